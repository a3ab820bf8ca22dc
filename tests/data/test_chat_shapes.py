# ruff: noqa: RUF001
"""What is trained, for every kind of row on the chat templates of TRL and of well-known models: right, or truly refused.

The oracle renders with a Jinja environment of its own: an answer is what the text has behind its prompt, up to the first
stop text of the template. A row may be refused only for a reason that the oracle finds true.
"""

import copy
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from qlora_train.data.row_encoder import INLINE_REASONING, RowEncoder
from qlora_train.data.types import UnusableRowError
from qlora_train.utils.errors import DataError
from tests.support.chat_oracle import BLOCK, DATE, OWN_TEMPLATES, TRL_TEMPLATES, compiled, label_texts
from tests.support.chat_shapes import SHAPES, Shape
from tests.support.pico import build_tokenizer
from tests.support.rows import WEATHER, read

IM, END, TURN, COHERE = "<|im_end|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"
STOPS: dict[str, str | None] = {
    "cohere": COHERE, "deepseek": "<｜end▁of▁sentence｜>", "diffusion": "<turn|>", "gemma4": "<turn|>", "gemma": TURN,
    "glm4moe_training": "<|user|>", "glm4moe": None, "gptoss": "<|return|>", "idefics": "<end_of_utterance>", "lfm2": IM,
    "llama": "<|eot_id|>", "llava": IM, "muse": "<|eot|>", "nemotron": IM, "phi": END, "qwen": IM,
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip
"""By what the names of TRL's files begin with."""
CALL_STOPS = {
    "gptoss": "<|call|>",
    "glm4moe_training": "<|observation|>",
    "gemma4_v2": "<turn|>",
    "gemma4": "<tool_call|><|tool_response>",
    "diffusion": "<tool_call|><|tool_response>",
}
TEMPLATES = {path.stem: path for path in sorted(TRL_TEMPLATES.glob("*.jinja"))}
SPECIAL = re.compile(
    r"<\|?[A-Za-z_]+\|>|<\|[A-Za-z_]+>|<(?:start|end)_of_turn>|<end_of_utterance>|<｜[^｜']+｜>|\[/?[A-Z_]+\]"
)


def _of(table: dict[str, Any], name: str, default: Any = None) -> Any:
    return next((stop for prefix, stop in table.items() if name.startswith(prefix)), default)


@cache
def shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    return Shape(TEMPLATES[name].read_text(), _of(STOPS, name), _of(CALL_STOPS, name))


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def user(text: str = "Weather in Oslo?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None = "It is cold.", **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


OSLO, BERGEN = call(city="Oslo"), call(city="Bergen", days=2)
COLD, WET = (
    {"role": "tool", "name": "weather", "content": "cold"},
    {"role": "tool", "name": "weather", "content": "wet"},
)
THINK = "<think>\nSo cold there.\n</think>\n\n"
CASES: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief."}, user(), answer()],
    "tools": [user(), answer()],
    "call without text": [user(), answer(None, tool_calls=[OSLO]), COLD, answer()],
    "call with empty text": [user(), answer("", tool_calls=[OSLO]), COLD, answer()],
    "call with blank text": [user(), answer(" \n", tool_calls=[OSLO]), COLD, answer()],
    "call with text": [user(), answer("Let me see.", tool_calls=[OSLO]), COLD, answer()],
    "call at the end": [user(), answer(None, tool_calls=[OSLO])],
    "two calls": [user(), answer(None, tool_calls=[OSLO, BERGEN]), COLD, WET, answer()],
    "calls in two steps": [
        user(), answer(None, tool_calls=[OSLO]), COLD, answer(None, tool_calls=[BERGEN]), WET, answer(),
    ],
    "call before a question": [
        user(), answer(None, tool_calls=[OSLO]), COLD, answer(), user("And now?"), answer("Still cold."),
    ],
    "reasoning": [user(), answer(reasoning_content="So cold there.")],
    "reasoning before a call": [
        user(), answer(None, reasoning_content="Let me look.", tool_calls=[OSLO]), COLD,
        answer(reasoning_content="So cold there."),
    ],
    "inline thoughts": [user(), answer(THINK + "It is cold.")],
    "inline empty thoughts": [user(), answer("<think>\n\n</think>\n\nIt is cold.")],
    "inline thoughts before a call": [user(), answer(THINK, tool_calls=[OSLO]), COLD, answer()],
    "two inline thoughts": [user(), answer(THINK + "It is cold."), user("Why?"), answer("<think>Hm.</think>Winter.")],
    "thoughts without a beginning": [user(), answer("So cold there.\n</think>\n\nIt is cold.")],
    "two answers": [user(), answer(), user("And now?"), answer("Still cold.")],
}  # fmt: skip
DOUBLE = re.compile(r"<think>\s*(</think>\s*)?<think>")
WITH_TOOLS = [name for name in CASES if name == "tools" or "call" in name]
SPLIT = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)


class Oracle:
    """One template for one list of tools."""

    def __init__(self, name: str, tools: list[Any]) -> None:
        self._template = compiled(shape(name).jinja)
        self.stop, self.call_stop = shape(name).stop, shape(name).call_stop or shape(name).stop
        self.tools = tools

    def text(self, turns: Sequence[Any], *, add_generation_prompt: bool = False, tools: Any = "own") -> str:
        tools = self.tools if tools == "own" else tools
        options = {"add_generation_prompt": add_generation_prompt, "bos_token": "<s>", "eos_token": "</s>"}
        text: str = self._template.render(messages=turns, tools=tools or None, **options)
        return text

    def reads_reasoning(self) -> bool:
        try:
            return "Hm hm." in self.text(named([user(), answer(reasoning_content="Hm hm.")]))
        except ERRORS:
            return False

    def form(self, turns: Sequence[Any]) -> list[Any]:
        """Return a row as the template reads it: reasoning in its field, null content where it tests for null."""
        split = [self._split(turn) for turn in turns] if self.reads_reasoning() else list(turns)
        null = [turn if (turn["content"] or "").strip() else turn | {"content": None} for turn in split]
        empty = [turn | {"content": turn["content"] or ""} for turn in null]
        for form in (empty, null):
            try:
                if all("weather" in self.text([user(), turn]) for turn in form if "tool_calls" in turn):
                    return named(form)
            except ERRORS:
                continue
        return named(empty)

    def _split(self, turn: Any) -> Any:
        found = SPLIT.fullmatch(turn["content"] or "")
        if found is None:
            return turn
        thoughts = {"reasoning_content": found[1].strip("\n")} if found[1].strip() else {}
        return turn | {"content": found[2].lstrip("\n")} | thoughts

    def answers(self, turns: Sequence[Any]) -> list[tuple[str, str, str]]:
        """Return every answer as its prompt, what the text has behind it, and that up to the stop text."""
        text, found = self.text(turns), []
        for index in [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]:
            prompt = self.text(turns[:index], add_generation_prompt=True)
            behind = text[len(prompt) :] if text.startswith(prompt) else ""
            stop = self.call_stop if "tool_calls" in turns[index] else self.stop
            trained = behind[: behind.index(stop) + len(stop)] if stop and stop in behind else ""
            found.append((prompt, behind, trained))
        return found


def named(turns: Sequence[Any]) -> list[Any]:
    """Return turns with their reasoning under each name that templates read."""
    return [
        turn | dict.fromkeys(("reasoning", "thinking"), turn["reasoning_content"])
        if "reasoning_content" in turn
        else turn
        for turn in turns
    ]


@cache
def tokenizer_for(name: str) -> Any:
    tokenizer = copy.deepcopy(build_tokenizer())
    special = {*SPECIAL.findall(shape(name).jinja), IM, "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"}
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": sorted(special)}, False
    )
    tokenizer.chat_template = shape(name).jinja
    return tokenizer


def squeezed(text: str) -> str:
    return "".join(text.split())


def parts_of(turn: Any) -> list[str]:
    """Return what an answer must have."""
    calls = [one["function"] for one in turn.get("tool_calls", [])]
    arguments = [str(value) for one in calls for item in one["arguments"].items() for value in item]
    parts = [turn["content"] or "", turn.get("reasoning_content", ""), *(one["name"] for one in calls), *arguments]
    return [squeezed(part) for part in parts]


def is_lost(oracle: Oracle, turns: Sequence[Any]) -> bool:
    """Say whether the text behind some prompt, or with thoughts that the prompt opens, lacks what an answer says."""
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    found = oracle.answers(turns)
    texts = [trained or behind for _, behind, trained in found]
    opened = ["<think>" * prompt.rstrip().endswith("<think>") for prompt, _, _ in found]
    return any(
        part not in squeezed(begin + text)
        for turn, begin, text in zip(answers, opened, texts, strict=True)
        for part in parts_of(turn)
    )


def differs(oracle: Oracle, turns: Sequence[Any], *, earlier: bool) -> bool:
    """Say whether a prompt is no prefix of the text, and whether that begins in earlier turns."""
    text = oracle.text(turns)
    for index in [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]:
        prompt = oracle.text(turns[:index], add_generation_prompt=True)
        if not text.startswith(prompt):
            return earlier != text.startswith(oracle.text(turns[:index]))
    return False


def fails(oracle: Oracle, turns: Sequence[Any]) -> bool:
    try:
        oracle.answers(turns)
    except ERRORS:
        return True
    return False


def has_no_end(oracle: Oracle, turns: Sequence[Any]) -> bool:
    """Say whether an answer has no stop text behind it, or another one than when it comes last."""
    text = oracle.text(turns)
    ends = [oracle.stop is None]
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and oracle.stop and "tool_calls" not in turn:
            behind = text[text.rindex(turn["content"].split(">")[-1].strip()) :]
            as_last = oracle.text(turns[: index + 1])
            ends.append(
                oracle.stop not in behind
                or as_last.split(turn["content"])[-1][:4] != behind[len(turn["content"]) :][:4]
            )
    return any(ends)


def writes_more_thoughts(oracle: Oracle, turns: Sequence[Any]) -> bool:
    """Say whether the text has more ends of thoughts than the row says."""
    num_expected = sum((turn["content"] or "").count("</think>") + ("reasoning_content" in turn) for turn in turns)
    return oracle.text(turns).count("</think>") > num_expected


REASONS: dict[str, Callable[[Oracle, Sequence[Any]], bool]] = {
    "(it drops or rewrites earlier turns)": lambda oracle, turns: differs(oracle, turns, earlier=True),
    "(the answer does not begin as the generation prompt ends": lambda oracle, turns: differs(
        oracle, turns, earlier=False
    ),
    "leaves out or rewrites part of an assistant turn": is_lost,
    "ends an assistant turn without a special token": has_no_end,
    "does not print tools": lambda oracle, turns: oracle.text(turns) == oracle.text(turns, tools=None),
    "the chat template refuses the row": fails,
    "has no attribute": fails,
    "leaves out or rewrites what a tool returned": lambda oracle, turns: "cold" not in oracle.text(turns[:3]),
    "leaves out or rewrites a call": is_lost,
    "writes thoughts of its own around": writes_more_thoughts,
    "leaves out the system turn": lambda oracle, turns: "Be brief." not in oracle.text(turns),
}
"""Of refusals, and what must be so."""
ERRORS = (TemplateError, TypeError, ValueError, LookupError)
WHOLE = "cannot be trained with"


def holds(reason: str, oracle: Oracle, turns: Sequence[Any]) -> bool:
    """Say whether the reason of a refusal is true."""
    return fails(oracle, turns) if fails(oracle, turns) else REASONS[reason](oracle, turns)


@cache
def outcome(name: str, case: str) -> str:
    """Return what becomes of a row: "equal", or the reason of a refusal, both compared with the oracle."""
    tools = [WEATHER] if case in WITH_TOOLS else []
    oracle, turns = Oracle(name, tools), CASES[case]
    form = oracle.form(turns)
    tokenizer = tokenizer_for(name)
    row = read({"messages": json.loads(json.dumps(turns)), "tools": tools})
    try:
        example = encoder_for(name).encode(row)
    except (UnusableRowError, DataError) as error:
        reason = str(error)
        if WHOLE in reason:  # with and without reasoning
            oracle, form = Oracle(name, []), [user(), answer()]
            reasoned = named([user(), answer(reasoning_content="Hm.")])
            assert any(holds(known, oracle, reasoned) for known in REASONS)
        known = next((known for known in REASONS if known in reason), None)
        assert known, reason
        assert holds(known, oracle, form), (reason, form)
        return known
    text = oracle.text(form)
    assert tokenizer.decode(example.input_ids) == text
    assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert not is_lost(oracle, form), ("lost", form, text)
    assert all(turn["content"] in text for turn in form if turn["role"] != "assistant")
    expected = [trained for _, _, trained in oracle.answers(form)]
    if BLOCK.search(shape(name).jinja):  # which may leave out a header that the prompt lacks
        expected = [trained.removeprefix("<|turn>model\n") for trained in expected]
    assert label_texts(tokenizer, example) == expected
    assert not DOUBLE.search(text)
    return "equal"


@cache
def encoder_for(name: str) -> RowEncoder:
    return RowEncoder(tokenizer_for(name), train_on="assistant", date=DATE)


def test_the_oracle_covers_what_trl_carries_and_twenty_shapes() -> None:
    assert sum("training" in name for name in TEMPLATES) >= 20
    assert len(SHAPES) >= 20


@pytest.mark.parametrize("name", [*TEMPLATES, *SHAPES])
def test_labels_equal_the_oracle_or_the_row_is_refused_for_a_true_reason(name: str) -> None:
    assert {case: outcome(name, case) for case in CASES}


COMPLETE = ("qwen3_training", "qwen3_5_think_training", "qwen3_6_training", "command r7b")
"""Templates with a place for everything: no kind of row is refused."""


@pytest.mark.parametrize("name", COMPLETE)
def test_a_template_with_a_place_for_everything_refuses_nothing(name: str) -> None:
    assert {outcome(name, case) for case in CASES} == {"equal"}


def labels_of(template: str, turns: list[dict[str, Any]]) -> list[str]:
    tokenizer = copy.deepcopy(tokenizer_for("chatml"))
    tokenizer.chat_template = (OWN_TEMPLATES / f"{template}.jinja").read_text()
    encoder = RowEncoder(tokenizer, train_on="assistant", date=DATE)
    return label_texts(tokenizer, encoder.encode(read({"messages": turns})))


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_call_without_text_is_trained_where_the_last_turn_differs(content: str | None) -> None:
    """What "as the last turn" and "in the middle" have in common ends within `<tool_call>`."""
    turns = [user(), answer(content, tool_calls=[OSLO]), COLD, answer()]
    assert labels_of("last_turn_thinks", turns) == [f"{CALL}<|im_end|>", "<think>\n\n</think>\n\nIt is cold.<|im_end|>"]


def test_thoughts_in_the_content_are_trained_behind_the_tag_that_the_prompt_opens() -> None:
    turns = [user("Two plus two?"), answer("<think>\nAdding them.\n</think>\n\nFour.")]
    assert labels_of("prompt_opens_thoughts", turns) == ["Adding them.\n</think>\n\nFour.<|im_end|>"]


def test_only_rows_without_reasoning_are_refused_where_empty_thoughts_differ_from_the_prompt() -> None:
    reasoned = [user("Two plus two?"), answer("Four.", reasoning_content="Adding them.")]
    assert labels_of("empty_thoughts_on_one_line", reasoned) == ["Adding them.\n</think>\nFour.<|im_end|>"]
    with pytest.raises(UnusableRowError, match="does not begin as the generation prompt ends: thoughts are opened"):
        labels_of("empty_thoughts_on_one_line", [user("Two plus two?"), answer("Four.")])


def test_an_answer_ends_at_its_end_of_turn_where_the_next_header_always_follows() -> None:
    name = "llama3 with the next header always"
    example = encoder_for(name).encode(read({"messages": [user(), answer()]}))
    assert label_texts(tokenizer_for(name), example) == ["It is cold.<|eot_id|>"]


def trained(jinja: str, turns: list[dict[str, Any]], train_on: Any = "assistant") -> list[str]:
    tokenizer = copy.deepcopy(tokenizer_for("chatml"))
    tokenizer.chat_template = jinja
    return label_texts(tokenizer, RowEncoder(tokenizer, train_on=train_on, date=DATE).encode(read({"messages": turns})))


def one_call(name: str = "weather", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


LAST_TURN_THINKS = SHAPES["chatml"].jinja.replace(
    "{{ m.content }}",
    "{% if loop.last or m.reasoning_content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}",
    1,
)
COLD_LABEL = f"<think>\n\n</think>\n\nIt is cold.{IM}"


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_calls_without_text_are_trained_where_the_last_turn_is_written_differently(content: Any) -> None:
    oslo, both = "\n" + one_call(city="Oslo"), "\n" + one_call(city="Oslo") + "\n" + one_call(city="Bergen", days=2)
    turns = [user(), answer(content, tool_calls=[OSLO]), COLD, answer()]
    assert trained(LAST_TURN_THINKS, turns) == [oslo + IM, COLD_LABEL]
    assert trained(LAST_TURN_THINKS, turns, "last") == [COLD_LABEL]
    parallel = [user(), answer(content, tool_calls=[OSLO, BERGEN]), COLD, WET, answer()]
    assert trained(LAST_TURN_THINKS, parallel) == [both + IM, COLD_LABEL]
    steps = [*turns[:3], answer(content, tool_calls=[BERGEN]), WET, answer()]
    assert trained(LAST_TURN_THINKS, steps) == [oslo + IM, "\n" + one_call(city="Bergen", days=2) + IM, COLD_LABEL]
    asked_again = [*turns, user("Why?"), answer()]
    assert trained(LAST_TURN_THINKS, asked_again) == [oslo + IM, "It is cold." + IM, COLD_LABEL]
    assert trained(LAST_TURN_THINKS, turns[:2]) == ["<think>\n\n</think>\n\n" + oslo + IM]


@pytest.mark.parametrize("name", ["qwen3.5 thinking", "thoughts that are not looked for in the content", "nemotron"])
def test_thoughts_that_the_prompt_opens_are_trained_once(name: str) -> None:
    behind = "\n</think>\n" if name == "nemotron" else "\n</think>\n\n"
    expected = [f"So cold there.{behind}It is cold.{IM}"]
    for case in ("reasoning", "inline thoughts"):
        assert trained(SHAPES[name].jinja, CASES[case]) == expected


def test_reasoning_in_the_content_is_noted_and_stays_there_for_templates_without_a_place_for_it() -> None:
    row = read({"messages": CASES["inline thoughts"]})
    assert encoder_for("nemotron").encode(row).warnings == (INLINE_REASONING,)
    assert encoder_for("chatml").encode(row).warnings == ()
    assert trained(SHAPES["chatml"].jinja, CASES["inline thoughts"]) == [f"{THINK}It is cold.{IM}"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a</think>", "has <think>...</think> and nothing behind it"),
        ("a</think>b", "writes thoughts of its own around an assistant turn whose content has <think> or </think>"),
        ("<think>a", "writes thoughts of its own around an assistant turn whose content has <think> or </think>"),
    ],
)
def test_thoughts_that_would_be_written_twice_or_answer_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UnusableRowError, match=re.escape(reason)):
        trained(SHAPES["thoughts that are not looked for in the content"].jinja, [user(), answer(text)])
    with pytest.raises(UnusableRowError, match="reasoning both in a field of its own and as <think>"):
        trained(SHAPES["nemotron"].jinja, [user(), answer("<think>a</think>b", reasoning_content="c")])


def test_a_template_is_refused_by_the_row_where_only_answers_without_reasoning_fail() -> None:
    for name in ("nemotron", *(name for name in TEMPLATES if name.startswith("nemotron_3"))):
        reason = outcome(name, "two answers")
        assert reason == "(the answer does not begin as the generation prompt ends"
        assert (outcome(name, "reasoning"), outcome(name, "inline thoughts")) == ("equal", "equal")


@pytest.mark.parametrize("case", ["tools", "two answers", "call at the end"])
@pytest.mark.parametrize("name", ["llama3 with the next header always", "phi3 with the next header always"])
def test_no_loss_falls_on_a_header_behind_the_end_of_the_turn(name: str, case: str) -> None:
    """A header may follow without anything between, or have another beginning than the conversation."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    jinja = SHAPES[name].jinja if "llama3" in name else (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}" + calls + "<|end|>{% endfor %}<|assistant|>"
    )  # fmt: skip
    tokenizer = copy.deepcopy(tokenizer_for(name))
    tokenizer.chat_template = jinja
    example = RowEncoder(tokenizer, train_on="assistant", date=DATE).encode(read({"messages": CASES[case]}))
    texts = [turn["content"] or json.dumps(OSLO["function"]) for turn in CASES[case] if turn["role"] == "assistant"]
    assert label_texts(tokenizer, example) == [text + str(SHAPES[name].stop) for text in texts]
