"""The live view: one screen of 80 x 24, log lines above it, and a terminal as it was, however the run ends."""

import io
import json
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console

from qlora_train.cli.live_screen import LiveScreen, duration, sparkline, trend
from qlora_train.config.writer import to_yaml
from qlora_train.runs import RunFolder
from qlora_train.utils.run_events import Measured, Restored, RunOpened, StepEnded
from tests.support.runs import make_config
from tests.support.terminal import Terminal

COMMAND = ("-m", "qlora_train.cli.main")
STEPS = 12
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


def config_file(folder: Path, base: Path, *settings: str) -> Path:
    file = folder / "whole.yaml"
    file.write_text(to_yaml(make_config(folder, base, *settings)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def shown(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """A whole run on a terminal."""
    folder = tmp_path_factory.mktemp("t")
    settings = [f"train.max_steps={STEPS}", "train.eval_steps=4", f"run.output_dir={folder / 'run'}"]
    terminal = Terminal([*COMMAND, config_file(folder, pico_llama, *settings)])
    assert terminal.wait() == 0, "\n".join(terminal.screens[-1])
    return terminal


def view_of(screen: list[str]) -> list[str]:
    """Return the lines of the view."""
    starts = [number for number, line in enumerate(screen) if re.match("[✓▸·✗] data", line)]
    return screen[starts[-1] :] if starts else []


def count(screen: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, line)) for line in screen)


def test_view_has_stages_progress_loss_and_evaluation(shown: Terminal) -> None:
    view = "\n".join(view_of(shown.screens[-1]))
    assert re.search(r"✓ data  ✓ base  ✓ adapter  ✓ parity check  ✓ memory  ✓ training", view)
    assert f"step {STEPS}/{STEPS}" in view
    assert re.search(r"loss +\d\.\d{4}  █[▁-█]{11}  ↘ falling", view)
    assert re.search(r"eval +\d\.\d{4} at step 12, the best so far", view)
    assert re.search(r"speed +[\d,]+ tokens/s", view)
    assert re.search(r"learning rate \d\.\d\de-\d\d   gradient norm \d", view)


def test_view_is_drawn_in_place(shown: Terminal) -> None:
    """No picture has it twice, and it never fills the screen."""
    views = [screen for screen in shown.screens if view_of(screen)]
    assert len(views) > 5
    assert max(count(screen, r"step \d+/12 ") for screen in views) == 1
    assert max(count(screen, "[✓▸·✗] data") for screen in views) == 1
    assert max(len([line for line in view_of(screen) if line]) for screen in views) <= 14


def test_log_lines_stand_above_the_view_but_not_the_steps(shown: Terminal) -> None:
    screen = shown.screens[-1]
    text = "\n".join(screen)
    assert text.index("adapter check: passed") < text.index("✓ data")
    assert count(screen, r"step \d+/12  loss") == 0


def test_terminal_is_as_before(shown: Terminal) -> None:
    assert shown.screens[-1][shown.screen.cursor.y - 1].startswith("finished: ")
    assert shown.raw.rfind(SHOW) > shown.raw.rfind(HIDE)


def test_ctrl_c_ends_with_a_checkpoint_and_the_terminal_as_before(pico_llama: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, pico_llama, "train.max_steps=3000", "train.logging_steps=5")
    terminal = Terminal([*COMMAND, config])
    assert terminal.run_until(lambda screen: count(screen, "loss ") > 0)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 130
    text = " ".join(line.strip() for line in terminal.screens[-1])
    assert "SIGINT: stopping after this step; once more ends it at once" in text
    assert "SIGINT: stopped; the same command resumes: qlora-train" in text
    assert terminal.raw.rfind(SHOW) > terminal.raw.rfind(HIDE)
    run = RunFolder(tmp_path / "run")
    assert run.latest_checkpoint() is not None
    assert "■ training" in " ".join(view_of(terminal.screens[-1])), "neither done nor failed"
    step = run.checkpoint_steps()[-1]
    stopped = [line for line in run.log_file.read_text().splitlines() if "stopped by SIGINT" in line]
    assert [line.split(maxsplit=2)[2] for line in stopped] == [
        f"INFO    run: stopped by SIGINT (checkpoint of step {step}: {run.checkpoint(step)})"
    ]
    assert "Traceback" not in run.log_file.read_text()


# --- what a library, a child process or a row may do ------------------------------------------------------------------

SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from qlora_train.cli.live_view import shown_live
from qlora_train.cli.output import set_up_logging
from qlora_train.utils.run_events import Measured, RunOpened, Sampled, StepEnded, emit, stage
set_up_logging()
with shown_live():
    emit(RunOpened(Path(sys.argv[1])))
    with stage("training"):
        for step in range(1, 11):
            emit(StepEnded(step, 10))
            emit(Measured(step, 10, 0.1, {"loss": 1 / step, "tokens_per_second": 100.0}, 10.0 - step, None))
        {body}
print("end of the script")
"""
SAMPLE = 'emit(Sampled(1, 0, "[red]p[/red] \\x1b[2J\\u202eabc", "one\\ntwo", "three")); time.sleep(1)'
CHILD = "subprocess.run(['sh', '-c', \"printf 'from a child [bold]\\\\033[2J\\\\n' >&2\"]); time.sleep(1)"
RESIZED = "time.sleep(3)"
RAISES = "raise OSError('no more')"
UNDRAWABLE = (
    'emit(Measured(10, 10, 0.1, {"loss": 1.0}, float("inf"), None)); time.sleep(1); '
    'logger = __import__("logging").getLogger("qlora_train.test"); logger.info("a line"); print("a library\'s line")'
)
"""No clock shows the end of an endless run."""
CLOSED_TERMINAL = (
    "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); print('ready', flush=True); time.sleep(2); "
    "__import__('logging').getLogger('qlora_train.test').info('a line'); "
    "(Path(sys.argv[1]) / 'trained').write_text('to its end')"
)


def scripted(folder: Path, body: str, **environment: str) -> Terminal:
    return Terminal(["-c", SCRIPT.replace("{body}", body), folder], environment=environment)


def test_text_of_rows_is_escaped(tmp_path: Path) -> None:
    terminal = scripted(tmp_path, SAMPLE)
    assert terminal.wait() == 0
    view = view_of(terminal.screens[-1])
    assert "prompt   [red]p[/red] \\x1b[2J\\u202eabc" in view
    assert "expected one\\ntwo" in view
    assert b"\x1b[2J" not in terminal.raw


def test_lines_of_child_processes_stand_above_the_view(tmp_path: Path) -> None:
    terminal = scripted(tmp_path, CHILD)
    assert terminal.wait() == 0
    screen = terminal.screens[-1]
    assert "from a child [bold]\\x1b[2J" in screen
    assert screen.index("from a child [bold]\\x1b[2J") < screen.index(view_of(screen)[0])
    assert count(screen, "step 10/10 ") == 1
    assert (tmp_path / "stderr.log").read_bytes() == b"from a child [bold]\x1b[2J\n", "it outlives a crash"


def test_nothing_is_left_in_the_run_folder_without_such_lines(tmp_path: Path) -> None:
    assert scripted(tmp_path, "pass").wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_view_follows_the_size_of_the_terminal(tmp_path: Path) -> None:
    terminal = scripted(tmp_path, RESIZED)
    assert terminal.run_until(lambda screen: count(screen, "step 10/10") > 0)
    terminal.resize(50, 12)
    assert terminal.wait() == 0
    screen = terminal.screens[-1]
    assert (len(screen), max(map(len, screen)) <= 50) == (12, True)
    assert count(screen, "step 10/10 ") == 1
    assert "end of the script" in screen


def test_traceback_follows_the_view(tmp_path: Path) -> None:
    terminal = scripted(tmp_path, RAISES)
    assert terminal.wait() == 1
    text = "\n".join(terminal.screens[-1])
    assert "✗ training" in text
    assert text.rstrip().endswith("OSError: no more")
    assert terminal.raw.rfind(SHOW) > terminal.raw.rfind(HIDE)


def test_a_view_that_cannot_be_drawn_gives_way_to_plain_lines(tmp_path: Path) -> None:
    terminal = scripted(tmp_path, UNDRAWABLE)
    assert terminal.wait() == 0, terminal.raw.decode()
    lines = terminal.raw.decode().replace("\r\n", "\n").split("\n")
    assert "display: stopped after an error; the run continues" in lines
    assert lines[-4:] == ["a line", "a library's line", "end of the script", ""]
    assert terminal.raw.rfind(SHOW) >= terminal.raw.rfind(HIDE)


def test_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    """As under nohup, or in a session whose connection is lost."""
    terminal = scripted(tmp_path, CLOSED_TERMINAL)
    assert terminal.run_until(lambda screen: count(screen, "ready") > 0)
    terminal.close()
    terminal.process.wait(timeout=60)
    assert (tmp_path / "trained").read_text() == "to its end"


# --- terminals without a view ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "true"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_terminal_that_cannot_show_a_view_gets_plain_lines(environment: dict[str, str], tmp_path: Path) -> None:
    terminal = scripted(tmp_path, "pass", **environment)
    assert terminal.wait() == 0
    assert terminal.raw == b"end of the script\r\n"


def test_no_color_leaves_out_colours_only(tmp_path: Path) -> None:
    coloured = scripted(tmp_path, "time.sleep(1)")
    assert coloured.wait() == 0
    plain = scripted(tmp_path, "time.sleep(1)", NO_COLOR="1")
    assert plain.wait() == 0
    assert b"\x1b[32m" in coloured.raw or b"\x1b[1;36m" in coloured.raw
    codes = set(re.findall(rb"\x1b\[([0-9;]*)m", plain.raw))
    assert not [code for code in codes if re.search(rb"(^|;)(3[0-7]|9[0-7]|38)", code)], codes
    assert count(plain.screens[-1], "step 10/10 ") == 1


def lines_of(screen: LiveScreen) -> str:
    console = Console(width=80, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(screen)
    return capture.get()


def test_memory_is_shown_against_the_plan_of_the_run(shown: Terminal, tmp_path: Path) -> None:
    """The plan is that of the real run; only a GPU tells its peak."""
    [run] = [Path(str(word)).parent / "run" for word in shown.words if str(word).endswith("whole.yaml")]
    peak = json.loads((run / "plan.json").read_text())["peak_bytes"]
    screen = LiveScreen()
    screen.receive(RunOpened(run))
    screen.receive(StepEnded(1, 10))
    values = {"loss": 1.0, "tokens_per_second": 1234.5, "mfu": 0.4321}
    screen.receive(Measured(1, 10, 0.1, values, 9.0, 3_210_000_000))
    text = lines_of(screen)
    assert f"memory   3.2 GB at most of {peak / 1e9:.1f} GB planned" in text
    assert "1,234 tokens/s   mfu 43.2 %   0:09 left" in text


def test_a_resumed_run_shows_its_history_and_no_speed_before_a_step() -> None:
    screen = LiveScreen()
    screen.receive(Restored([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 0.5}]))
    screen.receive(StepEnded(4, 10))
    screen.receive(Measured(4, 10, 0.4, {"eval_loss": 0.75}, None, None))
    text = lines_of(screen)
    assert re.search(r"loss +1\.0000  █▁", text)
    assert "0.7500 at step 4; best 0.5000 at step 2" in text
    assert "speed" not in text


# --- parts -------------------------------------------------------------------------------------------------------------


def test_sparkline_scales_from_lowest_to_highest() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([float("nan"), 2.0, float("inf"), 1.0]) == "█▁"
    assert sparkline([]) == ""
    averaged = sparkline([float(value) for value in range(64)], width=8)
    assert averaged == "▁▂▃▄▅▆▇█"


def test_trend_compares_the_later_half_with_the_earlier() -> None:
    assert trend([2.0, 2.0, 1.0, 1.0]) == "↘ falling (-50.0 %)"
    assert trend([1.0, 1.0, 2.0, 2.0]) == "↗ rising (+100.0 %)"
    assert trend([1.0, 1.0, 1.001, 1.001]) == "→ level"
    assert trend([1.0, 2.0]) == "", "too few to tell"
    assert trend([9.0, *[1.0] * 40]) == "→ level", "what lies long ago does not count"


def test_durations_have_hours_where_needed() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3661, 90000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:01:01",
        "25:00:00",
    ]
