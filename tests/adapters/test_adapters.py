"""The adapter: what trains and how much of it, where it starts from, and that it comes back as it was saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_train.adapters import AdaptedModel, attach_adapter, load_trained, trainable_state
from qlora_train.adapters.eva import eva_batches
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.merging.merge_finished_run import merge
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.models import LoadedModel, load_model
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training import QloraTrainer
from qlora_train.utils.errors import ConfigError
from tests.support.runs import adapter_bytes, losses, make_config, train_run

Pico = Callable[..., Path]
IDS = torch.arange(40).reshape(2, 20) * 7 + 4
HIDDEN, INNER, VOCABULARY, LAYERS = 64, 128, 320, 2
LLAMA_LINEARS = {  # name: (inputs, outputs) in the pico Llama, whose keys and values have half of its 4 heads
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, HIDDEN // 2), "v_proj": (HIDDEN, HIDDEN // 2),
    "o_proj": (HIDDEN, HIDDEN), "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN),
}  # fmt: skip
LORA_OF_LLAMA = LAYERS * sum(8 * (inputs + outputs) for inputs, outputs in LLAMA_LINEARS.values())


def load(config: RunConfig) -> LoadedModel:
    return load_model(config.model, config.quantization)


def prepare_tokenizer_and_data(config: RunConfig) -> PreparedData:
    return prepare(config, RunFolder(Path(str(config.run.output_dir))))[1]


def attach(folder: Path, base: Path, *overrides: str) -> AdaptedModel:
    config = make_config(folder, base, *overrides)
    return attach_adapter(load(config), config.lora, seed=config.run.seed)


def adapted_layers(adapted: AdaptedModel) -> set[str]:
    """Full names, in the base, of the layers that carry LoRA."""
    modules = adapted.model.get_base_model().named_modules()
    return {name for name, module in modules if isinstance(module, LoraLayer)}


def randomise(model: PeftModel, std: float = 0.05) -> None:
    """Give everything that trains a value far from its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * std)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), LORA_OF_LLAMA),
        (("lora.r=3",), LORA_OF_LLAMA * 3 // 8),
        (("lora.use_dora=true",), LORA_OF_LLAMA + LAYERS * sum(outputs for _, outputs in LLAMA_LINEARS.values())),
        (("lora.target_modules=[q_proj, down_proj]",), LAYERS * 8 * (2 * HIDDEN + HIDDEN + INNER)),
        (("lora.target_modules='.*layers\\.1\\.mlp\\..*'",), 3 * 8 * (HIDDEN + INNER)),
        (("lora.modules_to_save=[lm_head]",), LORA_OF_LLAMA + VOCABULARY * HIDDEN),
        (("lora.modules_to_save=[norm]",), LORA_OF_LLAMA + HIDDEN),
        (("model.new_tokens=['<a>', '<b>', '<c>']",), LORA_OF_LLAMA + 2 * 3 * HIDDEN),  # embedding and head
    ],
)  # fmt: skip
def test_trainable_count_equals_hand_arithmetic(
    overrides: tuple[str, ...], expected: int, pico_llama: Path, tmp_path: Path
) -> None:
    adapted = attach(tmp_path, pico_llama, *overrides)
    assert adapted.num_trainable == expected
    assert sum(parameter.numel() for parameter in trainable_state(adapted.model).values()) == expected


def test_total_counts_weights_and_not_packed_elements(pico_llama: Path, tmp_path: Path) -> None:
    base = 2 * VOCABULARY * HIDDEN + 5 * HIDDEN
    base += LAYERS * sum(inputs * outputs for inputs, outputs in LLAMA_LINEARS.values())
    assert attach(tmp_path, pico_llama).num_total == base + LORA_OF_LLAMA


@pytest.mark.parametrize(("bias", "expected"), [("all", 1), ("lora_only", 0)])
def test_lora_bias_trains_the_right_biases(bias: str, expected: int, pico: Pico, tmp_path: Path) -> None:
    plain, with_bias = (attach(tmp_path, pico("phi"), f"lora.bias={value}") for value in ("none", bias))
    model = AutoModelForCausalLM.from_pretrained(pico("phi"))
    biases = {name: p.numel() for name, p in model.named_parameters() if name.endswith("bias")}
    of_linears = sum(count for name, count in biases.items() if "norm" not in name and "lm_head" not in name)
    others = sum(biases.values()) - of_linears
    assert others > 0
    assert with_bias.num_trainable - plain.num_trainable == of_linears + expected * others


def test_new_tokens_of_a_tied_model_train_one_set_of_rows(pico: Pico, tmp_path: Path) -> None:
    adapted = attach(tmp_path, pico("llama", tie_word_embeddings=True), "model.new_tokens=['<a>', '<b>', '<c>']")
    assert adapted.num_trainable == LORA_OF_LLAMA + 3 * HIDDEN


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt_neox", {}), ("phi", {}), ("cohere", {})],
)
def test_all_linear_is_every_linear_except_the_head(
    family: str, settings: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    folder = pico(family, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    head = plain.get_output_embeddings()
    expected = {
        name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    assert adapted_layers(attach(tmp_path, folder)) == expected


def test_regular_expression_matches_linear_layers_alone(pico_llama: Path, tmp_path: Path) -> None:
    assert adapted_layers(attach(tmp_path, pico_llama, "lora.target_modules='.*'")) == adapted_layers(
        attach(tmp_path, pico_llama)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[q_proj, wqkv]", r"no linear layer is called wqkv; this model has down_proj, .*v_proj"),
        ("lora.target_modules=[lm_head]", "no linear layer is called lm_head"),
        (
            "lora.target_modules='.*attention.*'",
            r"matches no linear layer; a full name is, for example, 'model\.layers",
        ),
        ("lora.modules_to_save=[score]", "the model has no module 'score'"),
        ("lora.modules_to_save=[mlp]", "'mlp' is stored in 4 bits"),
    ],
)
def test_names_that_cannot_be_trained_are_refused(
    override: str, message: str, pico_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        attach(tmp_path, pico_llama, override)
    assert "\n" not in str(caught.value)


def test_saving_one_of_two_tied_modules_is_refused(pico: Pico, tmp_path: Path) -> None:
    base = pico("llama", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="is tied to the output head") as caught:
        attach(tmp_path, base, "model.new_tokens=['<a>']", "lora.modules_to_save=[embed_tokens]")
    assert "\n" not in str(caught.value)


def test_scaling_is_alpha_over_rank_or_its_square_root(pico_llama: Path, tmp_path: Path) -> None:
    for override, expected in (("false", 12 / 16), ("true", 12 / 4)):
        adapted = attach(tmp_path, pico_llama, "lora.r=16", "lora.lora_alpha=12", f"lora.use_rslora={override}")
        scales = {m.scaling["default"] for m in adapted.model.modules() if isinstance(m, LoraLayer)}
        assert scales == {expected}


# --- float32 ----------------------------------------------------------------------------------------------------------

TRAINED_IN_FULL = {
    "head": ("llama", "lora.modules_to_save=[lm_head]"),
    "embedding": ("llama", "lora.modules_to_save=[embed_tokens]"),
    "norm": ("phi", "lora.modules_to_save=[final_layernorm]"),
    "all biases": ("phi", "lora.bias=all"),
    "all biases, tied": ("phi tied", "lora.bias=all"),
    "biases of adapted layers": ("qwen2", "lora.bias=lora_only"),
    "magnitudes": ("llama", "lora.use_dora=true"),
    "tokens": ("llama", "model.new_tokens=['<a>', '<b>']"),
    "head and tokens": ("llama", "lora.modules_to_save=[lm_head]", "model.new_tokens=['<a>', '<b>']"),
}


def base_of(case: str, pico: Pico) -> tuple[Path, tuple[str, ...]]:
    family, *overrides = TRAINED_IN_FULL[case]
    name, _, tied = family.partition(" ")
    return pico(name, tie_word_embeddings=True) if tied else pico(name), tuple(overrides)


@pytest.mark.parametrize("case", TRAINED_IN_FULL)
def test_trained_parameters_are_float32_and_reload_bitwise(case: str, pico: Pico, tmp_path: Path) -> None:
    base, overrides = base_of(case, pico)
    config = make_config(tmp_path, base, *overrides, "quantization.bnb_4bit_compute_dtype=bfloat16")
    adapted = attach_adapter(load(config), config.lora, seed=1)
    randomise(adapted.model)
    before = {name: parameter.detach().clone() for name, parameter in trainable_state(adapted.model).items()}
    wanted = logits(adapted.model)
    assert wanted.dtype == torch.bfloat16
    after = trainable_state(adapted.model)
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], before[name]) for name in before), "a forward leaves the weights alone"

    adapted.model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    again = load_trained(load(config), tmp_path / "adapter")
    values = dict(again.named_parameters())
    assert all(torch.equal(values[name], before[name]) for name in before)
    assert torch.equal(logits(again), wanted)
    assert trainable_state(again) == {}


@pytest.mark.parametrize("case", ["embedding", "norm", "all biases, tied", "magnitudes", "head and tokens"])
def test_all_trained_parameters_are_resumed_evaluated_and_merged(case: str, pico: Pico, tmp_path: Path) -> None:
    base, overrides = base_of(case, pico)
    settings = (
        "quantization.bnb_4bit_compute_dtype=bfloat16", "train.max_steps=2", "train.save_steps=1", "train.eval_steps=1",
        "export.merge_base=dequantized", *overrides,
    )  # fmt: skip
    run = train_run(tmp_path, base, *settings)
    assert {str(t.dtype) for t in load_file(run.adapter / "adapter_model.safetensors").values()} == {"torch.float32"}
    finished = adapter_bytes(run)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(2))
    assert adapter_bytes(train_run(tmp_path, base, *settings)) == finished
    merge(run.path)
    results = evaluate(run.path, EvalSettings(num_shots=1, max_new_tokens=2))
    untrained = next(result["loss"] for name, result in results.items() if name.startswith("base"))
    assert results["adapter"]["loss"] < untrained
    assert results["merged"]["loss"] == pytest.approx(results["adapter"]["loss"], abs=0.05)


def test_adapted_model_with_a_trained_head_works_outside_the_trainer(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, pico_llama, "lora.modules_to_save=[lm_head]", "quantization.bnb_4bit_compute_dtype=bfloat16"
    )
    data = prepare_tokenizer_and_data(config)
    adapted = attach_adapter(load(config), config.lora, seed=1)
    assert held_out_loss(adapted.model, data.eval, batch_size=2, pad_token_id=0).loss > 0
    assert adapted.model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False).shape == (2, 22)


# --- where it starts --------------------------------------------------------------------------------------------------


def first_matrices(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in adapted.model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_new_adapter_is_a_no_op_and_deterministic_by_seed(init: str, pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, f"lora.init_lora_weights={init}", "lora.r=16")
    plain = load(config)
    wanted = logits(plain.model)
    first = attach_adapter(plain, config.lora, seed=1)
    assert torch.equal(logits(first.model), wanted)
    torch.manual_seed(99)
    again, other = (attach_adapter(load(config), config.lora, seed=seed) for seed in (1, 2))
    matrices = first_matrices(first)
    assert all(torch.equal(tensor, matrices[name]) for name, tensor in first_matrices(again).items())
    assert not any(torch.equal(tensor, matrices[name]) for name, tensor in first_matrices(other).items())


def test_gaussian_init_has_std_one_over_rank(pico_llama: Path, tmp_path: Path) -> None:
    adapted = attach(tmp_path, pico_llama, "lora.init_lora_weights=gaussian", "lora.r=16")
    values = torch.cat([tensor.flatten() for tensor in first_matrices(adapted).values()])
    assert values.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert values.abs().max() > 3 / 16, "a uniform start of that spread would end at 1.73 / 16"


@pytest.fixture
def eva(pico_llama: Path, tmp_path: Path) -> tuple[RunConfig, AdaptedModel, PreparedData]:
    config = make_config(
        tmp_path, pico_llama, "lora.init_lora_weights=eva", "quantization.bnb_4bit_compute_dtype=float32"
    )
    loaded = load(config)
    data = prepare_tokenizer_and_data(config)
    return config, attach_adapter(loaded, config.lora, seed=1, data=data), data


def test_eva_init_is_orthonormal_principal_directions(
    eva: tuple[RunConfig, AdaptedModel, PreparedData],
) -> None:
    config, adapted, data = eva
    batches = eva_batches(adapted.loaded, data, config.lora.r, seed=1)
    default = first_matrices(attach_adapter(load(config), config.lora, seed=1))
    layer = adapted.model.get_base_model().model.layers[1].mlp.down_proj
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            adapted.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    seen = torch.cat([x[batch["labels"] != -100] for x, batch in zip(inputs, batches, strict=True)])
    variances = torch.linalg.eigvalsh(torch.cov(seen.T)).flip(0)
    for name, matrix in first_matrices(adapted).items():
        assert not torch.allclose(matrix, default[name], atol=1e-2)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-3, rtol=0)
    explained = torch.cov((seen @ layer.lora_A["default"].weight.T).T).diagonal().sum()
    assert explained > 0.9 * variances[:8].sum(), "no 8 directions hold more variance than the first 8 eigenvectors"


def test_eva_is_deterministic_and_leaves_the_base_unchanged(
    eva: tuple[RunConfig, AdaptedModel, PreparedData],
) -> None:
    config, adapted, data = eva
    torch.manual_seed(77)
    plain = load(config)
    wanted = logits(plain.model)
    again = attach_adapter(plain, config.lora, seed=1, data=data)
    assert all(torch.equal(a, first_matrices(adapted)[name]) for name, a in first_matrices(again).items())
    assert torch.equal(logits(again.model), wanted)
    assert adapted.num_trainable == LORA_OF_LLAMA


def test_eva_run_resumes_bitwise_and_merges(pico: Pico, tmp_path: Path) -> None:
    settings = (
        "lora.init_lora_weights=eva", "model.new_tokens=['<a>']", "train.max_steps=2", "train.save_steps=1",
    )  # fmt: skip
    base = pico("llama", tie_word_embeddings=True)
    run = train_run(tmp_path, base, *settings)
    default = train_run(tmp_path, base, *settings, "lora.init_lora_weights=default", name="default")
    assert losses(run)[0] == losses(default)[0], "B is zero in both"
    finished = adapter_bytes(run)
    assert finished != adapter_bytes(default)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(2))
    assert adapter_bytes(train_run(tmp_path, base, *settings)) == finished
    merge(run.path)


def test_eva_with_too_high_a_rank_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eva with lora.r 64 needs at least 128 inputs .* found 64 and"):
        train_run(tmp_path, pico_llama, "lora.init_lora_weights=eva", "lora.r=64")


def test_eva_with_a_warm_start_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no effect with lora\.adapter_path"):
        make_config(tmp_path, pico_llama, "lora.init_lora_weights=eva", f"lora.adapter_path={tmp_path}")


# --- warm start -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(pico_llama: Path, tmp_path: Path) -> Path:
    """An adapter with a trained head and values that bfloat16 cannot hold."""
    adapted = attach(tmp_path / "first", pico_llama, "lora.modules_to_save=[lm_head]")
    randomise(adapted.model)
    adapted.model.save_pretrained(str(tmp_path / "stored"), save_embedding_layers=False)
    return tmp_path / "stored"


def test_warm_start_is_bitwise_after_trainer_init(stored: Path, pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, pico_llama, "lora.modules_to_save=[lm_head]", f"lora.adapter_path={stored}",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
    )  # fmt: skip
    data = prepare_tokenizer_and_data(config)
    adapted = attach_adapter(load(config), config.lora, seed=1)
    trainer = QloraTrainer(adapted, data, config, RunFolder(tmp_path), [])
    state = trainable_state(trainer.model)
    trainer.model.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    first, again = (load_file(path / "adapter_model.safetensors") for path in (stored, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert len(state) == len(first)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        assert not torch.equal(tensor, tensor.bfloat16().float()), "the values tell a rounding"


def test_warm_start_uses_the_configured_dropout(stored: Path, pico_llama: Path, tmp_path: Path) -> None:
    adapted = attach(
        tmp_path, pico_llama, "lora.modules_to_save=[lm_head]", f"lora.adapter_path={stored}", "lora.lora_dropout=0.25"
    )
    rates = {m.lora_dropout["default"].p for m in adapted.model.modules() if isinstance(m, LoraLayer)}
    assert rates == {0.25}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=16", r"lora\.r: 16, but the adapter in .*stored has 8; set it to that"),
        ("lora.lora_alpha=5", r"lora\.lora_alpha: 5\.0, but"),
        ("lora.modules_to_save=[]", r"lora\.modules_to_save: the adapter in .* has \[lm_head\]"),
        ("lora.target_modules=[q_proj]", r"does not fit the base model: \d+ tensors differ"),
        ("model.new_tokens=['<a>']", "does not fit the base model"),
    ],
)
def test_warm_start_from_an_adapter_of_another_kind_is_refused(
    override: str, message: str, stored: Path, pico_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        attach(tmp_path, pico_llama, "lora.modules_to_save=[lm_head]", f"lora.adapter_path={stored}", override)
    assert "\n" not in str(caught.value)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def without_a_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if ".lora_B" in name))
    save_file(tensors, file)


def prefix_tuning(folder: Path) -> None:
    file = folder / "adapter_config.json"
    settings = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "holds no readable adapter"),
        (cut, "holds no readable adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "holds no readable adapter"),
        (without_a_tensor, "does not fit the base model: 1 tensors differ"),
        (prefix_tuning, r"peft_type: Input should be 'LORA' \(found 'PREFIX_TUNING'\)"),
    ],
)
def test_warm_start_from_a_damaged_adapter_is_refused(
    damage: Callable[[Path], None], message: str, stored: Path, pico_llama: Path, tmp_path: Path
) -> None:
    damage(stored)
    with pytest.raises(ConfigError, match=message) as caught:
        attach(tmp_path, pico_llama, "lora.modules_to_save=[lm_head]", f"lora.adapter_path={stored}")
    assert all("\n" not in problem for problem in caught.value.problems)


# --- new tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_saved_reloaded_and_merged(tied: bool, pico: Pico, tmp_path: Path) -> None:
    rows = tmp_path / "new.jsonl"
    turns = [{"role": "user", "content": "one <a> two"}, {"role": "assistant", "content": "<b> <a> three"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    base = pico("llama", tie_word_embeddings=tied)
    overrides = (
        "model.new_tokens=['<a>', '<b>']", f"data.train={rows}", f"data.eval={rows}", "train.max_steps=3",
        "quantization.bnb_4bit_compute_dtype=float32", "export.merge_base=dequantized",
    )  # fmt: skip
    config = make_config(tmp_path, base, *overrides)
    fresh = attach_adapter(load(config), config.lora, seed=7).model
    start = {name: parameter.detach().clone() for name, parameter in trainable_state(fresh).items()}
    run: RunFolder = train_run(tmp_path, base, *overrides)
    loaded = load(config)
    adapted = load_trained(loaded, run.adapter)
    trained = dict(adapted.named_parameters())
    deltas = [name for name in start if "trainable_tokens_delta" in name]
    assert len(deltas) == (1 if tied else 2)
    assert all(((trained[name] - start[name]).abs().amax(dim=1) > 0).all() for name in deltas), "every row has moved"

    merge(run.path)
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    new = torch.tensor([[5, *loaded.new_token_ids, 9, 11, *loaded.new_token_ids, 12]])
    assert len(loaded.tokenizer("<a><b>")["input_ids"]) == 2
    with torch.no_grad():
        wanted, found = adapted(input_ids=new).logits, merged.eval()(input_ids=new).logits
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=0.02, atol=0.02)
    assert merged.config.tie_word_embeddings == tied
