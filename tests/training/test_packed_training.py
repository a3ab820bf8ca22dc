"""Packed documents have the losses and gradients of separate rows; packed runs resume bitwise."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.architectures import ARCHITECTURES, check_packing
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import FlatteningCollator
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.kernels.packed import attention as document_attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.models import load_model
from qlora_train.objectives.label_losses import label_losses
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training import QloraTrainer
from qlora_train.training.batch_source import pack_order
from qlora_train.training.parity.document_isolation import isolate_documents
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import ConfigError, TrainingError
from tests.support.packing import PACKABLE, WINDOWS, losses_and_gradients
from tests.support.runs import adapter_bytes, losses, make_config, train_run
from tests.support.stores import example

EXACT = ("quantization.bnb_4bit_compute_dtype=float32",)
PACKED = (*EXACT, "data.packing=true")
LENGTHS = (50, 40, 30, 27, 20, 9, 2, 1)


def documents(*, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 300, (length,), generator=generator) for length in LENGTHS]


def labels_of(document: torch.Tensor) -> torch.Tensor:
    labels = document.clone()
    labels[0] = IGNORE_INDEX
    return labels


def packed_batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    examples = [example(row.tolist(), [0, *[1] * (len(row) - 1)]) for row in rows]
    batch = FlatteningCollator()(list(enumerate(examples)))
    del batch["row"]
    return batch


def plainly(model: Any, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the whole logits of each document, run by itself, as the definition has it."""
    model.zero_grad()
    found = []
    for row in rows:
        logits = model(input_ids=row[None]).logits[0].float()
        found.append(functional.cross_entropy(logits[:-1], row[1:], reduction="none"))
    torch.cat(found).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found).detach(), torch.cat(gradients)


def adapted_pico(base: Path, folder: Path, *overrides: str) -> tuple[AdaptedModel, RunConfig]:
    """Return a pico model in 4 bits with an adapter whose every matrix matters."""
    config = make_config(folder, base, *PACKED, *overrides)
    adapted = attach_adapter(load_model(config.model, config.quantization), config.lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(adapted.model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted, config


def build(config: RunConfig) -> tuple[AdaptedModel, PreparedData, RunFolder]:
    folder = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, folder)
    loaded = load_model(config.model, config.quantization, source=source)
    return attach_adapter(loaded, config.lora, seed=config.run.seed), data, folder


ROWS = [example(row.tolist(), [0, *[1] * (len(row) - 1)]) for row in documents(seed=5)]


@pytest.mark.parametrize(
    ("model_type", "attention"), [*((name, "auto") for name in PACKABLE), *((name, "eager") for name in WINDOWS)]
)
def test_losses_and_lora_gradients_of_a_pack_are_those_of_its_documents(
    model_type: str, attention: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    adapted, config = adapted_pico(
        pico(model_type, **WINDOWS.get(model_type, {})), tmp_path, f"model.attn_implementation={attention}"
    )
    model = adapted.model.eval()
    wanted = plainly(model, documents())
    isolate_documents(adapted, config, ROWS)
    assert (model.config._attn_implementation == PACKED_ATTENTION) == (attention == "auto")
    found = losses_and_gradients(model, [packed_batch(documents())])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert wanted[1].abs().max() > 1e-3
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


def test_sliding_windows_are_shorter_than_the_documents(pico: Callable[..., Path]) -> None:
    for model_type, window in WINDOWS.items():
        models = [
            AutoModelForCausalLM.from_pretrained(pico(model_type, **settings), dtype=torch.float32).eval()
            for settings in (window, {**window, "sliding_window": 255})
        ]
        models[1].load_state_dict(models[0].state_dict())
        with torch.no_grad():
            short, long = (model(input_ids=documents()[1][None]).logits for model in models)
        assert (short - long).abs().max() > 1e-2, model_type


def test_checkpointed_layers_isolate_documents_too(pico: Callable[..., Path], tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico("gemma3_text", **WINDOWS["gemma3_text"]), tmp_path)
    wanted = plainly(adapted.model.eval(), documents())
    isolate_documents(adapted, config, ROWS)
    adapted.model.enable_input_require_grads()
    adapted.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = losses_and_gradients(adapted.model.train(), [packed_batch(documents())])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


def test_the_split_into_packs_changes_nothing(pico_llama: Path, tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico_llama, tmp_path)
    isolate_documents(adapted, config, ROWS)
    rows = documents()
    together = losses_and_gradients(adapted.model.eval(), [packed_batch(rows)])
    apart = losses_and_gradients(
        adapted.model, [packed_batch(rows[:2]), packed_batch(rows[2:3]), packed_batch(rows[3:])]
    )
    torch.testing.assert_close(together[0], apart[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-4, atol=1e-5 * float(apart[1].abs().max()))


def documents_in_the_first_layer(adapted: AdaptedModel) -> document_attention.Documents:
    seen = []
    attention = next(module for name, module in adapted.model.named_modules() if name.endswith("self_attn"))
    attention.register_forward_pre_hook(lambda _m, _a, named: seen.append(named["attention_mask"]), with_kwargs=True)
    label_losses(adapted.model, **packed_batch(documents()))
    (found,) = seen
    return found


def test_no_mask_covers_a_whole_pack(pico: Callable[..., Path], tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico("gemma3_text", **WINDOWS["gemma3_text"]), tmp_path)
    isolate_documents(adapted, config, ROWS)
    batches = documents_in_the_first_layer(adapted).batches
    shapes = [None if batch.mask is None else tuple(batch.mask.shape) for batch in batches]
    assert shapes == [(1, 1, length, length) if length > 8 else None for length in sorted(LENGTHS, reverse=True)]


def test_documents_of_similar_length_share_an_attention_call(pico_llama: Path, tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico_llama, tmp_path)
    isolate_documents(adapted, config, ROWS)
    found = documents_in_the_first_layer(adapted)
    sizes = [(batch.num_documents, batch.length) for batch in found.batches]
    assert sizes == [(2, 56), (2, 32), (1, 24), (1, 16), (1, 8), (1, 8)], "multiples of 8"
    assert len(found.index.tokens) == sum(documents * length for documents, length in sizes)
    assert found.index.tokens[found.index.own].tolist() == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_evaluation_does_not_depend_on_packing(model_type: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico(model_type, **WINDOWS.get(model_type, {})), tmp_path)
    before = held_out_loss(adapted.model, ROWS[1:2] + ROWS[3:], batch_size=3, pad_token_id=0)
    isolate_documents(adapted, config, ROWS)
    after = held_out_loss(adapted.model, ROWS[1:2] + ROWS[3:], batch_size=3, pad_token_id=0)
    assert after == before


def with_table_row(adapted: AdaptedModel, **changes: Any) -> AdaptedModel:
    architecture = replace(adapted.loaded.architecture, **changes)
    return replace(adapted, loaded=replace(adapted.loaded, architecture=architecture))


def test_falcon_is_refused_before_it_loads() -> None:
    wrong = r"data\.packing: true, but .* attend to each other in a falcon model: .*position ids"
    with pytest.raises(ConfigError, match=wrong):
        check_packing(ARCHITECTURES["falcon"])


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolation_check_detects_a_leak_that_the_table_lacks(
    alibi: bool, attention: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    adapted, config = adapted_pico(pico("falcon", alibi=alibi), tmp_path, f"model.attn_implementation={attention}")
    with pytest.raises(ConfigError, match=r"does not isolate the documents of a pack: a document changes the loss"):
        isolate_documents(with_table_row(adapted, packing_error=""), config, ROWS)


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_model_without_position_ids_is_refused(model_type: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    base = pico(model_type, n_head=4, n_heads=4, n_layer=2, n_layers=2, d_model=64)
    adapted, config = adapted_pico(base, tmp_path, "model.attn_implementation=eager")
    with pytest.raises(ConfigError, match=rf"this {model_type} model does not isolate .*: it takes no position_ids"):
        isolate_documents(with_table_row(adapted, packing_error=""), config, ROWS)


def test_isolation_check_detects_a_wrong_attention_function(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, config = adapted_pico(pico_llama, tmp_path)
    right = document_attention.packed_attention
    monkeypatch.setattr(
        document_attention,
        "packed_attention",
        lambda *arguments, **options: right(*arguments, **{**options, "scaling": 1.0}),
    )
    with pytest.raises(ConfigError, match="the loss of a packed document differs from its own by"):
        isolate_documents(adapted, config, ROWS)


def test_isolation_check_passes_every_packable_family_in_bfloat16(pico: Callable[..., Path], tmp_path: Path) -> None:
    for model_type in PACKABLE:
        adapted, config = adapted_pico(pico(model_type), tmp_path, "quantization.bnb_4bit_compute_dtype=bfloat16")
        state = torch.get_rng_state()
        adapted.model.train()
        isolate_documents(adapted, config, ROWS)
        assert torch.equal(torch.get_rng_state(), state)
        assert adapted.model.training


def test_unknown_architecture_is_packed_if_the_check_passes(pico: Callable[..., Path], tmp_path: Path) -> None:
    run = train_run(tmp_path, pico("stablelm"), *PACKED, "train.max_steps=3", "train.gradient_accumulation_steps=1")
    assert losses(run)[-1] < losses(run)[0]


def test_a_packed_step_has_the_gradient_of_the_same_rows_padded(pico_llama: Path, tmp_path: Path) -> None:
    updates = []
    one_step = (
        "data.eval=0.5", "train.optim=sgd", "train.max_grad_norm=0", "train.lr_scheduler_type=constant",
        "train.warmup_ratio=0", "train.learning_rate=1", "train.max_steps=1", "train.gradient_accumulation_steps=32",
    )  # fmt: skip
    for name, settings in {"padded": EXACT, "packs": PACKED, "pairs": PACKED}.items():
        size = 2 if name == "pairs" else 1
        run = train_run(
            tmp_path, pico_llama, *settings, *one_step, f"train.per_device_train_batch_size={size}", name=name
        )
        updates.append(load_file(run.adapter / "adapter_model.safetensors"))
    for other in updates[1:]:
        for key, tensor in updates[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6)


def test_steps_and_epochs_count_packs(pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(
        tmp_path, pico_llama, *PACKED, "train.max_steps=null", "train.num_train_epochs=2",
        "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1", "train.eval_steps=null",
    )  # fmt: skip
    adapted, data, folder = build(config)
    adapted.loaded.tokenizer.pad_token = adapted.loaded.tokenizer.eos_token  # which every row has, and is no padding
    with caplog.at_level(logging.DEBUG, logger="qlora_train"):
        trainer = QloraTrainer(adapted, data, config, folder, [])
    num_tokens = int(data.train.lengths.sum())
    num_packs = pack_order(data.train.lengths, config).num_packs
    assert num_packs < len(data.train) / 2
    assert num_packs >= num_tokens / 128
    full = 100 * num_tokens / (num_packs * 128)
    assert f"packing: {len(data.train)} rows in {num_packs} packs of 128 tokens, {full:.1f} % full" in caplog.text
    assert "packing: documents are isolated (one attention call per document; checked on this model)" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 2 * -(-num_packs // 2)
    assert trainer.state.num_input_tokens_seen == 2 * num_tokens


def test_batches_of_packs_hold_the_rows_they_name(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *PACKED, "train.padding_free=false")
    adapted, data, folder = build(config)
    for batch in chain.from_iterable(QloraTrainer(adapted, data, config, folder, []).get_train_dataloader()):
        rows = batch["row"].tolist()
        tokens = [token for row in rows for token in data.train[row].input_ids.tolist()]
        assert batch["input_ids"][0, : len(tokens)].tolist() == tokens
        assert batch["position_ids"][0, : len(tokens)].eq(0).sum() == len(rows)
        assert batch["input_ids"].shape[1] == -(-len(tokens) // 32) * 32


def test_non_finite_loss_names_rows_of_the_pack(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *PACKED)
    adapted, data, folder = build(config)
    trainer = QloraTrainer(adapted, data, config, folder, [])
    layer = next(module for module in adapted.model.modules() if isinstance(module, Linear4bit))
    layer.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan .* rows of this step: .*rows\.jsonl:\d+"):
        trainer.train()


def test_stopped_packed_run_resumes_bitwise(pico_llama: Path, tmp_path: Path) -> None:
    settings = (
        *PACKED, "train.save_steps=1", "train.eval_steps=2", "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=2", "lora.lora_dropout=0.1",
    )  # fmt: skip
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    for step in (1, 4):
        stopped = RunFolder(tmp_path / f"stopped-{step}")
        shutil.copytree(straight.path, stopped.path)
        shutil.rmtree(stopped.adapter)
        stopped.results_file.unlink()
        for later in [number for number in stopped.checkpoint_steps() if number > step]:
            shutil.rmtree(stopped.checkpoint(later))
        resumed = train_run(tmp_path, pico_llama, *settings, name=stopped.path.name)
        assert adapter_bytes(resumed) == adapter_bytes(straight), f"resumed after step {step}"
        assert losses(resumed) == losses(straight)


def test_no_written_file_names_our_attention_function(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, pico_llama, *PACKED, "train.max_steps=1", "export.merge=true", "export.max_loss_increase=10"
    )
    files = [file for file in run.path.rglob("*") if file.suffix in {".json", ".md", ".yaml", ".jinja"}]
    assert any(file.name == "config.json" for file in files)
    assert any(file.name == "adapter_config.json" for file in files)
    for file in files:
        assert PACKED_ATTENTION not in file.read_text(encoding="utf-8"), file


@torch.no_grad()
def next_token_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits behind the last token, as generation computes them: from the keys and values of the others."""
    cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
    last: torch.Tensor = model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True).logits
    return last


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_generation_does_not_depend_on_packing(model_type: str, pico: Callable[..., Path], tmp_path: Path) -> None:
    adapted, config = adapted_pico(pico(model_type, **WINDOWS.get(model_type, {})), tmp_path)
    tokens = documents()[3][None]
    before = next_token_logits(adapted.model.eval(), tokens)
    isolate_documents(adapted, config, ROWS)
    torch.testing.assert_close(next_token_logits(adapted.model, tokens), before, rtol=1e-5, atol=1e-5)
