"""`sdft eval`: a model folder on held-out rows, on real generators and without a learner."""

import json

import numpy as np
import pytest
import ray
from helpers import config_of, write_jsonl

from sdft_dist.cluster import serving
from sdft_dist.errors import ConfigError, Fault, UserError
from sdft_dist.evaluate_model import evaluate_model
from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    sets = {
        name: str(write_jsonl(folder / f"{name}.jsonl", [{"prompt": r.prompt, "answer": r.answer} for r in rows]))
        for name, rows in (("old", world.rows("rev", "a", 12, seed=1)), ("new", world.rows("t35", "a", 12, seed=1)))
    }
    return {
        "run_dir": str(folder / "unused"),
        "model": {"path": str(shipped_base()), "dtype": "float32", "max_length": 64, "lora": {"rank": 4}},
        "rollout": {"max_completion_tokens": 16},
        "eval": {"every": 1, "sets": sets, "scorer": "sdft_dist.lab.world:score", "samples": 2},
        "cluster": {"device": "cpu"},
        "data": {"train": "none"},
    }


def test_the_labs_base_knows_its_skills_and_not_the_new_word(settings, tmp_path, ray_cluster):
    found, judged = evaluate_model(config_of(settings), tmp_path / "out")
    assert (found["old"], found["new"], found["old_rows"], found["old_pass@2"]) == (1.0, 0.0, 12, 1.0)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["set"], row["completion"]) for row in rows] == [
        (n, row.completion) for n in judged for row in judged[n]
    ]
    with pytest.raises(UserError, match=r"--out: .* is already in use"):
        evaluate_model(config_of(settings), tmp_path / "out")
    assert not (tmp_path / "unused").exists()


def test_there_must_be_something_to_evaluate_on(settings):
    nothing = {**settings, "eval": {"every": 0}}
    with pytest.raises(ConfigError, match=r"eval\.sets: has no held-out file"):
        evaluate_model(config_of(nothing))


@pytest.mark.fault("generator lost in sdft eval or sdft harness", "SIGKILL", "ends by name, exit 4")
def test_a_lost_generator_ends_it_by_name(settings, ray_cluster):
    config = config_of({**settings, "model": {**settings["model"], "lora": {}}})
    with pytest.raises(Fault, match="lost a generator"):
        complete_with_a_dead_one(config)


def complete_with_a_dead_one(config):
    with serving(config, [1], None) as engines:
        ray.kill(engines.actors[0])
        engines.complete([np.arange(4, dtype=np.int32)], 4)
