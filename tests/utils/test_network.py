"""Offline runs open no connection, and requests to a silent Hub end."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from qlora_train.config.preflight import tracker_problems
from qlora_train.utils import network, trackers
from tests.support.runs import write_rows

ROOT = Path(__file__).parents[2]
WATCH = """
import os, socket, sys

def watch(event, arguments):
    internet = event == "socket.__new__" and arguments[1] in (socket.AF_INET, socket.AF_INET6)
    if internet or event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple)
    ):
        with open(os.environ["SOCKETS"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
        raise OSError("no sockets here")

sys.addaudithook(watch)
"""
"""Writes down and refuses every way to the network, from the interpreter's start on; Python's own audit events, which no
library can go around."""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    return folder


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process with an empty cache."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    own = {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "SOCKETS": str(folder / "sockets"), "OMP_NUM_THREADS": "1"}
    caches = {"HF_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "qlora_train.cli.main", *words],
        env={**inherited, **own, **caches, **environment},
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def write_config(folder: Path, *, base: str | Path, rows: str | Path) -> None:
    config = {
        "model": {"model_name_or_path": str(base)},
        "data": {"train": str(rows), "eval": 0.25, "max_length": 128, "num_proc": 2},
        "train": {"max_steps": 1, "gradient_accumulation_steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")


def sockets(folder: Path) -> str:
    file = folder / "sockets"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the output without the log."""
    log = re.compile(r"^cpu threads: |^device: |^tokenizer: |^chat template: |: loading the Hub data set ")
    return [line for line in done.stderr.splitlines() if not log.search(line)]


@pytest.mark.parametrize("how", [["--offline"], []], ids=["option", "environment"])
def test_offline_hub_model_is_refused_in_one_line_without_a_socket(how: list[str], tmp_path: Path, site: Path) -> None:
    write_config(tmp_path, base="some-org/some-model", rows=write_rows(tmp_path / "rows.jsonl"))
    done = command(tmp_path, "train", "run.yaml", *how, **({} if how else {"HF_HUB_OFFLINE": "1"}))
    assert done.returncode == 2
    assert messages(done) == [
        "model.model_name_or_path: some-org/some-model is not in the local cache, and offline nothing is fetched "
        "(--offline or HF_HUB_OFFLINE=1): fetch it once with a network, or give a local path"
    ]
    assert sockets(tmp_path) == ""


def test_offline_hub_data_set_is_refused_in_one_line_without_a_socket(
    pico_llama: Path, tmp_path: Path, site: Path
) -> None:
    write_config(tmp_path, base=pico_llama, rows="some-org/some-set")
    done = command(tmp_path, "data", "run.yaml", "--offline")
    assert (done.returncode, done.stdout) == (2, "")
    assert messages(done) == [
        "data.train: the Hub data set some-org/some-set[train] is not in the local cache, and offline nothing is fetched "
        "(--offline or HF_HUB_OFFLINE=1): fetch it once with a network, or give a local path"
    ]
    assert sockets(tmp_path) == ""


def test_offline_run_with_everything_local_opens_no_socket(pico_llama: Path, tmp_path: Path, site: Path) -> None:
    write_config(tmp_path, base=pico_llama, rows=write_rows(tmp_path / "rows.jsonl"))
    words = ("export.merge=true", "export.max_loss_increase=1")
    done = command(tmp_path, "train", "run.yaml", *words, "--offline")
    assert done.returncode == 0, done.stderr
    done = command(tmp_path, "eval", "runs/run", "--loss-only", "--offline")
    assert done.returncode == 0, done.stderr
    assert sockets(tmp_path) == ""


def test_missing_network_is_one_line(tmp_path: Path, site: Path) -> None:
    """Without the option the audit hook does see connections."""
    write_config(tmp_path, base="some-org/some-model", rows=write_rows(tmp_path / "rows.jsonl"))
    done = command(tmp_path, "train", "run.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert messages(done) == [
        "model.model_name_or_path: some-org/some-model is not in the local cache and the Hub cannot be reached: check the "
        "network, or give a local path"
    ]
    assert "socket.getaddrinfo" in sockets(tmp_path)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


SHORT_OF_PATIENCE = """
import sys
from qlora_train.cli import main as cli
from qlora_train.utils import network, trackers
network.TIMEOUT_SECONDS, network.RETRY_SECONDS = 5, 2
sys.exit(cli.main(["data", "run.yaml"]))
"""


@pytest.mark.parametrize("absent", ["model", "data set"])
def test_silent_hub_is_one_line(absent: str, pico_llama: Path, tmp_path: Path, silent_server: str) -> None:
    rows = "some-org/some-set" if absent == "data set" else str(write_rows(tmp_path / "rows.jsonl"))
    write_config(tmp_path, base="some-org/some-model" if absent == "model" else pico_llama, rows=rows)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": silent_server, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_PATIENCE], env={**environment, **own},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = messages(done)
    assert "is not in the local cache and the Hub cannot be reached: check the network" in line


class Request:
    """The timeouts of an HTTP request."""

    def __init__(self, **limits: float | None) -> None:
        self.extensions = {"timeout": limits}


def test_retry_budget_ends_and_an_answer_resets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(network, "time", clock)
    budget = network.RetryBudget()
    for clock.now in (100.0, 130.0, 160.0):
        request = Request(connect=None, read=2.0, write=1000.0)
        budget.before_request(request)
        assert request.extensions["timeout"] == {"connect": 30.0, "read": 2.0, "write": 30.0, "pool": 30.0}
    clock.now = 161.0
    with pytest.raises(OfflineModeIsEnabled):
        budget.before_request(Request())
    clock.now = 300.0  # later the Hub is tried again
    budget.before_request(Request())
    for clock.now in (330.0, 360.0, 390.0, 420.0):
        budget.after_response(None)
        budget.before_request(Request())


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_variable_is_parsed_as_by_the_libraries(value: str, offline: bool) -> None:
    assert network.is_offline({"HF_HUB_OFFLINE": value}) is offline


def test_going_offline_keeps_a_disabled_tracker_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setenv("WANDB_MODE", "online")
    network.go_offline()
    assert {name: os.environ[name] for name in network.OFFLINE} == network.OFFLINE
    assert os.environ["WANDB_MODE"] == "online", "whose offline mode Transformers announces to everyone"
    trackers.go_offline(["wandb"])
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trackers.go_offline(["wandb"])
    assert os.environ["WANDB_MODE"] == "disabled"


def test_offline_tracker_of_another_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("")  # only whether it is installed is looked at
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tracked")
    assert list(tracker_problems(["mlflow"])) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.example")
    [problem] = tracker_problems(["mlflow"])
    assert "mlflow uses the network (MLFLOW_TRACKING_URI), but this run is offline" in problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert list(tracker_problems(["mlflow"])) == []


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [("wandb", "WANDB_LOG_MODEL", "checkpoint"), ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS", "TRUE")],
)
def test_uploads_of_checkpoints_by_a_tracker_are_refused(
    tracker: str, variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' callbacks upload `output_dir/checkpoint-N`, a folder that a run does not have."""
    (tmp_path / f"{tracker}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(tracker_problems([tracker])) == []
    monkeypatch.setenv(variable, value)
    [problem] = tracker_problems([tracker])
    assert f"{variable}={value} uploads checkpoints in Transformers' layout" in problem
