"""Every `sdft` command that a document shows is one that the command line takes, every script of the tests that one
shows can be started so, and every link leads to a file."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from sdft_dist.cli import _parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [p for p in sorted([*ROOT.glob("*.md"), *ROOT.glob("deploy/**/*.md")]) if p.name != "CHANGELOG.md"]
TESTS = Path("tests"), Path("tests/e2e")  # what scripts in them import from, as pytest does
# Names of commands in the running text, and lines that show a syntax.
NO_COMMANDS = re.compile(r"[…|{}<>\[\]]|--\w+-only \||^sdft( [a-z-]+){0,2}$")


def commands(text):
    """What stands after `sdft ` in code, up to a comment."""
    fenced = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = (line.partition("#")[0].strip() for line in lines)
    return [line for line in found if line.startswith("sdft ") and not NO_COMMANDS.search(line)]


def test_there_are_commands_to_look_at():
    assert sum(len(commands(path.read_text())) for path in DOCUMENTS) > 25


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(path):
    for line in commands(path.read_text()):
        _parse(shlex.split(line)[1:])


def imported(script):
    """The files of the tests that a script needs, itself among them."""
    found, left = set(), [script]
    while left:
        path = left.pop()
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            files = {folder / f"{name}.py" for name in names for folder in TESTS}
            left += [file for file in files - found if (ROOT / file).is_file()]
    return found


def test_scripts_of_the_tests_are_there_and_find_what_they_import():
    texts = [p.read_text() for p in [*DOCUMENTS, ROOT / "Makefile", *(ROOT / "tests" / "e2e").glob("*.py")]]
    shown = [m for text in texts for m in re.findall(r"(?:PYTHONPATH=(\S+) )?\S*python (tests/\S+\.py)", text)]
    assert len(shown) >= 6
    for given, script in shown:
        folders = {Path(script).parent, *map(Path, given.split(":"))}
        assert {path.parent for path in imported(Path(script))} <= folders, f"PYTHONPATH of {script}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link
