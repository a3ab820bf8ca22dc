"""Every setting of a run: name, type, default, bounds and documentation. No other module holds a default.

Names follow Transformers, PEFT and TRL. The string under a field is its documentation in `show`, `schema` and README.
Sections are frozen and refuse unknown keys. This module imports no torch.
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qlora_train.config.objectives import BATCH_OBJECTIVES, OBJECTIVES, ONLINE_OBJECTIVES, SETTINGS
from qlora_train.config.optimizers import OPTIMIZERS
from qlora_train.config.path_checks import validate_path, validate_source
from qlora_train.config.resume_policy import why_not_allowed
from qlora_train.config.rope_scaling import check_rope_scaling
from qlora_train.utils.trackers import TRACKERS

COMMIT = re.compile(r"[0-9a-f]{40}")
REFUSED_INITS = {
    "pissa": "PiSSA changes the base weights, which are already rounded to 4 bits",
    "corda": "CorDA changes the base weights, which are already rounded to 4 bits",
    "orthogonal": "orthogonal initialisation raises on 4-bit weights",
    "olora": "OLoRA changes the 4-bit base, so that a merge onto the original weights is wrong",
    "loftq": "LoftQ needs the 16-bit weights and replaces the 4-bit ones",
}
INITS = {"default": True, "gaussian": "gaussian", "eva": "eva"}


def _as_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_trackers(value: Any) -> Any:
    return () if value == "none" else _as_names(value)  # as in Transformers


Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]


class Section(BaseModel):
    """A section of the YAML file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


CHAT_TEMPLATE_NAMES = ("chatml", "llama2", "llama3", "mistral", "gemma", "alpaca")


class ModelSection(Section):
    """The base model."""

    model_name_or_path: str = Field(min_length=1)
    """Hub id (`meta-llama/Llama-2-7b-hf`), local folder, or `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub (default branch if unset)."""
    trust_remote_code: bool = False
    """Run Python code from the checkpoint. For Hub models, `revision` must be a 40-digit commit."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention implementation. `auto`: sdpa, or eager if the architecture needs it. FlashAttention needs its
    package."""
    rope_scaling: dict[str, str | int | float] | None = None
    """RoPE scaling for longer contexts (linear, dynamic, yarn, llama3), e.g. `{rope_type: yarn, factor: 2}`."""
    chat_template: str | None = None
    """`chatml`, `llama2`, `llama3`, `mistral`, `gemma`, `alpaca`, or a Jinja file (the tokenizer's if unset)."""
    new_tokens: Names = ()
    """Tokens to add. Their embeddings start at the mean of all others and are trained with the adapter."""

    @model_validator(mode="after")
    def _check_revision_is_pinned(self) -> Self:
        name = self.model_name_or_path
        local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or Path(name).is_dir()
        if self.trust_remote_code and not local and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError("trust_remote_code: true runs code from the Hub; set revision to a 40-digit commit hash")
        return self

    _paths = field_validator("model_name_or_path", "chat_template")(validate_path)

    @field_validator("rope_scaling")
    @classmethod
    def _check_rope_scaling(cls, value: dict[str, str | int | float] | None) -> Any:
        if value is not None:
            check_rope_scaling(value)
        return value


class QuantizationSection(Section):
    """Quantization of the base weights (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

    load_in_4bit: bool = True
    """Quantize the linear layers of the base to 4 bits; `false` is 16-bit LoRA."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Data type: 4-bit NormalFloat or 4-bit float."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the block scales too: 4.127 instead of 4.5 bits per weight."""
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of matrix products. `auto`: bfloat16 if the hardware supports it; the choice is logged."""
    min_quantized_share: float = Field(0.9, ge=0.0, le=1.0)
    """Stop if a smaller share of the linear weights is stored in 4 bits."""


class LoraSection(Section):
    """The adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    r: int = Field(16, ge=1, le=4096)
    """LoRA rank."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA scale: updates are multiplied by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. Layers that read the same input share a mask."""
    target_modules: Literal["all-linear"] | tuple[str, ...] | str = "all-linear"
    """`all-linear` (all linear layers except the head), a list of layer names, or a regular expression on full
    names."""
    target_parameters: Literal["auto"] | tuple[str, ...] = "auto"
    """Expert weights that get LoRA: all with `all-linear` (`auto`), a list of names, or none (`[]`)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Bias vectors of the base to train."""
    init_lora_weights: Literal["default", "gaussian", "eva"] = "default"
    """Initialisation; `eva` uses the first batches (https://arxiv.org/abs/2410.07170), each layer at rank r."""
    modules_to_save: Names = ()
    """Modules to train in full and save with the adapter, e.g. `[lm_head]`."""
    adapter_path: str | None = None
    """Initialise from this adapter, a local PEFT folder."""

    _paths = field_validator("adapter_path")(validate_path)

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _check_init(cls, value: Any) -> Any:
        name = str(value).lower().split("_niter_")[0]
        if name in REFUSED_INITS:
            raise ValueError(f"{value!r} is wrong on a 4-bit base: {REFUSED_INITS[name]}; use {', '.join(INITS)}")
        return value

    @field_validator("target_modules")
    @classmethod
    def _check_target_modules(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+[\s,]*", value):
                names = ", ".join(filter(None, re.split(r"[\s,]+", value)))
                raise ValueError(f"{value!r} is a text, not a list of layer names; write [{names}]")
            if re.fullmatch(r"[\w-]+", value):
                raise ValueError(
                    f"{value!r} is a regular expression that matches no layer's full name, such as "
                    "model.layers.0.self_attn.q_proj; allowed: all-linear, or a list of layer names: [q_proj, v_proj]"
                )
        if value in ((), ""):
            raise ValueError("is empty; use all-linear, a list of layer names or a regular expression")
        return value

    @model_validator(mode="after")
    def _check_init_is_used(self) -> Self:
        if self.adapter_path is not None and self.init_lora_weights != "default":
            raise ValueError(
                f"lora.init_lora_weights: {self.init_lora_weights} has no effect with lora.adapter_path, which provides "
                "the initial weights; drop one of them"
            )
        return self


FORMATS = Literal[
    "auto", "messages", "conversations", "prompt_completion", "alpaca", "question_answer", "text", "tokens",
    "preference", "question_preference", "openai_preference", "unpaired_preference", "unpaired_messages",
]  # fmt: skip


class Source(Section):
    """One data set: a local file, a folder or glob of files, or a Hub id."""

    path: str = Field(min_length=1)
    """File (jsonl, json, csv, tsv, parquet, arrow, txt; also .gz or .zst), glob, folder, or Hub id."""
    split: str = "train"
    """Split of a Hub data set, or of a folder written by `datasets`."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    format: FORMATS | None = None
    """Row format of this source (`data.format` if unset)."""
    columns: dict[str, str] | None = None
    """Column names of this source (`data.columns` if unset)."""
    weight: float | None = Field(None, gt=0, le=1000)
    """Times that each row is used per epoch: 0.5 uses half of the rows, 2 each row twice (once if unset)."""
    num_rows: int | None = Field(None, ge=1)
    """Use exactly this many rows per epoch, sampled or repeated, instead of `weight`."""

    _paths = field_validator("path")(validate_source)

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if self.weight is not None and self.num_rows is not None:
            raise ValueError("weight and num_rows are both set; drop one of them")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    return tuple(_as_source(item) for item in (value if isinstance(value, list | tuple) else [value]))


SHARE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*")
NULL_WORDS = ("none", "no", "off", "false", "nil")


def _as_sources_or_share(value: Any) -> Any:
    # refused here, because the Hub would be asked for a data set of this name
    if isinstance(value, str) and value.strip().lower() in NULL_WORDS:
        raise ValueError(f"{value!r} is not a data set; for no evaluation write null, or leave data.eval out")
    if isinstance(value, str) and (match := SHARE.fullmatch(value)):
        share = float(match[1]) / (100 if match[2] else 1)
        example = f"{share:g}" if 0 < share < 1 else "0.05"
        raise ValueError(
            f"{value!r} is not a data set; a share of data.train is a number without quotes, such as {example}"
        )
    return value if value is None or isinstance(value, int | float) else _as_sources(value)


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_as_source)], ...], Field(min_length=1)]


class DataSection(Section):
    """Training and held-out data, its format, and the tokens with loss."""

    train: Annotated[Sources, BeforeValidator(_as_sources)]
    """Training data: a path or Hub id, a mapping `{path, split, subset, revision}`, or a list of these."""
    eval: Annotated[Sources | Annotated[float, Field(gt=0, lt=1)] | None, BeforeValidator(_as_sources_or_share)] = None
    """Held-out data: like `train`, or a share of it such as 0.05, chosen by a hash of each row (no evaluation if
    unset)."""
    format: FORMATS = "auto"
    """Row format; `auto` detects it from the columns."""
    columns: dict[str, str] = {}
    """Map of the format's column names to the file's, e.g. `{prompt: question, completion: answer}`."""
    max_length: int = Field(2048, ge=8)
    """Maximum row length in tokens; `overflow` handles longer rows."""
    overflow: Literal["drop", "refuse", "truncate", "keep_end", "keep_answer", "split"] = "drop"
    """On a row longer than max_length: drop it (counts towards max_dropped), refuse it (stop), truncate its end, keep
    its end, keep its last answer and as much context as fits, or split it into several rows."""
    packing: bool = False
    """Pack several short rows into one of max_length tokens, with isolated attention and no padding."""
    train_on: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Tokens with loss: every assistant turn, the last one, all tokens after the prompt, or all tokens."""
    max_dropped: float = Field(0.01, ge=0.0, le=1.0)
    """Stop if a larger share of rows cannot be used."""
    max_rows: int | None = Field(None, ge=1)
    """Train on a sample of at most this many rows."""
    deduplicate: bool = False
    """Drop exact duplicates among training rows, and training rows that are also held out (of preferences: whose prompt
    is)."""
    streaming: bool = False
    """Tokenise during training, for data too large for a disk cache; needs train.max_steps or train.minutes."""
    num_proc: int | None = Field(None, ge=1, le=1024)
    """Tokenisation processes (one per CPU core if unset, none for small data)."""
    cache_dir: str | None = Field(None, min_length=1)
    """Folder of the cache of tokenised data (`qlora-train` in the user's cache folder if unset)."""
    cache_limit: str = Field("50GB", pattern=r"^[1-9]\d*(MB|GB)$")
    """Maximum size of that folder; the least recently used data sets are deleted."""

    _paths = field_validator("cache_dir")(validate_path)

    @model_validator(mode="after")
    def _check_eval_amounts(self) -> Self:
        if isinstance(self.eval, tuple) and any(source.weight or source.num_rows for source in self.eval):
            raise ValueError("eval: weight and num_rows have an effect in data.train only; drop them here")
        return self


if TYPE_CHECKING:
    ObjectiveName = str
    OptimizerName = str
    TrackerName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    OptimizerName = Literal[("auto", *OPTIMIZERS)]
    TrackerName = Literal[tuple(TRACKERS)]
SCHEDULES = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
MIN_ADAM_EPSILON = 1e-20
"""In float32 the squares of smaller gradients are 0."""
POLYNOMIAL_END = 1e-7
"""`lr_end` of Transformers' polynomial schedule."""


class TrainSection(Section):
    """Objective, optimization, batching, memory and evaluation."""

    objective: ObjectiveName = "sft"
    """What is trained: `sft` on answers, a preference objective on pairs of a chosen and a rejected answer, or one
    (`kto`, `apo_zero_unpaired`) on answers marked as desirable or undesirable."""
    beta: float | None = Field(None, gt=0)
    """Strength of the regularization towards the reference model, which is the base, or the adapter of
    lora.adapter_path; without a reference, scale of the log-probabilities, and for `orpo` weight of the odds ratio (0.1 if
    unset). Preference objectives only."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """Share of pairs expected to be flipped (0 if unset, 0.001 for `exo_pair`). Objectives `robust`, `exo_pair`, `simpo`
    and `cpo` only."""
    sft_weight: float | None = Field(None, ge=0)
    """Weight of the chosen answers' mean loss per label token, which is added to the loss of a preference objective (0 if
    unset, 1 for `cpo` and `orpo`). Objectives on pairs only."""
    simpo_gamma: float | None = Field(None, ge=0)
    """Reward margin that chosen answers should have (0.5 if unset). Objective `simpo` only."""
    discopop_tau: float | None = Field(None, gt=0)
    """Temperature of the share of the exponential loss (0.05 if unset). Objective `discopop` only."""
    desirable_weight: float | None = Field(None, gt=0)
    """Weight of the loss of desirable answers (1 if unset). Objectives `kto` and `apo_zero_unpaired` only."""
    undesirable_weight: float | None = Field(None, gt=0)
    """The same for undesirable answers."""
    optim: OptimizerName = "auto"
    """Optimizer. `auto`: adamw_torch_fused on a CPU, or if its state takes at most 2 % of the GPU's memory; else
    paged_adamw_8bit. A resumed run keeps its optimizer."""
    precompute_ref_log_probs: bool | None = None
    """Compute the reference model's log-probabilities once, before step 1, and store them (true if unset, except with
    minutes). `false`: in an additional forward pass for each micro-batch."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    lr_scheduler_type: SCHEDULES = "cosine"
    """Learning rate schedule."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with linear warm-up; the first step has a learning rate above 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First-moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Second-moment decay."""
    adam_epsilon: float = Field(1e-8, ge=MIN_ADAM_EPSILON)
    """Denominator term of Adam."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient to this norm; 0 disables clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient: stop the run, or skip the step. Weights are unchanged either way."""
    max_skipped_steps: int = Field(5, ge=1)
    """Stop when `on_nonfinite: skip` has skipped more than this many steps in the run."""
    on_loss_spike: Literal["warn", "stop", "ignore"] = "warn"
    """On a loss spike: warn, stop before the optimizer step, or ignore it. Losses of preferences are not compared:
    with few rows per step they vary by more than a spike."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Number of epochs; max_steps or minutes override it."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps."""
    minutes: float | None = Field(None, gt=0, le=1e6)
    """Minutes of training with evaluations, samples and checkpoints: a trial of some steps sets the number of steps, so
    that the learning-rate schedule ends in time. A resumed run keeps that number."""
    per_device_train_batch_size: int = Field(1, ge=1)
    """Rows per micro-batch of a process, or packs with data.packing. `padding_free` may compute more short rows at once."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Maximum rows per evaluation batch; smaller if memory runs out."""
    gradient_accumulation_steps: int = Field(16, ge=1)
    """Micro-batches per optimizer step, over all processes; the loss is normalised over all of their tokens."""
    gradient_checkpointing: Literal["auto", "none", "mlp", "full"] = "auto"
    """Activation checkpointing (non-reentrant): each layer recomputes nothing, its MLP, or everything in the backward pass.
    `auto`: as little as the GPU's memory allows, layer by layer; `full` with activation_offloading and under fsdp; `none`
    on a CPU."""
    activation_offloading: bool = False
    """Keep tensors saved for backward in host memory, copied while the GPU computes."""
    auto_find_batch_size: bool = False
    """If the worst-case batch runs out of memory, use the first settings that fit: smaller micro-batches with more
    accumulation, activation checkpointing, activation_offloading. Rows and steps stay the same. `false`: stop and name
    the settings that fit."""
    group_by_length: bool = False
    """Batch rows of similar length to reduce padding; the order is a pure function of the seed."""
    router_aux_loss_coef: float | None = Field(None, ge=0, le=1)
    """Weight of the load-balancing loss of mixture-of-experts models (config.json decides if unset: its value if
    output_router_logits is true)."""
    fused_kernels: bool = True
    """Use fused kernels if a parity check on the first batch matches PEFT and Transformers."""
    padding_free: bool = True
    """Train padding-free: flatten each step's rows into one sequence and compute shared prefixes
    once, if that saves tokens and a parity check matches. A sequence has at most the tokens of the largest padded
    micro-batch (on a GPU up to 8,192 if they fit, unless run.deterministic). Needs fused_kernels."""
    dequantized_cache_gb: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Memory per process for a cache of weights dequantized to the compute dtype. `auto`: up to a quarter of a CPU's free
    memory, 0 on GPUs."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune noise on the embeddings (https://arxiv.org/abs/2310.05914)."""
    logging_steps: int = Field(10, ge=1)
    """Optimizer steps between log lines; the last step is logged too."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations (every epoch if unset)."""
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints (every epoch if unset)."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints to keep; the best one is kept in addition if it is needed."""
    load_best_model_at_end: bool = False
    """Finish with the adapter of the lowest evaluation loss."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a lower loss."""

    @field_validator("objective", mode="before")
    @classmethod
    def _check_objective(cls, value: Any) -> Any:
        if value in BATCH_OBJECTIVES:
            raise ValueError(
                f"{value!r} compares sorted log-ratios of a micro-batch, so that its loss depends on the size of "
                "micro-batches; use an objective of pairs, such as dpo"
            )
        if value in ONLINE_OBJECTIVES:
            raise ValueError(
                f"{value!r} trains on answers that it samples, which this package does not; TRL's trainers do, and load "
                "its adapters and merged models"
            )
        return value

    @model_validator(mode="after")
    def _check_polynomial_schedule(self) -> Self:
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"learning_rate: {self.learning_rate:g} is not above the final rate of lr_scheduler_type: polynomial; "
                f"allowed: a number > {POLYNOMIAL_END:g}"
            )
        return self


class ParallelSection(Section):
    """The processes that train together."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How several processes divide the work. Each computes a share of every optimizer step's rows, balanced by tokens, and
    the adapter's gradients are summed. `ddp`: each has the whole base. `fsdp`: each loads and keeps a part of the 4-bit
    base, and gathers a layer at a time. `none`: one process. `auto`: ddp if base and training state fit on every device, or
    if the base fits and fsdp does not support the run; else fsdp."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    """Processes on this machine, one per GPU. `auto`: one per visible GPU, one if their models differ, one on a CPU. Rows
    per step, and the adapter within rounding, do not depend on it. Under torchrun or srun: their number."""

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        if self.strategy == "none" and self.processes not in ("auto", 1):
            raise ValueError(
                f"processes: {self.processes}, but strategy: none is one process; use strategy auto, ddp or fsdp"
            )
        return self


class RunSection(Section):
    """The run folder, reproducibility and tracking."""

    output_dir: str | None = Field(None, min_length=1)
    """Run folder (`runs/<config name>` if unset)."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of initialisation, order, dropout and splits."""
    deterministic: bool = False
    """Use deterministic algorithms only: on the same GPU model and library versions, reruns and resumed runs are
    bitwise equal. Slower on a GPU; no effect on a CPU."""
    report_to: Annotated[tuple[TrackerName, ...], BeforeValidator(_as_trackers)] = ()
    """Trackers, one or a list, in addition to metrics.jsonl."""
    row_losses: int = Field(256, ge=0)
    """Training rows, and as many held-out rows, whose loss is measured after training: the report lists the
    highest, often wrong labels. A random sample, of at most a tenth of the trained tokens. 0: none."""
    samples: int = Field(0, ge=0, le=100)
    """Held-out prompts to answer before the first step and at every evaluation, greedily, for samples.jsonl; they do not
    change training."""
    max_minutes: float | None = Field(None, gt=0, le=1e6)
    """Stop with a checkpoint and exit status 75 in time to end this many minutes after the start, for the time limit of
    a job queue; the same command resumes."""
    allow_changed: Names = ()
    """Changes to accept on resume, by name: settings such as `train.num_train_epochs`, or `versions`, `device`,
    `num_threads`, `data_fingerprint`, `base_identity`."""

    _paths = field_validator("output_dir")(validate_path)


class ExportSection(Section):
    """The merge after training."""

    merge: bool = False
    """Merge the adapter into the base's 16-bit weights after training (70B writes 140 GB)."""
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """Merge onto the original weights or the dequantized 4-bit ones; `auto` measures both and takes the better."""
    max_loss_increase: float = Field(0.02, ge=0)
    """Refuse a merge whose loss on held-out rows (else training rows) exceeds the adapter's by more than this, in nats
    per token."""
    max_divergence: float = Field(0.02, gt=0)
    """Refuse a merge onto the trained base if the KL divergence of its predictions from the adapter's is larger, in
    nats per token. Merges of 4-bit runs onto the original weights only report it: rounding alone can cost 0.2."""
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(MB|GB)$")
    """Maximum file size of the merged model."""


class RunConfig(Section):
    """The whole YAML file."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    run: RunSection = RunSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if problem := next(
            chain(_conflicts(self), _objective_conflicts(self), _streaming_conflicts(self), _refused_changes(self)),
            None,
        ):
            raise ValueError(problem)
        return self


def _conflicts(config: RunConfig) -> Iterator[str]:
    data, train = config.data, config.train
    if config.run.samples and data.eval is None:
        yield "run.samples needs held-out rows; set data.eval to a file or a share like 0.05"
    if config.run.samples and config.parallel.strategy == "fsdp":
        yield "run.samples: rank 0 generates alone, which parallel.strategy: fsdp does not support; drop one of them"
    for key in ("load_best_model_at_end", "early_stopping_patience", "eval_steps"):
        if data.eval is None and getattr(train, key):
            yield f"train.{key} needs held-out rows; set data.eval to a file or a share like 0.05"
    if train.load_best_model_at_end and train.eval_steps != train.save_steps:
        yield (
            f"train.load_best_model_at_end needs a checkpoint at every evaluation; train.save_steps is "
            f"{train.save_steps} and train.eval_steps {train.eval_steps}; give them the same value"
        )
    if data.packing and train.group_by_length:
        yield (
            "train.group_by_length has no effect with data.packing: true, whose rows all have about max_length "
            "tokens; drop one of them"
        )
    if train.max_steps is not None and train.minutes is not None:
        yield (
            f"train.max_steps: {train.max_steps} and train.minutes: {train.minutes:g} both set the number of steps; "
            "drop one of them"
        )
    rows_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if config.parallel.processes != "auto" and config.parallel.processes > rows_per_step:
        yield (
            f"parallel.processes: {config.parallel.processes}, but an optimizer step has {rows_per_step} "
            f"row{'s' if rows_per_step > 1 else ''} (train.per_device_train_batch_size x "
            "train.gradient_accumulation_steps); lower it, or raise train.gradient_accumulation_steps"
        )
    if config.export.merge_base == "dequantized" and not config.quantization.load_in_4bit:
        yield (
            "export.merge_base: dequantized, but with quantization.load_in_4bit: false nothing is in 4 bits; use "
            "original or auto"
        )


def _objective_conflicts(config: RunConfig) -> Iterator[str]:
    data, train = config.data, config.train
    row = OBJECTIVES[train.objective]
    for name in SETTINGS:
        if getattr(train, name) is not None and name not in row.defaults:
            readers = ", ".join(each.name for each in OBJECTIVES.values() if name in each.defaults)
            yield f"train.{name} has no effect with train.objective: {row.name}; drop it (it is for {readers})"
    if train.precompute_ref_log_probs is not None and not row.uses_reference:
        yield f"train.precompute_ref_log_probs: train.objective: {row.name} has no reference model; drop it"
    if train.precompute_ref_log_probs and train.minutes is not None:
        yield (
            "train.precompute_ref_log_probs: true needs a known number of steps, which train.minutes measures later; drop "
            "one of them"
        )
    if row.dataset_type == "language_modeling":
        return
    if row.name == "exo_pair" and train.label_smoothing == 0:
        yield "train.label_smoothing: 0, but exo_pair needs a number > 0; drop it for 0.001, which its paper recommends"
    if row.estimates_kl and train.per_device_train_batch_size * train.gradient_accumulation_steps == 1:
        yield (
            f"train.objective: {row.name} compares each prompt with the answer of another row of its optimizer step, and "
            "a step is one row; raise train.gradient_accumulation_steps"
        )
    unsupported = {
        "data.packing": data.packing, "data.streaming": data.streaming, "data.train_on: all": data.train_on == "all",
        f"data.overflow: {data.overflow}": data.overflow in ("split", "keep_end", "keep_answer"),
        "lora.init_lora_weights: eva": config.lora.init_lora_weights == "eva",
        "train.on_loss_spike: stop": train.on_loss_spike == "stop",
    }  # fmt: skip
    if found := [name for name, value in unsupported.items() if value]:
        yield f"train.objective: {row.name} does not support {', '.join(found)}; drop one or the other"


def _streaming_conflicts(config: RunConfig) -> Iterator[str]:
    data, train = config.data, config.train
    if not data.streaming:
        return
    needed = {
        "train.max_steps or train.minutes": train.max_steps or train.minutes, "train.save_steps": train.save_steps,
        "train.eval_steps": train.eval_steps or data.eval is None,
    }  # fmt: skip
    if missing := [key for key, value in needed.items() if not value]:
        yield f"data.streaming has no epochs; set {', '.join(missing)}"
    unsupported = {
        "data.packing": data.packing, "data.deduplicate": data.deduplicate, "data.max_rows": data.max_rows,
        "data.eval as a share": isinstance(data.eval, float), "train.group_by_length": train.group_by_length,
        "weight or num_rows of a source": any(source.weight or source.num_rows for source in data.train),
        "lora.init_lora_weights: eva": config.lora.init_lora_weights == "eva",
        "train.on_loss_spike: stop": train.on_loss_spike == "stop",
    }  # fmt: skip
    if found := [name for name, value in unsupported.items() if value]:
        yield f"data.streaming: true does not support {', '.join(found)}; drop one or the other"


def _refused_changes(config: RunConfig) -> Iterator[str]:
    settings = [f"{name}.{key}" for name in RunConfig.model_fields for key in type(getattr(config, name)).model_fields]
    for key in config.run.allow_changed:
        if problem := why_not_allowed(key, settings):
            yield f"run.allow_changed: {key} {problem}"
