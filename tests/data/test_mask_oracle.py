"""Tokens and masks against an oracle that shares no method with the code, on the chat templates of real models.

The oracle renders with a Jinja environment of its own. It finds the end of an answer by rendering twice, the second time
with a character more behind the answer's last one, and knows from a table by which text each template ends a turn. An
answer begins where its prompt ends, rendered alone. Characters become tokens by the tokenizer's list of offsets.

Templates of real models are those of the installed `trl`; the others were written for these tests.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from qlora_train.architectures import ARCHITECTURES
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES
from qlora_train.data.row_encoder import CROSSES_PROMPT_END, RowEncoder
from qlora_train.data.types import Message, Row, UnusableRowError
from qlora_train.utils.errors import DataError
from tests.support.chat_oracle import DATE, OWN_TEMPLATES, TRL_TEMPLATES, compiled, metaspace_tokenizer
from tests.support.pico import build_tokenizer

IM, COHERE, LLAMA = "<|im_end|>", "<|END_OF_TURN_TOKEN|>", "<|eot_id|>"
STOPS = {
    **dict.fromkeys(("cohere", "cohere_training"), COHERE),
    **dict.fromkeys(("cohere2", "cohere2_training"), "<|END_RESPONSE|>" + COHERE),
    **dict.fromkeys(("gemma", "gemma_training", "gemma3", "gemma3_training"), "<end_of_turn>"),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), "<turn|>"),
    **dict.fromkeys(("lfm2", "lfm2_training", "lfm2_v2", "lfm2_v2_training"), IM),
    **dict.fromkeys(("llama3", "llama3_training", "llama3_1", "llama3_2"), LLAMA),
    **dict.fromkeys(("muse_glimmer", "muse_glimmer_training"), "<|eot|>"),
    **dict.fromkeys(("phi3", "phi3_5", "phi3_training", "phi3_5_training", "drops_system"), "<|end|>"),
    **dict.fromkeys(("qwen2_5", "qwen2_5_training", "qwen2_5_vl", "qwen2_5_vl_training"), IM),
    **dict.fromkeys(("qwen3", "qwen3_training", "qwen3_instruct_2507", "qwen3_instruct_2507_training"), IM),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_training", "qwen3_8", "qwen3_8_training"), IM),
    **dict.fromkeys(("qwen3_5_nothink_training", "qwen3_5_think_training", "qwen3_6_training"), IM),
    **dict.fromkeys(("granite",), "<|end_of_text|>"),
    **dict.fromkeys(("olmo2", "instruction", "dialogue", "llama2", "mistral", "alpaca"), "</s>"),
    **dict.fromkeys(("soft_switch", "chatml"), IM),
    "library llama3": LLAMA,
    "library gemma": "<end_of_turn>",
}
"""The text by which each template ends an assistant turn."""
LIBRARY = {"library llama3": "llama3", "library gemma": "gemma"} | {
    name: name for name in ("chatml", "llama2", "mistral", "alpaca")
}
REFUSED = {
    "deepseek_r1_distill": "renders the prompt of an answer differently",
    "deepseekv3": "renders the prompt of an answer differently",
    "glm4moe": "ends an assistant turn without a special token",
    "idefics3": "leaves out or rewrites part of an assistant turn",
    "llava_next": "has no attribute",
    "smolvlm": "leaves out or rewrites part of an assistant turn",
}
"""Templates that no row can be trained with, and why: a prompt that training would not have, no token to stop with, or
contents that must be lists of parts."""
LAST_ONLY = {
    "gptoss": ("<|return|>", "ends an assistant turn without a special token"),
    "qwen3_5_nothink": (IM, "renders the prompt of an answer differently"),
    "qwen3_6": (IM, "renders the prompt of an answer differently"),
}
"""Templates that write earlier answers differently from inference: only the last one can be trained."""
OPENED = re.compile(r"<think>\s*(</think>\s*)?$")
SPECIAL = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<end_of_utterance>")


@cache
def source(name: str) -> str:
    if name in LIBRARY:
        return CHAT_TEMPLATES[LIBRARY[name]].jinja
    own = OWN_TEMPLATES / f"{name}.jinja"
    return (own if own.exists() else TRL_TEMPLATES / f"{name}.jinja").read_text()


@cache
def tokenizer_for(name: str, kind: str) -> Any:
    """Return a tokenizer with a template, its special tokens, a beginning token and an end-of-sequence token."""
    tokenizer = copy.deepcopy({"bytes": build_tokenizer, "pieces": metaspace_tokenizer}[kind]())
    special = {*SPECIAL.findall(source(name)), "<|user|>", "<|system|>", "<|im_start|>", IM}
    if name in LIBRARY:
        special.update(CHAT_TEMPLATES[LIBRARY[name]].special_tokens)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": sorted(special - {"</s>"})}, False
    )
    tokenizer.chat_template = source(name)
    return tokenizer


def rendered(name: str, turns: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    text: str = compiled(source(name)).render(
        messages=turns, tools=None, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>"
    )
    return text


class RefusedError(Exception):
    """The oracle cannot locate an answer: its prompt or content is not in the text, or a turn is lost."""


@dataclass
class Truth:
    ids: list[int]
    mask: list[bool]
    ends: list[int]


def answer_chars(name: str, turns: Sequence[Message], text: str, answer: int) -> tuple[int, int]:
    """Return the characters of an answer and its stop text."""
    prompt = rendered(name, turns[:answer], add_generation_prompt=True)
    content = turns[answer]["content"]
    longer = [dict(turn) for turn in turns]
    cut = len(content.rstrip())
    longer[answer]["content"] = content[:cut] + "\ue010" + content[cut:]
    second = rendered(name, longer)  # type: ignore[arg-type]
    end = second.find("\ue010")
    if not text.startswith(prompt) or end < 0 or second.replace("\ue010", "") != text:
        raise RefusedError
    opened = OPENED.search(prompt)
    written = (opened[0] if opened else "") + text[len(prompt) : end]
    answer_text = written if "think>" in content else text[len(prompt) : end]
    reasoning = turns[answer].get("reasoning_content", "")
    if any("".join(part.split()) not in "".join(answer_text.split()) for part in (content, reasoning)):
        raise RefusedError
    if has_more_thoughts(content, written):
        raise RefusedError
    stop = text.index(STOPS[name], end)
    assert text[end:stop].strip() == ""
    return len(prompt), stop + len(STOPS[name])


def has_more_thoughts(content: str, written: str) -> bool:
    """Say whether a template wrote thoughts, which may be empty, around an answer that says some in its content."""
    num_closed, num_opened = content.count("</think>"), content.count("<think>")
    return num_closed + num_opened > 0 and (
        written.count("</think>") > num_closed or written.count("<think>") > max(num_opened, num_closed)
    )


@cache
def reads_reasoning(name: str) -> bool:
    probe = {"role": "assistant", "content": "a", "reasoning_content": "xyz"}
    return "xyz" in rendered(name, [{"role": "user", "content": "a"}, probe])  # type: ignore[list-item]


def with_reasoning(name: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a row as it is read for a template that writes reasoning."""
    if not reads_reasoning(name):
        return turns
    return tuple(split(turn) if turn["role"] == "assistant" else turn for turn in turns)


def split(turn: Message) -> Message:
    before, _, behind = turn["content"].partition("</think>")
    blank, tag, reasoning = before.partition("<think>")
    if not tag or blank.strip() or "</think>" not in turn["content"]:
        return turn
    moved: Message = {**turn, "content": behind.lstrip("\n")}
    return {**moved, "reasoning_content": reasoning.strip("\n")} if reasoning.strip() else moved


def oracle(name: str, kind: str, turns: Sequence[Message], answers: Sequence[int]) -> Truth:
    text = rendered(name, turns)
    if turns[0]["role"] == "system" and turns[0]["content"] and text == rendered(name, turns[1:]):
        raise RefusedError
    encoded = tokenizer_for(name, kind)(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [answer_chars(name, turns, text, answer) for answer in answers]
    mask = [
        index > 0 and any(begin < last and end > first for first, last in spans)
        for index, (begin, end) in enumerate(encoded["offset_mapping"])
    ]
    ends = [index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end in {last for _, last in spans}]
    return Truth(encoded["input_ids"], mask, ends)


def answers_of(turns: Sequence[Message]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]


def conversation(texts: Sequence[str], system: str | None = None) -> tuple[Message, ...]:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tuple(turns)


def holds_special(name: str, kind: str, turns: Sequence[Message]) -> bool:
    tokenizer = tokenizer_for(name, kind)
    return any(token in turn["content"] for token in tokenizer.all_special_tokens for turn in turns)


@cache
def encoder_for(name: str, kind: str) -> RowEncoder:
    """One encoder for all examples, as in a run: its caches serve the next row."""
    return RowEncoder(tokenizer_for(name, kind), train_on="assistant", date=DATE)


def check(name: str, kind: str, turns: tuple[Message, ...]) -> None:
    """Compare one row with the oracle; it is refused where, and only where, the oracle cannot locate an answer."""
    answers, row = answers_of(turns), Row("row", turns)
    turns = with_reasoning(name, turns)
    try:
        truth = oracle(name, kind, turns, answers)
    except (RefusedError, TemplateError):
        with pytest.raises(UnusableRowError, match=r"chat template|special token"):
            encoder_for(name, kind).encode(row)
        return
    if holds_special(name, kind, turns):
        with pytest.raises(UnusableRowError, match="holds the special token"):
            encoder_for(name, kind).encode(row)
        return
    example = encoder_for(name, kind).encode(row)
    assert example.input_ids.tolist() == truth.ids
    assert example.loss_mask.tolist() == truth.mask
    assert len(truth.ends) >= len(answers)
    assert all(example.loss_mask[end] for end in truth.ends)
    check_beginning(name, kind, truth.ids)
    check_inference(name, kind, turns, truth, reaches_over=CROSSES_PROMPT_END in example.warnings)


def check_beginning(name: str, kind: str, ids: Sequence[int]) -> None:
    bos = tokenizer_for(name, kind).bos_token_id
    writes_bos = "bos_token" in source(name)
    per_turn = name == "llama2"  # which begins every user turn so
    assert (ids[0] == bos, ids[1] == bos) == (writes_bos, False)
    assert per_turn or ids.count(bos) == int(writes_bos)


def check_inference(name: str, kind: str, turns: Sequence[Message], truth: Truth, *, reaches_over: bool) -> None:
    """Compare with what Transformers gives for the row, and for the prompts of its answers."""
    tokenizer = tokenizer_for(name, kind)
    if "strftime_now" not in source(name):
        assert tokenizer.apply_chat_template(list(turns))["input_ids"] == truth.ids
    differing = []
    for answer in answers_of(turns):
        prompt = tokenizer(
            rendered(name, turns[:answer], add_generation_prompt=True), add_special_tokens=False, verbose=False
        )
        differing.append(truth.ids[: len(prompt["input_ids"])] != prompt["input_ids"])
        if not differing[-1] and not reaches_over:
            assert truth.mask[len(prompt["input_ids"])]
            assert not truth.mask[len(prompt["input_ids"]) - 1]
    assert any(differing) == reaches_over


HOSTILE = (
    "", "a", " ", "user", "assistant", "model", "system", "[/INST]", "[INST] x", "### Response:\n", "### Instruction\n",
    "<</SYS>>", "Assistant: ", "User: a\n\nAssistant: ", "<|im_end|", "im_end", "end", "final", "<think>", "</think>x",
    "<think>a</think>b", "<tool_response>", "/no_think", "  a", "a  ", "\n\na\n\n", "   \n \t x", "😀👍🏽", "👩‍👩‍👧",
    "שלום \u202eabc\u202c", "e\u0301\u0323\u0327", "{{ messages }}", "{% endfor %}", "x" * 300, " " * 40 + "y", "\n" * 30,
    "one two", "\u00a0", "\ufeffa", "0", "'\"\\",
)  # fmt: skip
texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=12), min_size=2, max_size=6)
NAMES = sorted(STOPS)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contents=texts, system=st.none() | st.sampled_from(["Be brief.", "/no_think", ""]))
def test_tokens_and_masks_equal_the_oracle(name: str, kind: str, contents: list[str], system: str | None) -> None:
    contents = [text.replace("\0", "").replace("\ue010", "") for text in contents[: len(contents) // 2 * 2]]
    contents[1::2] = [text if text.strip() else "ok" for text in contents[1::2]]  # an empty answer is refused before
    check(name, kind, conversation(contents, system))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_contents_and_contents_that_equal_a_role_are_distinguished(name: str, kind: str) -> None:
    for words in (["a"] * 6, ["user", "assistant", "assistant", "user"], ["one", "one\none", "one", "one"]):
        check(name, kind, conversation(words))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", NAMES)
def test_contents_may_begin_or_end_like_special_tokens(name: str, kind: str) -> None:
    begins = (["", "<", "", "ok"], ["<", "<", "<|", "<|", "<|e", "<"], ["a", "<s", "[", "</s", "<|im", "<|end|"])
    for words in (*begins, ["", ">", "", "ok"], ["|", "|>", "a", "s>", "b", ">"]):
        encoder_for.cache_clear()  # the layouts are confirmed on the first row of each sequence of roles
        check(name, kind, conversation(words))


@pytest.mark.parametrize("name", [*REFUSED, *(f"{name}_training" for name in REFUSED if name != "glm4moe")])
def test_templates_that_cannot_be_trained_with_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name.removesuffix("_training")]):
        RowEncoder(tokenizer_for(name, "bytes"), train_on="assistant", date=DATE).encode(Row("row", conversation("ab")))


@pytest.mark.parametrize("name", LAST_ONLY)
def test_templates_that_rewrite_earlier_answers_train_the_last_one(name: str) -> None:
    stop, reason = LAST_ONLY[name]
    tokenizer, turns = tokenizer_for(name, "bytes"), conversation(["one", "two", "three", "four"])
    with pytest.raises(UnusableRowError, match=reason):
        RowEncoder(tokenizer, train_on="assistant", date=DATE).encode(Row("row", turns))
    example = RowEncoder(tokenizer, train_on="last", date=DATE).encode(Row("row", turns))
    text = rendered(name, turns)
    prompt = rendered(name, turns[:-1], add_generation_prompt=True)
    assert tokenizer.decode(example.input_ids) == text
    assert tokenizer.decode(example.input_ids[example.loss_mask]) == text[len(prompt) : text.rindex(stop) + len(stop)]


def test_every_template_that_a_base_model_gets_is_tried_here() -> None:
    assert {row.chat_template for row in ARCHITECTURES.values()} <= {*LIBRARY.values()} <= {*CHAT_TEMPLATES}
    assert {*LIBRARY} <= {*STOPS}
