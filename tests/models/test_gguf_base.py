"""GGUF files, written here from pico models in llama.cpp's layout, come back as the same models."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_train.architectures.gguf_configs import gguf_config
from qlora_train.architectures.gguf_header import read_header
from qlora_train.models.gguf_base import convert_gguf
from qlora_train.models.gguf_tensors import LAYOUTS, parameter_sources
from qlora_train.utils.errors import ModelError
from tests.support.gguf_files import write_gguf
from tests.support.pico import build_config, build_pico

TEXT = "the capital of France is Paris"
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def weights(folder: Path, **arguments: Any) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments).state_dict()


def assert_equal_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


@pytest.fixture(scope="module")
def llama_gguf(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(pico_llama, tmp_path_factory.mktemp("gguf") / "pico.gguf")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
def test_converted_gguf_equals_the_original_model(model_type: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = pico(model_type)
    converted = convert_gguf(write_gguf(folder, tmp_path / "pico.gguf"), tmp_path / "cache")
    assert_equal_weights(weights(converted), weights(folder))

    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (converted, folder)]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_quantized_gguf_equals_transformers_dequantization(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_gguf(pico(model_type, tie_word_embeddings=True), tmp_path / "pico.gguf", quantized=True)
    expected = weights(tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True))
    assert_equal_weights(weights(convert_gguf(path, tmp_path / "cache")), expected)


def test_tokenizer_and_configs_are_complete(llama_gguf: Path, pico_llama: Path, tmp_path: Path) -> None:
    folder = convert_gguf(llama_gguf, tmp_path)
    ours, original = (AutoTokenizer.from_pretrained(f) for f in (folder, pico_llama))
    assert ours(TEXT).input_ids == original(TEXT).input_ids
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == ("<|im_end|>", "<|pad|>", original.chat_template)
    assert ours.model_max_length == 256
    generation = json.loads((folder / "generation_config.json").read_text())
    assert "_from_model_config" not in generation
    assert generation["eos_token_id"] == original.eos_token_id
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])


def test_conversion_is_cached_and_repeated_if_damaged(llama_gguf: Path, tmp_path: Path) -> None:
    folder = convert_gguf(llama_gguf, tmp_path)
    file = folder / "model.safetensors"
    content, made = file.read_bytes(), file.stat().st_mtime_ns
    assert convert_gguf(llama_gguf, tmp_path) == folder
    assert file.stat().st_mtime_ns == made
    file.write_bytes(content[:-1] + b"x")
    assert convert_gguf(llama_gguf, tmp_path) == folder
    assert file.read_bytes() == content


def test_another_file_of_the_same_name_is_another_model(pico: Callable[..., Path], tmp_path: Path) -> None:
    folders = set()
    for seed in (1, 2):
        path = write_gguf(build_pico(tmp_path / f"pico{seed}", seed=seed), tmp_path / "pico.gguf")
        folders.add(convert_gguf(path, tmp_path / "cache"))
    assert len(folders) == 2


def test_parts_of_a_split_file_are_one_model(pico_llama: Path, tmp_path: Path) -> None:
    write_gguf(pico_llama, tmp_path / "pico.gguf", part_tensors=9)
    parts = sorted(tmp_path.glob("pico-*.gguf"))
    assert [part.name for part in parts] == [f"pico-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts[:2]:
        assert_equal_weights(weights(convert_gguf(part, tmp_path / "cache")), weights(pico_llama))
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 parts are missing: pico-00003-of-00003\.gguf"):
        convert_gguf(parts[0], tmp_path / "cache")


def llama3_factors() -> Tensor:
    """What llama.cpp stores for Llama 3.1: unscaled over scaled frequencies, here from Transformers' own rope."""
    ropes = ({"rope_type": "default", "rope_theta": 500000.0}, dict(LLAMA_3_ROPE))
    configs = [build_config("llama", max_position_embeddings=131072, rope_parameters=rope) for rope in ropes]
    plain, scaled = (AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq for config in configs)
    return plain / scaled


def test_llama_3_rope_factors_become_rope_parameters(pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = pico("llama", rope_parameters=LLAMA_3_ROPE, max_position_embeddings=131072)
    path = write_gguf(folder, tmp_path / "pico.gguf", extra={"rope_freqs.weight": llama3_factors()})
    config = json.loads((convert_gguf(path, tmp_path / "cache") / "config.json").read_text())
    assert config["rope_parameters"] == pytest.approx(LLAMA_3_ROPE)


def test_unknown_rope_factors_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", extra={"rope_freqs.weight": torch.linspace(1, 3, 8)})
    with pytest.raises(ModelError, match="rope factors"):
        convert_gguf(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"leave_out": "blk.1.ffn_up.weight"}, r"1 tensors are missing \['blk.1.ffn_up.weight'\]"),
        ({"extra": {"blk.0.attn_q_norm.weight": torch.ones(16)}}, r"1 are unmapped \['blk.0.attn_q_norm.weight'\]"),
        ({"extra": {"output_norm.weight": torch.ones(32)}}, r"tensor output_norm.weight of shape \(32,\)"),
        ({"settings": {"rope.scaling.type": "dynamic"}}, "llama.rope.scaling.type: dynamic, which would be lost"),
        ({"settings": {"attention.new_thing": "on"}}, "llama.attention.new_thing: on, which would be lost"),
        ({"settings": {"attention.head_count": "many"}}, "settings of another type or size .*TypeError"),
        ({"settings": {"rope.scaling.type": "linear"}}, "has no llama.rope.scaling.factor"),
    ],
)
def test_gguf_that_cannot_be_converted_exactly_is_refused(
    arguments: dict[str, Any], expected: str, pico_llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", **arguments)
    with pytest.raises(ModelError, match=expected) as caught:
        convert_gguf(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_file_and_other_formats_are_one_line(llama_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(llama_gguf.read_bytes()[:20_000])
    for name, expected in [("no.gguf", "does not exist"), ("text.gguf", "not a GGUF"), ("short.gguf", "damaged")]:
        with pytest.raises(ModelError, match=expected) as caught:
            convert_gguf(tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_every_damaged_header_is_one_line(llama_gguf: Path, tmp_path: Path) -> None:
    content = llama_gguf.read_bytes()
    size = content.index(b"blk.1.ffn_up.weight")
    generator, file, problems = random.Random(0), tmp_path / "damaged.gguf", []
    for _ in range(300):
        damaged = bytearray(content[: generator.randrange(size) if generator.random() < 0.3 else None])
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(8, min(size, max(9, len(damaged))))] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            gguf_config(read_header(file))
        except ModelError as error:
            problems.append(str(error))
    assert len(problems) > 100
    assert [problem for problem in problems if "\n" in problem] == []


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("rwkv6", "'rwkv6'; converted are llama, qwen2"), ("t5", "'t5': it has an encoder"), ("gemma4", "'gemma4': ")],
)
def test_unsupported_architecture_is_one_line(architecture: str, expected: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=expected) as caught:
        convert_gguf(tmp_path / "other.gguf", tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_norms_of_heads_are_parts_of_one_tensor() -> None:
    name = "model.layers.1.self_attn.k_layernorm.norms.2.weight"  # of StableLM 2 12B
    source = parameter_sources([name], "stablelm", 2, LAYOUTS["stablelm"].rules)[name]
    stored = torch.randn(4, 16)
    assert source.names == ("blk.1.attn_k_norm.weight",)
    assert torch.equal(source.make(lambda _name: stored, LAYOUTS["stablelm"].undo, None, torch.Size([16])), stored[2])


def test_missing_package_names_the_extra(llama_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"qlora-train\[gguf\]"):
        convert_gguf(llama_gguf, tmp_path)
