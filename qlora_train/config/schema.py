"""Every setting of a run: its name, type, default, bounds and meaning. Nothing else in the package holds a default.

Names are those that users of Transformers, PEFT and TRL already type; the string under a field is its documentation
and its help text. The sections are frozen and refuse unknown keys. No torch here: ``check`` answers in milliseconds.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qlora_train.config.path_checks import validate_path, validate_source
from qlora_train.config.resume_policy import why_not_allowed
from qlora_train.config.rope_scaling import check_rope_scaling

COMMIT = re.compile(r"[0-9a-f]{40}")
REFUSED_INITS = {
    "pissa": "PiSSA rewrites the base weights, which 4-bit storage cannot hold",
    "corda": "CorDA rewrites the base weights, which 4-bit storage cannot hold",
    "orthogonal": "orthogonal initialisation raises on 4-bit weights",
    "olora": "OLoRA rewrites the 4-bit base, so that merging onto the original weights is wrong",
    "loftq": "LoftQ needs the 16-bit weights and replaces the 4-bit ones",
}
INITS = {"default": True, "gaussian": "gaussian", "eva": "eva"}


def _as_names(value: Any) -> Any:
    """Take a single name for a list of one; Transformers calls an empty list of trackers `none`."""
    return (value,) if isinstance(value, str) else value


def _as_trackers(value: Any) -> Any:
    return () if value == "none" else _as_names(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]


class Section(BaseModel):
    """A section of the YAML file: frozen, no unknown keys, docstrings under fields are their help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


CHAT_TEMPLATE_NAMES = ("chatml", "llama2", "llama3", "mistral", "gemma", "alpaca")


class ModelSection(Section):
    """Which base model, and how it is loaded."""

    model_name_or_path: str = Field(min_length=1)
    """Hub id (`meta-llama/Llama-2-7b-hf`), local folder, or a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None is the default branch."""
    trust_remote_code: bool = False
    """Run Python code shipped with the checkpoint. A Hub model needs `revision` to be a 40-digit commit."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel; `auto` is sdpa, or eager where sdpa is wrong or missing. FlashAttention needs its own package."""
    rope_scaling: dict[str, str | int | float] | None = None
    """How positions beyond the model's own are reached (linear, dynamic, yarn, llama3): `{rope_type: yarn, factor: 2}`."""
    chat_template: str | None = None
    """`chatml`, `llama2`, `llama3`, `mistral`, `gemma`, `alpaca`, or a Jinja file; None keeps the tokenizer's own."""
    new_tokens: Names = ()
    """Tokens to add to the vocabulary: their rows begin as the mean of all others, and are trained next to the adapter."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        name = self.model_name_or_path
        local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or Path(name).is_dir()
        if self.trust_remote_code and not local and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError("trust_remote_code: true runs code from the Hub; set revision to a 40-digit commit hash")
        return self

    _paths = field_validator("model_name_or_path", "chat_template")(validate_path)

    @field_validator("rope_scaling")
    @classmethod
    def _rope_scaling_is_complete(cls, value: dict[str, str | int | float] | None) -> Any:
        if value is not None:
            check_rope_scaling(value)
        return value


class QuantizationSection(Section):
    """How the base weights are stored (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

    load_in_4bit: bool = True
    """Store the linear layers of the base in 4 bits; `false` is plain 16-bit LoRA."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code book: 4-bit NormalFloat or 4-bit float."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the block scales too: 4.127 instead of 4.5 bits a weight."""
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the matrix products; `auto` is bfloat16 where the hardware has it, and the choice is logged."""
    min_quantized_share: float = Field(0.9, ge=0.0, le=1.0)
    """Stop when a smaller share of the linear weights than this ended up in 4 bits."""


class LoraSection(Section):
    """The adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    r: int = Field(16, ge=1, le=4096)
    """Rank."""
    lora_alpha: float = Field(32, gt=0)
    """Scale: updates are multiplied by lora_alpha / r (or / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input, against overfitting; layers that read the same input share a mask."""
    target_modules: Literal["all-linear"] | tuple[str, ...] | str = "all-linear"
    """`all-linear` (every linear but the head), a list of layer names, or one regular expression on full names."""
    target_parameters: Literal["auto"] | tuple[str, ...] = "auto"
    """Expert weights of a mixture that carry LoRA: all with `all-linear` (`auto`), the ones named, or none (`[]`)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias vectors of the base are trained too."""
    init_lora_weights: Literal["default", "gaussian", "eva"] = "default"
    """Initialisation; `eva` uses the first training batches (https://arxiv.org/abs/2410.07170), every layer at rank r."""
    modules_to_save: Names = ()
    """Modules trained in full and saved with the adapter, e.g. `[lm_head]`."""
    adapter_path: str | None = None
    """Start from this adapter (a local PEFT folder) instead of a fresh one."""

    _paths = field_validator("adapter_path")(validate_path)

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _init_is_right_on_4_bit(cls, value: Any) -> Any:
        name = str(value).lower().split("_niter_")[0]
        if name in REFUSED_INITS:
            raise ValueError(f"{value!r} is not right on a 4-bit base: {REFUSED_INITS[name]}; use {', '.join(INITS)}")
        return value

    @field_validator("target_modules")
    @classmethod
    def _target_pattern_compiles(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if re.fullmatch(r"[\w-]+", value):
                raise ValueError(
                    f"{value!r} is a regular expression that matches no layer's full name, such as "
                    "model.layers.0.self_attn.q_proj; allowed: all-linear, or a list of layer names: [q_proj, v_proj]"
                )
        if value in ((), ""):
            raise ValueError("names no layer; use all-linear, a list of layer names or a regular expression")
        return value

    @model_validator(mode="after")
    def _initialisation_has_an_effect(self) -> Self:
        if self.adapter_path is not None and self.init_lora_weights != "default":
            raise ValueError(
                f"lora.init_lora_weights: {self.init_lora_weights} has no effect beside lora.adapter_path, whose weights "
                "are the start; drop one of them"
            )
        return self


FORMATS = Literal[
    "auto", "messages", "conversations", "prompt_completion", "alpaca", "question_answer", "text", "tokens",
]  # fmt: skip


class Source(Section):
    """One data set: a local file, a folder or glob of files, or a Hub id."""

    path: str = Field(min_length=1)
    """File (jsonl, json, csv, tsv, parquet, arrow, txt; also .gz or .zst), glob, folder, or Hub id."""
    split: str = "train"
    """Split of a Hub data set, or of a folder that `datasets` wrote."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    format: FORMATS | None = None
    """Shape of this source's rows; None: `data.format`."""
    columns: dict[str, str] | None = None
    """This source's column names; None: `data.columns`."""
    weight: float | None = Field(None, gt=0, le=1000)
    """How often each row is seen in an epoch: 0.5 takes half of the rows, 2 takes each twice; None: once."""
    num_rows: int | None = Field(None, ge=1)
    """Take exactly this many rows an epoch: a sample, or every row as often as it takes; instead of `weight`."""

    _paths = field_validator("path")(validate_source)

    @model_validator(mode="after")
    def _amount_is_given_once(self) -> Self:
        if self.weight is not None and self.num_rows is not None:
            raise ValueError("weight and num_rows both say how many rows to take; drop one of them")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    return tuple(_as_source(item) for item in (value if isinstance(value, list | tuple) else [value]))


SHARE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*")
NOTHING = ("none", "no", "off", "false", "nil")
"""What people write for `null`; quoted or not, YAML reads a text, which could be the name of a data set."""


def _as_sources_or_share(value: Any) -> Any:
    """Refuse texts that name no data, but would be looked for on the Hub.

    Raises:
        ValueError: a share in quotes or in percent, or a word for nothing.
    """
    if isinstance(value, str) and value.strip().lower() in NOTHING:
        raise ValueError(f"{value!r} names no data; for no evaluation write null, or leave data.eval out")
    if isinstance(value, str) and (match := SHARE.fullmatch(value)):
        share = float(match[1]) / (100 if match[2] else 1)
        example = f"{share:g}" if 0 < share < 1 else "0.05"
        raise ValueError(
            f"{value!r} names no data; a share of data.train is a number without quotes, such as {example}"
        )
    return value if value is None or isinstance(value, int | float) else _as_sources(value)


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_as_source)], ...], Field(min_length=1)]


class DataSection(Section):
    """What is learnt: rows, their rendering, and which of their tokens carry loss."""

    train: Annotated[Sources, BeforeValidator(_as_sources)]
    """Training data: a path or Hub id, a mapping `{path, split, subset, revision}`, or a list of these."""
    eval: Annotated[Sources | Annotated[float, Field(gt=0, lt=1)] | None, BeforeValidator(_as_sources_or_share)] = None
    """Held-out data: like `train`, or a share of it such as 0.05 (by a hash of each row); None: no evaluation."""
    format: FORMATS = "auto"
    """Shape of a row; `auto` recognises it from the columns."""
    columns: dict[str, str] = {}
    """The format's column names -> the file's, e.g. `{prompt: question, completion: answer}`."""
    max_length: int = Field(2048, ge=8)
    """Longest row in tokens; longer ones are handled by `overflow`."""
    overflow: Literal["drop", "refuse", "truncate", "keep_end", "keep_answer", "split"] = "drop"
    """A row beyond max_length: drop it (counted against max_dropped), refuse it (stop), truncate its end, keep its end,
    keep its last answer and what fits before it, or split it into several rows."""
    packing: bool = False
    """Fill rows of max_length with several short ones, each of which sees itself alone; no padding is computed."""
    train_on: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Tokens that carry loss: every assistant turn, the last one, all that follows the prompt, or everything."""
    max_dropped: float = Field(0.01, ge=0.0, le=1.0)
    """Largest share of rows that may be unusable before the run stops."""
    max_rows: int | None = Field(None, ge=1)
    """Train on at most this many rows, a sample of them all; None: on every row."""
    deduplicate: bool = False
    """Train once on rows that say exactly the same, and not on rows that are held out too."""
    streaming: bool = False
    """Tokenise while training instead of before, for data that no disk cache should hold; needs train.max_steps."""
    num_proc: int | None = Field(None, ge=1, le=1024)
    """Processes that tokenise; None: one a CPU core, or none beside this one for small data."""
    cache_dir: str | None = Field(None, min_length=1)
    """Where tokenised data is kept for the next run; None: `qlora-train` in the user's cache folder."""
    cache_limit: str = Field("50GB", pattern=r"^[1-9]\d*(MB|GB)$")
    """Largest size of that folder: data sets that were not used for longest make room."""

    _paths = field_validator("cache_dir")(validate_path)

    @model_validator(mode="after")
    def _amounts_are_of_training_rows(self) -> Self:
        if isinstance(self.eval, tuple) and any(source.weight or source.num_rows for source in self.eval):
            raise ValueError("eval: weight and num_rows have an effect in data.train only; drop them here")
        return self


OPTIMIZERS = Literal[
    "auto", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused",
    "paged_lion_8bit", "lion_8bit", "adafactor", "sgd",
]  # fmt: skip
SCHEDULES = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
MIN_ADAM_EPSILON = 1e-20
"""Optimizers compute in float32, where the squares of smaller gradients are 0 and epsilon alone divides the update."""
POLYNOMIAL_END = 1e-7
"""Learning rate that the polynomial schedule of Transformers ends at."""


class TrainSection(Section):
    """The optimisation."""

    optim: OPTIMIZERS = "auto"
    """Optimizer; `auto` is adamw_torch_fused where its state is at most 2 % of the GPU's memory and on a CPU, else
    paged_adamw_8bit. A run keeps its own when it resumes."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    lr_scheduler_type: SCHEDULES = "cosine"
    """Schedule of the learning rate."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises, the first of them already above 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First-moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Second-moment decay."""
    adam_epsilon: float = Field(1e-8, ge=MIN_ADAM_EPSILON)
    """Denominator term of Adam."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient to this norm; 0 does not clip."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite stops the run, or is skipped; either way it changes no weight."""
    max_skipped_steps: int = Field(5, ge=1)
    """Steps that `on_nonfinite: skip` may skip in the whole run; one more stops it."""
    on_loss_spike: Literal["warn", "stop", "ignore"] = "warn"
    """A loss far above the median of the last steps is warned of, stops the run before the update, or is no matter."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training rows; max_steps, when set, decides instead."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    per_device_train_batch_size: int = Field(1, ge=1)
    """Rows in a micro-batch, or packs of rows with data.packing; `padding_free` computes more rows at a time where they are
    short."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Most rows in an evaluation batch; fewer where memory runs out."""
    gradient_accumulation_steps: int = Field(16, ge=1)
    """Micro-batches in an optimizer step; the loss is normalised over all of them together."""
    gradient_checkpointing: Literal["auto", "none", "mlp", "full"] = "auto"
    """Activation checkpointing (non-reentrant): each layer recomputes nothing, its MLP, or everything in the backward pass.
    `auto`: as little as the GPU's memory allows, layer by layer; `full` with activation_offloading; `none` on a CPU."""
    activation_offloading: bool = False
    """Keep what the backward pass needs in the host's memory instead of a GPU's, copied while the GPU computes."""
    auto_find_batch_size: bool = False
    """Where the largest batch does not fit into memory, train with the first that does of: smaller micro-batches with more
    accumulation, gradient_checkpointing, activation_offloading; rows and steps stay the same. False:
    stop and say which does."""
    group_by_length: bool = False
    """Batch rows of similar length: less padding, the order stays a pure function of the seed."""
    router_aux_loss_coef: float | None = Field(None, ge=0, le=1)
    """Weight of the loss that keeps a mixture's experts evenly used, of models that have one. None: what config.json says,
    where it turns the loss on (output_router_logits)."""
    fused_kernels: bool = True
    """Train with operations of this package where a comparison on the first rows shows that they compute what PEFT's and
    Transformers' own do."""
    padding_free: bool = True
    """Compute the rows of an optimizer step end to end, as many at a time as the largest micro-batch of
    `per_device_train_batch_size` rows has tokens (on a GPU up to 8,192 where they fit, unless run.deterministic), and the
    prefix that several of them share once; where that saves anything and a comparison shows that it changes nothing: part
    of the fast path."""
    dequantized_cache_gb: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Memory for copies of 4-bit weights in the compute dtype, which are then not dequantised in every step; `auto` is up
    to a quarter of a CPU's free memory, and 0 on GPUs."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune noise on the embeddings (https://arxiv.org/abs/2310.05914)."""
    logging_steps: int = Field(10, ge=1)
    """Optimizer steps between two lines of metrics; the last step has one too."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two evaluations; None: at the end of every epoch."""
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two checkpoints; None: at the end of every epoch."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints to keep; the best one is always kept when it will be needed."""
    load_best_model_at_end: bool = False
    """Finish with the adapter of the lowest evaluation loss instead of the last."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a lower loss."""

    @model_validator(mode="after")
    def _polynomial_schedule_falls(self) -> Self:
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"learning_rate: {self.learning_rate:g} is where lr_scheduler_type: polynomial ends, or below; allowed "
                f"with it: a number > {POLYNOMIAL_END:g}"
            )
        return self


class RunSection(Section):
    """Where a run lives and how it is made repeatable."""

    output_dir: str | None = Field(None, min_length=1)
    """Run folder; None is `runs/<config name>`."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of initialisation, order, dropout and splits."""
    deterministic: bool = False
    """Use deterministic algorithms alone: reruns and resumed runs are then bitwise equal on a GPU too, with the same GPU
    model and library versions. Slower on a GPU; no effect on a CPU."""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(_as_trackers)
    ] = ()
    """Trackers, one or a list, that receive the metrics besides metrics.jsonl."""
    max_minutes: float | None = Field(None, gt=0, le=1e6)
    """Stop with a checkpoint and exit status 75 early enough to be gone this long after the start, as for the wall clock of
    a queue; the same command goes on."""
    allow_changed: Names = ()
    """What may differ from the run that is continued, by name: settings such as `train.num_train_epochs`, or `versions`,
    `device`, `num_threads`, `data_fingerprint`, `base_identity`."""

    _paths = field_validator("output_dir")(validate_path)


class ExportSection(Section):
    """What is made of a finished run."""

    merge: bool = False
    """Merge the adapter into the base's unquantised weights after training (a 70B merge writes 140 GB)."""
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """Merge onto the original weights or the dequantised 4-bit ones; `auto` measures both and keeps the better."""
    max_loss_increase: float = Field(0.02, ge=0)
    """Refuse a merge whose loss on held-out rows (training rows where there are none) exceeds the adapter's by more nats a
    token than this."""
    max_divergence: float = Field(0.02, gt=0)
    """Refuse a merge onto what was trained whose predictions are more nats a token (Kullback-Leibler) from the adapter's;
    onto the original weights of a 4-bit run, where rounding alone may be 0.2, they are only reported."""
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*(MB|GB)$")
    """Largest file of the merged model."""


class RunConfig(Section):
    """The whole YAML file."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _evaluation_is_possible(self) -> Self:
        if self.data.eval is None:
            for key in ("load_best_model_at_end", "early_stopping_patience", "eval_steps"):
                if getattr(self.train, key):
                    raise ValueError(f"train.{key} needs held-out rows; set data.eval to a file or a share like 0.05")
        return self

    @model_validator(mode="after")
    def _best_model_is_saved(self) -> Self:
        train = self.train
        if train.load_best_model_at_end and train.eval_steps != train.save_steps:
            raise ValueError(
                f"train.load_best_model_at_end needs a checkpoint at every evaluation; train.save_steps is "
                f"{train.save_steps} and train.eval_steps {train.eval_steps}; give them the same value"
            )
        return self

    @model_validator(mode="after")
    def _packs_have_no_lengths_to_group(self) -> Self:
        if self.data.packing and self.train.group_by_length:
            raise ValueError(
                "train.group_by_length has no effect with data.packing: true, whose rows all have about max_length "
                "tokens; drop one of them"
            )
        return self

    @model_validator(mode="after")
    def _a_stream_has_neither_length_nor_end(self) -> Self:
        if not self.data.streaming:
            return self
        needs = {
            "train.max_steps": self.train.max_steps, "train.save_steps": self.train.save_steps,
            "train.eval_steps": self.train.eval_steps or self.data.eval is None,
        }  # fmt: skip
        if missing := [key for key, value in needs.items() if not value]:
            raise ValueError(f"data.streaming has no epochs to count by; set {', '.join(missing)}")
        whole = {
            "data.packing": self.data.packing, "data.deduplicate": self.data.deduplicate,
            "data.max_rows": self.data.max_rows,
            "data.eval as a share": isinstance(self.data.eval, float), "train.group_by_length": self.train.group_by_length,
            "weight or num_rows of a source": any(source.weight or source.num_rows for source in self.data.train),
            "lora.init_lora_weights: eva": self.lora.init_lora_weights == "eva",
        }  # fmt: skip
        if found := [name for name, value in whole.items() if value]:
            raise ValueError(
                f"data.streaming: true never has all rows at once, as {', '.join(found)} would need; drop one or the other"
            )
        return self

    @model_validator(mode="after")
    def _changes_can_be_allowed(self) -> Self:
        settings = [
            f"{name}.{key}" for name in type(self).model_fields for key in type(getattr(self, name)).model_fields
        ]
        for key in self.run.allow_changed:
            if problem := why_not_allowed(key, settings):
                raise ValueError(f"run.allow_changed: {key} {problem}")
        return self

    @model_validator(mode="after")
    def _merge_base_was_trained_on(self) -> Self:
        if self.export.merge_base == "dequantized" and not self.quantization.load_in_4bit:
            raise ValueError(
                "export.merge_base: dequantized, but with quantization.load_in_4bit: false nothing is in 4 bits; use "
                "original or auto"
            )
        return self
