"""A look at a base model without weights and without torch: config.json, chat template, and the tokenizer if it is a file.

Of a Hub model, only config.json and the tokenizer's files are fetched. A model that a table describes needs no network; its
chat template is then unknown.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.architectures import default_chat_template, detect, max_positions
from qlora_train.config import LoraSection, ModelSection
from qlora_train.planning.base_config import find_base_config
from qlora_train.planning.run_plan import model_shapes

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True)
class BaseLook:
    """What a config depends on.

    Attributes:
        origin: where its config.json is from.
        num_weights: of the whole model.
        positions: maximum input length in tokens; None if unlimited or unknown.
        has_template: a chat template; None if it cannot be known.
        default_template: for a base without one, a name of `model.chat_template`.
        tokenizer: of the package `tokenizers`; None if it would need a conversion.
    """

    name: str
    content: Mapping[str, Any]
    origin: str
    is_local: bool
    num_weights: int
    positions: int | None
    has_template: bool | None
    default_template: str
    tokenizer: Any

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any("experts" in key and isinstance(value, int) and value > 1 for key, value in self.content.items())


def look_at_base(model: ModelSection) -> BaseLook:
    """Look at a base model.

    Raises:
        ModelError: it does not exist, or config.json cannot be read or describes no causal language model.
    """
    found = find_base_config(model)
    architecture = detect(found.content)
    path = Path(model.model_name_or_path).expanduser()
    tokenizer: Any = None
    has_template: bool | None
    if path.suffix == ".gguf":
        vocabulary, has_template = _gguf_tokenizer(path)
    else:
        files = _tokenizer_files(model, path)
        tokenizer = _tokenizer(files.get(TOKENIZER))
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        has_template = _has_template(files) if files else None
    return BaseLook(
        name=model.model_name_or_path,
        content=found.content,
        origin=found.origin,
        is_local=found.is_local,
        num_weights=model_shapes(found.content, LoraSection()).numel,
        positions=max_positions(found.content, architecture),
        has_template=has_template,
        default_template=default_chat_template(architecture, vocabulary),
        tokenizer=tokenizer,
    )


def _tokenizer_files(model: ModelSection, path: Path) -> dict[str, Path]:
    """Return the files of the tokenizer by name: of a folder, or of the Hub if it can be reached."""
    names = (TOKENIZER, TOKENIZER_CONFIG, *TEMPLATE_FILES)
    if path.is_dir():
        return {name: path / name for name in names if (path / name).is_file()}
    return {name: file for name in names if (file := _hub_file(model, name)) is not None}


def _hub_file(model: ModelSection, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.model_name_or_path, name, revision=model.revision))
    except OSError:  # no such file, no network, or no access: config.json was enough
        return None


def _tokenizer(file: Path | None) -> Any:
    if file is None:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # of a newer format: lengths are estimated
        return None


def _has_template(files: Mapping[str, Path]) -> bool:
    if any(name in files for name in TEMPLATE_FILES):
        return True
    try:
        content = json.loads(files[TOKENIZER_CONFIG].read_text(encoding="utf-8-sig"))
    except (KeyError, OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))


def _gguf_tokenizer(path: Path) -> tuple[Container[str], bool]:
    """Return the vocabulary of a GGUF file, and whether it has a chat template."""
    from qlora_train.architectures.gguf_header import read_header

    header = read_header(path)
    return set(header.vocabulary("tokens") or ()), header.chat_template is not None
