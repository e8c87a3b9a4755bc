"""The preflight on the lab, where the demonstration is known to help."""

import json
from dataclasses import asdict

from helpers import config_of, write_jsonl

from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base
from sdft_dist.preflight import preflight, show


def test_the_lab_is_found_fit_for_sdft(ray_cluster, tmp_path):
    rows = [row._asdict() for row in world.rows("t35", "a", 32, seed=0)]
    rows.append({"prompt": "rev " + "a0 " * 60, "demonstration": "thus a0 end", "answer": "a0"})
    config = config_of(
        model={"path": str(shipped_base()), "max_length": 64},
        data={"train": str(write_jsonl(tmp_path / "train.jsonl", rows)), "too_long": "drop"},
        prompt={"template": world.TEACHER_TEMPLATE},
        rollout={"max_completion_tokens": 16, "temperature": 0.9},
        learner={"tokens_per_microbatch": 256},
        eval={"scorer": "sdft_dist.lab.world:score"},
        cluster={"timeout_s": 120},
    )
    found = preflight(config, num_rows=32)
    assert found.rows == 33
    assert len(found.dropped) == 1
    assert found.logprob_difference_max < 1e-4
    assert found.accuracy is not None
    assert found.accuracy.student.mean < 0.1
    assert found.accuracy.teacher.mean > 0.9
    # The base answers in its own style, so that the demonstration's wording becomes less likely: the case
    # in which likelihood misleads and accuracy decides.
    assert found.likelihood.gain.high < 0
    assert found.verdict.startswith("SDFT is likely to help")
    assert json.loads(json.dumps(asdict(found)))["accuracy"]["gain"]["rows"] == 32

    from rich.console import Console

    console = Console(record=True, width=120)
    show(found, console)
    text = console.export_text()
    assert "1 rows dropped" in text
    assert "likely to help" in text
