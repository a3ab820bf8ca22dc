"""Progress of long work: events of a run, a bar on a terminal, and a line now and then in a pipe."""

import json
import logging
from pathlib import Path

import pytest

from qlora_train.cli import progress_lines
from qlora_train.cli.progress_lines import ProgressLines
from qlora_train.utils import run_events
from qlora_train.utils.run_events import Event, Progress, StageEnded, StageStarted, emit, progress, stage, tracked
from tests.support.runs import train_run
from tests.support.terminal import Terminal


@pytest.fixture(scope="module")
def events(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """The events of a run that tokenises, loads, evaluates, generates and merges."""
    folder, found = tmp_path_factory.mktemp("progress"), list[Event]()
    settings = ("train.max_steps=2", "export.merge=true", "export.max_loss_increase=1", "export.max_divergence=5")
    with run_events.listening(found.append):
        train_run(folder, pico_llama, *settings, "run.samples=2", f"data.cache_dir={folder / 'cache'}")
    return found


def of(events: list[Event], name: str) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress) and event.name == name]


@pytest.mark.parametrize(
    ("name", "unit", "total"),
    [
        ("data.train: tokenising", "bytes", None),
        ("loading and quantizing", "weights", 14),
        ("evaluation", "rows", None),
        ("answers", "rows", 2),
        ("merging onto dequantized", "bytes", None),
        ("merging onto original", "bytes", None),
    ],
)
def test_long_work_of_a_run_is_counted_to_its_end(name: str, unit: str, total: int | None, events: list[Event]) -> None:
    found = of(events, name)
    assert {event.unit for event in found} == {unit}
    assert found[-1].is_complete
    done = [event.done for event in found]
    assert len(set(done)) > 1
    assert max(done) == max(event.total or 0 for event in found)
    if total is not None:
        assert max(done) == total


def test_every_stage_that_starts_ends(events: list[Event]) -> None:
    names = [event.name for event in events if isinstance(event, StageStarted)]
    assert names == ["data", "base", "adapter", "parity check", "memory", "training", "adapter check", "merge"]
    assert [event.name for event in events if isinstance(event, StageEnded) and event.outcome == "done"] == names


def test_failed_stage_says_so() -> None:
    found: list[Event] = []
    with run_events.listening(found.append), pytest.raises(ValueError, match="no"), stage("data"):
        raise ValueError("no")
    ended = found[-1]
    assert isinstance(ended, StageEnded)
    assert (ended.name, ended.outcome) == ("data", "failed")
    assert run_events.current_stage() is None


def test_listener_that_fails_is_removed_and_the_run_continues(messages: pytest.LogCaptureFixture) -> None:
    calls: list[Event] = []

    def fails(event: Event) -> None:
        calls.append(event)
        raise OSError("the terminal is gone")

    with run_events.listening(fails):
        emit(StageStarted("data"))
        emit(StageStarted("base"))
    assert calls == [StageStarted("data")]
    assert "display: stopped after an error; the run continues" in messages.text


def test_items_count_when_the_next_one_is_asked_for() -> None:
    found: list[Event] = []
    with run_events.listening(found.append):
        assert list(tracked("ab", "letters", 2, "letters", lambda _letter: 1)) == ["a", "b"]
    assert [event.done for event in found if isinstance(event, Progress)] == [0, 1, 2, 2]


def test_pipe_gets_a_line_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now[0])
    with run_events.listening(ProgressLines().receive), progress("merging", 100e6, "bytes") as counter:
        for _ in range(100):
            now[0] += 1
            counter.advance(1e6)
    lines = [record for record in messages.records if record.name == progress_lines.logger.name]
    assert [record.getMessage() for record in lines] == [f"merging: {done}.0 of 100.0 MB" for done in (30, 60, 90)]
    assert all(record.levelno == logging.INFO for record in lines)
    assert json.dumps(lines[0].metrics) == '{"done": 30000000.0, "total": 100000000.0, "unit": "bytes"}'  # type: ignore[attr-defined]


BAR = """
import time
from qlora_train.cli.log_options import shown_progress
from qlora_train.cli.output import set_up_logging
from qlora_train.utils.run_events import progress
set_up_logging()
with shown_progress(), progress("[red]rows\\x1b[2J", 10, "rows") as counter:
    for _ in range(10):
        counter.advance()
        time.sleep(0.15)
print("done")
"""


def test_terminal_gets_a_bar_that_disappears() -> None:
    terminal = Terminal(["-c", BAR])
    assert terminal.wait() == 0
    assert any("of 10 rows" in line for screen in terminal.screens for line in screen)
    assert any("[red]rows\\x1b[2J" in line for screen in terminal.screens for line in screen)
    assert b"\x1b[2J" not in terminal.raw
    assert [line for line in terminal.screens[-1] if line] == ["done"]
