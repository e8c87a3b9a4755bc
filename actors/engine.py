"""Drives vLLM's engine; how one is made is in llm.py.

An Engine runs in its actor's own process and is driven step by step. It knows the version of its
weights, and serves nothing between a failed push and the next whole one.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from actors.llm import Runner, make_llm
from sdft_dist.config import Config
from sdft_dist.errors import NotServing, is_broken_device
from sdft_dist.memory import own_peak_gib
from sdft_dist.types import Span, VersionSpan, WeightManifest
from sdft_dist.wire import weight_sums


class Sampling(NamedTuple):
    """How completions are sampled. `temperature` 0 is greedy; `num_top` likeliest ids are reported, or
    all where there are fewer."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    num_top: int = 0


class Completion(NamedTuple):
    """What one request comes to, by the names that it has in a Sample."""

    completion_ids: np.ndarray  # int32 [C], with the end-of-turn token if it was reached
    logprobs: np.ndarray  # float32 [C]
    finish_reason: Literal["stop", "length"]
    policy_versions: tuple[VersionSpan, ...]
    top_ids: np.ndarray | None  # int32 [C, num_top], likeliest first; None where none were asked for


class _Request:
    """What is known of a request under way. Versions are counted here: vLLM 0.26 does not tell them."""

    def __init__(self, num_top: int, version: int) -> None:
        self.num_top = num_top
        self._starts = [(version, 0)]  # of each version's tokens

    def renew(self, version: int, num_tokens: int) -> None:
        """Tokens after the first `num_tokens` are sampled by `version`."""
        if self._starts[-1][1] == num_tokens:
            self._starts.pop()
        self._starts.append((version, num_tokens))

    def spans(self, num_tokens: int) -> tuple[VersionSpan, ...]:
        """Who sampled which of its tokens, `num_tokens` in all."""
        ends = [start for _, start in self._starts[1:]] + [num_tokens]
        return tuple(VersionSpan(version, start, end) for (version, start), end in zip(self._starts, ends, strict=True))


class Engine:
    """vLLM as a generator (`runner="generate"`) or as a reader of hidden states (`runner="pooling"`).

    A generator samples of the first `vocab_size` ids, where that is given: what a model's head has beyond its
    tokenizer is padding. Raises UserError for settings and models that vLLM refuses."""

    def __init__(self, config: Config, runner: Runner, device: str, stop_ids: Sequence[int], vocab_size: int | None):
        self._llm = make_llm(config, runner, device, vocab_size)
        self._core = self._llm.llm_engine.engine_core.engine_core
        self.device = device
        self._renewed = _renewed(config, runner)
        self._stop_ids = list(stop_ids)
        self._next_id = 0
        self._steps = self._stepped = 0  # steps since `decode_batch` was asked, and their requests added up
        self._under_way: dict[str, _Request] = {}
        self._done: dict[str, Completion] = {}  # what catching up has finished, for the next `advance`
        self.settings: Any = self._llm.llm_engine.model_config.hf_text_config
        self._num_ids = min(self.settings.vocab_size, vocab_size or self.settings.vocab_size)
        self.version: int | None = None
        self._head: Any = None  # of the last push, once it has been asked for: it may come from another process

    def loglikelihoods(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[tuple[float, bool]]:
        """For each sequence (int32 [T]): the log-probability of its tokens from `start` on, nats, in float32 at
        temperature 1, and whether every one of them is the likeliest. Needs runner="generate" and that nothing else
        is under way."""
        from vllm import SamplingParams

        salts = [str(self._serving_version())] * len(sequences)
        how = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        scores = []
        for answer, tokens, start in zip(self._answers(sequences, salts, how), sequences, starts, strict=True):
            places = answer.prompt_logprobs[start:]
            own = [place[int(token)] for place, token in zip(places, tokens[start:], strict=True)]
            scores.append((sum(token.logprob for token in own), all(token.rank == 1 for token in own)))
        return scores

    def add(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], how: Sampling) -> list[str]:
        """Take on one request per prompt (int32 [P]); returns their names. Needs runner="generate" and a
        current push."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        version, num_top = self._serving_version(), min(how.num_top, self._num_ids)
        names = [self._new_id() for _ in prompts]
        for name, prompt_ids, seed in zip(names, prompts, seeds, strict=True):
            params = SamplingParams(
                max_tokens=how.max_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                seed=seed,
                logprobs=num_top,
                flat_logprobs=True,  # a tenth of the Python time of one dictionary a token
                stop_token_ids=self._stop_ids,
                ignore_eos=True,  # besides those: what the model's folder names is among them where it counts
                detokenize=False,
                # An answer after every token would take a quarter of the time that vLLM's scheduler has for one.
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            # The salt keeps prefixes computed under other weights out of the cache's answers.
            prompt = {"prompt_token_ids": prompt_ids.tolist(), "cache_salt": str(version)}
            self._llm.llm_engine.add_request(name, prompt, params)
            self._under_way[name] = _Request(num_top, version)
        return names

    def abort(self) -> None:
        """Forget all requests."""
        self._llm.llm_engine.abort_request(list(self._under_way))
        self._under_way, self._done = {}, {}

    @property
    def unfinished(self) -> int:
        """Requests that are taken on and that `advance` has not given back."""
        return len(self._under_way) + len(self._done)

    def advance(self) -> dict[str, Completion]:
        """One decoding step of all requests; what has finished, by name. Needs a current push."""
        self._serving_version()
        if self._under_way:
            self._step()
        found, self._done = self._done, {}
        return found

    def decode_batch(self) -> float:
        """Mean number of requests in an engine step since the last call, those included whose prompt was read in it; 0
        where there was no step."""
        mean = self._stepped / max(1, self._steps)
        self._steps = self._stepped = 0
        return mean

    def _step(self) -> None:
        finished = self._engine_step()
        in_step = len(self._core.scheduler.running) + len(finished)
        self._steps += bool(in_step)
        self._stepped += in_step
        for output in finished:
            self._done[output.request_id] = _completion(output.outputs[0], self._under_way.pop(output.request_id))

    def _engine_step(self) -> Any:
        """One step of vLLM's. Ends this process where the engine is broken for good, so that its actor is replaced."""
        try:
            return self._llm.llm_engine.step()
        except Exception as e:
            executor = getattr(self._llm.llm_engine, "model_executor", None)
            if is_broken_device(e) or getattr(executor, "is_failed", False):  # of several processes one has ended
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            raise

    def _catch_up(self) -> None:
        """Finish the step that vLLM has already begun, as on CUDA it schedules one ahead, and begin no other: its
        tokens are of the present weights, and it must not run while the engine sleeps."""
        if self._core.batch_queue:
            self._core.pause_scheduler("keep", clear_cache=False)
            while self._core.batch_queue:
                self._step()
            self._core.resume_scheduler()

    def states(self, sequences: Sequence[np.ndarray], starts: Sequence[int], salts: Sequence[str]) -> list[np.ndarray]:
        """Of each sequence the final hidden states [len(sequence) − start, D] that predict its tokens from `start` on;
        bf16 comes as uint16. Where a prompt has several completions, what sequences of one salt have in common at
        their start is computed once. Needs runner="pooling" and a current push."""
        # The state of the last token predicts nothing that is scored.
        tokens = [sequence[:-1] for sequence in sequences]
        counts = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        found = self._read(tokens, salts, reuse=True)
        # No states come of what is in the cache: a completion that begins as another did is read again.
        short = [i for i, (states, count) in enumerate(zip(found, counts, strict=True)) if len(states) < count]
        for i, states in zip(
            short, self._read([tokens[i] for i in short], [""] * len(short), reuse=False), strict=True
        ):
            found[i] = states
        return [_last_rows(states, count) for states, count in zip(found, counts, strict=True)]

    def _read(self, prompts: Sequence[np.ndarray], salts: Sequence[str], *, reuse: bool) -> list[Any]:
        """Final hidden states [tokens that were computed, D], the last ones of each prompt."""
        from vllm import PoolingParams

        version = self._serving_version()
        how = PoolingParams(task="token_embed", skip_reading_prefix_cache=not reuse)
        answers = self._answers(prompts, [f"{version}/{salt}" for salt in salts], how)
        return [answer.outputs.data for answer in answers]

    def _answers(self, prompts: Sequence[np.ndarray], salts: Sequence[str], how: Any) -> list[Any]:
        """vLLM's answers to `prompts`, in their order; `how` are their SamplingParams or PoolingParams. Needs that
        nothing else is under way."""
        engine, found = self._llm.llm_engine, {}
        names = [self._new_id() for _ in prompts]
        for name, prompt_ids, salt in zip(names, prompts, salts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt_ids.tolist(), "cache_salt": salt}, how)
        while engine.has_unfinished_requests():
            found.update({answer.request_id: answer for answer in self._engine_step() if answer.finished})
        return [found[name] for name in names]

    def join_push(self, init_info: dict[str, Any]) -> None:
        """Join the push group as a receiver."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def receive(self, manifest: WeightManifest) -> tuple[Span, ...]:
        """Take in one whole push, between two decoding steps: requests under way go on with the new
        weights. If it fails, nothing is served until one succeeds: vLLM does not roll back.

        Returns how long it waited for messages and how long it loaded them; the two alternate, and come
        as one span each."""
        started = time.time()
        self._catch_up()
        self.version, self._head = None, None
        self._llm.start_weight_update()
        update = {"buckets": list(manifest.buckets), "adapter_scale": manifest.adapter_scale}
        self._llm.update_weights({"update_info": update})
        self._llm.finish_weight_update()
        self.version = manifest.version
        for state in self._llm.llm_engine.output_processor.request_states.values():
            if state.external_req_id in self._under_way:
                self._under_way[state.external_req_id].renew(manifest.version, state.detokenizer.num_output_tokens())
        loading = started + max(self._llm.collective_rpc(_wire_seconds))
        return Span("await weights", started, loading), Span("load weights", loading, time.time())

    def sleep(self) -> None:
        """Give up the GPU's memory. The cache is lost, and so are weights that the next push brings anew; others wait
        in host memory. Needs cluster.sleep, and that no request is under way."""
        self._catch_up()
        if self._renewed:
            self.version, self._head = None, None
        self._llm.sleep(level=2 if self._renewed else 1)

    def wake_up(self) -> None:
        """Take the GPU's memory back."""
        self._llm.wake_up()

    def pushed_head(self) -> Any:
        """The output head [V, D] of the last push, where `join_push` was told to keep it."""
        if self._head is None:
            self._head = self._llm.collective_rpc(_kept_head)[0]
        return self._head

    def weight_sums(self) -> tuple[int, int]:
        """Of all that is served, as sdft_dist/wire.py adds it up. Of an engine in one process."""
        (sums,) = self._llm.collective_rpc(_weight_sums)
        return sums

    def peak_gib(self) -> float:
        """Peak memory of the process that has needed most: this one, or one of those that a tensor-parallel engine
        spans, which hold its GPUs' memory."""
        return max(own_peak_gib(self.device), *self._llm.collective_rpc(_peak_gib, args=(self.device,)))

    def _serving_version(self) -> int:
        if self.version is None:
            raise NotServing("this engine has no whole set of weights: a push must succeed before it serves")
        return self.version

    def _new_id(self) -> str:
        self._next_id += 1
        return str(self._next_id)


def _renewed(config: Config, runner: Runner) -> bool:
    """Whether an engine gets all its weights anew after every optimizer step, before it serves again."""
    moves = config.teacher.moves and config.teacher.sync_every == 1
    return not config.model.lora.rank and (runner == "generate" or moves)


def _wire_seconds(worker: Any) -> float:
    return worker.weight_transfer_engine.wire_s


def _peak_gib(worker: Any, device: str) -> float:
    return own_peak_gib(device)


def _weight_sums(worker: Any) -> tuple[int, int]:
    return weight_sums(worker.get_model().parameters())


def _kept_head(worker: Any) -> Any:
    return worker.weight_transfer_engine.kept


def _completion(output: Any, request: _Request) -> Completion:
    """A position's log-probs in vLLM's flat layout: the sampled token's, then the likeliest ones."""
    flat, token_ids = output.logprobs, np.asarray(output.token_ids, dtype=np.int32)
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(len(token_ids), 1 + request.num_top)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(ids.shape)[:, 0]
    assert (ids[:, 0] == token_ids).all()
    top_ids = ids[:, 1:] if request.num_top else None
    return Completion(token_ids, logprobs, output.finish_reason, request.spans(len(token_ids)), top_ids)


def _last_rows(states: Any, count: int) -> np.ndarray:
    import torch

    kept = states[len(states) - count :].contiguous().cpu()
    return (kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy()
