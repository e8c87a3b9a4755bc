"""The cluster files for `ray up`: Ray's own validation, GPUs that a recipe fits, and commands that exist."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from sdft_dist.cli import _parse
from sdft_dist.recipe import load_config
from sdft_dist.topology import lacking, needs

ROOT = Path(__file__).parent.parent
FILES = ["aws", "gcp"]


def read(name):
    return yaml.safe_load((ROOT / "deploy" / "ray" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name):
    config = read(name)
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(Exception, match="stray"):
        validate_config(prepare_config(config | {"stray": 1}))


@pytest.mark.parametrize("name", FILES)
def test_its_nodes_hold_what_the_largest_recipe_asks_for(name):
    config = read(name)
    kinds = config["available_node_types"]
    nodes = [
        {"Alive": True, "Resources": kind["resources"]}
        for kind in kinds.values()
        for _ in range(kind.get("max_workers", 1))
    ]
    recipes = ROOT / "deploy" / "recipes"
    largest = load_config(recipes / "paper.yaml", [str(recipes / "sizes" / "16x80gb.yaml")])
    assert lacking(needs(largest, "cuda"), nodes) is None
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in kinds.values())


@pytest.mark.parametrize("name", FILES)
def test_no_port_is_open_and_every_option_exists(name):
    config = read(name)
    assert "/home/sdft/.ray/auth_token" in config["file_mounts"]
    known = {option for parameter in cli.commands["start"].params for option in parameter.opts}
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("--")]
        assert words[:2] in (["ray", "stop"], ["ray", "start"])
        if words[1] == "start":
            assert command.startswith("RAY_AUTH_MODE=token ")
            assert {word.partition("=")[0] for word in words[2:]} <= known


def test_the_readme_s_commands_parse():
    text = (ROOT / "deploy" / "ray" / "README.md").read_text()
    commands = re.findall(r"'(?:RAY_AUTH_MODE=token )?sdft ([^']*)'", text)
    assert len(commands) == 3
    for command in commands:
        _parse(shlex.split(command))


def test_the_stop_command_finds_the_run_and_not_the_shell_or_tmux_around_it(tmp_path):
    """Their command lines hold the run's; tmux, told to stop, hangs up on it before it has saved."""
    text = (ROOT / "deploy" / "ray" / "README.md").read_text()
    (which,) = re.findall(r"'pkill -TERM ([^']*)'", text)
    script = tmp_path / "sdft"  # with the first line that pip gives it
    script.write_text(f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    script.chmod(0o755)
    shell = subprocess.Popen(["bash", "-c", f"{script} train recipe.yaml; true"], stdout=subprocess.PIPE, text=True)
    run = int(shell.stdout.readline())
    try:
        found = subprocess.run(["pgrep", *shlex.split(which)], capture_output=True, text=True).stdout.split()
        assert {run, shell.pid} & set(map(int, found)) == {run}
    finally:
        os.kill(run, signal.SIGTERM)
        shell.wait()
