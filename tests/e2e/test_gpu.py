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
    losses = [m["loss"] for m in read_metrics(rundir.path, "train")]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(rundir.path / "model").dtype == torch.bfloat16
