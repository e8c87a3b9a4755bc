"""Commands that start actors of their own, each as small as it can be: what they leave behind, and what they tell."""

import json

import pytest

from sdft_dist.cli import main
from sdft_dist.lab import world
from sdft_dist.lab.teaching import RECIPE
from sdft_dist.runlog import read_metrics

BENCH = ["bench", str(RECIPE), "teacher.kind=base", "eval.every=0", "rollout.prompts_per_step=4"]
BENCH += ["--synthetic-model", "lab", "--lengths", "8/9/5", "--out"]


def test_bench(ray_cluster, tmp_path, capsys):
    out = tmp_path / "bench"
    words = [*BENCH, str(out), "rollout.max_staleness=1", "--pairs", "1", "--segment", "4"]
    assert main(words) == 0
    assert "device-seconds per sample, SDFT / SFT: " in capsys.readouterr().out
    report = json.loads((out / "bench.json").read_text())
    assert (report["batch"], report["completion_tokens"]) == ({"sdft": 4, "sft": 4}, 5)
    assert report["samples_per_s"].keys() == {"sdft", "sft"}
    assert report["sdft_over_sft"]["median"] > 0
    for method, taken in report["tokens_per_device_s"].items():
        samples = report["samples_per_s"][method]["median"]
        assert {what: found["median"] / samples for what, found in taken.items()} == pytest.approx(
            {"trained": 5, "processed": 8 + 5}
        )
    assert 3 <= report["decode_batch"]["measured"] <= report["decode_batch"]["planned"] == 8
    assert all(sum(spent.values()) >= 0.99 for spent in report["time_share"].values())
    assert report["push_in_a_step"]["generator_pause_s"] > 0
    for role in ("generator", "teacher", "learner", "sft"):
        account = report["roles"][role]
        assert all(account[name] > 0 for name in ("device_s", "predicted_s", "tokens_per_device_s", "mfu", "peak_gib"))
    assert len(read_metrics(out / "sdft", "train")) == len(read_metrics(out / "sft", "train")) == 12
    names = {event.get("name") for event in json.loads((out / "sdft" / "trace.json").read_text())}
    assert {"decode", "score", "train", "gather weights", "load weights"} <= names
    assert (out / "timeline.png").stat().st_size > 2000
    assert main(words) == 2
    assert f"--out: {out} is already in use" in capsys.readouterr().err


def test_a_role_alone(ray_cluster, tmp_path, capsys):
    out = tmp_path / "learner"
    assert main([*BENCH, str(out), "--learner-only", "--pairs", "1"]) == 0
    assert "learner alone, method=sdft, 1 on cpu: 1 batches of 4 with 8/" in capsys.readouterr().out
    report = json.loads((out / "bench.json").read_text())
    assert (report["role"], report["repeats"], report["lengths"]["completion"]) == ("learner", 1, 5)
    per_s = 4 * (8 + 5) / report["batch_s"]["median"]
    assert report["tokens_per_s"]["median"] == pytest.approx(per_s)
    assert report["account"]["tokens_per_device_s"] == pytest.approx(per_s)


def test_demo(ray_cluster, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "1", "rollout.prompts_per_step=4"]) == 0
    assert "2 runs in " in capsys.readouterr().out
    for method in ("sdft", "sft"):
        run = out / "seed-0" / method
        assert [m["samples"] for m in read_metrics(run, "train")] == [4]
        start, end = read_metrics(run, "eval")
        assert (start["step"], end["step"]) == (0, 1)
        assert all(start[skill] > 0.9 for skill in world.OLD_SKILLS)
        assert start["new"] < 0.1
        assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 500_000
        assert f"run_dir: {run}" in (out / "seed-0" / f"{method}.yaml").read_text()
    assert (out / "curves.png").stat().st_size > 2000
    assert "<table>" in (out / "report" / "index.html").read_text()
