"""From files to the rows of a run: used, dropped with a reason, held out, and cached."""

import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_train.config import DataSection
from qlora_train.data import PreparedData, prepare_data
from qlora_train.data.data_report import SystemPrompt
from qlora_train.utils.errors import ConfigError, DataError
from tests.support.pico import build_tokenizer

TOKENIZER = build_tokenizer()


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(seed: int = 0, **settings: Any) -> PreparedData:
    prepared = prepare_data(DataSection(**settings), TOKENIZER, seed)
    prepared.report.log()
    return prepared


def texts(rows: Any) -> list[str]:
    return [TOKENIZER.decode(row.input_ids, skip_special_tokens=True) for row in rows]


def dropped(data: PreparedData, source: int = 0) -> dict[str, int]:
    return data.report.sources[source].summary.dropped.counts


def test_a_few_unusable_rows_are_counted_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": chat("hi", "" if i == 2 else f"hello {i}")} for i in range(10)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, "qlora_train"):
        prepared = prepare(train=file, max_dropped=0.1)
    assert len(prepared.train) == 9
    assert dropped(prepared) == {"empty assistant turn": 1}
    assert f"1 of 10 rows cannot be used and are dropped: 1 x empty assistant turn ({file}:3)" in caplog.text


def test_dropped_rows_are_counted_by_where_they_were_read_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": ""}, {"text": None}, {"text": " "}])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": ""}, {"text": "two"}, {"text": "two"}])
    with caplog.at_level(logging.DEBUG, "qlora_train"):
        prepared = prepare(train=train, eval=held_out, max_dropped=0.9)
    assert dropped(prepared) == {"text is empty": 2, "text is null, expected a string": 1}
    assert dropped(prepared, 1) == {"text is empty": 1}
    assert f"2 x text is empty ({train}:2, {train}:4); 1 x text is null, expected a string ({train}:3)" in caplog.text
    assert "data.eval: 2 rows (1 duplicates)" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_the_system_prompt_that_rows_share_is_found_in_any_format(tmp_path: Path, streaming: bool) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *chat(f"question {i}", "yes")]} for i in range(19)] + [{"messages": chat("hi", "ho")}]
    columns = [{"system": "Be brief.", "question": f"q {i}", "answer": "no"} for i in range(20)]
    plain = [{"text": f"text {i}"} for i in range(20)]
    named = {"turns": rows, "columns": columns, "plain": plain}
    files = [{"path": write_jsonl(tmp_path / f"{name}.jsonl", content)} for name, content in named.items()]
    report = prepare(train=files, streaming=streaming).report
    assert report.system_prompt == SystemPrompt("Be brief.", 39 / 40)
    assert report.to_json()["system_prompt"] == {"text": "Be brief.", "share": 39 / 40}
    assert prepare(train=files[2], streaming=streaming).report.system_prompt is None


def test_columns_that_may_matter_are_warned_of_with_their_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": chat("hi"), "completion": chat("", f"hello {i}")[1:], "label": True, "id": i} for i in range(7)]
    rows[3]["context"] = "It was Tuesday."
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for is_cached in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qlora_train"):
            prepared = prepare(train=file, cache_dir=str(tmp_path / "cache"))
        assert cached(prepared) == [is_cached]
        locations = ", ".join(f"{file}:{line}" for line in range(1, 6))
        assert [record.getMessage() for record in caplog.records] == [
            "data.train: 7 rows: label is true, and the row is trained as any other (train.objective: kto reads "
            f"it) ({locations} and 2 more)",
            f"data.train: 1 rows: the column context is not used: answers may depend on it ({file}:4)",
        ]


def test_rows_with_other_template_variables_are_other_rows(tmp_path: Path) -> None:
    rows = [{"messages": chat("hi", "hello"), "chat_template_kwargs": {"enable_thinking": on}} for on in (True, False)]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    assert len(prepare(train=file, deduplicate=True).train) == 2


def test_a_reason_is_one_short_line_whatever_the_row_says(tmp_path: Path) -> None:
    turns = [{"role": "hu\nman" + "x" * 5000, "content": "hi"}]
    rows = [{"messages": turns}, *({"messages": [{"role": f"r{i}", "content": "hi"}]} for i in range(30))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(train=file)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3000
    assert f"23 x other reasons ({file}:9, {file}:10" in message


def test_all_rows_unusable_is_an_error_even_where_every_drop_is_allowed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="no row can be used: 1 x text is empty"):
        prepare(train=file, max_dropped=1.0)


def test_an_empty_file_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    full, empty = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}]), write_jsonl(tmp_path / "b.jsonl", [])
    for train in (empty, [full, empty], str(tmp_path / "*.jsonl")):
        with pytest.raises(DataError, match=rf"^{empty}: found no rows; expected at least one"):
            prepare(train=train)


def test_token_ids_beyond_the_models_vocabulary_are_counted(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [5, 320]}, {"input_ids": [5, 70_000]}]
    )
    prepared = prepare_data(DataSection(train=file, max_dropped=0.9), TOKENIZER, 0, vocabulary_size=320)
    assert dropped(prepared) == {"a token id beyond the model's vocabulary (320 tokens)": 2}
    assert [row.input_ids.tolist() for row in prepared.train] == [[5, 6]]


def test_a_row_longer_than_allowed_stops_the_run_where_it_is_to_be_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two " * 50}])
    with pytest.raises(DataError, match=rf"^{file}:2: found a row of \d+ tokens; data.max_length allows 16"):
        prepare(train=file, max_length=16, overflow="refuse")


def test_a_long_row_is_split_and_its_pieces_are_no_repeats(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b c d " * 20}, {"text": "short"}])
    prepared = prepare(train=file, max_length=16, overflow="split", deduplicate=True)
    whole = prepare(train=file, max_length=500)
    assert prepared.train.num_labels.sum() == whole.train.num_labels.sum()
    assert max(prepared.train.lengths) == 16
    source = prepared.report.sources[0].summary
    assert (source.num_records, source.num_rows) == (2, len(prepared.train))
    assert texts(prepared.train)[-1] == "short"


# --- eval -----------------------------------------------------------------------------------------------------------------


def test_the_split_keeps_its_sides_when_rows_are_added_and_equal_rows_together(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(200)]
    few = write_jsonl(tmp_path / "few.jsonl", rows[:100] + rows[:50])
    many = write_jsonl(tmp_path / "many.jsonl", rows[::-1])
    sides = []
    for file in (few, many):
        prepared = prepare(3, train=file, eval=0.2)
        train, held_out = set(texts(prepared.train)), set(texts(prepared.eval))
        assert not train & held_out
        sides.append(held_out)
    assert 10 <= len(sides[0]) <= 30
    assert sides[0] < sides[1]
    assert set(texts(prepare(4, train=many, eval=0.2).eval)) != sides[1]


def test_rows_that_are_held_out_keep_their_texts_for_generation(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i} ", "completion": f"c {i}"} for i in range(300)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = prepare(train=file, eval=0.2)
    assert all((row.prompt or "").startswith("p ") and (row.answer or "").startswith("c ") for row in prepared.eval)
    assert 0 < sum(row.answer is not None for row in prepared.train) <= 64
    assert [row.answer is not None for row in prepared.few_shot_examples(3)] == [True] * 3
    assert len(prepared.few_shot_examples(1000)) <= 64
    everything = prepare(train=file, eval=file).eval
    assert [row.answer for row in everything] == [row["completion"] for row in rows]


def test_a_split_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "one"}])
    with pytest.raises(DataError, match=r"data.eval: a share of 0.1 of 2 rows leaves none"):
        prepare(train=file, eval=0.1)


def test_rows_in_train_and_eval_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "three"}, {"text": "two"}])
    with caplog.at_level(logging.WARNING, "qlora_train"):
        prepared = prepare(train=train, eval=held_out)
    assert (len(prepared.train), len(prepared.eval)) == (2, 2)
    assert f"1 of 2 rows are in data.train too, so the evaluation is biased: {held_out}:2" in caplog.text


def test_deduplication_trains_once_on_equal_rows_and_never_on_held_out_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two", "one", "three")])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in ("two", "four", "held")])
    held_out = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in ("three", "held")])
    with caplog.at_level(logging.DEBUG, "qlora_train"):
        prepared = prepare(train=[first, second], eval=held_out, deduplicate=True)
    assert texts(prepared.train) == ["one", "two", "four"]
    assert texts(prepared.eval) == ["three", "held"]
    assert "3 rows (0 duplicates, 4 removed by data.deduplicate)" in caplog.text
    assert "biased" not in caplog.text
    with pytest.raises(DataError, match=r"every row of data.train is in data.eval too"):
        prepare(train=held_out, eval=held_out, deduplicate=True)


# --- several sources ------------------------------------------------------------------------------------------------------


def test_sources_of_different_formats_are_mixed_by_weight_and_number(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}"} for i in range(10)]
    questions = [{"q": f"q {i} ", "a": f"a {i}"} for i in range(20)]
    messages = [{"messages": chat("hi", f"m {i}")} for i in range(4)]
    paths = [
        write_jsonl(tmp_path / name, content) for name, content in (("t", rows), ("q", questions), ("m", messages))
        for name in (f"{name}.jsonl",)
    ]  # fmt: skip
    sources = [
        {"path": paths[0], "weight": 0.5},
        {"path": paths[1], "num_rows": 7, "format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}},
        {"path": paths[2], "weight": 2},
    ]
    prepared = prepare(train=sources)
    used = Counter(prepared.train.store_indices.tolist())
    assert used == {0: 5, 1: 7, 2: 8}
    assert [source.num_used for source in prepared.report.sources] == [5, 7, 8]
    assert [source.summary.format for source in prepared.report.sources] == ["text", "prompt_completion", "messages"]
    assert prepare(train=sources).fingerprint == prepared.fingerprint != prepare(1, train=sources).fingerprint
    assert len(prepare(train=sources, max_rows=6).train) == 6


def test_names_of_columns_for_all_sources_do_not_disturb_one_with_a_format_of_its_own(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    named = write_jsonl(tmp_path / "b.jsonl", [{"q": "q ", "a": "a"}])
    settings = {"columns": {"prompt": "q", "completion": "a"}, "train": [{"path": plain, "format": "text"}, named]}
    assert texts(prepare(**settings).train) == ["one", "q a"]
    with pytest.raises(ConfigError, match="'prompt' is not a column of the format text"):
        prepare(train=[{"path": plain, "format": "text", "columns": {"prompt": "q"}}])


def test_a_renamed_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"instruction": "add", "context": "1 2", "output": "3"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"^data.train: data.columns says that input is called contxt, but no row of"):
        prepare(train=file, columns={"input": "contxt"})
    file = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "bow", "output": "ok"}, *rows])
    assert len(prepare(train=file, columns={"input": "context"}).train) == 2


# --- the cache and the processes ------------------------------------------------------------------------------------------


def cached(data: PreparedData) -> list[bool]:
    return [source.cached for source in data.report.sources]


def test_data_is_tokenised_again_only_when_something_that_matters_changes(tmp_path: Path) -> None:
    rows = [{"messages": chat("hi", f"hello {i}")} for i in range(20)]
    file, cache_dir = write_jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "cache")
    first = prepare(train=file, cache_dir=cache_dir)
    assert cached(first) == [False]
    elsewhere = str(shutil.copy(file, tmp_path / "moved.jsonl"))
    same = (
        {"train": file}, {"train": elsewhere}, {"train": {"path": file, "weight": 2}}, {"train": file, "max_rows": 3},
        {"train": file, "deduplicate": True, "packing": True, "num_proc": 2, "max_dropped": 0.5},
    )  # fmt: skip
    for settings in same:
        assert cached(prepare(7, **settings, cache_dir=cache_dir)) == [True], settings
    other = (
        {"train": file, "max_length": 100}, {"train": file, "train_on": "all"}, {"train": file, "overflow": "truncate"},
        {"train": file, "eval": 0.5},
    )  # fmt: skip
    for settings in other:
        assert cached(prepare(**settings, cache_dir=cache_dir)) == [False], settings
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "one"}, {"text": ""}])
    prepare(train=bad, cache_dir=cache_dir, max_dropped=0.5)
    renamed = prepare(train=str(shutil.move(bad, tmp_path / "new.jsonl")), cache_dir=cache_dir, max_dropped=0.5)
    assert cached(renamed) == [True]
    assert renamed.report.sources[0].summary.dropped.locations == {"text is empty": [f"{tmp_path / 'new.jsonl'}:2"]}
    moved = prepare(train=elsewhere, cache_dir=cache_dir)
    assert moved.fingerprint == first.fingerprint
    assert moved.train[3].where == f"{elsewhere}:4"
    write_jsonl(tmp_path / "a.jsonl", [*rows[:-1], {"messages": chat("hi", "hello other")}])
    assert cached(prepare(train=file, cache_dir=cache_dir)) == [False]


def test_another_tokenizer_or_template_is_another_store(tmp_path: Path) -> None:
    file, cache_dir = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("hi", "hello")}]), str(tmp_path / "cache")
    data = DataSection(train=file, cache_dir=cache_dir)
    prepare_data(data, TOKENIZER, 0)
    changed = build_tokenizer()
    changed.chat_template = changed.chat_template.replace("<|im_end|>' + '\n'", "<|im_end|>' + ' '")
    grown = build_tokenizer()
    grown.add_tokens(["<new>"])
    for tokenizer, expected in ((build_tokenizer(), True), (changed, False), (grown, False)):
        assert cached(prepare_data(data, tokenizer, 0)) == [expected]


def test_the_rows_are_the_same_in_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.data.source_store.CHUNK_BYTES", 1000)
    rows = [{"messages": chat("hi", "" if i % 50 == 7 else f"hello {i}")} for i in range(300)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = {"train": file, "max_dropped": 0.1, "eval": 0.1}
    one, three = (prepare(**settings, num_proc=n, cache_dir=str(tmp_path / f"cache{n}")) for n in (1, 3))
    assert one.fingerprint == three.fingerprint
    assert [row.where for row in one.train] == [row.where for row in three.train]
    assert [row.answer for row in one.eval] == [row.answer for row in three.eval]
    reports = [{**data.report.to_json(), "cache": None} for data in (one, three)]
    assert reports[0] == reports[1]


def test_an_error_in_a_process_is_that_of_the_first_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.data.source_store.CHUNK_BYTES", 500)
    lines = [json.dumps({"text": f"row {i}"}) for i in range(400)]
    lines[150] = lines[350] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for num_proc in (1, 2):
        with pytest.raises(DataError, match=r"a.jsonl:151:10: broken JSON"):
            prepare(train=str(tmp_path / "a.jsonl"), num_proc=num_proc)


def test_the_fingerprint_changes_with_tokens_masks_and_order(tmp_path: Path) -> None:
    rows = [{"messages": chat("a", "b", "c", "d")}, {"messages": chat("e", "f")}]
    forward = write_jsonl(tmp_path / "a.jsonl", rows)
    backward = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    variants = ((forward, "assistant"), (forward, "last"), (backward, "assistant"), (forward, "assistant"))
    prints = [prepare(train=file, train_on=train_on).fingerprint for file, train_on in variants]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_the_data_stage_needs_no_torch_until_there_are_batches() -> None:
    code = "import sys, qlora_train.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
