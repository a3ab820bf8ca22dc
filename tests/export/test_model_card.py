"""Model cards: filled, valid front matter, and nothing of this machine in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora_train.config.schema import RunConfig
from qlora_train.export.model_card import clean_adapter_config, is_hub_id, public_name, write_card
from qlora_train.utils.errors import MergeError

HUB = "meta-llama/Llama-2-7b-hf"


def config(**sections: Any) -> RunConfig:
    model = sections.pop("model", {"model_name_or_path": HUB})
    data = sections.pop("data", {"train": "org/addresses"})
    return RunConfig.model_validate({"model": model, "data": data, **sections})


def card(folder: Path, settings: RunConfig, **changes: Any) -> tuple[dict[str, Any], str]:
    """Write a card; return its front matter and its whole text."""
    options: dict[str, Any] = {
        "base": settings.model.model_name_or_path,
        "revision": None,
        "config": settings,
        "metrics": {"held-out loss": 0.194512, "exact match": 0.62},
        "num_train_rows": 1272,
        "kind": "adapter",
        "loading": "## Loading\n\nThe lines of the caller.",
    }
    write_card(folder, **{**options, **changes})
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_says_that_pairs_were_trained_and_with_which_objective(tmp_path: Path) -> None:
    _, text = card(tmp_path, config(train={"objective": "ipo"}))
    assert "1272 training pairs from `org/addresses`; objective `ipo` on every assistant turn." in text
    assert "loss on" not in text


def test_an_adapters_card_names_base_data_results_and_settings(tmp_path: Path) -> None:
    front, text = card(tmp_path, config(lora={"r": 8, "lora_alpha": 32}), revision="abc123")
    assert front["base_model"] == HUB
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert front["datasets"] == ["org/addresses"]
    for part in (
        "| held-out loss | 0.1945 |",
        f"| torch | {torch.__version__} |",
        "1272 training rows",
        "rank 8",
        "learning_rate",
    ):
        assert part in text
    assert "The lines of the caller." in text


def test_a_merged_models_card_is_of_transformers(tmp_path: Path) -> None:
    front, _ = card(tmp_path, config(), kind="merged")
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_no_local_path_is_in_the_card(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "secret-home" / "models" / "llama-local"
    base.mkdir(parents=True)
    settings = config(
        model={"model_name_or_path": str(base), "chat_template": "~/secret-home/t.jinja"},
        data={"train": [str(tmp_path / "secret-home" / "rows.jsonl"), "../secret-home/more.jsonl"], "eval": 0.1},
        lora={"adapter_path": r"C:\secret-home\start"},
        run={"output_dir": str(tmp_path / "secret-home" / "run")},
    )
    front, text = card(tmp_path, settings, kind=kind)
    assert "base_model" not in front
    assert "datasets" not in front
    assert "secret-home" not in text
    assert str(tmp_path) not in text
    for name in ("llama-local", "rows.jsonl", "more.jsonl", "t.jinja", "start"):
        assert name in text


def test_relative_paths_are_cut_to_their_last_part_and_hub_ids_stay(tmp_path: Path) -> None:
    settings = config(
        model={"model_name_or_path": ".local/my-base"},
        data={"train": ["private/rows.jsonl", "HuggingFaceH4/no_robots"]},
        run={"output_dir": "runs/secret-project"},
    )
    _, text = card(tmp_path, settings)
    assert not any(part in text for part in (".local", "private", "runs/"))
    assert all(part in text for part in ("my-base", "rows.jsonl", "HuggingFaceH4/no_robots"))


def test_the_settings_in_a_card_are_a_config_again(tmp_path: Path) -> None:
    settings = config(lora={"r": 8}, train={"learning_rate": 1e-3})
    _, text = card(tmp_path, settings)
    block = text.split("```yaml\n")[1].split("```")[0]
    assert RunConfig.model_validate(yaml.safe_load(block)) == settings


def test_hub_ids_are_distinguished_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert is_hub_id(HUB)
    for path in (
        "models/llama",
        "/models/llama",
        "./llama",
        "~/llama",
        "a/b/c",
        "org/model.gguf",
        r"C:\models",
        "llama",
    ):
        assert not is_hub_id(path), path
    assert public_name("/home/me/models/llama") == "llama"
    assert public_name("/home/me/models/llama/") == "llama"
    assert public_name(HUB) == HUB


def test_adapter_config_loses_its_paths_and_nothing_else(tmp_path: Path) -> None:
    original = {
        "base_model_name_or_path": "/home/me/models/llama",
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
        "corda_config": {"cache_file": "/home/me/cache/x.pt"},
        "revision": None,
    }
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(original))
    clean_adapter_config(tmp_path, "/home/me/models/llama", None)
    expected = {**original, "base_model_name_or_path": "llama", "corda_config": {"cache_file": "x.pt"}}
    assert json.loads(path.read_text()) == expected
    clean_adapter_config(tmp_path, HUB, "main")
    again = json.loads(path.read_text())
    assert (again["base_model_name_or_path"], again["revision"]) == (HUB, "main")


def test_a_missing_adapter_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"adapter_config\.json: not readable"):
        clean_adapter_config(tmp_path, HUB, None)
