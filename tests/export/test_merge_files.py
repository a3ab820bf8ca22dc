"""Merging: the written model computes what the adapter computes."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_train.config.schema import QuantizationSection
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.export.merging.load_merged import load_merged
from qlora_train.models.shard_writer import bytes_of_size, pack, write_shards
from qlora_train.utils.errors import MergeError
from tests.support.merging import (
    IDS,
    NF4,
    Pico,
    change_adapter,
    dequantized_reference,
    logits,
    merge,
    merged_logits,
    peft_merged_logits,
    plain,
    quantized,
    save_adapter,
)
from tests.support.pico import TEXT_END, TURN_END, VOCAB_SIZE
from tests.support.remote_code import with_remote_code


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


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "phi", "phi3", "gpt_neox", "falcon", "cohere"])
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
    merge(base, adapter, tmp_path / "m")
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
    report = merge(
        sharded, adapter, tmp_path / "parts",
        max_shard_size="100KB",
    )  # fmt: skip
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert report.num_shards == len(files) > 1
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 100_000
    torch.testing.assert_close(logits(plain(tmp_path / "parts")), whole, atol=0, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what a process has mapped")
def test_files_of_the_base_are_not_mapped_into_memory(pico_llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(pico_llama).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = {str(file) for file in tmp_path.glob("*.safetensors")}
    with BaseCheckpoint(tmp_path) as base:
        for name in base.names:
            assert base.read(name).isfinite().all()
            mapped = Path("/proc/self/maps").read_text().splitlines()
            assert len({line.partition("/")[2] for line in mapped if f"/{line.partition('/')[2]}" in shards}) <= 1
    assert len(shards) > 1


def test_output_is_a_complete_model_folder_in_16_bits(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(quantized(pico_llama), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    output = tmp_path / "merged"
    report = merge(pico_llama, adapter, output, merge_base="dequantized", quantization=NF4, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    assert (output / "generation_config.json").is_file()
    assert str(tmp_path) not in "".join(path.read_text() for path in output.glob("*.json"))
    assert (report.num_changed, report.num_quantized, report.num_shards) == (14, 14, 1)


def merge_with(base: Path, tokenizer: Any, output: Path, **generation: Any) -> Path:
    """Merge an adapter that was saved with this tokenizer onto a copy of the base with these generation settings."""
    copied = output.with_name("base")
    shutil.copytree(base, copied)
    (copied / "generation_config.json").write_text(json.dumps(generation))
    adapter = save_adapter(plain(base), output.with_name("adapter"))
    tokenizer.save_pretrained(adapter)
    merge(copied, adapter, output)
    return output


@pytest.mark.parametrize(
    ("eos_token", "of_base", "expected"),
    [
        (TURN_END, 3, [2, 3]),
        (TEXT_END, 3, [3, 2]),  # the tokenizer's own eos is the base's; its template ends turns with another
        (TURN_END, [9, 3], [2, 9, 3]),
        (TURN_END, 2, 2),
        (TURN_END, None, [2, 3]),
    ],
)
def test_merged_model_stops_where_its_training_data_ended_answers(
    pico: Pico, tmp_path: Path, eos_token: str, of_base: Any, expected: Any
) -> None:
    base = pico("llama", eos_token_id=2 if of_base == 2 else 3, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token=eos_token)
    generation = {"_from_model_config": True, "eos_token_id": of_base, "do_sample": False, "temperature": 0.9}
    merged = merge_with(base, tokenizer, tmp_path / "merged", **generation)
    written = json.loads((merged / "generation_config.json").read_text())
    assert written == {"eos_token_id": expected, "pad_token_id": 0, "do_sample": False, "temperature": 0.9}
    config = json.loads((merged / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (expected, 0)

    model = plain(merged)
    prompt = IDS[:1, :5]
    token = int(model(input_ids=prompt).logits[0, -1].argmax())
    with torch.no_grad():
        model.lm_head.weight[2] = 2 * model.lm_head.weight[token]
    assert model.generate(prompt, max_new_tokens=6)[0, 5:].tolist() == [2], "it stops at the end of turn"


def test_settings_are_written_for_a_base_without_any(pico: Pico, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico("llama", eos_token_id=3), base)
    (base / "generation_config.json").unlink()
    adapter = save_adapter(plain(base), tmp_path / "adapter")
    merged_logits(base, adapter, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, 3], "pad_token_id": 0}


def test_a_pad_token_beyond_the_embedding_is_not_written(pico_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == VOCAB_SIZE
    merged = merge_with(pico_llama, tokenizer, tmp_path / "merged", eos_token_id=2)
    assert json.loads((merged / "config.json").read_text())["pad_token_id"] == 0
    assert logits(plain(merged)).isfinite().all()


def test_a_model_with_code_of_its_own_is_merged_with_that_code(pico_llama: Path, tmp_path: Path) -> None:
    base = with_remote_code(Path(shutil.copytree(pico_llama, tmp_path / "own")))
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    merged_logits(pico_llama, adapter, tmp_path / "of_llama")
    merge(base, adapter, tmp_path / "of_own", trust_remote_code=True)
    model = load_merged(tmp_path / "of_own", "cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(logits(model.eval()), logits(plain(tmp_path / "of_llama")), atol=0, rtol=0)


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16"])
def test_merge_has_the_dtypes_of_the_base(pico: Pico, tmp_path: Path, stored: str) -> None:
    base = Path(shutil.copytree(pico("llama", dtype=stored), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(plain(base), tmp_path / "adapter")
    for merge_base in ("original", "dequantized"):
        output = tmp_path / merge_base
        merge(base, adapter, output, merge_base=merge_base, dtype=None, load_dtype=torch.float32)
        written = load_file(output / "model.safetensors")
        assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in tensors.items()}
        assert json.loads((output / "config.json").read_text())["dtype"] == stored
    got = logits(plain(tmp_path / "original"))
    torch.testing.assert_close(got, peft_merged_logits(base, adapter), atol=0.1, rtol=0)


def test_update_beyond_the_dtype_of_the_base_is_refused(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", dtype="float16")
    adapter = save_adapter(plain(base), tmp_path / "adapter")
    change_adapter(adapter, lambda tensors: [tensor.mul_(1e4) for tensor in tensors.values()])
    with pytest.raises(MergeError, match=r"the merged weight is beyond the range of torch\.float16"):
        merge(base, adapter, tmp_path / "merged", dtype=None)


def test_updated_weights_are_rounded_once_to_a_neighbour_and_others_not_at_all(
    pico_llama: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    settings: dict[str, Any] = {"merge_base": "original", "quantization": NF4}
    merge(pico_llama, adapter, tmp_path / "fp32", dtype=torch.float32, **settings)
    merge(pico_llama, adapter, tmp_path / "bf16", dtype=torch.bfloat16, **settings)
    folders = (pico_llama, tmp_path / "fp32", tmp_path / "bf16")
    base, exact, rounded = (load_file(folder / "model.safetensors") for folder in folders)
    for name, wanted in exact.items():
        spacing = torch.finfo(torch.bfloat16).eps * wanted.abs()  # at most, of the two neighbours
        assert ((rounded[name].float() - wanted).abs() <= spacing).all(), name
        if torch.equal(wanted, base[name].float()):
            assert torch.equal(rounded[name], base[name]), name


def test_base_and_adapter_files_are_untouched(pico_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(plain(pico_llama), tmp_path / "adapter")
    before = {path: path.read_bytes() for folder in (pico_llama, adapter) for path in folder.iterdir()}
    merged_logits(pico_llama, adapter, tmp_path / "merged")
    assert before == {path: path.read_bytes() for folder in (pico_llama, adapter) for path in folder.iterdir()}


def test_tensors_are_packed_into_shards_in_order() -> None:
    assert pack([4, 4, 4, 9, 1], 8) == [[0, 1], [2], [3], [4]]
    assert bytes_of_size("5GB") == 5_000_000_000
    for size in ("0GB", "5", "five GB", "5TB"):
        with pytest.raises(MergeError, match="max_shard_size"):
            bytes_of_size(size)


def test_one_shard_of_tensors_lives_at_a_time(tmp_path: Path) -> None:
    names, alive, most = [f"t{i}" for i in range(12)], set(), 0

    def make(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(1000)
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most = max(most, len(alive))
        return tensor

    assert write_shards(tmp_path, names, [4000] * 12, 12_000, map(make, names)) == 4
    assert most == 3
