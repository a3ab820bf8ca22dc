"""Chat templates in files that AutoTokenizer does not read, or reads with a byte order mark."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import ModelSection
from qlora_train.models import load_tokenizer, resolve_base
from qlora_train.utils.errors import ModelError
from tests.support.pico import CHATML

TOOL_USE = "{{ tools | tojson }}" + CHATML
MARK = "\ufeff"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def base(pico_llama: Path, tmp_path: Path) -> Path:
    """A base without weights and without a chat template."""
    folder = tmp_path / "base"
    shutil.copytree(pico_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.*"))
    return folder


def tokenizer_of(folder: Path, **model: Any) -> Any:
    section = ModelSection(model_name_or_path=str(folder), **model)
    return load_tokenizer(resolve_base(section), section)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (CHATML, CHATML),
        ([{"name": "default", "template": CHATML}], CHATML),
        ([{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOL_USE}],
         {"default": CHATML, "tool_use": TOOL_USE}),
        ({"default": CHATML}, CHATML),
        ({"default": MARK + CHATML, "tool_use": TOOL_USE}, {"default": CHATML, "tool_use": TOOL_USE}),
    ],
    ids=["text", "list of one", "list", "mapping of one", "mapping"],
)  # fmt: skip
def test_processor_chat_template_is_used_without_a_tokenizer_template(
    base: Path, content: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "chat_template.json").write_text(json.dumps({"chat_template": content}))
    with caplog.at_level("DEBUG", logger="qlora_train"):
        tokenizer = tokenizer_of(base)
    assert tokenizer.chat_template == expected
    assert "chat template: from the processor (chat_template.json, the tokenizer has none)" in caplog.text
    assert tokenizer_of(base, chat_template="alpaca").chat_template not in (expected, CHATML), "the config's goes first"


def test_processor_chat_template_does_not_replace_the_tokenizers(base: Path) -> None:
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TOOL_USE}))
    (base / "chat_template.jinja").write_text(CHATML)
    assert tokenizer_of(base).chat_template == CHATML


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"chat_template": ""}', '{"chat_template": []}', '{"chat_template": [{"name": "a"}]}',
             '{"chat_template": {"default": 3}}'],
)  # fmt: skip
def test_processor_file_without_a_template_is_refused_by_name(base: Path, text: str) -> None:
    (base / "chat_template.json").write_text(text)
    with pytest.raises(ModelError, match=r"chat_template\.json: found no chat template; expected \{chat_template: "):
        tokenizer_of(base)


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "the config's"]
)
def test_byte_order_mark_of_a_template_precedes_no_row(
    base: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {}
    if place == "chat_template.jinja":
        (base / place).write_text(MARK + CHATML)
    elif place == "chat_template.json":
        (base / place).write_text(MARK + json.dumps({"chat_template": MARK + CHATML}))
    elif place == "tokenizer_config.json":
        content = json.loads((base / place).read_text()) | {"chat_template": MARK + CHATML}
        (base / place).write_text(json.dumps(content))
    else:
        (base / "own.jinja").write_text(MARK + CHATML)
        settings = {"chat_template": str(base / "own.jinja")}
    with caplog.at_level("DEBUG", logger="qlora_train"):
        text = tokenizer_of(base, **settings).apply_chat_template(TURNS, tokenize=False)
    assert text.startswith("<|im_start|>user\nhi<|im_end|>")
    assert ("byte order mark removed" in caplog.text) == (place != "the config's")
