"""GGUF files, written here from pico models in llama.cpp's layout, come back as the same models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_train.models.gguf_base import convert_gguf
from qlora_train.utils.errors import ModelError
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


def interleave_heads(weight: Tensor, num_heads: int) -> Tensor:
    """Row order of query and key in llama.cpp: the two halves of a head's rows alternate."""
    heads = weight.view(num_heads, 2, -1, weight.shape[-1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def write_gguf(
    folder: Path,
    path: Path,
    *,
    settings: dict[str, str] | None = None,
    extra: dict[str, Tensor] | None = None,
    leave_out: str = "",
    quantized: bool = False,
) -> Path:
    """Write a saved pico model as GGUF, in float32 or (the matrices) Q8_0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (settings or {}).items():
        writer.add_string(f"{config.model_type}.{key}", value)
    add_tokenizer(writer, tokenizer)
    for name, tensor in {**gguf_tensors(model), **(extra or {})}.items():
        if name != leave_out:
            add_tensor(writer, name, tensor, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, quantized: bool) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    if quantized and tensor.dim() == 2:
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def gguf_tensors(model: Any) -> dict[str, Tensor]:
    config = model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        tensors[f"{names.get_name(module)}.{kind}"] = parameter.detach()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if config.model_type == "llama":
        for name, tensor in tensors.items():
            if num_heads := heads.get(name.split(".")[-2]):
                tensors[name] = interleave_heads(tensor, num_heads)
    return tensors


def weights(folder: Path, **arguments: Any) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments).state_dict()


def assert_equal_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []


@pytest.fixture(scope="module")
def llama_gguf(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(pico_llama, tmp_path_factory.mktemp("gguf") / "pico.gguf")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
def test_converted_model_is_the_model_that_was_written(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    # the file does not name Qwen3's head size: all of its models have 128
    folder = pico(model_type, head_dim=128) if model_type == "qwen3" else pico(model_type)
    converted = convert_gguf(write_gguf(folder, tmp_path / "pico.gguf"), tmp_path / "cache")
    assert_equal_weights(weights(converted), weights(folder))

    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (converted, folder)]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_quantised_file_gives_the_weights_that_transformers_dequantises(
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


def test_second_use_reads_the_cache_and_a_damaged_cache_is_made_again(llama_gguf: Path, tmp_path: Path) -> None:
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


def llama3_factors() -> Tensor:
    """What llama.cpp stores for Llama 3.1: unscaled over scaled frequencies, here from Transformers' own rope."""
    ropes = ({"rope_type": "default", "rope_theta": 500000.0}, dict(LLAMA_3_ROPE))
    configs = [build_config("llama", max_position_embeddings=131072, rope_parameters=rope) for rope in ropes]
    plain, scaled = (AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq for config in configs)
    return plain / scaled


def test_rope_factors_of_llama_3_become_its_rope_settings(pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = pico("llama", rope_parameters=LLAMA_3_ROPE, max_position_embeddings=131072)
    path = write_gguf(folder, tmp_path / "pico.gguf", extra={"rope_freqs.weight": llama3_factors()})
    config = json.loads((convert_gguf(path, tmp_path / "cache") / "config.json").read_text())
    assert config["rope_parameters"] == pytest.approx(LLAMA_3_ROPE)


def test_foreign_rope_factors_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", extra={"rope_freqs.weight": torch.linspace(1, 3, 8)})
    with pytest.raises(ModelError, match="rope factors"):
        convert_gguf(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"leave_out": "blk.1.ffn_up.weight"}, r"1 tensors are missing \['blk.1.ffn_up.weight'\]"),
        ({"extra": {"blk.0.attn_q.bias": torch.zeros(64)}}, r"1 have no place \['blk.0.attn_q.bias'\]"),
        ({"extra": {"output_norm.weight": torch.ones(32)}}, r"output_norm.weight has shape \(32,\)"),
        ({"settings": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: yarn"),
    ],
)
def test_file_that_would_lose_something_is_refused(
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


def test_architecture_that_is_not_converted_names_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba'; converted are llama, qwen2"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "cache")


def test_missing_package_names_the_extra(llama_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"qlora-train\[gguf\]"):
        convert_gguf(llama_gguf, tmp_path)
