"""What cannot be merged exactly, or would lose files, is refused, and nothing is written then."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qlora_train.config.schema import QuantizationSection, RunConfig
from qlora_train.export.merging import merge_files as merge_module
from qlora_train.export.merging.merge_files import MARKER, check_mergeable
from qlora_train.utils.errors import ConfigError, MergeError
from tests.support.merging import Pico, logits, merged_logits, peft_merged_logits, plain, save_adapter


def with_tensors(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy an adapter and change its tensors."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _unknown_kind(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_E.weight"] = torch.ones(1)


def _half_a_pair(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.lora_A.weight"]


def _no_such_layer(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"{Q.replace('layers.0', 'layers.9')}.{part}.weight"] = tensors[f"{Q}.{part}.weight"].clone()


def _other_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A", "lora_B"):
        tensors[f"base_model.model.decoder.q_proj.{part}.weight"] = tensors.pop(f"{Q}.{part}.weight")


def _other_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.ones(4, 32)


def _other_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.ones(5, 64)


def _not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"][0, 0] = torch.nan


def _stray_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_magnitude_vector"] = torch.ones(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown_kind, r"1 tensors of unknown kind: .*lora_E"),
        (_half_a_pair, r"unknown kind: .*q_proj.lora_B"),
        (_no_such_layer, r"have no tensor .*layers.9.self_attn.q_proj.weight"),
        (_other_prefix, r"decoder.q_proj.weight; the base's names are like .*lm_head.weight"),
        (_other_width, r"\(64, 32\) in the adapter and \(64, 64\)"),
        (_other_rank, r"has rank 4"),
        (_not_finite, r"not finite"),
        (_stray_magnitude, r"use_dora"),
    ],
)
def test_adapter_with_unknown_tensors_is_refused(
    pico_llama: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    adapter = with_tensors(save_adapter(plain(pico_llama), tmp_path / "a"), tmp_path / "b", change)
    with pytest.raises(MergeError, match=message):
        merged_logits(pico_llama, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("peft_type", "LOHA"), ("init_lora_weights", "olora"), ("rank_pattern", {"q_proj": 2})]
)
def test_an_adapter_of_another_kind_is_refused(pico_llama: Path, tmp_path: Path, setting: str, value: Any) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(ConfigError, match=setting):
        merged_logits(pico_llama, adapter, tmp_path / "merged")


def test_new_tokens_on_the_embedding_alone_are_refused_when_the_head_is_its_own(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama")
    size = AutoConfig.from_pretrained(base).vocab_size
    model = plain(base)
    model.resize_token_embeddings(size + 1)
    adapter = save_adapter(model, tmp_path / "adapter", trainable_token_indices=[size])
    with pytest.raises(MergeError, match=rf"lm_head.weight has {size} rows"):
        merged_logits(base, adapter, tmp_path / "merged")


def test_untrained_new_row_is_refused(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", tie_word_embeddings=True)
    size = AutoConfig.from_pretrained(base).vocab_size
    model = plain(base)
    model.resize_token_embeddings(size + 2)
    adapter = save_adapter(model, tmp_path / "adapter", trainable_token_indices=[size + 1])
    with pytest.raises(MergeError, match=rf"rows \[{size}\] were not trained"):
        merged_logits(base, adapter, tmp_path / "merged")


def test_output_that_would_overwrite_files_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_llama, base)
    adapter = save_adapter(plain(base), tmp_path / "run" / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    for output in (base, base / "merged", adapter, adapter / "merged", tmp_path / "run", full):
        with pytest.raises(MergeError, match=r"overlap|not a previous merge"):
            merged_logits(base, adapter, output)
    assert list(full.iterdir()) == []


def test_a_previous_merge_is_replaced_and_not_merged_again(pico_llama: Path, tmp_path: Path) -> None:
    first = save_adapter(plain(pico_llama), tmp_path / "first", seed=1)
    second = save_adapter(plain(pico_llama), tmp_path / "second", seed=2)
    merged_logits(pico_llama, first, tmp_path / "merged")
    again = merged_logits(pico_llama, second, tmp_path / "merged")
    torch.testing.assert_close(again, peft_merged_logits(pico_llama, second), atol=0, rtol=0)
    with pytest.raises(MergeError, match="already merged"):
        merged_logits(tmp_path / "merged", second, tmp_path / "twice")
    merged_logits(tmp_path / "merged", first, tmp_path / "both")
    assert len(json.loads((tmp_path / "both" / MARKER).read_text())["adapters"]) == 2


def test_a_failed_merge_leaves_the_previous_one(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    before = merged_logits(pico_llama, adapter, tmp_path / "merged")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "write_auxiliary_files", full_disk)
    with pytest.raises(OSError, match="No space"):
        merged_logits(pico_llama, adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), before, atol=0, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_base_that_lacks_what_its_index_names_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_llama, base)
    (base / "model.safetensors").unlink()
    plain(pico_llama).save_pretrained(base, max_shard_size="100KB")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "model.lost.weight": where}}))
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    with pytest.raises(MergeError, match=rf"{where} lacks model.lost.weight, which {index.name} names"):
        merged_logits(base, adapter, tmp_path / "merged")


def test_dequantized_is_refused_when_the_run_did_not_quantize(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    with pytest.raises(MergeError, match="load_in_4bit is false"):
        merged_logits(
            pico_llama, adapter, tmp_path / "m",
            merge_base="dequantized", quantization=QuantizationSection(load_in_4bit=False),
        )  # fmt: skip


@pytest.mark.parametrize(("merge_base", "refused"), [("original", True), ("dequantized", False), ("auto", False)])
def test_original_merge_of_a_4_bit_base_is_refused_before_training(merge_base: str, refused: bool) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"model_name_or_path": "org/model-4bit"},
            "data": {"train": "rows.jsonl"},
            "export": {"merge_base": merge_base},
        }
    )
    check_mergeable({"model_type": "llama"}, config)
    stored = {"model_type": "llama", "quantization_config": {"load_in_4bit": True}}
    with pytest.raises(ConfigError, match=r"original, but org/model-4bit is stored") if refused else nullcontext():
        check_mergeable(stored, config)
