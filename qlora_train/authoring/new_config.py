"""Write a new config: look at base and data, choose a recipe and settings, write the file, check it and plan the run."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_train.authoring.base_look import BaseLook, look_at_base
from qlora_train.authoring.choices import choose_recipe, choose_settings
from qlora_train.authoring.config_text import config_text
from qlora_train.authoring.data_look import DataLook, look_at_data
from qlora_train.authoring.memory_fit import fit_micro_batch
from qlora_train.authoring.recipe_files import EXAMPLES, Choice, Recipe, example_file, read_recipe, recipe_names
from qlora_train.config import ModelSection, RunConfig, Source, load_run_config
from qlora_train.config.preflight import check_machine
from qlora_train.config.schema import Section
from qlora_train.data.reason_counts import max_dropped_rows
from qlora_train.data.sources import find_files
from qlora_train.planning.plan_device import PlanDevice, plan_device
from qlora_train.planning.plan_text import plan_lines
from qlora_train.planning.run_plan import plan_run
from qlora_train.planning.workload import RowSizes
from qlora_train.utils.errors import ConfigError
from qlora_train.utils.secrets import secret_error

SUFFIXES = re.compile(r"\.(jsonl|json|csv|tsv|txt|parquet|arrow|ndjson|gguf)(\.(gz|zst))?$")
DEFAULT_RECIPE = "chat"
"""Without data and without a recipe."""


def recipe_lines() -> list[str]:
    """Return a line per recipe, for `new --recipe list`."""
    names = recipe_names()
    width = max(map(len, names))
    return [f"{name:<{width}}  {read_recipe(name).purpose}" for name in names]


def write_new_config(
    model: str,
    *,
    data: str | None,
    recipe: str | None,
    output: Path | None,
    held_out: str | None = None,
    memory: str | None = None,
) -> list[str]:
    """Write a config and check it; return lines that say where it is and what the run needs.

    Args:
        model: for `model.model_name_or_path`.
        data: for `data.train`; None: the recipe's example rows.
        recipe: a name; None: by the data.
        output: the file; None: named after model and data.
        held_out: for `data.eval`; None: a share of the data.
        memory: of the GPU to plan for, such as 24GiB; None: the device of this machine.

    Raises:
        UserError: model or data cannot be read, the recipe does not fit, or the file exists.
    """
    if secret := secret_error(f"{model} {data} {held_out}"):
        raise ConfigError(f"new: {secret}")
    if output is not None:
        _refuse_existing(output)
    chosen = read_recipe(recipe or DEFAULT_RECIPE) if recipe or data is None else None
    base = look_at_base(_validated(ModelSection, {"model_name_or_path": model}, "MODEL"))
    source = Choice(data) if data is not None else _example_of(chosen)
    path = source.value if isinstance(source.value, dict) else {"path": source.value}
    looked = look_at_data(_validated(Source, path, "--data"), base.tokenizer)
    reason = "asked for" if recipe else "no data given"
    if chosen is None:
        name, reason = choose_recipe(looked, base)
        chosen = read_recipe(name)
    file = output or Path(f"{_slug(model)}-{_slug(data or chosen.name)}.yaml")
    _refuse_existing(file)
    settings = choose_settings(chosen, base, looked, source, _free_output_dir(file.stem))
    if held_out is not None:
        find_files(_validated(Source, {"path": held_out}, "--eval"), "--eval")
        settings["data.eval"] = Choice(held_out, "held-out rows")
    device = plan_device(memory)
    if device.on_gpu:
        fit_micro_batch(settings, base, device)
    with file.open("x", encoding="utf-8") as written:
        written.write(config_text(settings, chosen, str(file)))
    config = load_run_config(file)
    check_machine(config)
    plan = _plan(config, base, looked, device)
    return list(_summary(file, f"recipe {chosen.name}: {reason}", looked, config.data.max_dropped, plan))


def _validated(section: type[Section], values: dict[str, Any], where: str) -> Any:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            [f"{where}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors()]
        ) from None


def _example_of(recipe: Recipe | None) -> Choice:
    assert recipe is not None, "without data there is a recipe"
    train = recipe.settings["data.train"].value
    if isinstance(train, str) and train.startswith(EXAMPLES):
        train = str(example_file(train))
    return Choice(train, "example rows, put your file here: ")


def _summary(file: Path, recipe: str, data: DataLook, max_dropped: float, plan: list[str]) -> Iterator[str]:
    yield f"wrote     {file} ({recipe}; checked: ok)"
    yield from _unusable_rows(data, max_dropped)
    yield from plan
    yield f"next      qlora-train data {file}, then qlora-train {file}"


def _unusable_rows(data: DataLook, max_dropped: float) -> Iterator[str]:
    """Yield which rows cannot be used, and what a run does with them."""
    num_unusable = data.unusable.total
    if not num_unusable:
        return
    num_rows = data.num_rows + num_unusable
    num_allowed = max_dropped_rows(max_dropped, num_rows)
    yield f"warning   {num_unusable:,} of {num_rows:,} rows cannot be used: {data.unusable.summary()}"
    limit = f"data.max_dropped ({max_dropped:g}) allows {num_allowed:,}"
    if num_unusable <= num_allowed:
        yield f"          a run drops them: {limit}"
        return
    needed = math.ceil(100 * num_unusable / num_rows) / 100
    yield f"          a run will stop: {limit}; correct these rows, or set data.max_dropped: {needed:g}"


def _plan(config: RunConfig, base: BaseLook, data: DataLook, device: PlanDevice) -> list[str]:
    sizes = RowSizes.most(config)
    if not data.is_partial:
        share = config.data.eval if isinstance(config.data.eval, float) else 0.0
        sizes = replace(sizes, num_rows=round(data.num_rows * (1 - share)))
    planned = plan_run(config, base.content, device, sizes, is_local=base.is_local)
    return plan_lines(planned, base.name, base.origin)


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"{file} exists and is not overwritten; give another name with -o, or delete it")
    if not file.parent.is_dir():
        raise ConfigError(f"-o {file}: its folder {file.parent} does not exist; make it first")


def _slug(name: str) -> str:
    """Return the last part of a path or Hub id as the part of a file name."""
    last = Path(name.rstrip("/")).name.lower()
    stem = SUFFIXES.sub("", last)
    return re.sub(r"[^a-z0-9.]+", "-", stem).strip("-.") or "model"


def _free_output_dir(stem: str) -> str:
    """Return runs/STEM, or with the first number that makes it new."""
    names = (f"runs/{stem}", *(f"runs/{stem}-{number}" for number in range(2, 1000)))
    return next(name for name in names if not Path(name).exists())
