"""The whole configuration: YAML plus dotted overrides, checked once, frozen afterwards.

Every field says what it does and in which unit. Cross-field rules are in `Config.check`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PAPER_TEMPLATE = (
    "{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process."
)


class Section(BaseModel):
    """A part of a YAML file: frozen, without fields of other names, its numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is expected: Python takes them for 1 and 0."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind), *map(type, get_args(kind))}:
            raise ValueError("expected a number, not true or false")
        return value


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="Rank of the low-rank adapters that are trained; 0 trains all weights.")
    alpha: int = Field(32, ge=1, description="The adapters' product is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="Modules that get adapters, by the ends of their names; all-linear is all but the output head.",
    )

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank if self.rank else 0.0


class ModelConfig(Section):
    path: str = Field(description="Hugging Face folder or hub id of the model to train, with its tokenizer.")
    revision: str | None = Field(None, description="Hub revision to pin; saved with the run.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of weights and activations. Optimizer and EMA are always float32."
    )
    max_length: int = Field(
        4096,
        ge=8,
        description="Context in tokens: teacher prompt + completion must fit. What happens to longer rows: "
        "data.too_long.",
    )
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "varlen"] = Field(
        "sdpa",
        description="The learner's attention implementation, as named by transformers; varlen is the FlashAttention "
        "that comes with torch. It and flash_attention_2 need a GPU and bfloat16, and pack without free slots.",
    )
    lora: LoraConfig = LoraConfig()


class DataConfig(Section):
    train: str = Field(
        description="Demonstrations: .jsonl, .json or .parquet file, a folder saved by `datasets`, or a hub id."
    )
    split: str = Field("train", description="Split, for a hub id or a saved DatasetDict.")
    subset: str | None = Field(
        None, description="Configuration of a hub data set that has several, such as gsm8k's main."
    )
    limit: int | None = Field(None, ge=1, description="Use only the first rows; default all.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longest student prompt; default: the context.")
    max_demonstration_tokens: int | None = Field(None, ge=1, description="Longest demonstration; default: the context.")
    too_long: Literal["error", "drop", "truncate_demonstration"] = Field(
        "error",
        description="What to do with a row over a limit or the context. truncate_demonstration shortens the "
        "demonstration as the teacher sees it, at its end; a row that still does not fit, or would lose all of its "
        "demonstration, is an error. All are counted.",
    )


class PromptConfig(Section):
    template: str = Field(PAPER_TEMPLATE, description="The teacher's user turn, with {prompt} and {demonstration}.")
    chat_template: str | None = Field(
        None, description="File with a Jinja chat template, for a tokenizer that has none."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables for the chat template, such as {enable_thinking: false} for Qwen3's."
    )


class RolloutConfig(Section):
    prompts_per_step: int = Field(32, ge=1, description="Prompts in one optimizer step.")
    completions_per_prompt: int = Field(1, ge=1, description="Student completions sampled for each prompt.")
    temperature: float = Field(
        1.0,
        ge=0.01,
        le=2,
        description="Sampling temperature; both models' logits use it too. vLLM samples at no lower one.",
    )
    max_completion_tokens: int = Field(1024, ge=1, description="A completion is cut at this many tokens.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling. Not with loss.importance, whose weights it would bias."
    )
    top_k: int = Field(
        0, ge=0, description="Sample among this many likeliest tokens; 0 is all. Not with loss.importance."
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Optimizer steps that a sample may lag behind: rollouts of this many later steps are in flight. "
        "0 is strictly on-policy and repeats bit by bit with one generator.",
    )
    max_held_mib: int = Field(
        512, ge=1, description="Teacher targets of later steps that may wait for the learner, MiB of the object store."
    )
    from_teacher: bool = Field(
        False, description="Sample completions from the teacher's prompt instead: off-policy distillation."
    )
    speculative: Literal["none", "ngram", "suffix"] = Field(
        "none",
        description="Draft tokens that the student then accepts or rejects, so that the distribution stays its own. "
        "ngram: what followed the last tokens earlier in the sequence. suffix: also in earlier completions; needs the "
        "package arctic-inference. Pays where a decoding step costs the same for more tokens: small batches on GPUs.",
    )
    draft_tokens: int = Field(3, ge=1, description="Most tokens drafted at once, with rollout.speculative.")
    cut_completions: Literal["keep", "drop", "error"] = Field(
        "keep", description="What to do with a completion cut at max_completion_tokens; dropped ones are counted."
    )


class TeacherConfig(Section):
    kind: Literal["base", "ema", "live"] = Field(
        "ema",
        description="base: the weights at the start. ema: average of the student. live: the student itself; with "
        "forward_kl it can lose everything. sft and dft keep an average too, for export, unless kind=base, which saves "
        "4 bytes a parameter.",
    )
    ema_rate: float = Field(0.01, gt=0, le=1, description="Share of the student that enters the EMA at each step.")
    sync_every: int = Field(1, ge=1, description="Optimizer steps between pushes to the teachers.")
    reanchor: bool = Field(
        True, description="The teacher starts from model.path. False: from `anchor`, such as the base of earlier tasks."
    )
    anchor: str | None = Field(
        None,
        description="Model folder where the teacher starts when reanchor is false; not for kind=live. With "
        "--resume PATH the other run's average goes on, unless this names another anchor than that run had.",
    )

    @property
    def moves(self) -> bool:
        """False for a frozen base, which is pushed once, at the start."""
        return self.kind != "base"


class LossConfig(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl is KL(teacher ‖ student); reverse_kl is KL(student ‖ teacher); see beta."
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="jsd: beta KL(teacher ‖ m) + (1-beta) KL(student ‖ m), m mixes beta of the teacher.",
    )
    support: Literal["full", "topk", "sampled"] = Field(
        "full", description="Where the divergence is taken: the whole vocabulary, top_k ids, or the sampled token."
    )
    top_k: int = Field(100, ge=1, description="Ids at each position for support=topk; all where there are fewer.")
    topk_from: Literal["teacher", "student"] = Field("teacher", description="Whose likeliest ids support=topk takes.")
    tail: bool = Field(
        True,
        description="One more category with the mass outside the chosen ids. False: topk is renormalised (no KL any "
        "more); sampled is the score-function estimator of reverse_kl, which needs the student's own samples: with "
        "rollout.max_staleness give importance=token.",
    )
    importance: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Importance weights p_learner / p_generator, each at most importance_clip. token: each token by "
        "its own. sequence: every token by the mean over the tokens of its completion that carry loss.",
    )
    importance_clip: float = Field(2.0, gt=0, description="Importance weights are truncated at this value.")
    token_clip: float | None = Field(
        None,
        gt=0,
        description="Positions with a larger loss count this much and give no gradient, with method=sdft; default off.",
    )
    skip_first_tokens: int = Field(
        0,
        ge=0,
        description="Completion tokens at the start without loss, with method=sdft. Demonstrations are imitated whole.",
    )
    normalisation: Literal["sequences", "tokens"] = Field(
        "sequences",
        description="sequences: mean over a sequence's tokens that carry loss, then over the step's sequences that "
        "have any. tokens: mean over all such tokens of the step.",
    )
    kernel: Literal["auto", "chunked", "liger"] = Field(
        "auto",
        description="Computes the full-vocabulary loss. chunked: this project's, reduced in float32. liger: Liger's, "
        "for support=full with normalisation=tokens; less exact in bfloat16 and without divergence by position. "
        "auto is chunked.",
    )


MomentRate = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after the warm-up; linear and cosine end at 0."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, of all that is trained.")
    betas: tuple[MomentRate, MomentRate] = Field(
        (0.9, 0.999), description="AdamW's moment rates, each at least 0 and below 1."
    )
    max_skipped: int = Field(
        3, ge=0, description="Steps in a row that may be skipped because loss or gradient is NaN or infinite."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1, description="Learner processes; one GPU each where there are GPUs.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="DeepSpeed ZeRO stage. Gradients of bfloat16 weights add up over micro-batches in "
        "fp32 at 2 and 3 without offload, else in bfloat16.",
    )
    tokens_per_microbatch: int = Field(
        8192, ge=8, description="Largest number of tokens (prompt + completion) in one packed micro-batch of a rank."
    )
    offload: Literal["none", "optimizer"] = Field(
        "none",
        description="optimizer: fp32 master weights and moments live in host memory, and the update is computed there; "
        "with zero_stage 1, 2 or 3.",
    )
    gradient_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What backward computes again instead of keeping it. full: whole layers. selective: all of a layer "
        "but its matrix products and attention, most of the memory for little time.",
    )
    compile: bool = Field(
        False,
        description="Compile each decoder layer, and the loss at full support or of demonstrations, with "
        "torch.compile: minutes at the start, faster steps. Not at zero_stage 3, whose hooks gather weights "
        "inside the layers.",
    )

    @property
    def fp32_gradients(self) -> bool:
        """Whether micro-batches' gradients of bf16 weights add up in fp32; bf16 loses what is 256 times smaller than
        the sum. At stage 1 DeepSpeed would keep whole fp32 gradients on every rank for it, and with offload on the
        GPU."""
        return self.zero_stage >= 2 and self.offload == "none"


class ClusterConfig(Section):
    address: str | None = Field(
        None,
        description="A running Ray cluster to join: HOST:PORT of its head, or auto on one of its nodes. "
        "Default: a Ray of its own on this machine.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes CUDA where torch sees it on the driver's node."
    )
    autoscaling: bool = Field(
        False,
        description="Nodes join on demand: wait up to start_timeout_s for a cluster that has too few GPUs.",
    )
    pin_roles: bool = Field(
        False,
        description="Place each role only on nodes that offer Ray's custom resource sdft_learner, sdft_generator or "
        "sdft_teacher: groups of different machines.",
    )
    generators: int = Field(1, ge=1, description="Generator actors.")
    teachers: int = Field(1, ge=1, description="Teacher actors; none are started for method=sft.")
    generator_tensor_parallel: int = Field(1, ge=1, description="GPUs of one node that each generator spans.")
    teacher_tensor_parallel: int = Field(1, ge=1, description="GPUs of one node that each teacher spans.")
    colocate: Literal["none", "teachers", "all"] = Field(
        "none",
        description="Which roles share GPUs: none. teachers: each generator shares one with a teacher. all: one actor "
        "of each role.",
    )
    sleep: bool = Field(
        False,
        description="With colocate=all and max_staleness 0: engines give up their memory while the learner works. What "
        "the next push does not bring, such as a frozen teacher's weights, waits in host memory.",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of its GPU that each vLLM engine may take. Default: 0.85; 0.4 where two engines share one; "
        "0.2 where the learner does too.",
    )
    teacher_memory: float | None = Field(
        None,
        gt=0,
        le=1,
        description="gpu_memory_utilization of teachers alone: they need keys and values of one call, generators use "
        "all that they get. Default: as generators.",
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache of each engine on CPU, GiB.")
    max_sequences: int = Field(256, ge=1, description="Largest decode batch of a generator.")
    push_transport: Literal["auto", "gloo", "nccl", "ipc"] = Field(
        "auto",
        description="How weights travel to the engines. gloo: through host memory, everywhere. nccl: between GPUs. "
        "ipc: within one GPU, or one machine without GPUs. auto: nccl where the learner has GPUs of its own, ipc where "
        "it is one rank that shares its GPU with the engines, otherwise gloo.",
    )
    push_bucket_mib: int = Field(256, ge=1, description="Size of one message of a weight push, MiB.")
    max_restarts: int = Field(
        3, ge=0, description="Restarts in a row that may bring no new checkpoint before the run gives up."
    )
    timeout_s: float = Field(600, gt=0, description="Longest wait for any one piece of work, seconds.")
    start_timeout_s: float = Field(
        1800,
        gt=0,
        description="Longest wait for room on the cluster, and then for engines and ranks to start (load weights, "
        "compile), seconds.",
    )

    def engine_memory(self, role: str) -> float:
        """Share of its GPU that each engine of "generator" or "teacher" takes."""
        own = self.teacher_memory if role == "teacher" else None
        return own or self.gpu_memory_utilization or {"none": 0.85, "teachers": 0.4, "all": 0.2}[self.colocate]


MEAN = "mean"  # of all held-out sets, as a metric
JUDGE_TEMPLATE = """Question:
{prompt}

Reference answer:
{answer}

Answer to judge:
{completion}

Does the answer to judge agree with the reference answer in substance? Think briefly, then end with one word: CORRECT \
or INCORRECT."""


class JudgeConfig(Section):
    url: str | None = Field(None, description="Base of an OpenAI-compatible endpoint, such as https://host/v1.")
    model: str | None = Field(None, description="The judge's name at that endpoint.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Sampling temperature of the judge; default: not sent, as reasoning models refuse any but their "
        "own. 0 makes verdicts of other models repeat as far as the endpoint can; those in `cache` repeat anyway.",
    )
    key_variable: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key.")
    template: str = Field(
        JUDGE_TEMPLATE,
        description="Question with {prompt}, {answer} and {completion}; the last CORRECT or INCORRECT counts.",
    )
    parallel: int = Field(8, ge=1, description="Calls at a time.")
    retries: int = Field(
        5,
        ge=0,
        description="Further attempts of a call that failed, or brought no verdict. Then no text at all ends the run; "
        "text without a verdict counts as wrong, as does what the endpoint's filter or context does not take.",
    )
    timeout_s: float = Field(60, gt=0, description="Longest wait for one reply, seconds.")
    cache: str | None = Field(
        None, description="File that keeps the verdicts, for evaluations that are repeated; made with its folders."
    )


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="Optimizer steps between evaluations; 0 is never.")
    sets: dict[str, str] = Field(
        default_factory=dict,
        description="Held-out files by name, with the columns `prompt` or `messages`, and `answer` or `golden_answer`.",
    )
    scorer: str = Field(
        "sdft_dist.evaluate:exact_match",
        description="module:function that takes (completion, answer), or (completion, answer, prompt), as text and "
        "returns whether it is right; or judge. A third parameter that has a default is the prompt only if it is named "
        "prompt. Where the module has function_answer too, it is asked about every answer at load; its ValueError "
        "refuses the row.",
    )
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="A completion of a held-out row is cut, and judged, at this many tokens; default: "
        "rollout.max_completion_tokens. With its prompt it must fit model.max_length.",
    )
    metric: str | None = Field(
        None,
        description="What `keep_best` and `patience` go by, the higher the better: a held-out set, or mean of all.",
    )
    keep_best: bool = Field(
        False, description="Save at every evaluation that is the best so far, keep that, and export it at the end."
    )
    patience: int = Field(
        0, ge=0, description="Stop after this many evaluations in a row that are not better than the best; 0 is never."
    )
    samples: int = Field(
        0, ge=0, description="Completions of each row to sample as rollouts are, besides the greedy one, for pass@k."
    )


class CheckpointConfig(Section):
    every: int = Field(
        0,
        ge=0,
        description="Optimizer steps between checkpoints, a multiple of teacher.sync_every; 0 is only at the end.",
    )
    keep_last: int = Field(
        2,
        ge=1,
        description="Newest checkpoints to keep, of 16 bytes a trained parameter each; one more while it is written.",
    )
    keep_every: int = Field(0, ge=0, description="Also keep those of steps that are multiples of this; 0 is none.")
    grace_s: float = Field(
        60.0, gt=0, description="Seconds to save in after SIGTERM, or when a node of the run is drained."
    )


class Config(Section):
    method: Literal["sdft", "sft", "dft"] = Field(
        "sdft",
        description="sdft: self-distillation. sft: cross-entropy on the demonstrations. dft: the same, each token "
        "weighted by the student's own detached probability of it.",
    )
    run_dir: str = Field("runs/sdft", description="Folder for everything that the run writes.")
    trace: bool = Field(
        False,
        description="Write attempts/NNN/trace.json, a timeline of all roles for Perfetto or chrome://tracing; "
        "its first 256 MiB, which are hours.",
    )
    wandb: str | None = Field(
        None,
        pattern=r"^([^/\s]+/)?[^/\s]+$",
        description="Weights & Biases, PROJECT or ENTITY/PROJECT, that gets the metrics too; needs the package and "
        "`wandb login` or WANDB_MODE=offline.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Decides data order and every sampled token; below 2**32.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; default: `epochs` over the data.")
    epochs: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Passes over the data, where `steps` is not given. The last step is filled up from a further pass.",
    )
    model: ModelConfig
    data: DataConfig
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def check(self) -> Config:
        """Rules that hold between fields."""
        for name in ("{prompt}", "{demonstration}"):
            if name not in self.prompt.template:
                raise ValueError(f"prompt.template: does not contain {name}")
        for name, tokens in (
            ("rollout.max_completion_tokens", self.rollout.max_completion_tokens),
            self.evaluation_limit,
        ):
            if tokens >= self.model.max_length:
                raise ValueError(
                    f"{name}: {tokens} leaves no room for a prompt in model.max_length={self.model.max_length}"
                )
        self._check_learner()
        self._check_loss()
        if self.teacher.reanchor == (self.teacher.anchor is not None):
            raise ValueError("teacher.anchor: is where the teacher starts when teacher.reanchor is false: give both")
        if self.teacher.anchor and self.teacher.kind == "live":
            raise ValueError(
                "teacher.anchor: with teacher.kind=live the teacher is the student itself: leave it out, or use ema or "
                "base"
            )
        if self.model.lora.rank and self.teacher.anchor:
            raise ValueError(
                "teacher.anchor: with model.lora.rank the teacher is model.path with adapters: leave it out"
            )
        self._check_topology()
        if self.checkpoint.every % self.teacher.sync_every:
            raise ValueError(
                f"checkpoint.every: {self.checkpoint.every} is no multiple of teacher.sync_every="
                f"{self.teacher.sync_every}: a resumed run would have another teacher"
            )
        if self.eval.every and not self.eval.sets:
            raise ValueError("eval.every: there is nothing to evaluate: give eval.sets.NAME=FILE")
        self._check_selection()
        return self

    def _check_learner(self) -> None:
        if self.learner.tokens_per_microbatch < self.model.max_length:
            raise ValueError(
                f"learner.tokens_per_microbatch: {self.learner.tokens_per_microbatch} is below "
                f"model.max_length={self.model.max_length}, so one long row may not fit"
            )
        if self.model.attention in ("varlen", "flash_attention_2") and self.model.dtype != "bfloat16":
            raise ValueError(f"model.attention: {self.model.attention} needs model.dtype=bfloat16; or use sdpa")
        if self.model.dtype == "bfloat16" and self.learner.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage: 0 keeps no fp32 master of bfloat16 weights for the average: use 1, 2 or 3"
            )
        if self.learner.offload != "none" and self.learner.zero_stage == 0:
            raise ValueError("learner.offload: needs learner.zero_stage 1, 2 or 3")
        if self.learner.compile and self.learner.zero_stage == 3:
            raise ValueError("learner.compile: ZeRO-3's hooks cannot be compiled: use learner.zero_stage 0, 1 or 2")

    def _check_topology(self) -> None:
        cluster = self.cluster
        if cluster.sleep and (cluster.colocate != "all" or self.rollout.max_staleness):
            raise ValueError("cluster.sleep: needs cluster.colocate=all and rollout.max_staleness=0")
        if cluster.colocate == "none":
            return
        numbers = {"cluster.generators": cluster.generators, "cluster.teachers": cluster.teachers}
        if cluster.colocate == "all":
            numbers["learner.ranks"] = self.learner.ranks
        if len(set(numbers.values())) > 1:
            got = ", ".join(f"{name}={number}" for name, number in numbers.items())
            raise ValueError(
                f"cluster.colocate: {cluster.colocate} puts one of each on a GPU, they must be equal: {got}"
            )
        if max(cluster.generator_tensor_parallel, cluster.teacher_tensor_parallel) > 1:
            raise ValueError("cluster.colocate: shares single GPUs: set both …_tensor_parallel to 1, or it to none")
        if cluster.pin_roles:
            raise ValueError("cluster.pin_roles: keeps roles apart: set it to false, or cluster.colocate to none")

    def _check_selection(self) -> None:
        chosen, valid = self.eval, [*self.eval.sets, MEAN]
        if not (chosen.keep_best or chosen.patience):
            return
        if chosen.metric is None or not chosen.every:
            raise ValueError("eval.metric: eval.keep_best and eval.patience need it, and eval.every")
        if chosen.metric not in valid:
            raise ValueError(f"eval.metric: got {chosen.metric!r}, expected one of {', '.join(valid)}")
        if chosen.keep_best and chosen.every % self.teacher.sync_every:
            raise ValueError(
                f"eval.keep_best: saves at evaluations, so eval.every={chosen.every} must be a multiple of "
                f"teacher.sync_every={self.teacher.sync_every}"
            )

    def _check_loss(self) -> None:
        loss, rollout = self.loss, self.rollout
        if self.skipped_tokens >= rollout.max_completion_tokens:
            raise ValueError(
                f"loss.skip_first_tokens: {loss.skip_first_tokens} leaves nothing to train on of completions of "
                f"rollout.max_completion_tokens={rollout.max_completion_tokens}: lower it"
            )
        if loss.support == "sampled" and not loss.tail and loss.divergence != "reverse_kl":
            raise ValueError(
                f"loss.tail: without it, support=sampled has one category and {loss.divergence} is always 0; only "
                "reverse_kl has a score-function estimator"
            )
        if loss.importance != "none" and self.method == "sdft":
            if rollout.top_p < 1 or rollout.top_k:
                raise ValueError(
                    "loss.importance: rollout.top_p and rollout.top_k bias the weights; switch one side off"
                )
            if rollout.from_teacher:
                raise ValueError("loss.importance: with rollout.from_teacher the samples are not the student's")
        plain = loss.importance == "none" and loss.token_clip is None
        if loss.kernel == "liger" and not (loss.support == "full" and loss.normalisation == "tokens" and plain):
            raise ValueError(
                "loss.kernel: liger computes a mean over tokens at full support: it needs loss.support=full, "
                "loss.normalisation=tokens, and neither loss.importance nor loss.token_clip"
            )
        if self.method == "sdft" and loss.support == "topk" and loss.topk_from == "student":
            if rollout.from_teacher:
                raise ValueError("loss.topk_from: with rollout.from_teacher nobody samples as the student: use teacher")
            if rollout.top_p < 1 or 0 < rollout.top_k < loss.top_k:
                raise ValueError(
                    f"loss.topk_from: student takes loss.top_k={loss.top_k} ids, but rollout.top_p={rollout.top_p:g} "
                    f"and rollout.top_k={rollout.top_k} leave fewer with any probability: use teacher, or "
                    "rollout.top_p=1 and rollout.top_k=0"
                )
        others = rollout.from_teacher or rollout.top_p < 1 or rollout.top_k
        if others and loss.support == "sampled" and not loss.tail:
            raise ValueError(
                "loss.tail: the score-function estimator needs samples of the student's whole distribution: use true, "
                "or neither rollout.from_teacher nor rollout.top_p nor rollout.top_k"
            )

    def changed(self, **values: Any) -> Config:
        """A copy with other values, which are not checked: `changed(steps=3, cluster={"device": "cpu"})`."""
        for name, value in values.items():
            own = getattr(self, name)
            values[name] = own.model_copy(update=value) if isinstance(own, Section) else value
        return self.model_copy(update=values)

    @property
    def skipped_tokens(self) -> int:
        """Tokens without loss at the start of each sequence that is trained on: of demonstrations none."""
        return self.loss.skip_first_tokens if self.method == "sdft" else 0

    @property
    def evaluation_limit(self) -> tuple[str, int]:
        """The field that decides at how many tokens completions of held-out rows are cut, and their number."""
        own = self.eval.max_completion_tokens
        if own is not None:
            return "eval.max_completion_tokens", own
        return "rollout.max_completion_tokens", self.rollout.max_completion_tokens

    def num_steps(self, num_problems: int) -> int:
        """Optimizer steps of the run; with `epochs` enough to see every row of the last pass."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(round(self.epochs * num_problems) / self.rollout.prompts_per_step))
