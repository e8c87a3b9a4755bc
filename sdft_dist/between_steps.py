"""What a run does between two optimizer steps: it evaluates, saves, and stops where it should."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

from ray.exceptions import RayError

from sdft_dist.config import Config
from sdft_dist.errors import ActorLost, Diverged, NotServing, Preempted, brief
from sdft_dist.evaluate import accuracy, evaluate, summary
from sdft_dist.fleet import Fleet
from sdft_dist.judge import Case, Judge
from sdft_dist.prepare import Prepared
from sdft_dist.rundir import RunDir
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.samples import NUMBER, is_due, write_samples
from sdft_dist.selection import best, exhausted
from sdft_dist.types import TrainItem

LOOK_S = 1.0  # of judging between two looks whether the run was asked to stop


class BetweenSteps:
    """Of one attempt that begins at step `start`; `asked` says whether the run was asked to stop."""

    def __init__(self, prepared: Prepared, rundir: RunDir, log: RunLog, asked: Callable[[], bool], start: int) -> None:
        self._prepared, self._rundir, self._log, self._asked = prepared, rundir, log, asked
        self._config = prepared.config
        self._saved: set[int] = set()
        self._evals: list[Mapping[str, Any]] = []  # all records of evaluations: the file grows with every step
        self.step = self._start = start  # optimizer steps done

    def begin(self) -> None:
        """Read what earlier attempts have saved and evaluated. To be called when the run directory holds nothing that
        came after the start."""
        self._saved = set(self._rundir.commits.steps())
        self._evals = [*read_metrics(self._rundir.path, "eval")]
        self._rundir.commits.kept = best_step(self._config, self._evals, self._saved)

    def must_stop(self) -> bool:
        """Whether to stop now. Never between two pushes to the teachers: a run that is resumed there would begin with
        another teacher."""
        return self._asked() and self.step % self._config.teacher.sync_every == 0

    def announce(self, text: str) -> None:
        """Write `text` into run.log, and its first line beside the progress bar."""
        self._rundir.say(text)
        self._log.say(text.splitlines()[0])

    def after_step(self, fleet: Fleet, step: int) -> bool:
        """As `loop.train` asks for it; what was done at this step already is not done again. Raises Preempted where the
        run was asked to stop."""
        self.step = step
        config, commits = self._config, self._rundir.commits
        every, last = config.checkpoint.every, step == self._prepared.num_steps
        if every and step > self._start and step % every == 0:
            self._save(fleet)  # it is written while the evaluation, which may take long or fail, goes on
        every = config.eval.every
        if every and (step % every == 0 or last):
            if step not in {record["step"] for record in self._evals}:
                self._evaluate(fleet)
            commits.kept = best_step(config, self._evals, self._saved | {step})
            if not last and exhausted(config.eval, self._evals):
                metric, patience = config.eval.metric, config.eval.patience
                self.announce(f"stops early: eval.{metric} was no better for {patience} evaluations")
                last = True
        if last or step == commits.kept:
            self._save(fleet)
        self.finish_saving(fleet, wait=last)
        if self.must_stop() and not last:
            raise Preempted
        return last

    def _save(self, fleet: Fleet) -> None:
        """Begin to save this step's state, unless that was done."""
        if self.step not in self._saved:
            started = time.perf_counter()
            self._rundir.commits.start(fleet.learner, self.step)
            self._log.write("checkpoint", self.step, {"wait_s": time.perf_counter() - started})
            self._saved.add(self.step)

    def note_samples(self, step: int, items: Sequence[TrainItem], bad: bool) -> None:
        """Write some of a step's samples down where it is due, and all of them where they made numbers that are not
        finite."""
        if bad or is_due(self._config, step):
            write_samples(self._rundir.samples(step), self._prepared.inputs, items if bad else items[:NUMBER])

    def finish_saving(self, fleet: Fleet, *, wait: bool) -> None:
        """Commit the checkpoint that is being written where it is complete; with `wait`, as soon as it is."""
        folder = self._rundir.commits.finish(fleet.learner, wait=wait)
        if folder is not None:
            self._rundir.say(f"committed {folder.name}")

    def rescue(self, fleet: Fleet, error: Exception) -> None:
        """Save the state where what ended the run has not harmed the learner: a scorer, a judge, samples that were all
        cut; only after a step that pushes to the teachers, as in `must_stop`."""
        lost = isinstance(error, RayError | NotServing | ActorLost | Diverged | OSError)  # TimeoutError is an OSError
        if lost or self.step % self._config.teacher.sync_every:
            return
        try:
            self.save_now(fleet, type(error).__name__)
        except Exception as second:
            self._rundir.say(f"could not save step {self.step}: {brief(second)}")

    def save_now(self, fleet: Fleet, why: str) -> None:
        """Commit the state as it is."""
        commits = self._rundir.commits
        commits.finish(fleet.learner, wait=True)
        if self.step not in commits.steps():
            commits.start(fleet.learner, self.step)
            commits.finish(fleet.learner, wait=True)
        self._rundir.say(f"{why}: committed step {self.step}")

    def _evaluate(self, fleet: Fleet) -> None:
        """Judge every held-out row, and write down all that came of it."""
        prepared, step = self._prepared, self.step
        scorer, samples = prepared.scorer, self._config.eval.samples
        _, limit = self._config.evaluation_limit

        def verdicts(cases: Sequence[Case]) -> Generator[bool | None]:
            if isinstance(scorer, Judge):
                return scorer.each(cases)
            return (scorer([case])[0] for case in cases)

        def score(cases: Sequence[Case]) -> list[bool]:
            right, look = list[bool](), 0.0
            with closing(verdicts(cases)) as found:
                while len(right) < len(cases):
                    if time.monotonic() > look:
                        if self.must_stop():
                            raise Preempted
                        self.finish_saving(fleet, wait=False)
                        self._log.say(f"{len(right)} of {len(cases)} judged", now=False)
                        look = time.monotonic() + LOOK_S
                    verdict = next(found)
                    if verdict is not None:
                        right.append(verdict)
            return right

        self._log.say("evaluating")
        judged = evaluate(prepared.eval_sets, fleet, prepared.inputs.tokenizer, score, limit, samples)
        self._rundir.note_evaluation(step, judged)
        cost = scorer.cost() if isinstance(scorer, Judge) else {}
        place = {"num_steps": prepared.num_steps}  # who reads the record later knows then whether it was the last
        found = {**place, **summary(judged), **cost}
        self._log.evaluation(step, found)
        self._evals.append({"step": step, **found})
        prepared.on_evaluation({**place, **{name: accuracy(rows) for name, rows in judged.items()}, "step": step})


def best_step(config: Config, evals: Sequence[Mapping[str, Any]], saved: Collection[int]) -> int | None:
    """With `eval.keep_best` the step of the best evaluation so far, of those whose weights are `saved`: a resumed run
    may ask for it later than the first. Else None."""
    records = [record for record in evals if record["step"] in saved]
    found = best(config.eval, records) if config.eval.keep_best else None
    return None if found is None else int(found["step"])
