"""Engines that span two processes serve what is pushed, and leave nothing behind."""

import os

import psutil
import pytest
import ray
from harness import assert_states, config_for, demonstration_items, engine_pools, exported, greedy
from helpers import tiny_model
from processes import PATIENCE_S, lab_config
from ray.exceptions import RayActorError

from sdft_dist.runlog import read_metrics
from sdft_dist.train import run


@pytest.fixture(scope="module")
def spanning(ray_cluster, problems, tmp_path_factory):
    """A model folder, and a generator and a teacher of two processes each."""
    model = tiny_model(tmp_path_factory.mktemp("model"), tied=False)
    two = {"generator_tensor_parallel": 2, "teacher_tensor_parallel": 2}
    generators, teachers = engine_pools(config_for(model, cluster=two), problems)
    yield model, generators, teachers
    for actor in [*generators.actors, *teachers.actors]:
        ray.kill(actor)


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
def test_they_equal_hugging_face_after_pushes(spanning, ranks, problems, rank, tmp_path):
    model, generators, teachers = spanning
    config = config_for(model, method="sft", model={"lora": {"rank": rank}}, teacher={"kind": "ema", "ema_rate": 0.3})
    group = ranks.group(config, problems, pools=(generators, teachers))
    for step in range(3):
        for pool in (generators, teachers):
            group.push(pool, step, step, wait=True)
        if step < 2:
            group.update(step, 2, demonstration_items(problems))
    student, average = exported(tmp_path / "s", group, config), exported(tmp_path / "e", group, config, "ema")
    group.stop()
    prompts = [p.prompt_ids for p in problems]
    assert [s.tolist() for s in generators.complete(prompts, 12)] == [greedy(student, p, 12) for p in prompts]
    assert_states(average, teachers, problems)


@pytest.mark.slow
def test_a_whole_run_with_them(ray_cluster, tmp_path):
    """In the placement group of a run, where vLLM would start Ray workers of its own if it were let."""
    two = {"generator_tensor_parallel": 2, "teacher_tensor_parallel": 2}
    rundir = run(lab_config(tmp_path, steps=2, cluster=two | {"timeout_s": 120}))
    records = read_metrics(rundir.path, "train")
    assert [record["samples"] for record in records] == [8, 8]
    assert max(record["logprob_difference_max"] for record in records) < 1e-4, "generator and learner agree"


def process_of(actor):
    return psutil.Process(ray.get(actor.__ray_call__.remote(lambda actor: os.getpid())))


@pytest.mark.fault("half of an engine killed", "SIGKILL to a worker of vLLM's", "its actor ends, and is replaced")
def test_an_engine_that_loses_a_half_ends(spanning, ranks, problems):
    """It would raise errors of vLLM's for ever, and no actor would be known to be lost."""
    model, _, teachers = spanning
    group = ranks.group(config_for(model, method="sft"), problems, pools=[teachers])
    group.push(teachers, 0, 0, wait=True)
    group.stop()
    below = process_of(teachers.actors[0]).children(recursive=True)
    _, worker = (process for process in below if "Worker" in " ".join(process.cmdline()))
    worker.kill()
    sequences = [p.teacher_prompt_ids for p in problems]
    with pytest.raises(RayActorError):
        ray.get(teachers.actors[0].read.remote(sequences, [1] * len(sequences)), timeout=60)


def test_a_killed_engine_takes_its_processes_along(spanning):
    _, generators, _ = spanning
    engine = process_of(generators.actors[0])
    below = engine.children(recursive=True)
    assert len(below) >= 2, "a process for each half"
    engine.kill()
    assert psutil.wait_procs(below, timeout=PATIENCE_S)[1] == []
