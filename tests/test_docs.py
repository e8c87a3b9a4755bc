"""Every `sdft` command that a document shows is one that the command line takes, and every link leads to a file."""

import re
import shlex
from pathlib import Path

import pytest

from sdft_dist.cli import _parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [p for p in sorted([*ROOT.glob("*.md"), *ROOT.glob("deploy/**/*.md")]) if p.name != "CHANGELOG.md"]
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link
