"""The report of the data: counts against plain Python, messages, and rows as text and on a terminal."""

import io
import json
import logging
import math
import re
import unicodedata
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from qlora_train.data.data_report import (
    DataReport,
    SourceReport,
    SystemPrompt,
    check_max_dropped,
)
from qlora_train.data.decoded_rows import DecodedRow, decode_rows
from qlora_train.data.reason_counts import ReasonCounts
from qlora_train.data.split_report import SplitReport, length_quantiles
from qlora_train.data.terminal_view import MAX_SEGMENT_LENGTH, shown_rows
from qlora_train.data.token_store import SourceSummary
from qlora_train.data.types import Example
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer


def reasons(**locations: list[str]) -> ReasonCounts:
    """Count one row per location, by the reason that is the keyword."""
    counted = ReasonCounts()
    for reason, wheres in locations.items():
        for where in wheres:
            counted.add(reason.replace("_", " "), where)
    return counted


def split(lengths: list[int], num_labels: list[int], *, max_length: int = 100, **counts: int) -> SplitReport:
    counts["num_at_max_length"] = lengths.count(max_length)
    return SplitReport.of(np.array(lengths, np.int32), np.array(num_labels, np.int32), **counts)


def source(key: str = "data.train", *, num_used: int = 10, cached: bool = False, **counted: Any) -> SourceReport:
    summary = SourceSummary(**{"format": "text", "num_records": 10, "num_rows": 10, **counted})
    return SourceReport(key, "a.jsonl", summary, num_used, cached)


def report(*sources: SourceReport, overflow: str = "drop", **settings: Any) -> DataReport:
    splits = {f"data.{name}": settings.pop(name) for name in ("train", "eval") if name in settings}
    return DataReport(100, overflow, sources, splits, settings.pop("first_rows", ()), **settings)


def example(ids: list[int], mask: list[bool], where: str = "a.jsonl:1", warnings: tuple[str, ...] = ()) -> Example:
    return Example(where, np.array(ids, np.int32), np.array(mask, np.bool_), warnings=warnings)


# --- counts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=300))
def test_length_quantiles_are_lengths_of_rows(lengths: list[int]) -> None:
    ordered = sorted(lengths)
    found = length_quantiles(np.array(lengths, np.int32))
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    for percent, name in ((50, "median"), (90, "p90"), (99, "p99")):
        assert found[name] == ordered[math.ceil(percent * len(ordered) / 100) - 1]


def test_tokens_are_counted_beyond_32_bits() -> None:
    counted = split([2**30] * 6, [2**29] * 6, max_length=2**30)
    assert (counted.num_tokens, counted.num_labels) == (6 * 2**30, 3 * 2**30)
    assert (counted.label_share, counted.num_at_max_length) == (0.5, 6)


def test_a_report_has_the_rows_read_dropped_split_and_used() -> None:
    dropped = reasons(overflow=["a.jsonl:2", "a.jsonl:3"])
    longer = source(num_records=10, num_rows=12, dropped=dropped, num_used=5, cached=True)
    made = report(longer, train=split([10, 20, 100, 30, 40], [1, 2, 50, 3, 4], num_duplicates=2, num_deduplicated=3))
    assert made.lines() == [
        "data.train: a.jsonl: 10 rows (format text), 2 dropped, 12 after splitting, 5 used (cached)",
        "data.train: 5 rows (2 duplicates, 3 removed by data.deduplicate), 200 tokens, 60 labels (30.0 %)",
        "data.train: tokens per row: min 10, median 30, p90 100, p99 100, max 100; 1 of data.max_length (100)",
    ]


def test_a_report_of_good_data_has_no_findings() -> None:
    good = report(source(), source("data.eval"), train=split([10], [5]), eval=split([10], [5]))
    assert good.lines()[0] == "data.train: a.jsonl: 10 rows (format text), 0 dropped"
    assert good.findings() == []


def test_the_report_of_a_stream_names_its_scope() -> None:
    made = report(train=split([10], [5]), is_streamed=True)
    assert made.lines()[0] == "data.train: streamed; the counts are those of its beginning"
    assert made.to_json()["is_streamed"] is True


def conversations(systems: dict[str, int], num_used: int = 100) -> SourceReport:
    return source(num_used=num_used, num_rows=100, num_conversations=sum(systems.values()), systems=systems)


def test_a_system_prompt_is_shared_by_nine_conversations_of_ten() -> None:
    assert SystemPrompt.shared([conversations({"Be brief.": 9, "": 1})]) == SystemPrompt("Be brief.", 0.9)
    assert SystemPrompt.shared([conversations({"Be brief.": 8, "Be long.": 1, "": 1})]) is None
    assert SystemPrompt.shared([conversations({"": 9, "Be brief.": 1})]) is None
    assert SystemPrompt.shared([conversations({})]) is None  # plain text


def test_system_prompts_are_weighted_by_used_rows() -> None:
    brief, long = {"Be brief.": 100}, {"Be long.": 100}
    assert report(conversations(brief), conversations(long)).system_prompt is None
    found = report(conversations(brief, 95), conversations(long, 5)).system_prompt
    assert found == SystemPrompt("Be brief.", 0.95)
    assert found.line() == "data.train: system prompt of 95 % of conversations, also for inference: 'Be brief.'"


def test_the_json_of_a_report_has_all_counts() -> None:
    dropped, warned = reasons(rare=["a:1"], frequent=[f"a:{i}" for i in range(2, 9)]), reasons(cut=["a:9"])
    rows = decode_rows([example([5, 6, 7], [False, True, True])], build_tokenizer())
    made = report(
        source(dropped=dropped, warned=warned), overflow="split", train=split([10, 30], [5, 5]), first_rows=rows
    )
    read = json.loads(json.dumps(made.to_json(), allow_nan=False))
    [first] = read["sources"]
    assert (first["num_records"], first["num_rows"], first["num_dropped"], first["cached"]) == (10, 10, 8, False)
    assert first["dropped"] == [
        {"reason": "frequent", "count": 7, "locations": [f"a:{i}" for i in range(2, 7)]},
        {"reason": "rare", "count": 1, "locations": ["a:1"]},
    ]
    assert first["warned"] == [{"reason": "cut", "count": 1, "locations": ["a:9"]}]
    assert read["splits"]["data.train"]["lengths"] == {"min": 10, "median": 10, "p90": 30, "p99": 30, "max": 30}
    assert read["splits"]["data.train"]["label_share"] == 0.25
    assert (read["max_length"], read["overflow"], read["overlap"]) == (100, "split", [])
    assert [finding["num_rows"] for finding in read["findings"]] == [8, 1]
    [row] = read["first_rows"]
    assert (row["where"], row["num_tokens"], row["num_labels"]) == ("a.jsonl:1", 3, 2)
    assert [segment["trained"] for segment in row["segments"]] == [False, True]


# --- max_dropped ------------------------------------------------------------------------------------------------------


def check(key: str, dropped: ReasonCounts, num_records: int, max_dropped: float) -> None:
    check_max_dropped(key, [SourceSummary(num_records=num_records, dropped=dropped)], max_dropped)


def test_too_many_unusable_rows_stop_with_one_line_that_counts_the_reasons() -> None:
    dropped = reasons(role_is_new=["a:1"], text_is_empty=[f"a:{i}" for i in range(2, 9)])
    with pytest.raises(DataError) as caught:
        check("data.train", dropped, 100, 0.05)
    assert str(caught.value) == (
        "data.train: 8 of 100 rows cannot be used, data.max_dropped (0.05) allows 5: 7 x text is empty (a:2, a:3, a:4, "
        "a:5, a:6 and 2 more); 1 x role is new (a:1); correct the rows or raise data.max_dropped"
    )


def test_rare_reasons_are_counted_together() -> None:
    dropped = reasons(**{f"reason_{i:02}": [f"a:{i}"] for i in range(30)})
    with pytest.raises(
        DataError, match=r"1 x reason 07 \(a:7\); 22 x other reasons \(a:8, a:9, a:10, a:11, a:12 and 17"
    ):
        check("data.train", dropped, 100, 0.0)


def test_the_share_that_may_be_dropped_is_exact() -> None:
    assert int(0.29 * 100) == 28, "the float product is below the whole number here"
    for num_dropped in (0, 29):
        check("data.train", reasons(empty=[f"a:{i}" for i in range(num_dropped)]), 100, 0.29)
    with pytest.raises(DataError, match=r"30 of 100 rows cannot be used, .* allows 29"):
        check("data.train", reasons(empty=[f"a:{i}" for i in range(30)]), 100, 0.29)


def test_no_usable_row_is_an_error_even_where_every_drop_is_allowed() -> None:
    with pytest.raises(DataError, match=r"^data.eval: no row can be used: 2 x empty \(a:1, a:2\)$"):
        check("data.eval", reasons(empty=["a:1", "a:2"]), 2, 1.0)


# --- findings ---------------------------------------------------------------------------------------------------------


def test_dropped_rows_and_warnings_of_all_sources_are_counted_together() -> None:
    sources = (
        source(dropped=reasons(empty=["a:1"]), warned=reasons(the_answer_is_cut=["a:5"])),
        source(dropped=reasons(empty=["b:1"], odd=["b:2"]), warned=reasons(the_answer_is_cut=["b:5"])),
        source("data.eval", dropped=reasons(empty=["c:1"])),
    )
    findings = report(*sources, train=split([10], [5]), eval=split([10], [5])).findings()
    assert [(finding.key, finding.num_rows, finding.text) for finding in findings] == [
        ("data.train", 3, "3 of 20 rows cannot be used and are dropped: 2 x empty (a:1, b:1); 1 x odd (b:2)"),
        ("data.train", 2, "2 rows: the answer is cut (a:5, b:5)"),
        ("data.eval", 1, "1 of 10 rows cannot be used and are dropped: 1 x empty (c:1)"),
    ]


@pytest.mark.parametrize(("num_labels", "found"), [(1, True), (2, False)])
def test_few_label_tokens_are_found(num_labels: int, found: bool) -> None:
    texts = [finding.text for finding in report(source(), train=split([100, 100], [num_labels, 0])).findings()]
    assert texts == (["only 0.5 % of the tokens are labels; shorten prompts or see data.train_on"] if found else [])


@pytest.mark.parametrize(
    ("overflow", "num_full", "found"),
    [("truncate", 3, True), ("keep_answer", 3, True), ("split", 3, False), ("truncate", 2, False)],
)
def test_rows_that_were_probably_truncated_are_found(overflow: str, num_full: int, found: bool) -> None:
    lengths = [100] * num_full + [50] * (4 - num_full)
    findings = report(source(), overflow=overflow, train=split(lengths, [40] * 4)).findings()
    assert [finding.text[:44] for finding in findings] == (
        ["3 of 4 rows have data.max_length (100) token"] if found else []
    )


def test_rows_in_both_splits_are_found_and_located() -> None:
    overlap = reasons(in_train=[f"eval.jsonl:{line}" for line in range(2, 8)])
    findings = report(source(), overlap=overlap, train=split([10], [5]), eval=split([10] * 9, [5] * 9)).findings()
    assert [finding.text for finding in findings] == [
        "6 of 9 rows are in train, so the evaluation is biased: eval.jsonl:2, eval.jsonl:3, eval.jsonl:4, eval.jsonl:5, "
        "eval.jsonl:6 and 1 more; data.deduplicate: true trains without them"
    ]


def test_the_log_has_one_line_per_split_as_information_and_findings_as_warnings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logged = report(source(dropped=reasons(empty=["100%.jsonl:1"])), train=split([10], [5]))
    with caplog.at_level(logging.DEBUG, "qlora_train"):
        logged.log()
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [text for level, text in levels if level != "WARNING"] == logged.lines()
    assert [text for level, text in levels if level == "INFO"] == [logged.lines()[1]]
    assert levels[-1] == (
        "WARNING",
        "data.train: 1 of 10 rows cannot be used and are dropped: 1 x empty (100%.jsonl:1)",
    )


# --- rows as text -----------------------------------------------------------------------------------------------------


def build_byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer as sentencepiece models have: white space inside tokens, unknown characters as bytes."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc", "\u2581a", "ab", "\u2581ab"]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZERS = {"bytes": build_tokenizer(), "byte fallback": build_byte_fallback_tokenizer()}
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)


@tokenizers
@settings(deadline=None)
@given(data=st.data())
def test_segments_join_to_the_whole_row_whatever_the_mask_cuts(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(st.sampled_from("ab c\n\u00e9\u4e2d\U0001f600\u200d\ufffd"), min_size=1, max_size=20))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if data.draw(st.booleans(), label="cut to a length, perhaps inside a character"):
        ids = ids[: data.draw(st.integers(1, len(ids)))]
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    [row] = decode_rows([example(ids, mask)], tokenizer)
    assert "".join(part for part, _ in row.segments) == tokenizer.decode(ids)
    assert [trained for _, trained in row.segments] == [trained for trained, _ in groupby(mask)]
    assert (row.num_tokens, row.num_labels) == (len(ids), sum(mask))


@tokenizers
@settings(deadline=None)
@given(data=st.data())
def test_trained_segments_are_the_characters_of_the_trained_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(st.sampled_from("abc "), min_size=1, max_size=30).map(lambda text: "a" + text))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = data.draw(st.lists(st.booleans(), min_size=len(encoding.input_ids), max_size=len(encoding.input_ids)))
    [row] = decode_rows([example(encoding.input_ids, mask)], tokenizer)
    is_trained = [trained for segment, trained in row.segments for _ in segment]
    expected = [False] * len(text)
    for (begin, end), trained in zip(encoding.offset_mapping, mask, strict=True):
        expected[begin:end] = [trained] * (end - begin)
    assert is_trained == expected


@tokenizers
@pytest.mark.parametrize("character", ["\u00e9", "\u4e2d", "\U0001f600"])
def test_a_character_on_both_sides_of_a_border_stands_behind_it_and_nothing_else_does(
    name: str, character: str
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(f"a {character}b", add_special_tokens=False)
    num_bytes = len(character.encode())
    last = len(ids) - 1  # the token of b
    for border in range(last - num_bytes + 1, last):
        mask = [token >= border for token in range(len(ids))]
        [row] = decode_rows([example(ids, mask)], tokenizer)
        assert row.segments == (("a ", False), (f"{character}b", True))


def test_no_text_is_shown_twice_where_a_cut_row_ends_in_bytes_that_are_no_characters() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("a" + 6 * "\n" + "\u00e9", add_special_tokens=False)[:-1]
    [row] = decode_rows([example(ids, [False, *[True] * 5, *[False] * (len(ids) - 6)])], tokenizer)
    assert "".join(part for part, _ in row.segments) == tokenizer.decode(ids)
    assert len(row.segments) == 3


def test_special_tokens_are_part_of_the_text() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("<|im_start|>assistant\nyes<|im_end|>\n", add_special_tokens=False)
    start = len(tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False))
    mask = [start <= i < len(ids) - 1 for i in range(len(ids))]
    [row] = decode_rows([example(ids, mask, warnings=("a note",))], tokenizer)
    assert row.segments == (("<|im_start|>assistant\n", False), ("yes<|im_end|>", True), ("\n", False))
    assert (row.where, row.warnings) == ("a.jsonl:1", ("a note",))


# --- rows on a terminal -----------------------------------------------------------------------------------------------

ESCAPES = re.compile(r"\x1b\[([0-9;]*)m")
HOSTILE = (
    "\x1b[31mred\x07 \r[bold]b[/bold] [link=x]y :smile: \u202eevil\u202c \ufeff\x00\t\U0001f468\u200d\U0001f469 \\n"
)


def rendered(*segments: tuple[str, bool], where: str = "a.jsonl:7", warnings: tuple[str, ...] = ()) -> DecodedRow:
    return DecodedRow(where, 9, 4, segments, warnings)


def coloured() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False, width=40)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_without_a_terminal_brackets_enclose_what_is_trained() -> None:
    rows = [rendered(("user: hi\n", False), ("hello<|im_end|>", True), ("\n", False), warnings=("the answer is cut",))]
    assert shown_rows(rows, plain()) == (
        "row 1: a.jsonl:7: 9 tokens, 4 of them with loss\n"
        "warning: the answer is cut\n"
        "user: hi↵\n⟦hello<|im_end|>⟧↵\n\n\n"
        "⟦with loss⟧ without loss ↵ line break\n"
    )


def test_a_terminal_that_wants_no_colour_gets_brackets_too() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=True)
    shown = shown_rows([rendered(("a", False), ("b", True))], console)
    assert "⟦b⟧" in ESCAPES.sub("", shown)
    assert {"32"}.isdisjoint(code for codes in ESCAPES.findall(shown) for code in codes.split(";"))


def test_on_a_terminal_what_is_trained_is_green_and_nothing_else_is() -> None:
    shown = shown_rows([rendered(("first\nsecond ", False), ("third\nfourth", True), (" fifth", False))], coloured())
    text, _legend = shown.rsplit("\n\n", 1)
    green, is_green = "", False
    for position, piece in enumerate(ESCAPES.split(text)):
        if position % 2:
            is_green = "32" in piece.split(";")
        elif is_green:
            green += piece
    assert green.replace("↵", " ").split() == ["third", "fourth"]
    assert "⟦" not in shown


@pytest.mark.parametrize("console", [plain, coloured])
def test_hostile_text_reaches_a_terminal_as_text(console: Any) -> None:
    shown = ESCAPES.sub("", shown_rows([rendered((HOSTILE, False), (HOSTILE, True), where=f"{HOSTILE}:7")], console()))
    odd = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf")} - {"\n", "\u200d"}
    assert odd == set()
    for seen in (r"\x1b[31mred\x07 \r[bold]b[/bold] [link=x]y :smile: \u202eevil", r"\ufeff\x00\t", "\U0001f468\u200d"):
        assert shown.count(seen) == 3


def test_long_lines_are_not_broken_and_long_pieces_are_shortened() -> None:
    line, piece = "word " * 100, "x" * MAX_SEGMENT_LENGTH + "yz"
    shown = shown_rows([rendered((line, False), (piece, True))], plain())
    assert line in shown
    assert f"x [... 2 characters ...] {'x' * (MAX_SEGMENT_LENGTH // 2 - 2)}yz⟧" in shown


def test_no_rows_are_shown_as_nothing() -> None:
    assert shown_rows([], plain()) == ""


def answers(*texts: str) -> list[DecodedRow]:
    prompt = ("user: hi\nassistant: ", False)
    return [
        DecodedRow(f"a.jsonl:7 ({answer})", 9, 4, (prompt, (text, True), ("\n", False)), answer=answer)
        for answer, text in zip(("chosen", "rejected"), texts, strict=True)
    ]


def test_the_answers_of_a_pair_are_below_each_other_behind_one_prompt() -> None:
    pair = [*answers("hello\nyou<|im_end|>", "no<|im_end|>"), rendered(("x", True))]
    assert shown_rows(pair, plain()) == (
        "pair 1: a.jsonl:7: chosen 9 tokens, 4 of them with loss; rejected 9 tokens, 4 of them with loss\n"
        "user: hi↵\nassistant:\n"
        "chosen:   ⟦hello↵\n          you<|im_end|>⟧↵\n"
        "rejected: ⟦no<|im_end|>⟧↵\n\n"
        "row 2: a.jsonl:7: 9 tokens, 4 of them with loss\n⟦x⟧\n\n"
        "⟦with loss⟧ without loss ↵ line break\n"
    )


def test_the_answers_of_a_pair_stand_side_by_side_on_a_wide_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    text = "word " * 30
    lines = shown_rows(answers(f"{text}end", "no"), console).splitlines()
    header = next(line for line in lines if line.split() == ["chosen", "rejected"])
    column = header.index("rejected")
    below = lines[lines.index(header) + 1 :]
    left = " ".join(line[:column].strip() for line in below[: below.index("")])
    right = " ".join(line[column:].strip() for line in below[: below.index("")])
    assert (left.strip(), right.strip()) == (f"⟦{text}end⟧↵", "⟦no⟧↵")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("width", [40, 120])
def test_hostile_answers_reach_a_terminal_as_text(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False, width=width)
    shown = ESCAPES.sub("", shown_rows(answers(HOSTILE, "x" * 300), console))
    odd = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf")} - {"\n", "\u200d"}
    assert odd == set()
    assert r"\x1b[31mred\x07" in shown
    assert shown.count("x" * 40) > 2
