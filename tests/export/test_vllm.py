"""Export for vLLM: what it cannot hold is refused by name, and what is written is the same adapter."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.config import load_config
from qlora_train.export.export_formats import ExportRequest
from qlora_train.export.vllm import check_vllm, export_vllm
from qlora_train.models import resolve_base
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ConfigError, ExportError
from tests.support.runs import train_run

READ_BY_VLLM = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}


def export(run: RunFolder) -> Path:
    config = load_config(run.config_file)
    [folder] = export_vllm(ExportRequest(run, config, resolve_base(config.model)))
    return folder


@pytest.fixture(scope="module")
def run(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = ("train.max_steps=2", "lora.r=12", "lora.use_rslora=true")
    return train_run(tmp_path_factory.mktemp("vllm"), pico_llama, *settings)


def test_exported_folder_is_the_adapter_with_its_template(
    run: RunFolder, pico_llama: Path, messages: pytest.LogCaptureFixture
) -> None:
    folder = export(run)
    command = messages.messages[-1].removeprefix("serve it: ")
    assert atomic_io.verify_manifest(folder) is None
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for adapter in (run.adapter, folder):
        base = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
        logits.append(base(ids).logits)
        logits.append(PeftModel.from_pretrained(base, adapter)(ids).logits)
    assert torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[0], logits[1])
    settings = json.loads((folder / "adapter_config.json").read_text())
    whole = json.loads((run.adapter / "adapter_config.json").read_text())
    assert all(settings[key] == whole[key] for key in READ_BY_VLLM & settings.keys())
    assert {key for key in whole.keys() - settings.keys() if key in READ_BY_VLLM and whole[key]} == {"bias"}
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(run.adapter).chat_template
    )
    assert shlex.split(command) == [
        "vllm", "serve", str(pico_llama), "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"run={folder}",
        "--tokenizer", str(folder),
    ]  # fmt: skip


def test_card_says_how_to_serve_it_without_paths_of_this_machine(run: RunFolder, tmp_path: Path) -> None:
    card = (export(run) / "README.md").read_text()
    assert card.startswith((run.adapter / "README.md").read_text())
    assert "vllm serve PATH-OF-THE-BASE --enable-lora --max-lora-rank 16 --lora-modules run=PATH-OF-THIS-FOLDER" in card
    assert str(run.path) not in card
    assert str(tmp_path.parent) not in card


@pytest.mark.parametrize("system", ["", 'Add up.\nIt\'s "JSON": ```{"sum": "3"}```'])
def test_request_on_the_card_asks_with_the_system_prompt_of_the_training_rows(
    system: str, run: RunFolder, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "asked", ignore=shutil.ignore_patterns("export")))
    report = json.loads((path / "data.json").read_text())
    shared = {"text": system, "share": 1.0} if system else None
    (path / "data.json").write_text(json.dumps(report | {"system_prompt": shared}))
    export(RunFolder(path))
    [request] = re.findall(r"^```\n(curl .*)\n```$", (path / "export" / "vllm" / "README.md").read_text(), re.MULTILINE)
    content = json.loads(shlex.split(request)[-1])
    assert content["model"] == "asked"
    assert [turn["content"] for turn in content["messages"][:-1]] == [system] * bool(system)
    assert content["messages"][-1]["role"] == "user"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA (lora.use_dora)"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules (lora.modules_to_save)"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trained token rows (model.new_tokens)"),
        ({"bias": "lora_only"}, "trained biases (lora.bias: lora_only)"),
        ({"r": 513}, "rank 513, above 512 (lora.r)"),
        ({"target_parameters": ["experts.down_proj"]}, "LoRA on stacked experts (target_parameters)"),
        ({}, "RoPE scaling that the base does not have (model.rope_scaling)"),
    ],
)
def test_what_vllm_cannot_hold_is_refused_with_the_merged_model_instead(
    settings: dict[str, object], reason: str, run: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("export"))))
    change_settings(run.adapter, **settings)
    config = load_config(run.config_file)
    if not settings:
        scaled = config.model.model_copy(update={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
        config = config.model_copy(update={"model": scaled})
    request = ExportRequest(run, config, resolve_base(config.model))
    with pytest.raises(ExportError, match=re.escape(reason)) as caught:
        export_vllm(request)
    assert str(caught.value).endswith(
        f"; merge it (qlora-train merge {run.path}) and serve the merged model: vllm serve {run.merged}"
    )
    assert "\n" not in str(caught.value)
    assert not (run.path / "export").exists()
    run.merged.mkdir()
    atomic_io.write_manifest(run.merged)
    with pytest.raises(ExportError, match=re.escape(f"; serve the merged model: vllm serve {run.merged}")):
        export_vllm(request)


def change_settings(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm_head.lora_A.weight", "LoRA on the output head"),
        ("model.embed_tokens.weight", "not LoRA of linear layers, such as base_model.model.model.embed_tokens"),
        ("model.layers.0.mlp.up_proj.base_layer.weight", "not LoRA of linear layers, such as base_model.model.model"),
    ],
)
def test_tensors_that_vllm_would_refuse_or_skip_are_reasons(
    name: str, reason: str, run: RunFolder, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({**weights, f"base_model.model.{name}": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    [found] = check_vllm(adapter)
    assert reason in found


def test_adapter_of_another_kind_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        check_vllm(tmp_path)
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    change_settings(adapter, rank_pattern={"q_proj": 4})
    with pytest.raises(ConfigError, match="rank_pattern"):
        check_vllm(adapter)


def test_command_writes_the_folder_and_says_how_it_is_served(run: RunFolder) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_train.cli.main", "export", str(run.path), "--format", "vllm", "--offline"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder = run.exports / "vllm"
    assert done.stdout.endswith(f"exported: {folder}\n")
    assert "serve it: vllm serve" in done.stderr
    assert check_vllm(folder) == ()
