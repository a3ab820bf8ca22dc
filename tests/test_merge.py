"""Merging: the written model computes what the adapter computes, and what cannot be merged exactly is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_train.config.schema import QuantizationSection
from qlora_train.data.types import Example
from qlora_train.errors import MergeError
from qlora_train.evaluate import ExampleLoss, HeldOutLoss, held_out_loss
from qlora_train.export import merge as merge_module
from qlora_train.export.merge import MARKER, merge_adapter
from qlora_train.export.shards import bytes_of_size, pack
from qlora_train.export.verify import MergeRun, choose_merge_base, verify_merge

Pico = Callable[..., Path]
NF4 = QuantizationSection()
IDS = torch.randint(4, 300, (3, 17), generator=torch.Generator().manual_seed(1))


def plain(folder: Path) -> Any:
    """Load a folder in float32, ready to compare."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized(folder: Path, **settings: Any) -> Any:
    """Load a folder in 4 bits through transformers, without the in-place repacking of some CPUs."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def dequantized_reference(folder: Path, **settings: Any) -> Any:
    """Return the base in float32 with the weights that the loaded 4-bit layers themselves hold."""
    reference = plain(folder)
    for name, module in quantized(folder, **settings).named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            reference.get_submodule(name).weight.data = weight.float()
    return reference


def save_adapter(model: Any, folder: Path, *, seed: int = 3, std: float = 0.05, **settings: Any) -> Path:
    """Put LoRA with non-zero random trainable weights on a model and save it as PEFT does."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def merged_logits(base: Path, adapter: Path, output: Path, **settings: Any) -> torch.Tensor:
    options: dict[str, Any] = {"merge_base": "original", "quantization": NF4, "dtype": torch.float32, **settings}
    merge_adapter(base, adapter, output, **options)
    return logits(plain(output))


def peft_merged_logits(base: Path, adapter: Path) -> torch.Tensor:
    """PEFT's own merge into the 16-bit model, in float32."""
    return logits(PeftModel.from_pretrained(plain(base), adapter).merge_and_unload())


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_dequantized_merge_matches_the_adapter_on_the_4_bit_weights(
    pico_llama: Path, tmp_path: Path, quant_type: str, double: bool
) -> None:
    settings = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    adapter = save_adapter(quantized(pico_llama, **settings), tmp_path / "adapter")
    reference = PeftModel.from_pretrained(dequantized_reference(pico_llama, **settings), adapter)
    expected = logits(reference.eval())
    section = QuantizationSection.model_validate(settings)
    got = merged_logits(
        pico_llama, adapter, tmp_path / "merged",
        merge_base="dequantized", quantization=section, load_dtype=torch.bfloat16,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert (logits(plain(pico_llama)) - expected).abs().max() > 0.1, "the adapter changes too little to prove anything"


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "phi", "gpt_neox", "falcon", "cohere"])
def test_dequantized_merge_matches_in_other_families(pico: Pico, tmp_path: Path, model_type: str) -> None:
    base = pico(model_type)
    adapter = save_adapter(quantized(base), tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(dequantized_reference(base), adapter).eval())
    got = merged_logits(base, adapter, tmp_path / "merged", merge_base="dequantized", load_dtype=torch.bfloat16)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"o_proj": 31}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_original_merge_equals_pefts_own_merge(pico_llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter", **settings)
    got = merged_logits(pico_llama, adapter, tmp_path / "merged")
    expected = peft_merged_logits(pico_llama, adapter)
    torch.testing.assert_close(got, expected, atol=1e-6 if settings.get("use_dora") else 0, rtol=0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(pico: Pico, tmp_path: Path, bias: str) -> None:
    base = pico("qwen2")
    adapter = save_adapter(plain(base), tmp_path / "adapter", bias=bias, target_modules=["q_proj", "v_proj"])
    assert any(key.endswith(".bias") for key in load_file(adapter / "adapter_model.safetensors"))
    torch.testing.assert_close(
        merged_logits(base, adapter, tmp_path / "merged"), peft_merged_logits(base, adapter), atol=0, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_extend_the_vocabulary(pico: Pico, tmp_path: Path, tied: bool) -> None:
    base = pico("llama", tie_word_embeddings=tied)
    size = AutoConfig.from_pretrained(base).vocab_size
    model = plain(base)
    model.resize_token_embeddings(size + 2)
    rows = [5, size, size + 1]
    adapter = save_adapter(model, tmp_path / "adapter", trainable_token_indices={"embed_tokens": rows, "lm_head": rows})
    grown = plain(base)
    grown.resize_token_embeddings(size + 2)
    expected = PeftModel.from_pretrained(grown, adapter).eval()
    merge_adapter(base, adapter, tmp_path / "m", merge_base="original", quantization=NF4, dtype=torch.float32)
    merged = plain(tmp_path / "m")
    ids = torch.tensor([[5, 9, size, 11, size + 1, 5]])
    torch.testing.assert_close(merged(input_ids=ids).logits, expected(input_ids=ids).logits, atol=2e-6, rtol=1e-5)
    assert merged.config.vocab_size == size + 2
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_training_one_side_of_a_tied_pair_unties_it(pico: Pico, tmp_path: Path, module: str) -> None:
    base = pico("llama", tie_word_embeddings=True)
    adapter = save_adapter(plain(base), tmp_path / "adapter", modules_to_save=[module])
    expected = logits(PeftModel.from_pretrained(plain(base), adapter).eval())
    got = merged_logits(base, adapter, tmp_path / "merged")
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False


def test_training_both_sides_of_a_tied_pair_as_one_keeps_it_tied(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", tie_word_embeddings=True)
    adapter = save_adapter(plain(base), tmp_path / "a", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    expected = logits(PeftModel.from_pretrained(plain(base), adapter).eval())
    torch.testing.assert_close(merged_logits(base, adapter, tmp_path / "m"), expected, atol=2e-6, rtol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "m").tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


def test_a_base_stored_in_4_bits_is_dequantized_from_its_own_state(pico_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base4bit"
    quantized(pico_llama).save_pretrained(base)
    adapter = save_adapter(quantized(pico_llama), tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(dequantized_reference(pico_llama), adapter).eval())
    got = merged_logits(base, adapter, tmp_path / "merged", merge_base="dequantized")
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(MergeError, match="stored in 4 bits"):
        merged_logits(base, adapter, tmp_path / "other", merge_base="original")


def test_sharded_base_and_sharded_output_hold_the_same_tensors(pico_llama: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(pico_llama, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(pico_llama).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    whole = merged_logits(pico_llama, adapter, tmp_path / "whole")
    report = merge_adapter(
        sharded, adapter, tmp_path / "parts",
        merge_base="original", quantization=NF4, dtype=torch.float32, max_shard_size="100KB",
    )  # fmt: skip
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert report.num_shards == len(files) > 1
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 100_000
    torch.testing.assert_close(logits(plain(tmp_path / "parts")), whole, atol=0, rtol=0)


def test_output_is_a_complete_model_folder_in_16_bits(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(quantized(pico_llama), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    output = tmp_path / "merged"
    report = merge_adapter(
        pico_llama, adapter, output, merge_base="dequantized", quantization=NF4, dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    assert (output / "generation_config.json").is_file()
    assert str(tmp_path) not in "".join(path.read_text() for path in output.glob("*.json"))
    assert (report.num_changed, report.num_rounded, report.num_shards) == (14, 14, 1)


def test_weights_are_rounded_once(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    settings: dict[str, Any] = {"merge_base": "original", "quantization": NF4}
    merge_adapter(pico_llama, adapter, tmp_path / "fp32", dtype=torch.float32, **settings)
    merge_adapter(pico_llama, adapter, tmp_path / "bf16", dtype=torch.bfloat16, **settings)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_base_and_adapter_files_are_untouched(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    before = {path: path.read_bytes() for folder in (pico_llama, adapter) for path in folder.iterdir()}
    merged_logits(pico_llama, adapter, tmp_path / "merged")
    assert before == {path: path.read_bytes() for folder in (pico_llama, adapter) for path in folder.iterdir()}


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
        (_no_such_layer, r"find no tensor .*layers.9.self_attn.q_proj.weight"),
        (_other_prefix, r"decoder.q_proj.weight; the base's names are like .*lm_head.weight"),
        (_other_width, r"\(64, 32\) in the adapter and \(64, 64\)"),
        (_other_rank, r"rank 4"),
        (_not_finite, r"not finite"),
        (_stray_magnitude, r"use_dora"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(
    pico_llama: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    adapter = with_tensors(save_adapter(plain(pico_llama), tmp_path / "a"), tmp_path / "b", change)
    with pytest.raises(MergeError, match=message):
        merged_logits(pico_llama, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("peft_type", "LOHA"), ("init_lora_weights", "olora"), ("lora_bias", True)]
)
def test_an_adapter_of_another_kind_is_refused(pico_llama: Path, tmp_path: Path, setting: str, value: Any) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(MergeError, match=setting):
        merged_logits(pico_llama, adapter, tmp_path / "merged")


def test_new_tokens_on_the_embedding_alone_are_refused_when_the_head_is_its_own(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama")
    size = AutoConfig.from_pretrained(base).vocab_size
    model = plain(base)
    model.resize_token_embeddings(size + 1)
    adapter = save_adapter(model, tmp_path / "adapter", trainable_token_indices=[size])
    with pytest.raises(MergeError, match=rf"lm_head.weight has {size} rows"):
        merged_logits(base, adapter, tmp_path / "merged")


def test_a_new_row_that_nobody_trained_is_refused(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", tie_word_embeddings=True)
    size = AutoConfig.from_pretrained(base).vocab_size
    model = plain(base)
    model.resize_token_embeddings(size + 2)
    adapter = save_adapter(model, tmp_path / "adapter", trainable_token_indices=[size + 1])
    with pytest.raises(MergeError, match=rf"rows \[{size}\] were not"):
        merged_logits(base, adapter, tmp_path / "merged")


def test_places_that_would_lose_files_are_refused(pico_llama: Path, tmp_path: Path) -> None:
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

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "_copy_companions", full_disk)
    with pytest.raises(OSError, match="No space"):
        merged_logits(pico_llama, adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), before, atol=0, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_dequantized_is_refused_when_the_run_did_not_quantize(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    with pytest.raises(MergeError, match="load_in_4bit is false"):
        merged_logits(
            pico_llama, adapter, tmp_path / "m",
            merge_base="dequantized", quantization=QuantizationSection(load_in_4bit=False),
        )  # fmt: skip


def test_tensors_are_packed_into_shards_in_order() -> None:
    assert pack([4, 4, 4, 9, 1], 8) == [[0, 1], [2], [3], [4]]
    assert bytes_of_size("5GB") == 5_000_000_000
    for size in ("0GB", "5", "five GB", "5TB"):
        with pytest.raises(MergeError, match="max_shard_size"):
            bytes_of_size(size)


def examples() -> list[Example]:
    """Held-out rows of random tokens, the second half of each labelled."""
    rows = [tuple(row.tolist()) for row in IDS]
    return [Example(f"row {i}", ids, (False,) * 8 + (True,) * 9, None, None) for i, ids in enumerate(rows)]


@dataclass
class Tuned:
    run: MergeRun
    loss: HeldOutLoss


@pytest.fixture
def tuned(pico_llama: Path, tmp_path: Path) -> Tuned:
    """An adapter on the 4-bit base, and its loss there."""
    adapter = save_adapter(quantized(pico_llama), tmp_path / "adapter", std=0.02)
    model = PeftModel.from_pretrained(quantized(pico_llama), adapter)
    loss = held_out_loss(model, examples(), batch_size=2, pad_token_id=0)
    return Tuned(MergeRun(pico_llama, adapter, NF4, torch.bfloat16), loss)


def choose(tuned: Tuned, output: Path, rows: list[Example], loss: HeldOutLoss | None, limit: float = 0.5) -> Any:
    return choose_merge_base(
        tuned.run, output, merge_base="auto", examples=rows, adapter_loss=loss, max_loss_increase=limit, batch_size=2
    )


def test_auto_keeps_the_better_base_and_reports_both(tuned: Tuned, tmp_path: Path) -> None:
    choice = choose(tuned, tmp_path / "merged", examples(), tuned.loss)
    assert set(choice.losses) == {"original", "dequantized"}
    assert choice.losses[choice.report.merge_base] == min(choice.losses.values())
    marker = json.loads((tmp_path / "merged" / MARKER).read_text())
    assert marker["adapters"][0]["merge_base"] == choice.report.merge_base
    assert sorted(os.listdir(tmp_path)) == ["adapter", "merged"]
    verification = verify_merge(
        tmp_path / "merged", examples(), tuned.loss,
        max_loss_increase=0.5, dtype=torch.bfloat16, device="cpu", batch_size=2,
    )  # fmt: skip
    assert verification.merged_loss == pytest.approx(choice.verification.merged_loss, abs=1e-6)
    assert choice.losses["dequantized"] == pytest.approx(tuned.loss.loss, abs=0.02)


def test_a_merge_that_costs_too_much_is_refused_with_both_numbers(tuned: Tuned, tmp_path: Path) -> None:
    better = HeldOutLoss.of([ExampleLoss(1.0, 10)])
    with pytest.raises(MergeError, match=r"after merging and 0\.1000 with the adapter.*allows 0\.02"):
        choose(tuned, tmp_path / "merged", examples(), better, limit=0.02)
    assert sorted(os.listdir(tmp_path)) == ["adapter"]


def test_auto_without_held_out_rows_takes_what_was_trained(
    tuned: Tuned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="qlora_train")
    choice = choose(tuned, tmp_path / "merged", [], None)
    assert (choice.report.merge_base, choice.losses, choice.verification) == ("dequantized", {}, None)
    assert "no held-out rows" in caplog.text
    assert "not verified" in caplog.text
