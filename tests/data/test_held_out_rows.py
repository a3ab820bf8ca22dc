"""What a run keeps of its rows is what it was measured on, and its folder is enough to merge, evaluate and chat."""

import io
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from qlora_train.cli.main import main
from qlora_train.data.held_out_rows import NUM_ROWS, load_rows, save_rows
from qlora_train.models import resolve_base
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from qlora_train.utils.errors import CheckpointError
from tests.support.pico import CHATML
from tests.support.runs import make_config, write_rows


def same(first, second):
    pairs = zip(astuple(first), astuple(second), strict=True)
    return len(first.input_ids) == len(second.input_ids) and all(np.all(a == b) for a, b in pairs)


@pytest.mark.parametrize("share", ["0.25", "null"])
def test_kept_rows_are_the_held_out_ones_and_the_first_to_train_on(share, pico_llama, tmp_path):
    write_rows(tmp_path / "rows.jsonl", count=600)
    write_rows(tmp_path / "more.jsonl", count=600, seed=1)
    files = f"data.train=[{tmp_path}/rows.jsonl, {tmp_path}/more.jsonl]"
    config = make_config(tmp_path, pico_llama, files, f"data.eval={share}", "train.eval_steps=null")
    data, _ = prepare_tokenizer_and_data(config, resolve_base(config.model), date=None)
    save_rows(tmp_path / "rows", data, data.fingerprint)
    kept = load_rows(tmp_path / "rows")
    assert kept.num_train_rows == data.num_train_rows
    assert len(kept.eval) == len(data.eval)
    assert NUM_ROWS < len(kept.train) < len(data.train)
    assert all(same(row, kept.eval[i]) for i, row in enumerate(data.eval))
    assert all(same(row, data.train[i]) for i, row in enumerate(kept.train))
    assert all(same(*pair) for pair in zip(kept.few_shot_examples(3), data.few_shot_examples(3), strict=True))
    (tmp_path / "rows" / "eval" / "rows.arrow").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"rows: the rows that this run is measured on: eval/rows.arrow has 1 bytes"
    ):
        load_rows(tmp_path / "rows")


def test_run_folder_is_enough_to_merge_evaluate_and_chat(pico_llama, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    project.mkdir()
    write_rows(project / "rows.jsonl")
    template = "{# mine #}" + CHATML
    (project / "mine.jinja").write_text(template)
    (project / "base").symlink_to(pico_llama)
    (project / "run.yaml").write_text(
        "model: {model_name_or_path: base, chat_template: mine.jinja}\n"
        "data: {train: rows.jsonl, eval: 0.25, max_length: 128, cache_dir: cache}\ntrain: {max_steps: 1}\n"
    )
    monkeypatch.chdir(project)
    assert main(["run.yaml"]) == 0
    for name in ("rows.jsonl", "mine.jinja", "run.yaml"):
        (project / name).unlink()
    monkeypatch.chdir(tmp_path)
    run = "project/runs/run"
    assert main(["merge", run]) == 0
    assert main(["eval", run, "--shots", "2", "--max-new-tokens", "2"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 2\n"))
    assert main(["chat", run, "--max-new-tokens", "2", "--verbose"]) == 0
    assert "adapter/chat_template.jinja" in capsys.readouterr().err
    assert Path(run, "merged", "chat_template.jinja").read_text() == template
