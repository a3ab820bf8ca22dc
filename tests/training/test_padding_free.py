"""Padding-free training and shared prefixes: losses and gradients of padded rows; stopped runs resume bitwise."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.config import RunConfig
from qlora_train.data import collate as batches
from qlora_train.data.collate import MIN_SHARED_PREFIX, FlatteningCollator, flattened_multiple, shared_prefix_length
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention, document_index
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.models import load_model
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training import QloraTrainer, padding_free
from qlora_train.training.parity.document_isolation import isolate_documents
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import CheckpointError
from tests.support.packing import PACKABLE, WINDOWS
from tests.support.packing import losses_and_gradients as in_order
from tests.support.runs import adapted_model, adapter_bytes, losses, make_config, stopped_copy, train_run
from tests.support.stores import example
from tests.support.varlen_reference import use_reference_kernel

EXACT = ("quantization.bnb_4bit_compute_dtype=float32",)
ON = "padding-free: on ("


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 300, (count,), generator=generator).tolist()


def row(prefix: Sequence[int], own: Sequence[int], num_labels: int) -> Example:
    ids = [*prefix, *own]
    return example(ids, [0] * (len(ids) - num_labels) + [1] * num_labels)


SYSTEM, OTHER = tokens(21, 1), tokens(17, 2)
ROWS = [
    row(SYSTEM, tokens(30, 3), 12),
    row(OTHER, tokens(9, 4), 8),
    row(SYSTEM, tokens(11, 5), 11),  # the first token after the prefix is a label
    row(SYSTEM[:13], tokens(20, 6), 5),  # shares a part of the prefix
    row(OTHER, tokens(14, 7), 3),
    row(SYSTEM, tokens(6, 8), 5),
    row([], tokens(12, 9), 11),  # shares nothing
]


def batch_of(rows: Sequence[Example], collate: FlatteningCollator) -> dict[str, torch.Tensor]:
    batch = collate(list(enumerate(rows)))
    del batch["row"]
    return batch


def losses_and_gradients(model: Any, rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sorted losses of all labels, since the order of rows differs, and the gradient of their sum."""
    found, gradients = in_order(model, rows)
    return found.sort()[0], gradients


def one_by_one(rows: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
    """Each row as a batch of its own."""
    return [
        {
            "input_ids": torch.from_numpy(each.input_ids).long()[None],
            "labels": torch.from_numpy(each.input_ids)
            .long()
            .masked_fill(~torch.from_numpy(each.loss_mask), IGNORE_INDEX)[None],
        }
        for each in rows
    ]


# --- flattened batches ------------------------------------------------------------------------------------------------


def test_shared_prefix_occurs_once() -> None:
    prefix = [1, 2, 3, 4, 5]
    batch = FlatteningCollator(share_prefixes=True)([(3, row(prefix, [6, 7], 2)), (8, row(prefix, [7, 8, 9], 1))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 8, 9, 5, 6, 7]], "5 predicts the label 6"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 7 + [9, IGNORE_INDEX, 6, 7]]
    assert batch["row"].tolist() == [8, 3]


def test_short_common_prefix_is_not_shared() -> None:
    rows = [(0, row([1, 2, 3], [4, 5], 1)), (1, row([1, 2, 3], [6, 7], 1))]
    assert FlatteningCollator(share_prefixes=True)(rows)["input_ids"].numel() == 10


def test_padding_is_unlabelled_documents_of_at_most_the_max_length() -> None:
    batch = FlatteningCollator(pad_token_id=9, pad_to_multiple_of=16)([(0, row([], [1, 2, 3, 4, 5], 2))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5] + [9] * 11]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 3 + [4, 5] + [IGNORE_INDEX] * 11]


@st.composite
def conversations(draw: st.DrawFn) -> list[Example]:
    """Rows over two tokens, most of which share a prefix."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 1), min_size=2, max_size=14))
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(example(ids, [0, *mask[1:]]))
    return rows


@given(conversations(), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_every_row_can_be_reconstructed_from_the_flattened_batch(rows: list[Example], multiple: int) -> None:
    batch = FlatteningCollator(7, multiple, share_prefixes=True)(list(enumerate(rows)))
    ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    assert len(ids) % multiple == 0
    begins = [i for i in range(len(ids)) if i == 0 or positions[i] != positions[i - 1] + 1]
    found, root = [], 0
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        if positions[begin] == 0:
            root = begin
        assert labels[begin] == IGNORE_INDEX, "no token of the document predicts it"
        shared = positions[begin]
        found.append((ids[root : root + shared] + ids[begin:end], [IGNORE_INDEX] * shared + labels[begin:end]))
        assert shared == 0 or shared >= MIN_SHARED_PREFIX
    for number, (read_ids, read_labels) in zip(batch["row"].tolist(), found[: len(rows)], strict=True):
        wanted = rows[number]
        assert read_ids == wanted.input_ids.tolist()
        assert read_labels == [
            token if label else IGNORE_INDEX for token, label in zip(wanted.input_ids, wanted.loss_mask, strict=True)
        ]
    assert all(
        set(read_ids) == {7} and set(read_labels) == {IGNORE_INDEX} for read_ids, read_labels in found[len(rows) :]
    )
    assert sorted(batch["row"].tolist()) == list(range(len(rows)))


def test_tokens_that_predict_labels_are_not_shared() -> None:
    one = row([1, 2, 3, 4, 5, 6], [], 2)
    assert shared_prefix_length(one, row([1, 2, 3, 4, 5, 6, 7], [], 1)) == 3, "predicts the first label"
    assert shared_prefix_length(one, row([1, 2], [9], 1)) == 2
    assert shared_prefix_length(row([1, 2, 3], [], 0), row([1, 2, 3], [], 0)) == 2, "every row keeps a token"
    assert shared_prefix_length(row([1, 2], [], 1), one) == 0


# --- losses and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", PACKABLE)
def test_losses_and_lora_gradients_match_separate_rows(
    model_type: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    adapted = adapted_model(tmp_path, pico(model_type, **WINDOWS.get(model_type, {})))
    model = adapted.model.eval()
    wanted = losses_and_gradients(model, one_by_one(ROWS))
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), ROWS)
    batch = batch_of(ROWS, FlatteningCollator(pad_to_multiple_of=32, share_prefixes=True))
    assert batch["input_ids"].numel() < sum(len(each.input_ids) for each in ROWS)
    found = losses_and_gradients(model, [batch])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert wanted[1].abs().max() > 1e-3
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


def test_documents_too_long_for_full_score_matrices_match_separate_rows(pico_llama: Path, tmp_path: Path) -> None:
    adapted = adapted_model(tmp_path, pico_llama, "data.max_length=512")
    model, prefix = adapted.model.eval(), tokens(100, 1)
    rows = [row(prefix, tokens(count, count), 9) for count in (190, 170, 60, 20)]
    assert len(rows[0].input_ids) > attention.MAX_EAGER_LENGTH > len(rows[2].input_ids)
    wanted = losses_and_gradients(model, one_by_one(rows))
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), rows)
    found = losses_and_gradients(model, [batch_of(rows, FlatteningCollator(share_prefixes=True))])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text", "gemma2"])
def test_varlen_kernel_matches_separate_rows(
    model_type: str, pico: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use_reference_kernel(monkeypatch)
    adapted = adapted_model(tmp_path, pico(model_type, **WINDOWS.get(model_type, {})))
    model = adapted.model.eval()
    wanted = losses_and_gradients(model, one_by_one(ROWS))
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), ROWS)
    calls.clear()
    found = losses_and_gradients(
        model, [batch_of(ROWS, FlatteningCollator(pad_to_multiple_of=32, share_prefixes=True))]
    )
    assert len(calls) == (0 if model_type == "gemma2" else 2), "every layer, unless scores are soft-capped"
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_matches_separate_rows(pico_llama: Path, tmp_path: Path) -> None:
    adapted = adapted_model(tmp_path, pico_llama)

    def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.cuda() for name, tensor in batch.items()}

    wanted = losses_and_gradients(adapted.model.eval(), [on_gpu(each) for each in one_by_one(ROWS)])
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), ROWS)
    found = losses_and_gradients(
        adapted.model, [on_gpu(batch_of(ROWS, FlatteningCollator(pad_to_multiple_of=8, share_prefixes=True)))]
    )
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-4 * float(wanted[1].abs().max()))


def test_comparison_detects_a_missing_prefix(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without the prefix, gradients differ."""
    adapted = adapted_model(tmp_path, pico_llama)
    wanted = losses_and_gradients(adapted.model.eval(), one_by_one(ROWS))
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), ROWS)
    monkeypatch.setattr(document_index, "shared_prefixes", lambda *_: None)
    found = losses_and_gradients(adapted.model, [batch_of(ROWS, FlatteningCollator(share_prefixes=True))])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert (found[1] - wanted[1]).norm() > 1e-2 * wanted[1].norm(), "gradients of prefixes"


def test_checkpointed_layers_share_prefixes_too(pico: Callable[..., Path], tmp_path: Path) -> None:
    adapted = adapted_model(tmp_path, pico("gemma3_text", **WINDOWS["gemma3_text"]))
    wanted = losses_and_gradients(adapted.model.eval(), one_by_one(ROWS))
    isolate_documents(adapted, make_config(tmp_path, Path("nowhere"), *EXACT, "data.packing=true"), ROWS)
    adapted.model.enable_input_require_grads()
    adapted.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = losses_and_gradients(adapted.model.train(), [batch_of(ROWS, FlatteningCollator(share_prefixes=True))])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5 * float(wanted[1].abs().max()))


# --- in a run ---------------------------------------------------------------------------------------------------------


TASK = "add up what the user says, and answer in json with the key sum"


def write_tasks(folder: Path, system: str = TASK, *, long: Sequence[int] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(24):
            summands = [number % 7 + 1, 3 * number + 2, *[5] * (number % 4), *[7] * 30 * (number in long)]
            turns = [
                {"role": "system", "content": system},
                {"role": "user", "content": " + ".join(map(str, summands))},
                {"role": "assistant", "content": json.dumps({"sum": str(sum(summands))})},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def built(config: RunConfig) -> tuple[AdaptedModel, QloraTrainer]:
    folder = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, folder)
    adapted = attach_adapter(load_model(config.model, config.quantization, source=source), config.lora, seed=1)
    return adapted, QloraTrainer(adapted, data, config, folder, [])


@pytest.mark.parametrize("packing", ["false", "true"])
def test_run_with_shared_prefixes_trains_like_a_padded_one(
    packing: str, pico_llama: Path, tmp_path: Path, messages: Any
) -> None:
    write_tasks(tmp_path)
    rows = (*EXACT, f"data.packing={packing}", "train.max_steps=2")
    shared = train_run(tmp_path, pico_llama, *rows, name="shared")
    assert ON in messages.text
    assert json.loads(shared.padding_free_file.read_text())["passed"]
    alone = train_run(tmp_path, pico_llama, *rows, "train.padding_free=false", name="alone")
    assert not alone.padding_free_file.exists()
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    assert adapter_bytes(shared) != adapter_bytes(alone), "computed in another way, so rounded differently"
    counts = [
        [json.loads(line).get("num_input_tokens_seen") for line in run.metrics_file.read_text().splitlines()]
        for run in (shared, alone)
    ]
    assert counts[0] == counts[1], "tokens of rows, shared or not"


A_ROW_AT_A_TIME = ("data.max_length=256", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=6")


@pytest.mark.parametrize(
    ("num_batches", "num_row_tokens", "text"),
    [
        ((8, 2), 75, "25 % fewer tokens, 1 micro-batch per step instead of 4"),
        ((8, 4), 72, "25 % fewer tokens, 2 micro-batches per step instead of 4"),
        ((2, 2), 75, "25 % fewer tokens"),
        ((2, 2), 90, "25 % fewer tokens, shared prefixes save 17 %"),
    ],
)
def test_savings_in_words(num_batches: tuple[int, int], num_row_tokens: int, text: str) -> None:
    assert str(padding_free.Savings(num_batches, (100, 75), num_row_tokens, num_steps=2)) == text


def test_short_rows_of_a_step_are_one_micro_batch(pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    write_tasks(tmp_path, long=(2, 5, 9, 20))
    rows = (*EXACT, *A_ROW_AT_A_TIME, "train.max_steps=4")
    together = train_run(tmp_path, pico_llama, *rows, name="together")
    assert re.search(r"padding-free: on \(\d+ % fewer tokens, .*3 micro-batches per step instead of 5\)", messages.text)
    alone = train_run(tmp_path, pico_llama, *rows, "train.padding_free=false", name="alone")
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    found, wanted = (load_file(run.adapter / "adapter_model.safetensors") for run in (together, alone))
    adapted, trainer = built(make_config(tmp_path, pico_llama, *rows, name="new"))
    before = {name.replace(".default", ""): tensor for name, tensor in trainable_state(adapted.model).items()}
    moved = sum(float((wanted[name] - before[name]).square().sum()) for name in before)
    apart = sum(float((wanted[name] - found[name]).square().sum()) for name in before)
    assert apart < 1e-4 * moved
    steps = list(trainer.get_train_dataloader())
    assert all(1 <= len(step) < 6 for step in steps)
    numbers = [number for step in steps for batch in step for number in batch["row"].tolist()]
    assert sorted(numbers) == list(range(len(numbers)))


def test_rows_of_one_length_without_shared_prefix_stay_padded(pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(24):
            ids = tokens(30, number)
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * 15 + ids[15:]}) + "\n")
    built(make_config(tmp_path, pico_llama, *A_ROW_AT_A_TIME, "data.eval=null", "train.eval_steps=null"))
    assert "padding-free: off (0 % fewer tokens)" in messages.text


@pytest.mark.parametrize("sizes", [(), A_ROW_AT_A_TIME])
def test_stopped_run_resumes_bitwise_or_not_at_all(
    sizes: tuple[str, ...], pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path, long=(2, 5, 9, 20) if sizes else ())
    saved = (*EXACT, *sizes, "train.save_steps=2", "train.max_steps=4")
    straight = train_run(tmp_path, pico_llama, *saved, name="straight")
    assert json.loads(straight.padding_free_file.read_text())["passed"]
    stopped_copy(straight, tmp_path / "stopped")
    resumed = train_run(tmp_path, pico_llama, *saved, name="stopped")
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    stopped_copy(straight, tmp_path / "elsewhere")
    monkeypatch.setattr(attention, "packed_mask", lambda **_: None)  # rows attend to each other
    with pytest.raises(CheckpointError, match=r"padding_free\.json: this run began padding-free, which fails here \("):
        train_run(tmp_path, pico_llama, *saved, name="elsewhere")


def test_run_without_parity_resumes_padded(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    write_tasks(tmp_path)
    monkeypatch.setattr(document_index, "shared_prefixes", lambda *_: None)
    saved = (*EXACT, "train.save_steps=2", "train.max_steps=4")
    straight = train_run(tmp_path, pico_llama, *saved, name="straight")
    assert "padding-free: off (it differs on this model (loss by" in messages.text
    monkeypatch.undo()
    stopped_copy(straight, tmp_path / "stopped")
    assert adapter_bytes(train_run(tmp_path, pico_llama, *saved, name="stopped")) == adapter_bytes(straight)
    shutil.rmtree(straight.adapter)
    straight.padding_free_file.write_text('{"passed": true, "colour": "red"}')
    with pytest.raises(
        CheckpointError, match=r"padding_free\.json: is not as it was written; restore it, or delete it"
    ):
        train_run(tmp_path, pico_llama, *saved, name="straight")


def test_rows_of_ragged_length_without_shared_prefix_are_flattened(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    monkeypatch.setattr(batches, "MIN_SHARED_PREFIX", 1000)
    ragged = (*EXACT, "train.per_device_train_batch_size=6", "train.max_steps=2")
    alone = train_run(tmp_path, pico_llama, *ragged, "train.padding_free=false", name="alone")
    together = train_run(tmp_path, pico_llama, *ragged, name="together")
    assert ON in messages.text
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)


def test_failed_parity_check_restores_the_attention_function(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path)
    adapted, trainer = built(make_config(tmp_path, pico_llama, *EXACT, name="sharing"))
    assert adapted.model.config._attn_implementation == PACKED_ATTENTION
    assert "position_ids" in next(iter(trainer.get_train_dataloader()))[0]
    monkeypatch.setattr(document_index, "shared_prefixes", lambda *_: None)
    adapted, trainer = built(make_config(tmp_path, pico_llama, *EXACT, name="wrong"))
    assert adapted.model.config._attn_implementation == "sdpa"
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))[0]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.padding_free=false", "train.padding_free: false"),
        ("train.neftune_noise_alpha=5", "NEFTune or the model's own dropout"),
        ("model.attn_implementation=eager", "attention is eager"),
    ],
)
def test_reasons_for_padding_are_logged(
    override: str, reason: str, pico_llama: Path, tmp_path: Path, messages: Any
) -> None:
    write_tasks(tmp_path)
    adapted, trainer = built(make_config(tmp_path, pico_llama, override))
    assert f"padding-free: off ({reason})" in messages.text
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))[0]
    assert adapted.model.config._attn_implementation in ("sdpa", "eager")


def test_lora_dropout_is_padding_free_without_shared_prefixes(pico_llama: Path, tmp_path: Path, messages: Any) -> None:
    write_tasks(tmp_path, long=(0, 9))
    _, trainer = built(make_config(tmp_path, pico_llama, "lora.lora_dropout=0.1", "data.max_length=256"))
    assert ON in messages.text
    for batch in chain.from_iterable(trainer.get_train_dataloader()):
        num_tokens = sum(len(trainer.examples.train[number].input_ids) for number in batch["row"].tolist())
        assert num_tokens <= batch["input_ids"].numel() < num_tokens + flattened_multiple(torch.device("cpu"))


def test_dropout_of_the_model_keeps_padding(pico: Callable[..., Path], tmp_path: Path, messages: Any) -> None:
    write_tasks(tmp_path)
    built(make_config(tmp_path, pico("llama", attention_dropout=0.1)))
    assert "padding-free: off (NEFTune or the model's own dropout)" in messages.text


def test_router_loss_counts_every_token(pico: Callable[..., Path], tmp_path: Path, messages: Any) -> None:
    write_tasks(tmp_path)
    _, trainer = built(
        make_config(tmp_path, pico("mixtral"), "train.router_aux_loss_coef=0.1", "data.packing=true", *EXACT)
    )
    assert "padding-free: off (the router loss counts every token of every row)" in messages.text
    for batch in chain.from_iterable(trainer.get_train_dataloader()):
        num_tokens = sum(len(trainer.examples.train[number].input_ids) for number in batch["row"].tolist())
        assert batch["input_ids"].numel() == num_tokens, "and no padding"


def test_small_savings_keep_padding(
    pico_llama: Path, tmp_path: Path, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding_free, "MIN_SAVINGS", 0.4)
    _, trainer = built(make_config(tmp_path, pico_llama))
    assert re.search(r"padding-free: off \(\d+ % (fewer|more) tokens", messages.text)
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))[0]


def test_architecture_that_cannot_isolate_rows_keeps_padding(
    pico: Callable[..., Path], tmp_path: Path, messages: Any
) -> None:
    write_tasks(tmp_path)
    built(make_config(tmp_path, pico("falcon"), *EXACT))
    assert "padding-free: off (flattened rows would attend to each other: " in messages.text


def test_leak_that_the_table_lacks_is_detected(
    pico: Callable[..., Path], tmp_path: Path, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path)
    config = make_config(tmp_path, pico("falcon"), *EXACT)
    folder = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, folder)
    loaded = load_model(config.model, config.quantization, source=source)
    loaded = replace(loaded, architecture=replace(loaded.architecture, packing_error=""))
    adapted = attach_adapter(loaded, config.lora, seed=1)
    trainer = QloraTrainer(adapted, data, config, folder, [])
    assert "padding-free: off (flattened rows attend to each other on this model)" in messages.text
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))[0]
