"""Whole runs on a GPU: load, parity checks, training, resume, evaluation, merge, check, generation.

On the fake device (`tests.support.fake_cuda`) these tests compute on the CPU, and fail if tensors of two devices meet;
`tests/e2e/test_fake_cuda.py` runs them so.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.export.finished_run import open_finished_run
from qlora_train.inference.chat import Chat, ChatSettings
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.inference.run_models import run_models
from qlora_train.kernels.packed import varlen
from qlora_train.objectives import chunk_sizes
from qlora_train.runs import read_json
from qlora_train.training import qlora_trainer
from qlora_train.training.memory import activation_offloading
from qlora_train.utils import signals
from tests.support import fake_cuda
from tests.support.runs import check_in_this_process, losses, make_config, train_run, write_rows
from tests.support.varlen_reference import reference_varlen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Pico = Callable[..., Path]

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "falcon", "gpt_neox",
    "qwen3_next",
)  # fmt: skip
FAMILIES_ON_FAKE = ("llama", "gemma2", "phi3", "mixtral", "falcon", "qwen3_next")
SHORT = ("train.max_steps=2", "train.eval_steps=2", "export.max_loss_increase=10")
MERGED = (*SHORT, "export.merge=true")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check saved models in this process, and fail on device mismatches that the product catches."""
    check_in_this_process(monkeypatch)
    if fake_cuda.IS_FAKE:
        monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)  # torch's has no kernel for the CPU
        varlen.works_on.cache_clear()
    fake_cuda.mismatches.clear()
    yield
    if fake_cuda.IS_FAKE:
        varlen.works_on.cache_clear()  # torch's own kernel is back
    assert fake_cuda.mismatches == []


@pytest.mark.parametrize("family", FAMILIES_ON_FAKE if fake_cuda.IS_FAKE else FAMILIES)
def test_a_run_trains_evaluates_merges_and_answers(family: str, pico: Pico, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico(family), *MERGED)
    assert all(map(math.isfinite, losses(run)))
    assert read_json(run.fused_kernels_file)["passed"], read_json(run.fused_kernels_file)
    assert run.metadata()["device"] == torch.cuda.get_device_name()
    results = evaluate(run.path, EvalSettings(max_new_tokens=4, batch_size=2))
    assert {"base", "adapter", "merged"} < results.keys()
    assert run.read_results()["adapter_check"]["passed"]
    assert varlen.works_on(torch.device("cuda", 0)), "first tried where gradients are off"


VARIANTS = {
    "reference, no checkpointing, NEFTune": (
        "train.fused_kernels=false", "train.gradient_checkpointing=none", "train.neftune_noise_alpha=5",
    ),
    "padded, float16, fused AdamW": (
        "train.padding_free=false", "quantization.bnb_4bit_compute_dtype=float16", "train.optim=adamw_torch_fused",
    ),
    "packed, mlp checkpointing, dropout": (
        "data.packing=true", "train.gradient_checkpointing=mlp", "lora.lora_dropout=0.1",
    ),
    "eager, float32, offloading": (
        "model.attn_implementation=eager", "quantization.bnb_4bit_compute_dtype=float32",
        "train.activation_offloading=true",
    ),
    "full checkpointing, dequantized cache, EVA": (
        "train.gradient_checkpointing=full", "train.dequantized_cache_gb=1", "lora.init_lora_weights=eva",
    ),
    "DoRA, new tokens": ("lora.use_dora=true", 'model.new_tokens=["<one>","<two>"]'),
    "16 bits": ("quantization.load_in_4bit=false",),
    "streamed": ("data.streaming=true", "data.eval=null", "train.eval_steps=null"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_trains_in_every_variant(
    variant: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunk_sizes.CHUNK_BYTES, "cuda", 1 << 16)
    monkeypatch.setattr(chunk_sizes, "MIN_CHUNK_TOKENS", 16)  # several chunks per micro-batch
    monkeypatch.setattr(activation_offloading, "MIN_BYTES", 1)
    make_config(tmp_path, pico_llama)
    write_rows(tmp_path / "rows.jsonl", system="Add the numbers of the question and answer in JSON.")
    run = train_run(tmp_path, pico_llama, *SHORT, *VARIANTS[variant])
    assert all(map(math.isfinite, losses(run)))
    assert run.read_results()["adapter_check"]["passed"]


def test_experts_balance(pico: Pico, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico("mixtral"), *SHORT, "train.router_aux_loss_coef=0.01")
    assert all(map(math.isfinite, losses(run)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stopped_run_resumes_merges_and_chats(
    dtype: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fake_cuda.IS_FAKE:
        monkeypatch.undo()  # check saved models in fresh processes, which use the GPU too
    settings = (
        "train.max_steps=4", "train.eval_steps=2", "train.save_steps=2", "export.merge=true", "export.max_loss_increase=10",
        f"quantization.bnb_4bit_compute_dtype={dtype}",
    )  # fmt: skip
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    step = qlora_trainer.QloraTrainer.training_step
    with monkeypatch.context() as patch, signals.handle_signals():

        def stopped(trainer: Any, *arguments: Any) -> torch.Tensor:
            if trainer.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *arguments)

        patch.setattr(qlora_trainer.QloraTrainer, "training_step", stopped)
        with pytest.raises(signals.Stop):
            train_run(tmp_path, pico_llama, *settings, name="stopped")
    run = train_run(tmp_path, pico_llama, *settings, name="stopped")
    assert losses(run) == pytest.approx(losses(straight), rel=1e-2)
    assert run.has_merged()
    finished = open_finished_run(run.path)
    [(_, model, tokenizer)] = run_models(finished, ["adapter"])
    written: list[str] = []
    Chat(model, tokenizer, ChatSettings(max_new_tokens=4), finished, written.append).handle("1 + 1")
    assert written
