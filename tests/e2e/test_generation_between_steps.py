"""Generation and evaluation between steps change nothing in training.

Two things could: random numbers, and, on CPUs with AVX512-BF16, weights that bitsandbytes repacks in its first forward pass
without gradients. Both are provoked here, to show that the comparison detects them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import TrainerCallback

from qlora_train.adapters import attach_adapter
from qlora_train.evaluation.generation import generate_answers
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.models import load_model
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training import QloraTrainer
from tests.support.runs import make_config

NUM_STEPS = 4
VARIANTS = {
    "dropout and NEFTune": ("lora.lora_dropout=0.1", "train.neftune_noise_alpha=5"),
    "checkpointing and 8-bit optimizer": ("train.gradient_checkpointing=full", "train.optim=adamw_8bit", "lora.r=64"),
}
Act = Callable[[QloraTrainer], None]


class InBetween(TrainerCallback):
    """Calls a function between micro-batches and after odd steps."""

    trainer: QloraTrainer

    def __init__(self, act: Act) -> None:
        self._act = act

    def on_substep_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        self._act(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        if state.global_step % 2:
            self._act(self.trainer)


def nothing(trainer: QloraTrainer) -> None:
    pass


def generate(trainer: QloraTrainer, *, do_sample: bool = False) -> None:
    """Generate with Transformers, in evaluation mode."""
    model: Any = trainer.model
    prompts = torch.tensor([example.input_ids[:6] for example in list(trainer.examples.eval)[:2]], dtype=torch.long)
    model.eval()
    with torch.no_grad():
        answers = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=do_sample, max_new_tokens=6,
            min_new_tokens=6, use_cache=True,
        )  # fmt: skip
    model.train()
    assert answers.shape == (2, 12)


def sample(trainer: QloraTrainer) -> None:
    generate(trainer, do_sample=True)


def evaluate(trainer: QloraTrainer) -> None:
    """Compute the held-out loss and greedy answers, like `qlora-train eval`."""
    held_out, tokenizer = trainer.examples.eval, trainer.processing_class
    held_out_loss(trainer.model, held_out, batch_size=4, pad_token_id=0)
    prompts = [example.prompt for example in held_out if example.prompt is not None][:2]
    assert prompts
    generate_answers(trainer.model, tokenizer, prompts, max_new_tokens=6, batch_size=2, date=trainer.run.start_date())


def trained(folder: Path, base: Path, act: Act, *settings: str, repack: bool = False) -> dict[str, bytes | list[float]]:
    """Train with `act` in between; return the losses and the content of the last checkpoint."""
    config = make_config(folder, base, f"train.max_steps={NUM_STEPS}", *settings, name=f"{act.__name__}-{repack}")
    run = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, run)
    loaded = load_model(config.model, config.quantization, source=source)
    adapted = attach_adapter(loaded, config.lora, seed=config.run.seed)
    for layer in (module for module in adapted.model.modules() if isinstance(module, Linear4bit)):
        layer.support_avx512bf16_for_cpu = repack
    callback = InBetween(act)
    trainer = callback.trainer = QloraTrainer(adapted, data, config, run, [callback])
    trainer.train()
    adapted.model.save_pretrained(str(folder / "adapter"))
    checkpoint = run.checkpoint(NUM_STEPS)
    names = ("adapter.safetensors", "optimizer.safetensors", "random.safetensors", "random.json", "loop.safetensors")
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        **{name: (checkpoint / name).read_bytes() for name in names},
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert len(one["losses"]) == NUM_STEPS
    return [name for name in one if one[name] != other[name]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generating_and_evaluating_change_nothing(variant: str, tmp_path: Path, pico_llama: Path) -> None:
    straight, *others = (
        trained(tmp_path, pico_llama, act, *VARIANTS[variant]) for act in (nothing, generate, evaluate)
    )
    for other in others:
        assert differences(straight, other) == []


def test_comparison_detects_random_numbers(tmp_path: Path, pico_llama: Path) -> None:
    settings = VARIANTS["dropout and NEFTune"]
    found = differences(*(trained(tmp_path, pico_llama, act, *settings) for act in (nothing, sample)))
    assert {"losses", "adapter", "random.safetensors"} <= set(found)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="only CPUs with AVX512-BF16 repack weights")
def test_comparison_detects_repacked_weights(tmp_path: Path, pico_llama: Path) -> None:
    straight = trained(tmp_path, pico_llama, generate)
    damaged = trained(tmp_path, pico_llama, generate, repack=True)
    assert {"losses", "adapter"} <= set(differences(straight, damaged))
