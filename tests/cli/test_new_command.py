"""`qlora-train new`: without torch; its config trains as it is; an installed package has recipes and example rows."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.cli.main import main
from qlora_train.config import load_run_config
from qlora_train.pipeline import run
from tests.support.runs import check_in_this_process

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
CODE = """
import sys
from qlora_train.cli.main import main
status = main({arguments!r})
print(status, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""

pytestmark = pytest.mark.usefixtures("preserve_library_settings")


@pytest.mark.parametrize("arguments", [["--help"], ["--recipe", "list"], ["BASE", "--recipe", "tool_calling"]])
def test_new_imports_no_torch(arguments: list[str], pico_llama: Path, tmp_path: Path) -> None:
    words = ["new", *(str(pico_llama) if word == "BASE" else word for word in arguments)]
    code = CODE.format(arguments=words, heavy=HEAVY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "0 []"


def test_the_new_config_trains_as_it_is(
    pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    base = pico(max_position_embeddings=1024)
    shutil.copyfile(ROOT / "data" / "examples" / "questions.jsonl", "mine.jsonl")
    assert main(["new", str(base), "--data", "mine.jsonl", "-o", "mine.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote     mine.yaml (recipe instruction: the format is question_answer; checked: ok)"
    assert lines[-1] == "next      qlora-train data mine.yaml, then qlora-train mine.yaml"
    planned = next(int(line.split()[1].rstrip(",")) for line in lines if line.startswith("steps "))
    finished = run(load_run_config(Path("mine.yaml")))
    assert finished.path == Path("runs/mine")
    steps = [json.loads(line)["step"] for line in finished.metrics_file.read_text().splitlines()]
    assert abs(max(steps) - planned) <= 3  # the share that is held out is chosen by a hash
    assert finished.passed_adapter_check()


def test_without_a_model_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new"]) == 2
    assert "MODEL is missing: a Hub id, a local folder or a .gguf file" in capsys.readouterr().err


def test_wheel_has_every_file_of_the_package_with_recipes_and_examples(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    source = tmp_path / "source"
    for name in filter(None, tracked):
        if name.startswith(("qlora_train/", "recipes/", "data/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qlora_train/")}
    own = {name for name in tracked if name.startswith("qlora_train/") and not (ROOT / name).is_symlink()}
    recipes = {f"qlora_train/bundled/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    examples = {f"qlora_train/bundled/examples/{path.name}" for path in (ROOT / "data" / "examples").iterdir()}
    assert names == own | recipes | examples
