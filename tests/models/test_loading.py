"""The loader: what is stored in 4 bits and at what cost, what stays as it was, and what is refused or repaired, aloud."""

import importlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.kernels import grouped_sdpa
from qlora_train.models import LoadedModel, load_model, load_tokenizer, resolve_base
from qlora_train.models.hardware import choose_compute_dtype
from qlora_train.models.malloc_trim import MemoryTrimmer
from qlora_train.models.new_tokens import add_new_tokens
from qlora_train.models.token_probes import encode, hard_texts
from qlora_train.utils.errors import ConfigError, ModelError
from tests.support.gguf_files import write_gguf
from tests.support.live_bytes import LiveBytes
from tests.support.pico import TURN_END, build_pico

STORED = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
Pico = Callable[..., Path]
CPU = torch.device("cpu")
http = importlib.import_module(hub.HTTPError.__module__.partition(".")[0])
"""The HTTP client of the installed Hub library, whose errors may get through it."""


def load(folder: Path, *, model: dict[str, Any] | None = None, **settings: Any) -> LoadedModel:
    section = ModelSection(model_name_or_path=str(folder), **(model or {}))
    return load_model(section, QuantizationSection(**settings))


def tokenizer_of(folder: Path, **model: Any) -> Any:
    section = ModelSection(model_name_or_path=str(folder), **model)
    return load_tokenizer(resolve_base(section), section)


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit_json(path: Path, *without: str, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key not in without} | changes))


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def linears(loaded: LoadedModel) -> dict[str, Linear4bit]:
    return {name: module for name, module in loaded.model.named_modules() if isinstance(module, Linear4bit)}


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer whose seven linears are all 1024 x 1024."""
    return build_pico(
        tmp_path_factory.mktemp("wide"), hidden_size=1024, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_loaded_bytes_equal_hand_arithmetic(wide: Path, quant_type: str, double: bool) -> None:
    loaded = load(
        wide, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double
    )
    weights = 1024 * 1024
    blocks = weights // 64
    scales = blocks + 4 * blocks // 256 + 4 if double else 4 * blocks  # 8-bit scales, their scales, their offset
    tables = 4 * 16 + (4 * 256 if double else 0)
    summary = loaded.quantization_summary
    assert summary.num_quantized_weights == summary.num_linear_weights == 7 * weights
    assert summary.weight_bytes == 7 * (weights // 2 + scales)
    assert summary.table_bytes == 7 * tables
    assert round(summary.bits_per_weight, 3) == (4.127 if double else 4.5)
    embeddings_norms_and_head = 2 * (2 * 320 * 1024 + 3 * 1024)
    rotary = sum(buffer.nbytes for buffer in loaded.model.buffers())
    assert summary.total_bytes == summary.weight_bytes + summary.table_bytes + embeddings_norms_and_head + rotary
    assert {layer.weight.quant_type for layer in linears(loaded).values()} == {quant_type}
    assert {layer.weight.quant_state.nested for layer in linears(loaded).values()} == {double}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_parameter_is_upcast_or_trainable(pico_llama: Path, dtype: str) -> None:
    loaded = load(pico_llama, bnb_4bit_compute_dtype=dtype)
    compute = getattr(torch, dtype)
    assert loaded.compute_dtype == compute
    assert {layer.compute_dtype for layer in linears(loaded).values()} == {compute}
    plain = [p for p in loaded.model.parameters() if p.dtype != torch.uint8]
    assert len(plain) == 2 + 2 * 2 + 1, "embedding, head and every norm"
    assert {p.dtype for p in plain} == {compute}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.lm_head not in linears(loaded).values()
    with torch.no_grad():
        assert loaded.model(input_ids=torch.arange(9)[None]).logits.dtype == compute


def test_compute_dtype_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="qlora_train"):
        chosen, asked = choose_compute_dtype("auto", CPU), choose_compute_dtype("float16", CPU)
    assert asked == torch.float16
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert chosen == (torch.bfloat16 if fast else torch.float32)
    assert "compute dtype: float16 (set in the config)" in caplog.text
    reason = "this CPU has AVX512" if fast else "slower than float32"
    assert reason in caplog.text


def test_loaded_models_use_grouped_sdpa(pico_llama: Path) -> None:
    assert load(pico_llama).model.config._attn_implementation == "sdpa"
    assert AttentionInterface()["sdpa"] is grouped_sdpa.attend


def test_emulated_bfloat16_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with caplog.at_level("WARNING", logger="qlora_train"):
        assert choose_compute_dtype("auto", torch.device("cuda")) == torch.float16
        assert not caplog.messages
        assert choose_compute_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16
    assert "Tesla T4 emulates bfloat16" in caplog.text


def test_16_bit_loading_leaves_weights_unchanged(pico_llama: Path) -> None:
    loaded = load(pico_llama, load_in_4bit=False, bnb_4bit_compute_dtype="bfloat16")
    assert linears(loaded) == {}
    assert loaded.quantization_summary.quantized_share == 0
    expected = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_loaded_model_generates_like_its_dequantized_weights(pico_llama: Path) -> None:
    loaded = load(pico_llama, bnb_4bit_compute_dtype="float32")
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the capital of France?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    for name, layer in linears(loaded).items():
        reference.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    wanted, found = (m.generate(**text, max_new_tokens=12, do_sample=False) for m in (reference, loaded.model.eval()))
    assert found.tolist() == wanted.tolist()
    assert found.shape[1] > text["input_ids"].shape[1]
    assert loaded.tokenizer.decode(found[0], skip_special_tokens=True)


def test_subclasses_of_linear_are_quantized_too(pico: Pico) -> None:
    loaded = load(pico("falcon"))
    assert loaded.quantization_summary.quantized_share == 1.0
    plain = AutoModelForCausalLM.from_pretrained(pico("falcon"), dtype=loaded.compute_dtype)
    names = {name for name, module in plain.named_modules() if type(module).__name__ == "FalconLinear"}
    assert names == set(linears(loaded)), "one 4-bit layer for every FalconLinear"


def test_too_many_16_bit_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = build_pico(tmp_path, "qwen3_moe")
    with pytest.raises(ModelError, match=r"only 99\.6% of the linear weights .* below 100%.*mlp\.gate\.") as caught:
        load(folder, min_quantized_share=0.999)
    one_line(caught.value)
    loaded = load(folder)
    routers = 2 * 4 * 64
    assert loaded.quantization_summary.num_linear_weights - loaded.quantization_summary.num_quantized_weights == routers


# --- checkpoints of other kinds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored_in_4bit(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "pico-4bit"
    loaded = load(pico_llama)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_falcon_stored_by_transformers_in_4_bits_is_quantized(pico: Pico, tmp_path: Path) -> None:
    """Transformers stores subclasses of nn.Linear in 16 bits."""
    falcon, folder = pico("falcon"), copy_of(pico("falcon"), tmp_path / "stored")
    expected, settings = load(falcon), BitsAndBytesConfig(load_in_4bit=True, **STORED)
    model = AutoModelForCausalLM.from_pretrained(falcon, quantization_config=settings, dtype=expected.compute_dtype)
    model.save_pretrained(folder)
    found = load(folder)
    assert found.quantization_summary == expected.quantization_summary
    for name, layer in linears(expected).items():
        assert torch.equal(found.model.get_submodule(name).weight, layer.weight)


def test_4_bit_checkpoint_loads_unchanged(stored_in_4bit: Path, pico_llama: Path) -> None:
    again, first = load(stored_in_4bit), load(pico_llama)
    assert again.quantization_summary == first.quantization_summary
    for name, layer in linears(first).items():
        assert torch.equal(linears(again)[name].weight.data, layer.weight.data)
        assert linears(again)[name].compute_dtype == first.compute_dtype
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, first.model(input_ids=ids).logits)


def test_separately_stored_4_bit_experts_are_refused(pico: Pico, tmp_path: Path) -> None:
    folder = copy_of(pico("qwen3_moe"), tmp_path / "apart")
    edit_json(
        folder / "config.json", quantization_config={**STORED, "quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        weights[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"bitsandbytes stored each expert in 4 bits.*original 16-bit model"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: fp4, but pico-4bit is stored with nf4"),
        ({"bnb_4bit_use_double_quant": False}, "use_double_quant: False, but pico-4bit is stored with True"),
        ({"load_in_4bit": False}, "load_in_4bit: false, but pico-4bit is stored in 4 bits"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(
    stored_in_4bit: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(stored_in_4bit, **settings)
    one_line(caught.value)


def test_missing_stored_settings_are_transformers_defaults(stored_in_4bit: Path, tmp_path: Path) -> None:
    folder = copy_of(stored_in_4bit, tmp_path / "unnamed")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]["bnb_4bit_quant_type"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type: nf4, but unnamed is stored with fp4; set it to fp4"):
        load(folder)


def test_unsupported_quantization_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(pico_llama, tmp_path / "gptq")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="already quantized with gptq"):
        load(folder)


def test_gguf_file_loads_like_its_original(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load(write_gguf(pico_llama, tmp_path / "pico.gguf"))
    assert loaded.source.name == "pico"
    assert loaded.quantization_summary.quantized_share == 1.0
    expected = linears(load(pico_llama))
    assert all(torch.equal(layer.weight.data, expected[name].weight.data) for name, layer in linears(loaded).items())


# --- what cannot be had -----------------------------------------------------------------------------------------------


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", "model_type")


def foreign_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="perceptron")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    torch.save({}, folder / "consolidated.00.pth")
    no_weights(folder)


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def rubbish_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"rubbish" * 100)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_config, "config.json cannot be read"),
        (list_config, "config.json holds no mapping"),
        (no_model_type, "model_type: found None"),
        (foreign_model_type, "perceptron"),
        (no_config, "holds no config.json"),
        (no_weights, "holds neither model.safetensors nor"),
        (pickled_weights, "consolidated.00.pth is a pickle other than"),
        (cut_weights, "model.safetensors .* is truncated or damaged"),
        (rubbish_weights, "model.safetensors .* is truncated or damaged"),
        (no_tokenizer, "no usable tokenizer"),
    ],
)
def test_broken_model_folder_is_one_line(
    damage: Callable[[Path], None], message: str, pico_llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(pico_llama, tmp_path / "base")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    one_line(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_missing_path_is_one_line_without_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist; give a folder") as caught:
        resolve_base(ModelSection(model_name_or_path=name))
    one_line(caught.value)


def test_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file; give a folder"):
        resolve_base(ModelSection(model_name_or_path=str(tmp_path / "model.bin")))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_hub_id_without_a_network_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match="not in the local cache, and offline nothing is fetched") as caught:
        resolve_base(ModelSection(model_name_or_path=name))
    assert name in one_line(caught.value)


def answer(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://huggingface.co/api/models/a/b"))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (hub.GatedRepoError("gated\nlong text", response=answer(403)), "403: the model is gated; accept its terms"),
        (hub.RepositoryNotFoundError("no\nrepo", response=answer(404)), "404: no such repository, or a private one"),
        (hub.RepositoryNotFoundError("no\nrepo", response=answer(401)), "401: no such repository"),
        (hub.RevisionNotFoundError("no\nrevision", response=answer(404)), "no such revision"),
        (hub.HfHubHTTPError("who\nis it", response=answer(401)), "the Hub answered 401: .*check HF_TOKEN"),
        (hub.HfHubHTTPError("not\nyou", response=answer(403)), "the Hub answered 403: .*check HF_TOKEN"),
        (hub.HfHubHTTPError("down\nfor now", response=answer(503)), "the Hub answered 503"),
        (hub.HFValidationError("a bad name"), "no repository id"),
        (hub.LocalEntryNotFoundError("not\nthere"), "is not in the local cache"),
        (hub.OfflineModeIsEnabled("offline\nmode"), "is not in the local cache"),
        (http.ConnectError("no\nroute"), "is not in the local cache"),
        (http.ReadTimeout("slow\nnetwork"), "is not in the local cache"),
    ],
)
def test_hub_exceptions_become_one_line(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=f"model.model_name_or_path: a/b.*{message}") as caught:
        resolve_base(ModelSection(model_name_or_path="a/b"))
    one_line(caught.value)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_complete_tokenizer_is_unchanged(pico_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="qlora_train"):
        tokenizer = tokenizer_of(pico_llama)
    assert [record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage()] == []
    original = AutoTokenizer.from_pretrained(pico_llama)
    assert tokenizer.get_vocab() == original.get_vocab()
    file = Tokenizer.from_file(str(pico_llama / "tokenizer.json"))
    for text in hard_texts(tokenizer):
        assert list(encode(tokenizer, text)) == file.encode(text, add_special_tokens=False).ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == (original.eos_token, original.pad_token)
    assert tokenizer.chat_template == original.chat_template


def test_every_tokenizer_repair_is_logged(pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(pico_llama, tmp_path / "bare")
    edit_json(folder / "tokenizer_config.json", "pad_token", "eos_token", "model_max_length")
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level("DEBUG", logger="qlora_train"):
        tokenizer = tokenizer_of(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|pad|>", TURN_END, 256)
    assert TURN_END in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    for repair in (
        "tokenizer: pad token",
        "eos token",
        "chat template: chatml, turns end with",
        "model_max_length 256 (from config.json)",
    ):
        assert repair in caplog.text


def test_missing_eos_token_comes_from_config_json(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(pico_llama, tmp_path / "bare")
    edit_json(folder / "tokenizer_config.json", "eos_token")
    with caplog.at_level("DEBUG", logger="qlora_train"):
        assert tokenizer_of(folder).eos_token == TURN_END
    assert f"eos token '{TURN_END}' (from config.json)" in caplog.text
    edit_json(folder / "config.json", "eos_token_id")
    with pytest.raises(ModelError, match=r"neither the tokenizer nor config\.json has an eos token"):
        tokenizer_of(folder)


def test_turns_end_with_eos_without_a_token_for_it(pico_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pico_llama, folder)
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|stop|>"))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text().replace("<|im_end|>", "<|stop|>"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_of(folder)
    assert tokenizer.eos_token == "<|stop|>"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert "y<|stop|>" in tokenizer.apply_chat_template(turns, tokenize=False).replace("y <", "y<")


def test_end_of_turn_of_several_tokens_is_refused(pico_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"'<\|eot_id\|>', which is \d+ tokens of this tokenizer") as caught:
        tokenizer_of(pico_llama, chat_template="llama3")
    assert "model.new_tokens: ['<|eot_id|>']" in one_line(caught.value)
    tokenizer = tokenizer_of(pico_llama, chat_template="llama3", new_tokens=("<|eot_id|>",))
    assert tokenizer.eos_token == "<|eot_id|>"


def test_new_vocabulary_rows_are_deterministic(pico_llama: Path) -> None:
    torch.manual_seed(1)
    first = load(pico_llama, model={"new_tokens": ("<a>", "<b>")})
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = load(pico_llama, model={"new_tokens": ("<a>", "<b>")})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.new_token_ids == (len(first.tokenizer) - 2, len(first.tokenizer) - 1)
    for embedding in ("get_input_embeddings", "get_output_embeddings"):
        rows, again = (getattr(loaded.model, embedding)().weight for loaded in (first, second))
        assert torch.equal(rows, again)
        assert rows.dtype == first.compute_dtype
        mean = rows[:-2].double().mean(0).to(rows.dtype)
        torch.testing.assert_close(rows[-2:], mean.expand(2, -1), atol=1e-7, rtol=0.01)


def test_growing_the_embedding_makes_no_float32_copy(pico: Pico) -> None:
    source = pico("llama", num_hidden_layers=1, vocab_size=40_000, hidden_size=128, num_attention_heads=2)
    loaded = load(source, bnb_4bit_compute_dtype="bfloat16")
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(40_001 - len(tokenizer))])
    old_bytes = model.get_input_embeddings().weight.nbytes
    with LiveBytes() as live:
        assert add_new_tokens(model, tokenizer, ["<0>"])[-1] == 40_000
    assert live.peak < 3 * old_bytes + (1 << 20)  # one old and two new ones


# --- positions --------------------------------------------------------------------------------------------------------


def test_rope_scaling_changes_the_positions(pico_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = load(pico_llama).model
    with caplog.at_level("DEBUG", logger="qlora_train"):
        scaled = load(pico_llama, model={"rope_scaling": {"rope_type": "linear", "factor": 4.0}}).model
    assert "positions: 256 -> 1024" in caplog.text
    assert scaled.config.max_position_embeddings == 1024
    torch.testing.assert_close(scaled.model.rotary_emb.inv_freq * 4, plain.model.rotary_emb.inv_freq)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert not torch.allclose(scaled(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_rope_scaling_replaces_the_checkpoints(pico: Pico) -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = pico("llama", rope_parameters=llama3)
    model = load(folder, model={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}).model
    wanted = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    assert model.config.rope_parameters == wanted
    fresh = pico("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    expected = load(fresh, model={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}).model
    assert torch.equal(model.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq)
    assert not torch.equal(model.model.rotary_emb.inv_freq, load(folder).model.model.rotary_emb.inv_freq)


def test_rope_scaling_with_different_layers_is_refused(pico: Pico) -> None:
    with pytest.raises(ConfigError, match="scales positions differently by layer"):
        load(pico("gemma3_text"), model={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_model_is_never_completely_in_16_bits(model_type: str, pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pico(model_type, num_hidden_layers=12, hidden_size=256, intermediate_size=512, moe_intermediate_size=256)
    live, most, total = 0, 0, 0
    count = MemoryTrimmer.count

    def watched(self: MemoryTrimmer, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal live, most, total
        size = tensor.nbytes
        live, total = live + size, total + size
        most = max(most, live)

        def gone() -> None:
            nonlocal live
            live -= size

        weakref.finalize(tensor, gone)
        return count(self, tensor)

    monkeypatch.setattr(MemoryTrimmer, "count", watched)
    load_model(ModelSection(model_name_or_path=str(base)), QuantizationSection())
    assert total > 5e6
    assert most < total / 10
