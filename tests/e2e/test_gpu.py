"""Whole runs on one GPU that all roles share."""

import math

import pytest
import torch
from processes import lab_config

from sdft_dist.runlog import read_metrics
from sdft_dist.train import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("learner", "cluster"),
    [
        ({"zero_stage": 1}, {"push_transport": "ipc"}),
        ({"zero_stage": 1, "compile": True}, {"push_transport": "ipc", "sleep": True}),
        ({"zero_stage": 2, "gradient_checkpointing": "selective"}, {"push_transport": "gloo"}),
        ({"zero_stage": 3}, {"push_transport": "ipc"}),
        ({"zero_stage": 1, "offload": "optimizer"}, {"push_transport": "ipc"}),
        ({"zero_stage": 3, "offload": "optimizer"}, {"push_transport": "ipc"}),
    ],
    ids=str,
)
def test_all_roles_share_a_gpu(ray_cluster, tmp_path, learner, cluster):
    config = lab_config(
        tmp_path,
        steps=6,
        model={"dtype": "bfloat16", "attention": "varlen"},
        learner=learner,
        cluster={"device": "cuda", "colocate": "all", "gpu_memory_utilization": 0.1, **cluster},
    )
    rundir = run(config)
    records = read_metrics(rundir.path, "train")
    assert len(records) == 6
    assert all(math.isfinite(m["loss"]) for m in records)
    # bf16 makes 0.03 in a step of this model; generators that are a push behind 1.3, with one matrix wrong 2.5.
    assert max(m["logprob_difference_mean"] for m in records) < 0.2, "generators hold what the learner holds"
    assert records[0]["loss"] < 4, "2.0 to 2.8 by the rows; 5.9 with one matrix of the teacher's wrong"

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(rundir.path / "model").dtype == torch.bfloat16
