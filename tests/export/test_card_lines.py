"""The lines of every kind of card, executed in a fresh process, give the run's model: its logits and its answers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_train.adapters import AdaptedModel
from qlora_train.evaluation.generation import generate_answers
from qlora_train.inference.run_models import merged_model
from tests.support.card_lines import IDS, MAX_NEW_TOKENS, QUESTION, executed, written_adapter
from tests.support.gguf_files import write_gguf
from tests.support.pico import build_pico, build_tokenizer
from tests.support.remote_code import TRUSTED
from tests.support.runs import adapted_model, make_config, train_run, write_rows

Pico = Callable[..., Path]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
TOLERANCE = 2e-3


def stored_in_4bit(folder: Path) -> Path:
    """Save a base in 4 bits, as those who publish such bases do: with a compute dtype of their own."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    plain = build_pico(folder / "plain")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization).save_pretrained(folder / "stored")
    build_tokenizer().save_pretrained(folder / "stored")
    return folder / "stored"


def with_own_code(folder: Path) -> Path:
    """Build a base whose model is Python code beside it."""
    base = build_pico(folder / "own")
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own_llama"\n\n\n'
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": auto_map}
    (base / "config.json").write_text(json.dumps(config))
    return base


def gguf_file(folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(build_pico(folder / "plain"), folder / "pico.gguf")


def rope(**scaling: Any) -> str:
    return f"model.rope_scaling={json.dumps(scaling)}"


LINES_OF_PACKAGE = "from qlora_train.models import load_model"
KINDS: dict[str, tuple[Callable[[Path], Path] | dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "plain": ({}, (), ("BitsAndBytesConfig", "support_avx512bf16_for_cpu")),
    "fp4 without double quantization": (
        {}, ("quantization.bnb_4bit_quant_type=fp4", "quantization.bnb_4bit_use_double_quant=false"), ('"fp4"', "=False")
    ),
    "16 bits": ({}, ("quantization.load_in_4bit=false",), ()),
    "DoRA and rsLoRA": ({}, ("lora.use_dora=true", "lora.use_rslora=true"), ()),
    "modules in full, biases": (
        {"attention_bias": True}, ("lora.modules_to_save=[lm_head]", "lora.bias=lora_only"), ()
    ),
    "new tokens": ({}, ("model.new_tokens=[<a>,<b>]",), ("resize_token_embeddings",)),
    "new tokens on a tied base": ({"tie_word_embeddings": True}, ("model.new_tokens=[<a>]",), ()),
    "linear positions": ({}, (rope(rope_type="linear", factor=4.0),), ("rope_parameters = {",)),
    "yarn": ({}, (rope(rope_type="yarn", factor=2.0),), ("max_position_embeddings = 512",)),
    "dynamic positions": (
        {"max_position_embeddings": 64}, (rope(rope_type="dynamic", factor=4.0),), ("max_position_embeddings = 64",)
    ),
    "code of its own": (with_own_code, TRUSTED, ("trust_remote_code=True",)),
    "stored in 4 bits": (stored_in_4bit, (), ('config.quantization_config["bnb_4bit_compute_dtype"] = "float32"',)),
    "experts": ({"model_type": "qwen3_moe", **EXPERTS}, (), (LINES_OF_PACKAGE, "held the experts in 4 bits")),
    "a class of linear layers": ({"model_type": "falcon"}, (), (LINES_OF_PACKAGE, "FalconLinear")),
    "soft-capped attention": ({"model_type": "gemma2"}, (), ('attn_implementation="eager"',)),
    "a layer kept in 16 bits": (
        {"model_type": "mamba"}, ("quantization.min_quantized_share=0.5",), ("llm_int8_skip_modules", '"dt_proj"')
    ),
    "odd rows": ({"hidden_size": 96, "head_dim": 16}, (), (LINES_OF_PACKAGE, "not a multiple of the block size")),
    "a GGUF file": (gguf_file, (), (LINES_OF_PACKAGE,)),
}  # fmt: skip
"""Base (a builder, or arguments of a pico model), settings of the run, and what has to be in the card."""


@torch.no_grad()
def outcome_of(adapted: AdaptedModel, system: str = "") -> tuple[torch.Tensor, str]:
    """Return what the run's own model does."""
    model = adapted.model.eval()
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": QUESTION}]
    [answer] = generate_answers(model, adapted.loaded.tokenizer, [turns], max_new_tokens=MAX_NEW_TOKENS, batch_size=1)
    return model(input_ids=IDS).logits.float(), answer


def assert_same(found: tuple[torch.Tensor, str], expected: tuple[torch.Tensor, str]) -> None:
    assert (found[0] - expected[0]).abs().max() <= TOLERANCE
    assert found[1] == expected[1]


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_card_loads_the_model_that_was_trained(kind: str, pico: Pico, tmp_path: Path) -> None:
    make, overrides, needed = KINDS[kind]
    base = pico(**make) if isinstance(make, dict) else make(tmp_path / "base")
    config = make_config(tmp_path, base, *overrides)
    adapted = adapted_model(tmp_path, base, *overrides)
    adapter = written_adapter(tmp_path / "run", adapted, config)
    card = (adapter / "README.md").read_text()
    assert [part for part in (*needed, "base in 16 bits") if part not in card] == (
        ["base in 16 bits"] if kind == "16 bits" else []
    )
    assert str(tmp_path) not in card
    named = adapted.loaded.source.name
    found = executed(adapter, {named: base, "PATH-OR-ID-OF-THIS-ADAPTER": adapter})
    assert_same(found, outcome_of(adapted))


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("plain", r"    quantization_config=BitsAndBytesConfig\(.*?\n    \),\n"),
        ("linear positions", r"    config=config,\n"),
        ("dynamic positions", r"    config=config,\n"),
        ("soft-capped attention", r'    attn_implementation="eager",\n'),
    ],
)
def test_without_its_lines_the_card_would_load_another_model(kind: str, lines: str, pico: Pico, tmp_path: Path) -> None:
    make, overrides, _ = KINDS[kind]
    base = pico(**make)  # type: ignore[arg-type]
    adapted = adapted_model(tmp_path, base, *overrides)
    if kind == "soft-capped attention":
        for module in adapted.model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.data *= 30  # scores that the cap bends
    adapter = written_adapter(tmp_path / "run", adapted, make_config(tmp_path, base, *overrides))
    card = adapter / "README.md"
    text, changed = re.subn(lines, "", card.read_text(), flags=re.DOTALL)
    assert changed == 1
    card.write_text(text)
    logits, _ = executed(adapter, {adapted.loaded.source.name: base, "PATH-OR-ID-OF-THIS-ADAPTER": adapter})
    assert (logits - outcome_of(adapted)[0]).abs().max() > 5 * TOLERANCE


def test_answers_end_and_begin_as_in_training(pico: Pico, tmp_path: Path) -> None:
    """Penalties of the base are off, its end tokens are joined by the template's, and the system prompt is there."""
    base = Path(shutil.copytree(pico(), tmp_path / "base"))
    generation = json.loads((base / "generation_config.json").read_text())
    generation |= {"eos_token_id": 3, "repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0}
    (base / "generation_config.json").write_text(json.dumps(generation))
    system = 'Answer with "the" sum.\nNothing else.'
    adapted = adapted_model(tmp_path, base)
    adapter = written_adapter(tmp_path / "run", adapted, make_config(tmp_path, base), system=system)
    card = (adapter / "README.md").read_text()
    assert 'eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])' in card
    assert "repetition_penalty=1.0" in card
    found = executed(adapter, {"base": base, "PATH-OR-ID-OF-THIS-ADAPTER": adapter})
    assert_same(found, outcome_of(adapted, system))
    assert found[1] != outcome_of(adapted)[1], "the system prompt counts"


MERGED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "tied": ({"tie_word_embeddings": True}, ()),
    "dynamic positions": ({"max_position_embeddings": 64}, (rope(rope_type="dynamic", factor=4.0),)),
    "soft-capped attention": ({"model_type": "gemma2"}, ()),
}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_card_loads_the_model_that_eval_measures(kind: str, pico: Pico, tmp_path: Path) -> None:
    make, overrides = MERGED[kind]
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    system = {"role": "system", "content": "Add."}
    lines = [json.dumps({"messages": [system, *row["messages"]]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    merging = ("train.max_steps=1", "export.merge=true", "export.merge_base=dequantized")
    run = train_run(tmp_path, pico(**make), *overrides, *merging)
    found = executed(run.merged, {"PATH-OR-ID-OF-THIS-MODEL": run.merged})
    model, tokenizer = merged_model(run, trust_remote_code=False)
    turns = [system, {"role": "user", "content": QUESTION}]
    [answer] = generate_answers(model, tokenizer, [turns], max_new_tokens=MAX_NEW_TOKENS, batch_size=1)
    with torch.no_grad():
        assert_same(found, (model.eval()(input_ids=IDS).logits.float(), answer))
