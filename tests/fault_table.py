"""`pytest --fault-table`: only the tests that inject faults, and a Markdown table of them at the end.

A test says what it injects with `@pytest.mark.fault(fault, how, what_must_happen)`, once or more, and how long
recovery took with `record_property(fault, seconds)`.
"""

import statistics

import pytest

_found = {}  # fault -> how, what must happen, outcomes, seconds


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="run the fault tests and print a table of them")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(fault, how, what_must_happen): what the test injects")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fault-table"):
        others = [item for item in items if item.get_closest_marker("fault") is None]
        items[:] = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        for mark in item.iter_markers("fault"):
            fault, how, expected = mark.args
            outcomes, seconds = _found.setdefault((fault, how, expected), ([], []))
            outcomes.append(report.outcome)
            seconds += [value for name, value in report.user_properties if name == fault]
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--fault-table"):
        return
    write = terminalreporter.write_line
    write("\n| fault | injected | what must happen | tests | recovery |")
    write("|---|---|---|---|---|")
    for (fault, how, expected), (outcomes, seconds) in _found.items():
        passed = f"{outcomes.count('passed')} of {len(outcomes)} passed"
        took = f"{statistics.median(seconds):.1f} s" if seconds else ""
        write(f"| {fault} | {how} | {expected} | {passed} | {took} |")
