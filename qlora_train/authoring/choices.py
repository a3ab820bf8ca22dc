"""Choose the settings of a new config, each with its reason: a recipe, changed for the base and the data at hand.

The conventions are those of configs/ and recipes/. The choices are a pure function of what was looked at.
"""

import math
from typing import Any

from qlora_train.authoring.base_look import BaseLook
from qlora_train.authoring.data_look import DataLook
from qlora_train.authoring.recipe_files import Choice, Recipe
from qlora_train.config import LoraSection
from qlora_train.config.objectives import dataset_type_of
from qlora_train.planning.plan_text import short_count
from qlora_train.utils.errors import ConfigError

Settings = dict[str, Choice]
RECIPES_BY_FORMAT = {
    "messages": "chat", "conversations": "chat", "prompt_completion": "completion", "alpaca": "instruction",
    "question_answer": "instruction", "text": "continued_pretraining", "preference": "dpo",
    "question_preference": "dpo", "openai_preference": "dpo", "unpaired_preference": "kto",
    "unpaired_messages": "kto", "tokens": "completion",
}  # fmt: skip
MICRO_BATCH_TOKENS = ((2e9, 16384), (9e9, 8192), (15e9, 4096), (math.inf, 2048))
"""Tokens of a micro-batch by the number of weights, below which the first that applies counts."""
MAX_ROWS_PER_BATCH = 8
STEP_ROWS = ((200, 4), (1000, 8), (math.inf, 16))
"""Rows of an optimizer step by the number of rows: a few hundred rows need enough steps."""
EPOCHS = ((2000, 3), (20_000, 2), (math.inf, 1))
EVAL_SHARES = ((10, None), (100, 0.2), (1000, 0.1), (20_000, 0.05), (math.inf, 0.01))
"""Share that is held out by the number of rows: some dozens of rows, at most a few thousand."""
SMALL_WEIGHTS, SMALL_RATE, LARGE_RATE = 2e9, 2e-4, 1e-4
GENTLE_RATE = 5e-5
"""A recipe with this learning rate or a lower one has its reason for it."""
HIGH_RANK = 32
LENGTH_STEPS = ((1024, 128), (4096, 256), (math.inf, 1024))
"""data.max_length is rounded up to a multiple, by its size."""
SMALL_GPU = "small_gpu"
LORA = LoraSection()
"""The defaults."""


def choose_recipe(data: DataLook, base: BaseLook) -> tuple[str, str]:
    """Return the recipe for a data set, and why."""
    if data.has_tools:
        return "tool_calling", "rows have tools"
    if data.has_reasoning:
        return "reasoning", "answers have a reasoning trace"
    if base.has_experts and data.is_chat and data.dataset_type == "language_modeling":
        return "mixture_of_experts", "the base is a mixture of experts"
    other = "; orpo is for a base that was not fine-tuned on such rows" if data.dataset_type == "preference" else ""
    return RECIPES_BY_FORMAT[data.format], f"the format is {data.format}{other}"


def choose_settings(recipe: Recipe, base: BaseLook, data: DataLook, source: Choice, output_dir: str) -> Settings:
    """Return the settings of the new config by `section.key`.

    Args:
        source: for `data.train`.

    Raises:
        ConfigError: the recipe's objective trains on another type of rows.
    """
    settings = dict(recipe.settings)
    objective = settings.get("train.objective", Choice("sft")).value
    if dataset_type_of(objective) != data.dataset_type:
        raise ConfigError(
            f"--recipe {recipe.name}: train.objective: {objective} does not train on the format {data.format}; use "
            f"--recipe {RECIPES_BY_FORMAT[data.format]}"
        )
    settings["model.model_name_or_path"] = Choice(base.name, _size_text(base))
    settings["data.train"] = Choice(source.value, f"{source.reason}{_rows_text(data)}")
    if "lora.r" not in settings:
        settings["lora.r"] = Choice(LORA.r, "8 takes less memory; 32 and more learn more than a format")
        settings["lora.lora_alpha"] = Choice(LORA.lora_alpha, "twice r")
    _choose_template(settings, recipe, base, data)
    _choose_data(settings, recipe, base, data)
    _choose_training(settings, recipe, base, data)
    settings["run.output_dir"] = Choice(output_dir, "holds checkpoints, adapter, log and results")
    merged = f"true also writes a merged model of {2 * base.num_weights / 1e9:.1f} GB"
    settings["export.merge"] = Choice(False, f"{merged}; `qlora-train merge` does so later")
    return settings


def _choose_template(settings: Settings, recipe: Recipe, base: BaseLook, data: DataLook) -> None:
    if base.name == recipe.settings["model.model_name_or_path"].value:
        return
    settings.pop("model.chat_template", None)
    if data.is_chat and base.has_template is False:
        reason = "the base has no chat template; this one fits its tokens"
        settings["model.chat_template"] = Choice(base.default_template, reason)


def _choose_data(settings: Settings, recipe: Recipe, base: BaseLook, data: DataLook) -> None:
    share = _by_size(EVAL_SHARES, data.num_rows)
    reason = f"held out of {data.num_rows:,} rows" if share else "too few rows to hold some out"
    settings["data.eval"] = Choice(share, reason)
    if share is None:
        settings.pop("train.load_best_model_at_end", None)
    settings["data.format"] = Choice(data.format, "found in the first row")
    settings.pop("data.columns", None)
    if data.columns:
        settings["data.columns"] = Choice(dict(data.columns), "the format's column: the file's")
    _choose_length(settings, recipe, base, data)


def _choose_length(settings: Settings, recipe: Recipe, base: BaseLook, data: DataLook) -> None:
    wanted = round_up(data.percentile_99)
    how = "" if data.is_counted else ", estimated from characters"
    reason = f"99 % of the rows have at most about {data.percentile_99:,} tokens{how}"
    scaling = settings.pop("model.rope_scaling", None)
    if base.positions is not None and wanted > base.positions:
        if scaling is not None:
            factor = float(math.ceil(wanted / base.positions))
            rope = {"rope_type": "linear", "factor": factor}
            settings["model.rope_scaling"] = Choice(rope, f"the base has {base.positions:,} positions")
        else:
            wanted, reason = base.positions, f"the base's positions; longest row: about {data.longest:,} tokens"
    if recipe.name == SMALL_GPU:
        own = recipe.settings["data.max_length"]
        wanted, reason = (wanted, reason) if wanted <= own.value else (own.value, own.reason)
    settings["data.max_length"] = Choice(wanted, reason)
    if data.longest > wanted and "data.overflow" not in settings and "data.max_dropped" not in settings:
        settings["data.max_dropped"] = Choice(0.05, f"longer rows are dropped; the longest has about {data.longest:,}")


def _choose_training(settings: Settings, recipe: Recipe, base: BaseLook, data: DataLook) -> None:
    rate = settings["train.learning_rate"]
    if rate.value > GENTLE_RATE:
        settings["train.learning_rate"] = _learning_rate(base, settings.get("lora.r", Choice(16)).value)
    settings.pop("train.max_steps", None)
    settings.pop("train.logging_steps", None)
    settings["train.num_train_epochs"] = Choice(_by_size(EPOCHS, data.num_rows), f"{data.num_rows:,} rows")
    in_step = _by_size(STEP_ROWS, data.num_rows)
    length = settings["data.max_length"].value * (2 if data.dataset_type == "preference" else 1)
    budget = _by_size(MICRO_BATCH_TOKENS, base.num_weights)
    rows = 1
    while rows * 2 <= min(in_step, MAX_ROWS_PER_BATCH) and rows * 2 * length <= budget:
        rows *= 2
    if recipe.name == SMALL_GPU:
        rows = 1
    settings["train.per_device_train_batch_size"] = Choice(rows, f"rows at once: at most {rows * length:,} tokens")
    settings["train.gradient_accumulation_steps"] = Choice(in_step // rows, f"so that a step has {in_step} rows")
    settings["train.per_device_eval_batch_size"] = Choice(rows, "halved if memory runs out")
    settings["train.auto_find_batch_size"] = Choice(True, "if it does not fit: the first smaller setting that does")


def _learning_rate(base: BaseLook, rank: int) -> Choice:
    rate = SMALL_RATE if base.num_weights < SMALL_WEIGHTS else LARGE_RATE
    if rank > HIGH_RANK:
        return Choice(rate / 2, f"half of what rank 16 takes on {short_count(base.num_weights)} weights")
    return Choice(rate, f"usual for {short_count(base.num_weights)} weights; halve it if the loss jumps")


def round_up(tokens: int) -> int:
    """Round a number of tokens up to a length for `data.max_length`."""
    step = _by_size(LENGTH_STEPS, tokens)
    return math.ceil(tokens / step) * step


def _by_size(table: tuple[tuple[float, Any], ...], size: float) -> Any:
    """Return the value of the first row whose limit is above `size`."""
    return next(value for limit, value in table if size < limit)


def _size_text(base: BaseLook) -> str:
    positions = f", {base.positions:,} positions" if base.positions else ""
    return f"{base.content['model_type']}, {short_count(base.num_weights)} weights{positions}"


def _rows_text(data: DataLook) -> str:
    more = "more than " if data.is_partial else ""
    tokens = "tokens" if data.is_counted else "tokens by characters"
    return f"{more}{data.num_rows:,} rows; median about {data.median:,} {tokens}, longest {data.longest:,}"
