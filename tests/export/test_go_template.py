"""The TEMPLATE of a Modelfile writes the prompts that the tokenizer's own chat template writes, or there is none."""

import datetime
import logging
from typing import Any

import pytest

from qlora_train.data.chat_template import render_chat
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES
from qlora_train.export.gguf.go_template import UnsupportedTemplateError, find_separators
from qlora_train.export.gguf.modelfile import modelfile
from tests.support.go_templates import GoTemplateError, answer_prompt, read_modelfile, render
from tests.support.pico import CHATML, build_tokenizer

WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful, \"Bob\" {{}}<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<turn>' + message['role'] + '\n' + message['content'] + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
TEMPLATES = {name: template.jinja for name, template in CHAT_TEMPLATES.items()} | {
    "default system": WITH_DEFAULT_SYSTEM,
    "no system": NO_SYSTEM,
}
CONTENTS = (
    "How much?",
    'He said: "{{ .Role }}" }} \\n $x',
    "Ça coûte 5 €\n\n```\n{% if %}\n```",
    "more",
    "…",
    "🦙",
    "end",
)


def tokenizer_with(jinja: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = jinja
    return tokenizer


def expected(tokenizer: Any, turns: list[Any]) -> str:
    return render_chat(tokenizer, turns, date=datetime.date(2026, 1, 2), add_generation_prompt=True)


def conversation(order: str) -> list[Any]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": content} for letter, content in zip(order, CONTENTS, strict=False)]


def template_of(text: str) -> str:
    """Return what a Modelfile says between the quotes of its TEMPLATE."""
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_template_writes_what_the_chat_template_writes(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    go = template_of(modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=False))
    for order in ("u", "uau", "uauau", *(() if name == "no system" else ("su", "suau", "suauau"))):
        turns = conversation(order)
        assert render(go, turns) == expected(tokenizer, turns), order


@pytest.mark.parametrize("name", [name for name, jinja in TEMPLATES.items() if "bos_token" in jinja])
def test_beginning_token_is_left_to_a_program_that_writes_it(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    go = template_of(modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=True))
    assert "<s>" + render(go, conversation("uau")) == expected(tokenizer, conversation("uau"))


def test_conversation_that_was_cut_before_an_answer_has_an_empty_question() -> None:
    tokenizer = tokenizer_with(TEMPLATES["no system"])
    go = template_of(modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=False))
    empty = {"role": "user", "content": ""}
    turns = conversation("uau")[1:]
    assert render(go, turns) == expected(tokenizer, [empty, *turns])


def test_role_that_the_model_does_not_know_is_an_error() -> None:
    tokenizer = tokenizer_with(TEMPLATES["no system"])
    go = template_of(modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=False))
    with pytest.raises(GoTemplateError):
        render(go, conversation("su"))


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ strftime_now('%d') }}" + WITH_DEFAULT_SYSTEM, "today's date"),
        ("{% for m in messages %}{{ m['role'] + loop.index|string + m['content'] }}{% endfor %}", "its neighbours"),
        ("{% for m in messages %}{{ m['role'] + m['content']|upper }}{% endfor %}", "rewrites"),
        ("{{ messages[-1]['content'] }}", "omits"),
        ("{{ raise_exception('never') }}", "refuses a plain conversation"),
    ],
)
def test_unsupported_template_is_not_written(jinja: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "qlora_train")
    logging.getLogger("qlora_train").propagate = True
    text = modelfile(tokenizer_with(jinja), model="m.gguf", adapter=None, adds_bos=False)
    assert 'TEMPLATE "' not in text
    assert reason in text
    assert reason in caplog.text


def test_beginning_token_that_no_prompt_has_is_no_template() -> None:
    with pytest.raises(UnsupportedTemplateError, match="does not write it"):
        find_separators(lambda turns: expected(tokenizer_with(WITH_DEFAULT_SYSTEM), list(turns)), "")[0].without_bos(
            "<s>"
        )


def test_contents_that_render_differently_are_listed() -> None:
    said = {}
    for name in ("chatml", "llama3"):
        tokenizer = tokenizer_with(TEMPLATES[name])
        said[name] = find_separators(lambda turns, t=tokenizer: expected(t, list(turns)), tokenizer.chat_template)[1]
    assert said["chatml"] == []
    assert "white space" in said["llama3"][0]


def test_modelfile_names_files_and_ends() -> None:
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    lines = modelfile(tokenizer, model="./base-f16.gguf", adapter="./run-lora-f16.gguf", adds_bos=False).splitlines()
    assert lines[:2] == ["FROM ./base-f16.gguf", "ADAPTER ./run-lora-f16.gguf"]
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'


@pytest.mark.parametrize(
    "system", ["Be brief.", "  two\n\n# lines\t\n", 'say "hi"', 'a """b""" c', "\n", "Ü 🚀 {{ .Role }}"]
)
@pytest.mark.parametrize("name", ["chatml", "default system"])
def test_system_prompt_of_the_rows_stands_before_every_chat(name: str, system: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    text = modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=False, system=system)
    turns = conversation("uau")
    assert answer_prompt(text, turns) == expected(tokenizer, [{"role": "system", "content": system}, *turns])
    own = conversation("su")
    assert answer_prompt(text, own) == expected(tokenizer, own)


@pytest.mark.parametrize("system", ['"""\nx', 'a """ \nb', "a\u200db", "a\xa0b"])
def test_system_prompt_that_a_modelfile_cannot_hold_is_a_warning(
    system: str, messages: pytest.LogCaptureFixture
) -> None:
    text = modelfile(tokenizer_with(CHATML), model="m.gguf", adapter=None, adds_bos=False, system=system)
    assert "SYSTEM" not in read_modelfile(text)
    assert "no SYSTEM (a Modelfile cannot hold the system prompt of the training rows" in messages.text


def test_template_keeps_characters_that_a_modelfile_drops() -> None:
    tokenizer = tokenizer_with(CHATML.replace("'<|im_start|>'", "'<|im_start|>\u200d\xa0'"))
    text = modelfile(tokenizer, model="m.gguf", adapter=None, adds_bos=False)
    assert answer_prompt(text, conversation("uau")) == expected(tokenizer, conversation("uau"))
