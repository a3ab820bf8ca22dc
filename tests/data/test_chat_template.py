"""A chat template that writes the current date renders the same text tomorrow."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from qlora_train.config import DataSection
from qlora_train.data import encode_chat, prepare_data, render_chat
from qlora_train.data.chat_template import DIRECTIVES, ChatRenderer
from qlora_train.data.row_encoder import RowEncoder
from qlora_train.data.types import Message, Row
from qlora_train.utils.errors import DataError
from tests.support.pico import CHATML, build_tokenizer

DATE, NEXT_DATE = datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)
TURNS: list[Message] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
DATED = "{%- if strftime_now is defined %}{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{%- endif %}" + CHATML
WITH_BLOCK = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}<|im_start|>user\n"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(template: Any) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write_rows(folder: Path) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(3)))
    return str(file)


@pytest.mark.parametrize("template", [DATED, WITH_BLOCK], ids=["plain", "generation block"])
def test_rows_depend_on_the_date_that_is_given_and_not_on_today(template: str) -> None:
    tokenizer = tokenizer_with(template)
    for date in (DATE, NEXT_DATE):
        example = RowEncoder(tokenizer, train_on="assistant", date=date).encode(Row("row", tuple(TURNS)))
        written = date.strftime("%d %b %Y") if template == DATED else date.isoformat()
        assert written in tokenizer.decode(example.input_ids)
        assert tokenizer.decode(example.input_ids[example.loss_mask]) == "hello<|im_end|>"


def test_a_date_gives_the_same_data_again_and_another_date_does_not(tmp_path: Path) -> None:
    tokenizer, data = tokenizer_with(DATED), DataSection(train=write_rows(tmp_path))
    first, again, other = (prepare_data(data, tokenizer, 0, date=date).fingerprint for date in (DATE, DATE, NEXT_DATE))
    assert first == again != other


def test_generation_blocks_are_characters_of_the_dated_text() -> None:
    tokenizer = tokenizer_with(WITH_BLOCK)
    text = render_chat(tokenizer, TURNS, date=DATE)
    ((begin, end),) = ChatRenderer(tokenizer, DATE).generation_blocks(TURNS) or ()
    assert text[begin:end] == "hello<|im_end|>"
    assert text.startswith(DATE.isoformat())


def test_without_a_date_rows_are_rendered_for_today(tmp_path: Path) -> None:
    tokenizer, data = tokenizer_with(DATED), DataSection(train=write_rows(tmp_path))
    before = datetime.date.today()
    fingerprint = prepare_data(data, tokenizer, 0).fingerprint
    days = {before, datetime.date.today()}
    assert fingerprint in {prepare_data(data, tokenizer, 0, date=day).fingerprint for day in days}


def test_a_dated_template_is_reported_and_an_undated_one_does_not_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSection(train=write_rows(tmp_path))
    with caplog.at_level(logging.DEBUG, "qlora_train"):
        prints = {prepare_data(data, build_tokenizer(), 0, date=date).fingerprint for date in (DATE, NEXT_DATE)}
        assert len(prints) == 1
        assert "current date" not in caplog.text
        prepare_data(data, tokenizer_with(DATED), 0, date=DATE)
    assert "chat template: prints the current date; every row is rendered for 2024-02-29" in caplog.text


@pytest.mark.parametrize(
    "template",
    [
        DATED, WITH_BLOCK, CHATML, "\n\n" + DATED, "  " + DATED,
        "\n  {{ strftime_now('%d') }}\n" + CHATML,
        "  {% if true %}\n " + DATED + "{% endif %}\n\n",
        "{% macro system() %}{{ strftime_now('%A, %-d %B %Y %%d') }}{% endmacro %}"
        "{% for m in messages %}{{ system() + m['content'] }}{% endfor %}",
        "{% set today = strftime_now(format='%d') %}{{ today | int + 1 }}{{ messages[0]['content'] }}",
        {"default": DATED, "tool_use": "other"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_todays_rendering_is_that_of_transformers(template: Any, add_generation_prompt: bool) -> None:
    tokenizer = tokenizer_with(template)
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    for _ in range(2):  # midnight may come between the two renderings, but not twice
        today = datetime.date.today()
        expected = tokenizer.apply_chat_template(TURNS, tokenize=False, **options)
        if today == datetime.date.today():
            break
    assert render_chat(tokenizer, TURNS, date=today, **options) == expected
    assert encode_chat(tokenizer, TURNS, date=today, **options) == tokenizer(expected)["input_ids"]


formats = st.lists(st.sampled_from([*(f"%{letters}" for letters in DIRECTIVES), "%%", " ", "d", "'", "é"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(date=st.dates(datetime.date(1000, 1, 1)), parts=formats)
def test_dates_are_written_as_by_strftime(date: datetime.date, parts: list[str]) -> None:
    format_ = "".join(parts)
    tokenizer = tokenizer_with("<{{ strftime_now(messages[0]['content']) }}>")
    expected = datetime.datetime.combine(date, datetime.time()).strftime(format_)
    assert render_chat(tokenizer, [{"role": "user", "content": format_}], date=date) == f"<{expected}>"


def test_a_format_that_is_not_known_is_refused_before_any_row() -> None:
    it = RowEncoder(tokenizer_with("{{ strftime_now('%Q') }}" + CHATML), train_on="assistant", date=DATE)
    with pytest.raises(DataError, match=r"cannot be trained with: .* the format %Q holds an unknown directive"):
        it.encode(Row("row", tuple(TURNS)))


def test_a_template_that_fails_in_python_fails_as_a_template() -> None:
    tokenizer = tokenizer_with("{{ 'a' + 1 }}")
    with pytest.raises(TemplateError, match="TypeError"):
        render_chat(tokenizer, TURNS, date=DATE)
    with pytest.raises(DataError, match="the tokenizer's chat template cannot be trained with"):
        RowEncoder(tokenizer, train_on="assistant", date=DATE).encode(Row("row", tuple(TURNS)))
