"""Chat template files that AutoTokenizer does not read, or reads with a byte order mark."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_train.utils.errors import ModelError

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "chat_template.json"
"""The template's file of Transformers 4 processors; AutoTokenizer does not read it."""
BYTE_ORDER_MARK = "\ufeff"


def complete_chat_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Use the processor's chat template for a tokenizer without one, and remove byte order marks.

    Raises:
        ModelError: the processor's file holds no template.
    """
    file = folder / PROCESSOR_FILE
    if tokenizer.chat_template is None and file.is_file():
        tokenizer.chat_template = _processor_template(file)
        logger.debug("chat template: from the processor (%s, the tokenizer has none)", PROCESSOR_FILE)
    template = tokenizer.chat_template
    cleaned = _without_mark(template)
    if cleaned != template:
        tokenizer.chat_template = cleaned
        logger.debug("chat template: byte order mark removed (it would precede every row)")


def _processor_template(file: Path) -> str | dict[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        content = None
    template: Any = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, list) and all(
        isinstance(it, dict) and {"name", "template"} <= it.keys() for it in template
    ):
        template = {it["name"]: it["template"] for it in template}
    named: dict[str, str] = template if isinstance(template, dict) else {"default": template}
    if not named or not all(isinstance(text, str) and text.strip() for text in named.values()):
        raise ModelError(
            f"model.model_name_or_path: {file}: found no chat template; expected {{chat_template: a text}}: "
            "download it again, or set model.chat_template"
        )
    return named["default"] if list(named) == ["default"] else named


def _without_mark(template: Any) -> Any:
    if isinstance(template, dict):
        return {name: _without_mark(text) for name, text in template.items()}
    return template.removeprefix(BYTE_ORDER_MARK) if isinstance(template, str) else template
