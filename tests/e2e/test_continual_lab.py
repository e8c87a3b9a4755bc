"""Two words in sequence on the lab, with real engines and a real learner."""

import shutil

import pytest

from sdft_dist.continual.stages import MethodPlan, continual, load_plan, stages
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_sequence
from sdft_dist.rundir import RunDir
from sdft_dist.runlog import read_metrics
from sdft_dist.selection import best


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """SFT, so that few processes are needed; each stage is free to end early and keeps its best."""
    plan = load_plan(write_sequence(tmp_path_factory.mktemp("sequence"), shipped_base()))
    settings = {
        "method": "sft",
        "steps": 6,
        "optim.learning_rate": 1e-3,  # old skills are lost at once
        "eval.every": 1,
        "eval.metric": "rev",
        "eval.patience": 2,
        "eval.keep_best": True,
    }
    tasks = {word: plan.tasks[word] for word in ("t35", "t36")}
    prior = {"rev": plan.prior["rev"]}
    methods = {"sft": MethodPlan(rehearse=0.5, set=settings)}
    return plan.model_copy(update={"tasks": tasks, "prior": prior, "methods": methods, "seeds": [3]})


@pytest.fixture(scope="module")
def found(plan, ray_cluster):
    return continual(plan)


def test_a_stage_ends_early_and_exports_its_best_from_which_the_next_one_goes_on(plan, found):
    first, second = stages(plan)
    for stage in (first, second):
        records = read_metrics(stage.folder, "eval")
        chosen = best(stage.config.eval, records)["step"]
        assert records[-1]["step"] == chosen + 2 <= 6
        assert "stops early" in (stage.folder / "run.log").read_text()
        assert chosen in RunDir(stage.folder).commits.steps()
        assert f"after {chosen} optimizer steps" in (stage.folder / "model" / "README.md").read_text()
    ended = best(first.config.eval, read_metrics(first.folder, "eval"))
    started = read_metrics(second.folder, "eval")[0]
    assert {name: started[name] for name in ("t35", "t36", "rev")} == {
        name: ended[name] for name in ("t35", "t36", "rev")
    }
    assert found["methods"]["sft"]["right"][1]["rev"] == [round(150 * ended["rev"])]


def test_a_stage_without_its_model_is_finished_and_the_others_are_left_alone(plan, found):
    first, second = stages(plan)
    shutil.rmtree(second.folder / "model")
    written = (first.folder / "metrics.jsonl").stat().st_mtime_ns
    assert continual(plan) == found
    assert (second.folder / "model").is_dir()
    assert (first.folder / "metrics.jsonl").stat().st_mtime_ns == written
