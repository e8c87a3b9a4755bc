"""What is quoted of a dead actor's stderr."""

from sdft_dist.last_words import LINES, _about_an_error

CHATTER = "Loading weights: 100%\nFutureWarning: `x` is deprecated\n"


def test_chatter_is_not_quoted():
    assert _about_an_error(CHATTER) == []


def test_a_crash_is_quoted_from_where_python_tells_of_it():
    native = "*** SIGABRT received at time=1 ***\n" + "    @ 0x7f  frame()\n" * 30
    python = "Fatal Python error: Aborted\n\nStack (most recent call first):\n  File worker.py\n"
    words = ["Fatal Python error: Aborted", "Stack (most recent call first):", "  File worker.py"]
    assert _about_an_error(CHATTER + native + python) == words
    cut = _about_an_error(CHATTER + native)
    assert cut[0].startswith("*** SIGABRT")
    assert len(cut) == LINES


def test_an_error_of_a_library_is_quoted():
    said = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"
    assert _about_an_error(CHATTER + said) == said.splitlines()
