"""Chat templates for base models that come without one, written here after the description of each format.

All begin with the tokenizer's bos token where it has one, and end every assistant turn with `end_of_turn`, which must
be one token of the vocabulary: a model can only learn to stop with a token of its own.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qlora_train.config.preflight import unknown_template
from qlora_train.utils.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and the tokens that it needs.

    Attributes:
        name: in `CHAT_TEMPLATES`, or the path of a file.
        jinja: the text for `tokenizer.chat_template`.
        end_of_turn: ends an assistant turn; None: the tokenizer's eos token, or what a file writes.
        special_tokens: texts that must be single tokens.
    """

    name: str
    jinja: str
    end_of_turn: str | None
    special_tokens: tuple[str, ...]

    def ending_with(self, token: str) -> "ChatTemplate":
        """Return this template with another end-of-turn token, for a vocabulary that lacks its own."""
        assert self.end_of_turn is not None, "a template without an end-of-turn text of its own ends with eos_token"
        others = tuple(text for text in self.special_tokens if text != self.end_of_turn)
        jinja = self.jinja.replace(_setting(self.end_of_turn), _setting(token))
        return dataclasses.replace(self, jinja=jinja, end_of_turn=token, special_tokens=(*others, token))


def _setting(end_of_turn: str) -> str:
    return "{%- set end_of_turn = '" + end_of_turn + "' -%}"


BOS = "{{- bos_token if bos_token is defined and bos_token else '' -}}"
UNKNOWN_ROLE = "{{- raise_exception('this chat template has no turns with role ' + message['role']) -}}"
SYSTEM_FIRST = (
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] | trim -%}{%- set turns = messages[1:] -%}"
    "{%- endif -%}"
)
"""Removes the system turn, for formats that write it into the first user turn."""

_CHATML = (
    BOS + "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + end_of_turn + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_LLAMA3 = (
    BOS + "{%- for message in messages -%}"
    "{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] | trim + end_of_turn -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
_LLAMA2 = (
    SYSTEM_FIRST + "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set preamble = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' -%}"
    + BOS
    + "{{- '[INST] ' + preamble + message['content'] | trim + ' [/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] | trim + ' ' + end_of_turn -}}"
    "{%- else -%}" + UNKNOWN_ROLE + "{%- endif -%}"
    "{%- endfor -%}"
)
_MISTRAL = (
    SYSTEM_FIRST + BOS + "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set preamble = system + '\\n\\n' if loop.first and system else '' -%}"
    "{{- '[INST] ' + preamble + message['content'] | trim + ' [/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] | trim + end_of_turn -}}"
    "{%- else -%}" + UNKNOWN_ROLE + "{%- endif -%}"
    "{%- endfor -%}"
)
_GEMMA = (
    SYSTEM_FIRST + BOS + "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set preamble = system + '\\n\\n' if loop.first and system else '' -%}"
    "{{- '<start_of_turn>user\\n' + preamble + message['content'] | trim + '<end_of_turn>\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<start_of_turn>model\\n' + message['content'] | trim + end_of_turn + '\\n' -}}"
    "{%- else -%}" + UNKNOWN_ROLE + "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
_ALPACA = (
    SYSTEM_FIRST
    + BOS
    + "{{- (system or 'Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.') + '\\n\\n' -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' -}}"
    "{%- else -%}" + UNKNOWN_ROLE + "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)


def _ends_with(name: str, end_of_turn: str, body: str, *special_tokens: str) -> ChatTemplate:
    return ChatTemplate(name, _setting(end_of_turn) + body, end_of_turn, (*special_tokens, end_of_turn))


CHAT_TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType(
    {
        "chatml": _ends_with("chatml", "<|im_end|>", _CHATML, "<|im_start|>"),
        "llama2": _ends_with("llama2", "</s>", _LLAMA2),
        "llama3": _ends_with("llama3", "<|eot_id|>", _LLAMA3, "<|start_header_id|>", "<|end_header_id|>"),
        "mistral": _ends_with("mistral", "</s>", _MISTRAL),
        "gemma": _ends_with("gemma", "<end_of_turn>", _GEMMA, "<start_of_turn>"),
        "alpaca": ChatTemplate("alpaca", _ALPACA, None, ()),
    }
)
"""By the names allowed for `model.chat_template`."""


def resolve_chat_template(name_or_file: str) -> ChatTemplate:
    """Return the named template, or the one in a Jinja file.

    Raises:
        ConfigError: it is neither a name nor a readable, non-empty file.
    """
    if name_or_file in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name_or_file]
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return _from_file(path)
    raise ConfigError(f"model.chat_template: {unknown_template(name_or_file)}")


def _from_file(path: Path) -> ChatTemplate:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark would begin every row
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template: {path} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ConfigError(f"model.chat_template: {path} is empty; expected a Jinja chat template")
    return ChatTemplate(str(path), text, None, ())
