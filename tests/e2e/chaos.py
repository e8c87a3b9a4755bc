"""Random kills of a run's processes: `make chaos`, or `make chaos KILLS=50`.

Trains the lab twice with the same seed, strictly on-policy: once undisturbed, once while generators,
teachers and learner ranks are killed at random moments. Whatever was lost must have been done again
exactly: losses and the last checkpoints of both runs are compared bit by bit, and what generators say after the last
step with what the exported model says. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from processes import PATIENCE_S, ended, lab_config, marked, start

from sdft_dist.runlog import read_metrics

STEPS = 12  # of a test's run
ROLES = {"generator": "ray::Generator", "teacher": "ray::Teacher", "learner rank": "ray::LearnerRank"}


def lab(folder, steps, ranks):
    """A small run with a checkpoint every five steps, and its rows asked about before the first and after the last,
    in `folder`/run."""
    folder.mkdir()
    asked = {"every": steps, "sets": {"rows": str(folder / "train.jsonl")}, "scorer": "sdft_dist.lab.world:score"}
    return lab_config(folder, steps=steps, checkpoint={"every": 5}, learner={"ranks": ranks}, eval=asked)


def steps_done(run):
    """Training records so far; 0 before the first."""
    return len(read_metrics(run, "train"))


def wait_until(condition, what):
    """Polls until `condition()`; fails after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S} s"
        time.sleep(0.05)


def wait_for(condition, process, what):
    """The same; also fails where the run ends first."""

    def met():
        if not condition() and process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode} before {what}:\n{process.stdout.read()}")
        return condition()

    wait_until(met, what)


def wait_for_step(run, step, process):
    """Waits until `step` is recorded; fails where the run ends first."""
    wait_for(lambda: steps_done(run) >= step, process, f"step {step}")


def pids_of(role, mark):
    """Processes of a role, of the run that carries `mark`."""
    return [pid for pid, command in marked(mark) if command.startswith(ROLES[role])]


def agreeing(records):
    """Whether the learner found each sampled token as likely as the generator did, in nats."""
    return max(m["logprob_difference_max"] for m in records) < 1e-4


def said_at_the_end(config):
    """What generators said to each row after the last step, greedily."""
    lines = (Path(config.run_dir) / "eval" / f"step-{config.steps:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


def said_by_the_export(config):
    """What transformers makes of the same rows with the exported model."""
    from transformers import AutoModelForCausalLM

    from sdft_dist.evaluate import load_eval_sets
    from sdft_dist.prompts import load_tokenizer

    tokenizer = load_tokenizer(config)
    (rows,) = load_eval_sets(config, tokenizer)
    ids = {"input_ids": [prompt.tolist() for prompt in rows.prompts]}
    padded = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    lm = AutoModelForCausalLM.from_pretrained(Path(config.run_dir) / "model")
    out = lm.generate(**padded, max_new_tokens=config.rollout.max_completion_tokens, do_sample=False)
    return tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)


def finished_alike(config, undisturbed):
    """Asserts that every step was done once, that losses and last checkpoint are those of the undisturbed run, and
    that generators held the learner's weights at each step and after the last."""
    records = read_metrics(Path(config.run_dir), "train")
    assert [m["step"] for m in records] == list(range(1, STEPS + 1)), "every step once"
    assert {m["samples"] for m in records} == {8}, "with all its samples"
    checkpoint, losses = undisturbed
    assert [m["loss"] for m in records] == losses
    assert differing(last_checkpoint(config), checkpoint) == []
    assert agreeing(records)
    assert said_at_the_end(config) == said_by_the_export(config)


def recovery(run, process, victim, how=signal.SIGKILL):
    """Send the process `victim` a signal; seconds until the run is further than it was then."""
    os.kill(victim, how)
    killed, before = time.time(), steps_done(run)

    def further():
        # What the driver had under way may still be recorded: a step at once is none that needed the dead.
        return (run / "metrics.jsonl").stat().st_mtime > killed + 2 and steps_done(run) > before

    wait_for(further, process, "recovery")
    return time.time() - killed


def under_fire(config, folder, kills, seed):
    """Run `config` and kill; returns (role, seconds until the next step) for each kill, and the exit code."""
    rng, run, found = random.Random(seed), Path(config.run_dir), []
    process, mark = start(config, folder)
    for _ in range(kills):
        goal = steps_done(run) + rng.randint(1, 4)
        wait_for_step(run, goal, process)
        # At any moment of a step; a second may be ten of them, after which too few are left for the other kills.
        time.sleep(rng.random() * statistics.median(m["time/step"] for m in read_metrics(run, "train")))
        role = rng.choice(list(ROLES))
        victims = pids_of(role, mark)
        if not victims:
            continue
        found.append((role, recovery(run, process, rng.choice(victims))))
        print(f"{len(found):3} {role}: next step after {found[-1][1]:.1f} s", file=sys.stderr, flush=True)
    ended(process, within_s=600)
    return found


def last_checkpoint(config):
    """All tensors of the last checkpoint, by file and key."""
    from safetensors.torch import load_file

    folder = sorted((Path(config.run_dir) / "checkpoints").glob("step-*"))[-1]
    return {(p.name, key): t for p in sorted(folder.glob("*.safetensors")) for key, t in load_file(p).items()}


def differing(one, other):
    """Keys at which two checkpoints are not bit-equal."""
    import torch

    return [
        key
        for key in one.keys() | other.keys()
        if key not in one or key not in other or not torch.equal(one[key], other[key])
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 5 * args.kills + 10
        quiet = lab(folder / "quiet", steps, args.ranks)
        process, _ = start(quiet, folder / "quiet")
        ended(process, within_s=900)
        config = lab(folder / "fire", steps, args.ranks)
        found = under_fire(config, folder / "fire", args.kills, args.seed)
        log = (Path(config.run_dir) / "run.log").read_text()
        records = read_metrics(Path(config.run_dir), "train")
        losses, expected = ([m["loss"] for m in read_metrics(Path(c.run_dir), "train")] for c in (config, quiet))
        different = differing(last_checkpoint(quiet), last_checkpoint(config))
        said, by_the_export = said_at_the_end(config), said_by_the_export(config)
    holds = {
        "every step recorded once": [m["step"] for m in records] == list(range(1, steps + 1)),
        "every loss equals that of the undisturbed run": losses == expected,
        "last checkpoint equals that of the undisturbed run bit by bit": not different,
        "generators held the learner's weights at every step": agreeing(records),
        "what generators say after the last step is what the exported model says": said == by_the_export,
    }
    print(f"{len(found)} kills in one run of {steps} steps, {args.ranks} learner rank(s):\n")
    print("| killed | times | next step after, median (longest) |\n|---|---|---|")
    for role in ROLES:
        times = [seconds for killed, seconds in found if killed == role]
        if times:
            print(f"| {role} | {len(times)} | {statistics.median(times):.1f} s ({max(times):.1f} s) |")
    again = [float(s) for s in re.findall(r"serve version \d+ again, after ([\d.]+) s", log)]
    if again:
        print(f"\nengines served verified weights again after {statistics.median(again):.1f} s ({max(again):.1f} s)")
    for what, true in holds.items():
        print(f"{what}: {true}")
    sys.exit(not all(holds.values()))


if __name__ == "__main__":
    main()
