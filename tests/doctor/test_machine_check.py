"""Checks of the machine: what is missing is named with the command that mends it, and no check stops the next."""

import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from bitsandbytes import cextension

from qlora_train.doctor import Check, hardware_checks, hub_checks, installed_packages, machine_check
from qlora_train.doctor.storage_checks import disk
from qlora_train.doctor.trial_run import train_pico
from qlora_train.utils import network

RUN = f"run: {shlex.quote(sys.executable)} -m pip install"


@pytest.fixture(autouse=True)
def no_pip_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands name this environment's Python."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_pip_is_named_alone_where_it_is_the_one_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_check.pip() == f"{shlex.quote(sys.executable)} -m pip"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert machine_check.pip() == "pip"


def test_a_cause_that_several_checks_meet_has_its_fix_once() -> None:
    absent = "absent_module:check"
    first, second = machine_check.run_checks((("GPU", absent, "torch"), ("Triton", absent, "triton")))
    assert first.fix.endswith("install --force-reinstall torch")
    assert second == Check("Triton", "problem", "not checked: the same error as GPU")


def require(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    monkeypatch.setattr(installed_packages, "requires", lambda _: list(requirements))


def test_unmet_requirements_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    require(monkeypatch, "torch>=99", "absent-package>=1.2", "numpy>=1", 'absent-too; extra == "more"')
    (check,) = installed_packages.packages()
    assert check.status == "problem"
    assert "is outside >=99, absent-package is not installed" in check.text
    assert "numpy" not in check.text
    assert check.fix == f"{RUN} 'torch>=99' 'absent-package>=1.2'"


def test_requirements_of_another_platform_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    require(monkeypatch, "numpy>=1", 'absent-package; sys_platform == "plan9"')
    assert [check.status for check in installed_packages.packages()] == ["ok"]


def test_pip_accepts_the_command_of_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    require(monkeypatch, "numpy>=99", "numpy>=1")
    (check,) = installed_packages.packages()
    words = shlex.split(check.fix.removeprefix("run: "))
    done = subprocess.run(
        [*words, "--dry-run", "--no-index"], capture_output=True, text=True, check=False
    )  # fails at the version, not at the syntax
    assert "numpy>=99" in done.stderr


def test_missing_extras_are_one_note_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = ('absent-package>=1; extra == "lm-eval"', 'absent-too; extra == "ray"', 'numpy>=1; extra == "gguf"')
    require(monkeypatch, "numpy>=1", *extras, 'absent-package; extra == "dev"')
    installed, missing = installed_packages.extras()
    assert installed.status == "ok"
    assert "gguf" in installed.text
    assert not {"dev", "docs", "ray", "lm-eval"} & set(installed.text.replace(",", "").split())
    text = "optional, lm-eval needs absent-package; ray needs absent-too"
    assert missing == Check("extra", "note", text, f"{RUN} 'qlora-train[lm-eval,ray]'")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("tests.absent_module:check", "ModuleNotFoundError: No module named 'tests.absent_module'"),
        ("shutil:disk_usage", "TypeError: "),
    ],
)
def test_a_check_that_fails_is_a_problem_of_its_own(function: str, text: str) -> None:
    (check,) = machine_check.guarded("GPU", function, "torch")
    assert check.status == "problem"
    assert check.text.startswith(text)
    assert check.fix == f"{RUN} --force-reinstall torch"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert disk("runs", file / "runs", "set run.output_dir") == Check(
        "disk", "problem", f"runs: {file} cannot be written to", "set run.output_dir"
    )
    assert disk("runs", tmp_path / "absent" / "runs", "").status == "ok"


def test_too_little_space_for_a_download_is_a_note(tmp_path: Path) -> None:
    check = disk("downloads", tmp_path, "set HF_HOME", 10**18)
    assert check.status == "note"
    assert check.fix == "set HF_HOME"


def test_token_is_reported_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (without,) = hub_checks.token()
    assert without.status == "note"
    assert "HF_TOKEN" in without.fix
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    (check,) = hub_checks.token()
    assert check.line() == "ok       Hub: a token is set (HF_TOKEN)"


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A server on this machine in the place of the Hub, and no offline mode."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub_checks, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield server
        server.shutdown()


def test_network_is_ok_when_the_hub_answers_and_a_note_when_it_does_not(online: HTTPServer) -> None:
    huggingface_hub.close_session()
    (answered,) = hub_checks.network_access()
    assert answered.status == "ok"
    online.shutdown()
    online.server_close()
    (refused,) = hub_checks.network_access()
    assert refused.status == "note"
    assert "does not answer" in refused.text
    assert refused.fix == "to train without it: export HF_HUB_OFFLINE=1"


def test_offline_mode_asks_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert network.is_offline()
    assert [check.text for check in hub_checks.network_access()] == [
        "offline (HF_HUB_OFFLINE): local models and data only"
    ]


def test_a_library_of_bitsandbytes_that_does_not_load_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.status for check in hardware_checks.bitsandbytes_library()] == ["ok"]
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no library"))
    (check,) = hardware_checks.bitsandbytes_library()
    assert check.status == "note"
    assert "does not load" in check.text


def test_the_compiler_that_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert hardware_checks.compiler_fix() == "run: apt-get install gcc python3-dev (or set CC)"
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    assert hardware_checks.compiler_fix() == ""


def test_a_run_that_fails_is_a_problem_with_its_message(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    check = train_pico(tmp_path, "train.learning_rates=1")
    assert check.status == "problem"
    assert check.text.startswith("exit status 2: ")
    assert "train.learning_rates=1: unknown key" in check.text
    assert "learning_rates" in messages.text
