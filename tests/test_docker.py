"""The image's recipe: hadolint, a base pinned by digest, a user without rights, and files that exist."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def test_hadolint():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_is_pinned_and_all_else_is_a_stage():
    (base,) = re.findall(r"^ARG PYTHON=(.*)$", TEXT, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    stages = {"${PYTHON}"}
    for source, name in re.findall(r"^FROM (\S+) AS (\S+)$", TEXT, re.MULTILINE):
        assert source in stages
        stages.add(name)
    assert TEXT.count("\nFROM ") == len(stages) - 1, "every FROM has a name"


def test_ray_up_finds_what_it_runs_inside_the_container():
    (stage,) = re.findall(r"^FROM base AS plain\n(.*?)^FROM ", TEXT, re.MULTILINE | re.DOTALL)
    assert {"openssh-client", "procps", "rsync", "tmux"} <= set(stage.split())


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_without_rights(target):
    (stage,) = re.findall(rf"^FROM plain AS {target}\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000"]
    assert f"COPY --from=build-{target} /opt/sdft /opt/sdft" in stage


def test_all_that_is_copied_is_there_and_not_ignored():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert any(fnmatch(source, pattern[1:]) for pattern in patterns), source
