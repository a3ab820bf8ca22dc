"""No forked process uses CUDA, which cannot be initialised again in one."""

import ast
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.config import DataSection
from qlora_train.data import prepare_data
from qlora_train.data.streaming import RowStream
from qlora_train.export import fresh_process
from qlora_train.utils.errors import MergeError
from tests.support.pico import build_tokenizer
from tests.support.runs import write_rows
from tests.support.source_tree import FILES, PACKAGE, imported, tree_of

STARTERS = {"multiprocessing", "concurrent", "subprocess", "multiprocess", "joblib", "pty"}
"""Libraries that start processes."""
FORKING = {
    "fork",
    "forkpty",
    "ProcessPoolExecutor",
    "Pool",
    "get_context",
    "set_start_method",
    "dataloader_num_workers",
}
"""Names by which a process is forked: functions, and an argument of the Trainer."""
TRAPS = ("_lazy_init", "is_available", "device_count", "get_rng_state", "current_device")


def test_only_these_files_start_processes() -> None:
    """`data/worker_pool.py` forks without torch, `export/fresh_process.py` spawns with CUDA, the others start programs."""
    starting = {
        file for file in FILES if STARTERS & {name.partition(".")[0] for name in imported(ast.walk(tree_of(file)))}
    }
    assert {str(file.relative_to(PACKAGE)) for file in starting} == {
        "data/worker_pool.py", "export/fresh_process.py", "utils/signals.py",
        "cli/ray_command.py", "parallel/start_processes.py", "utils/watched_process.py",
        "doctor/trial_run.py", "planning/plan_device.py",
        "export/gguf/write_quantized.py",  # threads
    }  # fmt: skip
    forking = {file for file in FILES if FORKING & names_called(tree_of(file))}
    assert {str(file.relative_to(PACKAGE)) for file in forking} == {"data/worker_pool.py", "export/fresh_process.py"}
    tree = tree_of(PACKAGE / "data" / "worker_pool.py")
    assert "torch" not in {name.partition(".")[0] for name in imported(ast.walk(tree))}


def names_called(tree: ast.Module) -> set[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
    return functions | {str(argument.arg) for call in calls for argument in call.keywords}


@pytest.mark.parametrize("streaming", [False, True])
def test_worker_processes_do_not_use_cuda(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = tmp_path / "forked"

    def trap(*_: Any, **__: Any) -> bool:
        if os.getpid() != parent:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return False

    parent, start = os.getpid(), os.fork
    monkeypatch.setattr(os, "fork", lambda: start() or (forked.touch(), 0)[1])
    for name in TRAPS:
        monkeypatch.setattr(torch.cuda, name, trap)
    train: Any = str(write_rows(tmp_path / "rows.jsonl", count=200))
    settings = {"train": train, "num_proc": 2, "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    rows: Any = prepare_data(DataSection.model_validate(settings), build_tokenizer(), 0).train
    found = list(islice(rows.rows(0), 200)) if isinstance(rows, RowStream) else list(rows)
    assert len(found) == 200
    assert forked.exists()


@pytest.mark.slow
def test_a_saved_model_is_checked_in_a_new_interpreter_with_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "_run", tell_how_it_was_started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "spawn_main" not in started(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "spawn_main" in started(tmp_path)


def started(folder: Path) -> str:
    with pytest.raises(MergeError) as caught:
        fresh_process.check_in_fresh_process(folder, "", folder, batch_size=1, error=MergeError)
    return str(caught.value)


def tell_how_it_was_started(told: Any, *_: Any) -> None:
    told.send_bytes(json.dumps({"problem": " ".join(sys.orig_argv)}).encode())
