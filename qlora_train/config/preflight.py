"""Checks that files, packages and trackers of a run exist on this machine; without torch."""

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_train.config import RunConfig, Source
from qlora_train.config.path_checks import is_local_data, is_local_model
from qlora_train.config.schema import CHAT_TEMPLATE_NAMES
from qlora_train.utils import network
from qlora_train.utils.errors import ConfigError, did_you_mean
from qlora_train.utils.trackers import TRACKERS

FLASH_ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Module and package of each attention implementation."""


def check_machine(config: RunConfig) -> None:
    """Raise a ConfigError with one line per setting whose file or package is missing."""
    if problems := list(_problems(config)):
        raise ConfigError(problems)


def _problems(config: RunConfig) -> Iterator[str]:
    model, adapter = config.model, config.lora.adapter_path
    if problem := missing_model(model.model_name_or_path):
        yield f"model.model_name_or_path: {problem}"
    if model.chat_template is not None and (problem := unknown_template(model.chat_template)):
        yield f"model.chat_template: {problem}"
    if problem := missing_attention(model.attn_implementation):
        yield problem
    if adapter is not None and not Path(adapter).expanduser().is_dir():
        yield f"lora.adapter_path: {adapter} does not exist; give a folder that PEFT wrote"
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for source in sources if isinstance(sources, tuple) else ():
            if problem := _missing_source(source):
                yield f"{key}: {problem}"
    yield from tracker_problems(config.run.report_to)


def missing_model(name: str) -> str | None:
    """Return the error for a missing local base model, or None; Hub ids are not checked."""
    path = Path(name).expanduser()
    if not is_local_model(name) or path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return None
    return (
        f"{name} {'is a file' if path.is_file() else 'does not exist'}; give a folder with config.json and safetensors, a "
        ".gguf file, or a Hub id such as meta-llama/Llama-2-7b-hf"
    )


def unknown_template(name_or_file: str) -> str | None:
    """Return the error for an unknown chat template, or None."""
    if name_or_file in CHAT_TEMPLATE_NAMES or Path(name_or_file).expanduser().is_file():
        return None
    hint = did_you_mean(name_or_file, CHAT_TEMPLATE_NAMES)
    return f"{name_or_file!r} is neither a name nor a file; allowed: {', '.join(CHAT_TEMPLATE_NAMES)} or a Jinja file{hint}"


def missing_attention(setting: str) -> str | None:
    """Return the error for a missing attention package, or None; the package `kernels` downloads them."""
    module, package = FLASH_ATTENTION.get(setting, ("", ""))
    if not module or any(importlib.util.find_spec(name) is not None for name in (module, "kernels")):
        return None
    return (
        f"model.attn_implementation: {setting} needs the package {package}, which is not installed; install it, or use "
        "auto or sdpa"
    )


def _missing_source(source: Source) -> str | None:
    try:
        return missing_data(source.path)
    except OSError as error:
        return f"{source.path} cannot be read: {error.strerror}"


def missing_data(text: str) -> str | None:
    """Return the error for a missing local file, folder or pattern, or None; Hub ids are not checked."""
    path = Path(text).expanduser()
    if path.exists() or not is_local_data(text):
        return None
    if glob.has_magic(text):
        return None if any(glob.iglob(str(path), recursive=True)) else no_match(path)  # noqa: PTH207
    return f"{text} does not exist{_nearest_file(path)}"


def no_match(pattern: Path) -> str:
    """Return the error for a pattern without matches."""
    return f"the pattern {pattern} matches no file; check the folder and the suffix"


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    # of files with the same stem, the one with the same suffix comes last, and counts
    entries = sorted(path.parent.iterdir(), key=lambda entry: entry.suffix == path.suffix)
    by_stem = {entry.name.partition(".")[0]: str(entry) for entry in entries}
    hint = did_you_mean(path.name.partition(".")[0], by_stem)
    return hint or f"; the folder is {path.parent.resolve()}"


def tracker_problems(names: Sequence[str]) -> Iterator[str]:
    """Yield an error per tracker that is missing, needs a network while offline, or is to upload checkpoints."""
    for name in names:
        tracker = TRACKERS[name]
        variable, uploads = tracker.remote_server_variable(), tracker.upload_variable()
        if importlib.util.find_spec(name) is None:
            yield f"run.report_to: {name} is not installed; run: pip install {name}, or drop it"
        elif network.is_offline() and variable:
            yield (
                f"run.report_to: {name} uses the network ({variable}), but this run is offline; unset {variable}, or "
                f"drop {name}"
            )
        elif uploads:
            yield (
                f"run.report_to: {uploads}={os.environ[uploads]} uploads checkpoints in Transformers' layout, which this "
                f"run does not write; unset {uploads}"
            )
