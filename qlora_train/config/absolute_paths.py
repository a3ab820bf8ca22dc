"""Make the local paths of a config absolute."""

import glob
from pathlib import Path
from typing import Any

from qlora_train.config.path_checks import is_local_data, is_local_model
from qlora_train.config.schema import CHAT_TEMPLATE_NAMES, RunConfig, Source


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths, except `run.output_dir`, where it will be saved."""
    model, lora, data = config.model, config.lora, config.data
    template = model.chat_template
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "model_name_or_path": _absolute(model.model_name_or_path)
            if is_local_model(model.model_name_or_path)
            else model.model_name_or_path,
            "chat_template": template if template in (None, *CHAT_TEMPLATE_NAMES) else _absolute(str(template)),
        },
        "lora": {"adapter_path": lora.adapter_path and _absolute(lora.adapter_path)},
        "data": {
            "train": _absolute_sources(data.train),
            "eval": _absolute_sources(data.eval) if isinstance(data.eval, tuple) else data.eval,
            "cache_dir": data.cache_dir and _absolute(data.cache_dir),
        },
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )


def _absolute_sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(
        source.model_copy(update={"path": _absolute_pattern(source.path)}) if is_local_data(source.path) else source
        for source in sources
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _absolute_pattern(path: str) -> str:
    is_pattern = glob.has_magic(path) and not Path(path).expanduser().exists()
    if is_pattern and not Path(path).expanduser().is_absolute():
        return str(Path(glob.escape(str(Path.cwd()))) / path)
    return _absolute(path)
