"""`qlora-train doctor`: a real run is its last check, and its status says whether training works."""

import json

import pytest

from qlora_train import doctor
from qlora_train.cli.main import main
from qlora_train.doctor import Check
from qlora_train.doctor.machine_check import CHECKS

pytestmark = pytest.mark.usefixtures("preserve_library_settings")
TOKEN = "hf_" + "b" * 34


def test_every_check_runs_and_the_last_trains_and_merges_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["doctor", "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["works"] is True
    assert {check["name"] for check in found["checks"]} == {name for name, _, _ in CHECKS}
    assert all(check["fix"] for check in found["checks"] if check["name"] == "extra" and check["status"] != "ok")
    last = found["checks"][-1]
    assert (last["name"], last["status"]) == ("trial run", "ok")
    assert "adapter and merged model load" in last["text"]
    assert TOKEN not in output.out + output.err


def test_a_problem_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [
        Check("Hub", "note", "no token", "run: hf auth login"),
        Check("packages", "problem", f"torch is not installed {TOKEN}", "run: pip install torch"),
    ]
    monkeypatch.setattr(doctor, "run_checks", lambda: iter(checks))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "note     Hub: no token; run: hf auth login",
        "problem  packages: torch is not installed [secret]; run: pip install torch",
        "not ready: 1 problem; 1 note",
    ]


@pytest.mark.parametrize(
    ("num_notes", "verdict"), [(0, "ready: training works here"), (2, "ready: training works here; 2 notes")]
)
def test_machine_without_a_problem_is_ready(
    num_notes: int, verdict: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check("trial run", "ok", "trained"), *[Check("Hub", "note", "no token")] * num_notes]
    monkeypatch.setattr(doctor, "run_checks", lambda: iter(checks))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == verdict
