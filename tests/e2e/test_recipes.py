"""Every recipe trains as it is: on its bundled rows, with its settings, on a pico model in the place of its base."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.config import load_config
from qlora_train.pipeline import run
from qlora_train.runs import RunFolder, read_json
from tests.support.runs import check_in_this_process, metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FAMILIES = {"mixture_of_experts": "qwen3_moe"}
TOOLS_TEMPLATE = ROOT / "tests" / "files" / "chat_templates" / "tools.jinja"
"""Writes what the templates of some recipes' bases write and a pico tokenizer's does not."""
HUB_DATA = {"long_context": ("data.train=data/examples/chat.jsonl", "data.eval=0.1")}
"""Rows for recipes whose own are on the Hub."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_on_its_bundled_rows(
    path: Path, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_this_process(monkeypatch)
    monkeypatch.chdir(ROOT)
    base = pico(FAMILIES.get(path.stem, "llama"), max_position_embeddings=16384)
    overrides = [
        f"model.model_name_or_path={base}", f"run.output_dir={tmp_path / 'run'}", "train.max_steps=2",
        "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2", "train.logging_steps=1",
    ]  # fmt: skip
    if path.stem in ("tool_calling", "reasoning"):
        overrides.append(f"model.chat_template={TOOLS_TEMPLATE}")
    overrides += HUB_DATA.get(path.stem, ())
    finished = run(load_config(path, overrides))
    check_run(finished)
    if path.stem == "new_tokens":
        assert "<person>" in (finished.adapter / "tokenizer.json").read_text(encoding="utf-8")


def check_run(finished: RunFolder) -> None:
    """No row is dropped, some are held out, two steps are trained, and the adapter was checked."""
    report = read_json(finished.data_report_file)
    assert [source["num_dropped"] for source in report["sources"]] == [0]
    assert report["splits"]["data.eval"]["num_rows"] > 0
    assert [line["step"] for line in metrics(finished) if "loss" in line] == [1, 2]
    assert finished.passed_adapter_check()
