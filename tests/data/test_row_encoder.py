"""Masks against an oracle: contents are replaced by markers, which shows the template's own text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlora_train.config.schema import CHAT_TEMPLATE_NAMES
from qlora_train.data import template_layout
from qlora_train.data.chat_template import ChatRenderer
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES, resolve_chat_template
from qlora_train.data.row_encoder import CROSSES_PROMPT_END, TWO_BOS, RowEncoder
from qlora_train.data.types import Example, Message, Row, UnusableRowError
from qlora_train.utils.errors import ConfigError, DataError
from tests.support.chat_oracle import DATE, label_texts, metaspace_tokenizer
from tests.support.pico import build_tokenizer

TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}"
GENERATION_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
EVERY_TURN = TURN + "{{ m['content'] }}"
TEMPLATES = {
    **{name: template.jinja for name, template in CHAT_TEMPLATES.items()},
    "generation block": "{% for m in messages %}{% if m['role'] == 'assistant' %}" + TURN + "{% generation %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}" + EVERY_TURN + "{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}" + GENERATION_PROMPT,
    "generation block without the end": "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + GENERATION_PROMPT,
    "eos after the last turn": "{% for m in messages %}" + EVERY_TURN + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    "empty thoughts in the last turn": "{% for m in messages %}"
    + TURN
    + "{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + GENERATION_PROMPT,
}
TOOLS: tuple[dict[str, Any], ...] = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
STRIPS_THOUGHTS = (
    "{% for m in messages %}" + TURN + "{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + GENERATION_PROMPT
)


def tokenizer_for(name: str, jinja: str | None = None) -> Any:
    """Return the pico tokenizer with a template and the special tokens that it needs."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = jinja or TEMPLATES[name]
    special = CHAT_TEMPLATES[name].special_tokens if name in CHAT_TEMPLATES else ()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(special)}, False)
    if name in CHAT_TEMPLATES:
        tokenizer.eos_token = CHAT_TEMPLATES[name].end_of_turn or "<|endoftext|>"
    return tokenizer


TOKENIZERS = {name: tokenizer_for(name) for name in TEMPLATES}
TOKENIZERS["trimmed offsets"] = tokenizer_for("chatml")
TOKENIZERS["trimmed offsets"].backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)


def encoder(tokenizer: Any, train_on: Any = "assistant") -> RowEncoder:
    return RowEncoder(tokenizer, train_on=train_on, date=DATE)


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return tuple(turns)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the UTF-8 bytes of a token, by the byte-level alphabet and not by the tokenizer's offsets."""
    text = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return text.encode()
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return bytes(alphabet[character] for character in text)


def oracle(tokenizer: Any, turns: Sequence[Message]) -> tuple[list[int], list[bool], list[int]]:
    """Return tokens, mask and the index of each answer's end, from the template's text around marked contents."""
    marked = [{**turn, "content": f"\ue000{i}\ue001"} for i, turn in enumerate(turns)]
    pieces = re.split("\ue000\\d+\ue001", tokenizer.apply_chat_template(marked, tokenize=False))
    text = tokenizer.apply_chat_template(list(turns), tokenize=False)
    contents = [turn["content"] for turn in turns]
    if text != interleave(pieces, contents):
        contents = [content.strip() for content in contents]  # the template trims
    assert text == interleave(pieces, contents)
    end_text = tokenizer.special_tokens_map["eos_token"]
    spans, position = [], 0
    for turn, before, content, after in zip(turns, pieces, contents, pieces[1:], strict=False):
        position += len(before)
        if turn["role"] == "assistant":
            begin = position - len(re.search(r" ?(<think>\s*</think>\s*)?$", before).group())  # type: ignore[union-attr]
            end = position + len(content) + after.index(end_text) + len(end_text)
            spans.append((len(text[:begin].encode()), len(text[:end].encode())))
        position += len(content)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask, ends, at = [], [], 0
    for index, token in enumerate(ids):
        begin, at = at, at + len(token_bytes(tokenizer, token))
        mask.append(any(begin < span_end and at > span_begin for span_begin, span_end in spans) and index > 0)
        ends += [index for _, span_end in spans if at == span_end]
    return ids, mask, ends


def interleave(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def check_against_oracle(name: str, turns: tuple[Message, ...]) -> Example:
    tokenizer = TOKENIZERS[name]
    example = encoder(tokenizer).encode(Row("row", turns))
    ids, mask, ends = oracle(tokenizer, turns)
    assert list(example.input_ids) == ids
    assert list(example.loss_mask) == mask
    assert len(ends) == sum(turn["role"] == "assistant" for turn in turns)
    assert all(example.loss_mask[end] and ids[end] == tokenizer.eos_token_id for end in ends)
    return example


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_and_its_end_of_turn_carries_loss_and_nothing_else(name: str) -> None:
    answer = "five \u202e\u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f467"  # right to left, and a joined emoji
    for system in (None, "Be brief."):
        check_against_oracle(name, conversation("one two", "three", "user four\n", answer, system=system))


@pytest.mark.parametrize("name", ["chatml", "llama2", "eos after the last turn", "trimmed offsets"])
def test_masks_of_long_conversations_equal_the_oracle(name: str) -> None:
    check_against_oracle(name, conversation(*(f" {i} and\n" for i in range(200)), system="Be brief."))


contents = st.text(max_size=20) | st.sampled_from(
    ["user\n", "[/INST]", "### Response:\n", "😀👍🏽", "שלום עולם", "</think", "  a"]
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(contents, min_size=2, max_size=6))
def test_masks_equal_the_oracle_for_any_contents(name: str, texts: list[str]) -> None:
    texts = texts[: len(texts) // 2 * 2]
    assume(all(text.strip() for text in texts[1::2]))
    assume(not any(ord(character) in (0xE000, 0xE001) for text in texts for character in text))
    special = TOKENIZERS[name].all_special_tokens
    if any(token in text for token in special for text in texts):  # hypothesis also tries strings of the source files
        with pytest.raises(UnusableRowError, match="holds the special token"):
            encoder(TOKENIZERS[name]).encode(Row("row", conversation(*texts)))
    else:
        check_against_oracle(name, conversation(*texts))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_prompts_tokens_are_those_of_inference(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    it = encoder(tokenizer, train_on="last")
    example = it.encode(Row("row", conversation("one", "two", "three", "four", system="kind")))
    inference = tokenizer.apply_chat_template(list(example.prompt or ()), add_generation_prompt=True)["input_ids"]
    assert inference == list(example.input_ids[: list(example.loss_mask).index(True)])
    assert (example.answer, example.warnings) == ("four", ())


def test_loss_on_chooses_last_every_or_all_tokens() -> None:
    tokenizer = TOKENIZERS["chatml"]
    row = Row("row", conversation("a", "b", "c", "d"))
    trained = {}
    for train_on in ("last", "assistant", "all"):
        example = encoder(tokenizer, train_on=train_on).encode(row)
        trained[train_on] = tokenizer.decode(example.input_ids[example.loss_mask])
    assert trained["last"] == "d<|im_end|>"
    assert trained["assistant"] == "b<|im_end|>d<|im_end|>"
    assert trained["all"] == tokenizer.apply_chat_template(list(row.messages or ()), tokenize=False).removeprefix("<s>")


def test_turns_of_a_prompt_list_carry_no_loss() -> None:
    tokenizer = TOKENIZERS["chatml"]
    example = encoder(tokenizer).encode(Row("row", conversation("a", "b", "c", "d"), loss_from=3))
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == "d<|im_end|>"


def test_a_template_that_drops_reasoning_is_refused_unless_only_the_last_turn_is_trained() -> None:
    tokenizer = tokenizer_for("thoughts", STRIPS_THOUGHTS)
    row = Row("row", conversation("a", "<think>x</think>b", "c", "<think>y</think>d"))
    with pytest.raises(UnusableRowError, match="leaves out or rewrites part of an assistant turn"):
        encoder(tokenizer).encode(row)
    example = encoder(tokenizer, train_on="last").encode(row)
    trained = tokenizer.decode(example.input_ids[example.loss_mask])
    assert trained == "<think>y</think>d<|im_end|>"


def test_the_names_that_a_config_may_give_are_those_of_the_library() -> None:
    assert set(CHAT_TEMPLATE_NAMES) == set(CHAT_TEMPLATES)


def test_a_generation_prompt_that_training_text_lacks_is_refused() -> None:
    jinja = TEMPLATES["chatml"].replace("assistant\\n' -}}{%- endif", "assistant\\n<think>' -}}{%- endif")
    with pytest.raises(DataError, match="renders the prompt of an answer differently"):
        encoder(tokenizer_for("own", jinja)).encode(Row("row", conversation("a", "b")))


def test_a_template_without_an_end_of_turn_token_is_refused() -> None:
    jinja = "{% for m in messages %}" + EVERY_TURN + "{{ '\n' }}{% endfor %}" + GENERATION_PROMPT
    with pytest.raises(
        DataError, match=r"without a special token .* so the model cannot learn to stop; set model.chat_template to"
    ):
        encoder(tokenizer_for("own", jinja)).encode(Row("row", conversation("a", "b")))


def test_a_tokenizer_without_template_names_the_setting() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match=r"set model.chat_template to chatml, llama2, llama3, mistral, gemma, alpaca or a"
    ):
        encoder(tokenizer).encode(Row("row", conversation("a", "b")))


def test_a_tokenizer_with_templates_for_other_uses_only_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"rag": TEMPLATES["chatml"], "tool_use": TEMPLATES["chatml"]}
    with pytest.raises(DataError, match=r"cannot be trained with: .*ValueError"):
        encoder(tokenizer).encode(Row("row", conversation("a", "b")))


def test_a_row_that_the_template_refuses_is_unusable_with_the_templates_words() -> None:
    turns: tuple[Message, ...] = (
        *conversation("a", "b"),
        {"role": "tool", "content": "c"},
        {"role": "assistant", "content": "d"},
    )
    with pytest.raises(UnusableRowError, match=r"the chat template refuses the row: .* no turns with role tool"):
        encoder(TOKENIZERS["gemma"]).encode(Row("row", turns))


USER_AND_ASSISTANT = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    + EVERY_TURN
    + "{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}" + GENERATION_PROMPT
)
DROPS_SYSTEM = {
    "always": USER_AND_ASSISTANT,
    "and writes its own": "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + USER_AND_ASSISTANT,
    "beside tools": "{% if tools %}{{ tools | tojson }}{% elif messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% endif %}" + USER_AND_ASSISTANT,
}


@pytest.mark.parametrize("name", DROPS_SYSTEM)
@pytest.mark.parametrize("train_on", ["assistant", "last", "completion", "all"])
def test_a_row_whose_system_turn_the_template_drops_is_refused_with_the_reason(name: str, train_on: str) -> None:
    it = encoder(tokenizer_for("own", DROPS_SYSTEM[name]), train_on)
    tools = TOOLS if name == "beside tools" else ()
    for user in ("Hello", "Answer in French."):  # the second one says what the system turn does
        row = Row("row", conversation(user, "Bonjour.", system="Answer in French."), tools=tools)
        with pytest.raises(UnusableRowError) as caught:
            it.encode(row)
        assert caught.value.reason == (
            "the chat template leaves out the system turn; set model.chat_template to one that writes it, or move its "
            "text into the first user turn"
        )
    for system in (None, " \n"):
        assert it.encode(Row("row", conversation("Hello", "Bonjour.", system=system), tools=tools)).answer != ""


def test_a_system_turn_is_lost_only_where_its_text_is() -> None:
    jinja = DROPS_SYSTEM["beside tools"]
    example = encoder(tokenizer_for("own", jinja)).encode(Row("row", conversation("a", "b", system="In French.")))
    assert example.answer == "b"
    switch = "{{ messages[0]['content'].replace('/think', '') }}" + USER_AND_ASSISTANT
    encoder(tokenizer_for("own", switch)).encode(Row("row", conversation("a", "b", system="In French. /think")))


def test_a_row_whose_user_turn_the_template_drops_is_refused() -> None:
    jinja = USER_AND_ASSISTANT.replace("('user', 'assistant')", "('user', 'assistant') and loop.index != 3")
    with pytest.raises(
        UnusableRowError, match=r"^the chat template leaves out a user turn; set model.chat_template to"
    ):
        encoder(tokenizer_for("own", jinja)).encode(Row("row", conversation("a", "b", "c", "d")))


def test_template_variables_of_a_row_are_rendered_and_warned_of_where_they_matter() -> None:
    thinks = "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% else %}"
    thinks += "{{ 'Reply: ' }}{% endif %}"
    jinja = TEMPLATES["chatml"].replace("assistant\\n' -}}{%- endif", "assistant\\n' -}}" + thinks + "{%- endif")
    jinja = jinja.replace(
        "'\\n' + message", "'\\n' -}}{% if message['role'] == 'assistant' %}" + thinks + "{% endif %}{{ message"
    )
    note = 'rendered with chat_template_kwargs {"enable_thinking": false}, which inference must pass too'
    for name, text, warnings in (
        ("own", "Reply: b<|im_end|>", (note,)), ("chatml", "b<|im_end|>", ()),
    ):  # fmt: skip
        tokenizer = tokenizer_for(name, jinja if name == "own" else None)
        row = Row("row", conversation("a", "b"), chat_template_kwargs={"enable_thinking": False})
        example = encoder(tokenizer).encode(row)
        expected = tokenizer.apply_chat_template(list(row.messages or ()), tokenize=False, enable_thinking=False)
        assert (tokenizer.decode(example.input_ids), example.warnings) == (expected, warnings)
        assert text in expected
        assert label_texts(tokenizer, example) == ["b<|im_end|>"]
        assert (example.prompt, example.answer) == (None, None), "evaluation would ask without the variables"


def plain_tokenizer(*, adds_bos: bool) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("text", ["hello world", "<s>hello world", "hello world<|im_end|>"])
def test_plain_text_begins_and_ends_once_and_trains_its_end(adds_bos: bool, text: str) -> None:
    tokenizer = plain_tokenizer(adds_bos=adds_bos)
    example = encoder(tokenizer).encode(Row("row", text=text))
    begins = adds_bos or text.startswith("<s>")
    assert tokenizer.decode(example.input_ids) == "<s>" * begins + "hello world<|im_end|>"
    assert list(example.loss_mask) == [False, *[True] * (len(example.input_ids) - 1)]
    assert (example.prompt, example.answer) == (None, None)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompt_and_completion_are_joined_as_they_are(adds_bos: bool) -> None:
    tokenizer = plain_tokenizer(adds_bos=adds_bos)
    it = encoder(tokenizer)
    example = it.encode(Row("row", prompt="Q: why 😀?\nA:", text=" because"))
    first = list(example.loss_mask).index(True)
    assert list(example.input_ids[:first]) == tokenizer("Q: why 😀?\nA:")["input_ids"]
    assert tokenizer.decode(example.input_ids[first:]) == " because<|im_end|>"
    assert all(example.loss_mask[first:])
    assert example.warnings == ()


def test_loss_on_all_trains_the_prompt_of_plain_text_too() -> None:
    tokenizer = plain_tokenizer(adds_bos=True)
    example = encoder(tokenizer, train_on="all").encode(Row("row", prompt="Q: why?", text=" because"))
    assert tokenizer.decode(example.input_ids) == "<s>Q: why? because<|im_end|>"
    assert list(example.loss_mask) == [False, *[True] * (len(example.input_ids) - 1)]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_over_the_border_counts_as_the_answers_and_is_reported(trim_offsets: bool) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    it = encoder(tokenizer)
    example = it.encode(Row("file:7", prompt="which? ", text="the fox"))
    trained = example.input_ids[example.loss_mask].tolist()
    assert tokenizer.convert_ids_to_tokens(trained[0]) == "Ġthe"
    assert tokenizer.decode(trained) == " the fox<|im_end|>"
    assert example.warnings == (CROSSES_PROMPT_END,)


@pytest.mark.parametrize("name", ["chatml", "llama2", "mistral"])
def test_masks_are_right_with_a_sentencepiece_like_tokenizer(name: str) -> None:
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    it = encoder(tokenizer)
    example = it.encode(Row("row", conversation("what is the capital?", "Paris is", "over the 😀", "lazy 😀 dog")))
    trained = example.input_ids[example.loss_mask].tolist()
    end = CHAT_TEMPLATES[name].end_of_turn or ""
    assert "".join(tokenizer.decode(trained).split()) == f"Parisis{end}lazy😀dog{end}"
    assert example.warnings == ()


HEADER, THOUGHTS = "{{ '<|im_start|>assistant\n' }}", "{{ '<think></think>' }}"


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["by layout", "by prompts"])
@pytest.mark.parametrize("start", [HEADER + THOUGHTS + "{% generation %}", "{% generation %}" + HEADER])
def test_labels_begin_with_the_generation_block_but_not_before_the_prompt_ends(start: str, tools: Any) -> None:
    jinja = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + start + "{{ m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}" + EVERY_TURN + "{{ '<|im_end|>' }}{% endif %}{% endfor %}" + GENERATION_PROMPT
    )
    tokenizer = tokenizer_for("own", jinja)
    example = encoder(tokenizer).encode(Row("row", conversation("a", "b", "c", "d"), tools=tools))
    assert label_texts(tokenizer, example) == ["b<|im_end|>", "d<|im_end|>"]


def test_answers_without_a_generation_block_are_refused_where_others_have_one() -> None:
    jinja = TEMPLATES["generation block"].replace(
        "m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.index < 3"
    )
    tokenizer = tokenizer_for("own", jinja)
    assert label_texts(tokenizer, encoder(tokenizer).encode(Row("row", conversation("a", "b"))))
    with pytest.raises(UnusableRowError, match="marks some answers with generation blocks, but not all of them"):
        encoder(tokenizer).encode(Row("row", conversation("a", "b", "c", "d")))


def test_completion_trains_all_that_follows_the_prompt() -> None:
    tokenizer = TOKENIZERS["chatml"]
    it = encoder(tokenizer, "completion")
    follows = "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    assert label_texts(tokenizer, it.encode(Row("row", conversation("a", "b", "c", "d")))) == [follows]
    behind = it.encode(Row("row", conversation("a", "b", "c", "d"), loss_from=2))
    assert label_texts(tokenizer, behind) == ["d<|im_end|>\n"]
    plain = it.encode(Row("row", prompt="Q: why?", text=" because"))
    assert label_texts(tokenizer, plain) == [" because<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("assistant", ["d<|im_end|>"]),
        ("last", ["d<|im_end|>"]),
        ("completion", ["\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"]),
        ("all", ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
                 "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_turns_that_the_row_excludes_carry_no_loss(train_on: str, trained: list[str]) -> None:
    tokenizer = TOKENIZERS["chatml"]
    row = Row("row", conversation("a", "b", "c", "d"), untrained=frozenset({1}))
    assert label_texts(tokenizer, encoder(tokenizer, train_on).encode(row)) == trained


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_row_that_excludes_all_of_its_answers_is_unusable(train_on: str) -> None:
    with pytest.raises(UnusableRowError, match=r"^no trained token$"):
        encoder(TOKENIZERS["chatml"], train_on).encode(Row("row", conversation("a", "b"), untrained=frozenset({1})))


@pytest.mark.parametrize("train_on", ["assistant", "last", "completion", "all"])
def test_a_row_of_tokens_keeps_its_own_labels(train_on: str) -> None:
    it = encoder(TOKENIZERS["chatml"], train_on)
    example = it.encode(Row("row", input_ids=(5, 6, 7, 8), loss_mask=(True, False, True, False)))
    assert (example.input_ids.tolist(), example.loss_mask.tolist()) == ([5, 6, 7, 8], [False, False, True, False])
    assert (example.prompt, example.answer, example.warnings) == (None, None, ())
    assert it.encode(Row("row", input_ids=(5, 6, 7))).loss_mask.tolist() == [False, True, True]
    with pytest.raises(UnusableRowError, match=r"^no trained token$"):
        it.encode(Row("row", input_ids=(5, 6), loss_mask=(True, False)))


def test_the_beginning_token_comes_once_and_a_row_of_tokens_with_two_gets_a_warning() -> None:
    tokenizer = plain_tokenizer(adds_bos=True)
    bos = tokenizer.bos_token_id
    example = encoder(tokenizer).encode(Row("row", text="<s><s><s>hello"))
    assert tokenizer.decode(example.input_ids) == "<s>hello<|im_end|>"
    assert encoder(tokenizer).encode(Row("row", input_ids=(bos, bos, 5))).warnings == (TWO_BOS,)
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + TEMPLATES["chatml"].replace("bos_token", "no_token")
    with pytest.raises(DataError, match="chat template writes the beginning token twice"):
        encoder(tokenizer).encode(Row("row", conversation("a", "b")))


CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + GENERATION_PROMPT
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turns_with_calls(**fields: Any) -> tuple[Message, ...]:
    calls = [call("weather", city="Zürich", days=2), call("weather", city="Zürich", days=2)]
    first: Message = {"role": "assistant", "content": "", "tool_calls": calls, **fields}
    return (
        {"role": "user", "content": "cold?"},
        first,
        {"role": "tool", "content": "-3"},
        {"role": "assistant", "content": "yes, -3", "reasoning_content": "so cold"},
    )


def unknown_words_tokenizer() -> Any:
    """Return a tokenizer to which nearly every word is unknown."""
    words = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "weather"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


@pytest.mark.parametrize("special", [[], ["<tool_call>", "</tool_call>"]], ids=["words", "special tokens"])
@pytest.mark.parametrize("tools", [(), TOOLS])
def test_tool_calls_and_reasoning_are_trained_to_their_end(tools: Any, special: list[str]) -> None:
    tokenizer = tokenizer_for("own", CALLS)
    tokenizer.add_special_tokens({"additional_special_tokens": special}, False)
    example = encoder(tokenizer).encode(Row("row", turns_with_calls(), tools=tools))
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
    assert label_texts(tokenizer, example) == [
        one + one + "<|im_end|>",
        "<think>\nso cold\n</think>\nyes, -3<|im_end|>",
    ]
    assert ("weather" in tokenizer.decode(example.input_ids[: list(example.loss_mask).index(True)])) == bool(tools)
    assert (example.prompt is None, example.answer is None) == (bool(tools), bool(tools))
    ends_with_a_call = Row("row", turns_with_calls()[:2])
    assert encoder(tokenizer).encode(ends_with_a_call).answer is None


LOST = {
    "does not print tools": (CALLS.replace("{% if tools %}", "{% if false %}"), TOOLS),
    "leaves out or rewrites what a tool returned": (
        CALLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"), TOOLS,
    ),
    "leaves out or rewrites a call": (TEMPLATES["chatml"], ()),
}  # fmt: skip


@pytest.mark.parametrize("reason", LOST)
def test_lost_tools_calls_and_results_before_the_trained_answer_are_refused(reason: str) -> None:
    jinja, tools = LOST[reason]
    tokenizer = tokenizer_for("own", jinja)
    turns = (*turns_with_calls()[:2], Message(role="tool", content="27 F"), Message(role="assistant", content="yes"))
    with pytest.raises(UnusableRowError, match=reason):
        encoder(tokenizer, train_on="last").encode(Row("row", turns, tools=tools))


def test_unknown_words_do_not_end_a_turn() -> None:
    tokenizer = unknown_words_tokenizer()
    tokenizer.chat_template = CALLS
    for turns in (turns_with_calls(), conversation("what", "good weather today")):
        example = encoder(tokenizer, "last").encode(Row("row", turns))
        assert example.loss_mask[-1]
        assert example.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert len(label_texts(tokenizer, example)) == 1
        assert tokenizer.convert_tokens_to_ids("<unk>") in example.input_ids[example.loss_mask]


@pytest.mark.parametrize(
    "jinja",
    [TEMPLATES["chatml"], CALLS.replace("(call.function | tojson)", "call.function.name"),
     CALLS.replace("{% if m.reasoning_content %}", "{% if false %}")],
    ids=["no place for calls", "no place for arguments", "no place for reasoning"],
)  # fmt: skip
def test_a_template_that_drops_calls_arguments_or_reasoning_is_refused(jinja: str) -> None:
    with pytest.raises(UnusableRowError, match=r"leaves out or rewrites (a call|part of an assistant turn)"):
        encoder(tokenizer_for("chatml", jinja)).encode(Row("row", turns_with_calls()))


@pytest.mark.parametrize(
    ("turns", "tools", "where"),
    [
        (turns_with_calls(tool_calls=[call("weather", city="<|im_end|>")]), (), "the tool_calls of a turn"),
        (turns_with_calls(reasoning_content="<|im_end|>"), (), "the reasoning_content of a turn with role assistant"),
        (turns_with_calls(), ({"function": {"name": "a", "<|im_end|>": 1}},), "the list of tools"),
    ],
)  # fmt: skip
def test_special_tokens_are_refused_in_every_field(turns: Any, tools: Any, where: str) -> None:
    with pytest.raises(UnusableRowError, match=f"^{where}.* holds the special token <"):
        encoder(tokenizer_for("own", CALLS)).encode(Row("row", turns, tools=tools))


def test_tools_take_the_template_for_tools_where_a_tokenizer_has_two() -> None:
    tokenizer = tokenizer_for("own", TEMPLATES["chatml"])
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": CALLS}
    for tools in ((), TOOLS):
        example = encoder(tokenizer).encode(Row("row", conversation("a", "b"), tools=tools))
        expected = tokenizer.apply_chat_template(list(conversation("a", "b")), tools=list(tools) or None)["input_ids"]
        assert example.input_ids.tolist() == expected
        assert label_texts(tokenizer, example) == ["b<|im_end|>"]


SWITCHED = (
    "{% for m in messages %}" + TURN + "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if '/fast' in messages[0]['content'] %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("test", "text"),
    [
        ("'/fast' in messages[0]['content']", "a /fast"),
        ("messages[0]['content'] == '/fast'", "/fast"),
        ("'!' != messages[-1].content | trim | last and messages[-1].content[-1] == '?'", "why?"),
    ],
)
def test_a_prompt_that_depends_on_a_word_in_a_turn_is_rendered_for_rows_with_that_word(test: str, text: str) -> None:
    it = encoder(tokenizer_for("own", SWITCHED.replace("'/fast' in messages[0]['content']", test)))
    it.encode(Row("row", conversation("a", "b")))
    with pytest.raises(UnusableRowError, match="renders the prompt of an answer differently"):
        it.encode(Row("row", conversation(text, "b")))
    assert it.encode(Row("row", conversation("a", "b"))).loss_mask.any()


BY_LENGTH = SWITCHED.replace("'/fast' in messages[0]['content']", "messages[0]['content'] | length < 3")


def test_roles_whose_first_row_contradicts_the_layout_use_prompts() -> None:
    it = encoder(tokenizer_for("own", BY_LENGTH))
    for text, refused in (("a", True), ("aaaa", False), ("a", True)):
        row = Row("row", conversation(text, "b"))
        if refused:
            with pytest.raises((UnusableRowError, DataError), match="renders the prompt of an answer differently"):
                it.encode(row)
        else:
            assert it.encode(row).loss_mask.any()


class CountedTemplate:
    """Counts the turns that a tokenizer renders."""

    def __init__(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_turns = 0
        original = tokenizer.apply_chat_template

        def counted(conversation: Any, *arguments: Any, **options: Any) -> Any:
            self.num_turns += len(conversation)
            return original(conversation, *arguments, **options)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counted)


@pytest.mark.parametrize("name", ["chatml", "generation block", "empty thoughts in the last turn"])
def test_a_row_is_rendered_once_and_a_new_number_of_turns_a_few_times(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_for("own", TEMPLATES[name])
    counted, it = CountedTemplate(tokenizer, monkeypatch), encoder(tokenizer)
    lengths = range(2, 202, 2)
    for length in lengths:
        it.encode(Row("row", conversation(*["a"] * length)))
    assert counted.num_turns < 6 * sum(lengths)
    counted.num_turns = 0
    for length in lengths:
        it.encode(Row("row", conversation(*["b"] * length)))
    assert counted.num_turns == sum(lengths)


def test_layouts_are_kept_for_a_limited_number_of_role_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_layout, "MOST_KEPT", 4)
    chat = ChatRenderer(tokenizer_for("chatml"), DATE)
    cache = template_layout.LayoutCache(chat)
    for length in (*range(2, 22, 2), 2):
        turns = conversation(*["a"] * length)
        layout = cache.get(turns)
        assert layout is not None
        assert layout.find_answers(turns, chat.text(turns)) is not None
        assert len(cache._layouts) <= 4
        assert len(cache._rendered) <= 4


def test_settings_that_another_call_left_in_the_tokenizer_do_not_cut_or_pad_rows() -> None:
    tokenizer = tokenizer_for("chatml")
    it = encoder(tokenizer)
    row = Row("row", conversation("one two three", "four five six"))
    expected = it.encode(row).input_ids.tolist()
    tokenizer(["a"], truncation=True, max_length=4, padding="max_length")
    assert it.encode(row).input_ids.tolist() == expected


class RewritingTokenizer(PreTrainedTokenizerFast):
    """Changes texts before its Rust tokenizer sees them, as some tokenizers of remote code do."""

    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text.replace("fox", "dog"), **options)


def test_rows_are_tokenised_by_the_call_that_inference_makes() -> None:
    tokenizer = RewritingTokenizer(tokenizer_object=build_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATES["chatml"]
    example = encoder(tokenizer).encode(Row("row", conversation("a fox", "the fox")))
    assert label_texts(tokenizer, example) == ["the dog<|im_end|>"]


def test_a_chat_template_is_found_by_name_or_file(tmp_path: Path) -> None:
    assert resolve_chat_template("llama3").end_of_turn == "<|eot_id|>"
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert resolve_chat_template(str(tmp_path / "own.jinja")).jinja == "{{ messages }}"
    (tmp_path / "own.jinja").write_text("{{ messages }}", encoding="utf-8-sig")
    assert resolve_chat_template(str(tmp_path / "own.jinja")).jinja == "{{ messages }}", "a mark would begin every row"
    with pytest.raises(ConfigError, match=r"model.chat_template: 'chat-ml' is neither .* did you mean chatml\?"):
        resolve_chat_template("chat-ml")


def test_a_template_can_end_turns_with_another_token() -> None:
    template = CHAT_TEMPLATES["chatml"].ending_with("<|endoftext|>")
    tokenizer = tokenizer_for("own", template.jinja)
    text = tokenizer.apply_chat_template(list(conversation("a", "b")), tokenize=False)
    assert text == "<s><|im_start|>user\na<|endoftext|>\n<|im_start|>assistant\nb<|endoftext|>\n"
    assert (template.end_of_turn, template.special_tokens) == ("<|endoftext|>", ("<|im_start|>", "<|endoftext|>"))
