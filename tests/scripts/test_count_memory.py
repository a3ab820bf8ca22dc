"""The counter of GPU memory on pico shapes: it agrees with the plan, and start-up grows with depth as a step does."""

import json
from pathlib import Path

import pytest

from qlora_train.config import LoraSection
from qlora_train.planning.held_memory import adapter_numel, base_parts
from qlora_train.planning.memory import step_settings
from qlora_train.planning.run_plan import model_shapes

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")
import count_memory  # noqa: E402
import count_preference_memory  # noqa: E402

PICO = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160,
    "vocab_size": 320,
}  # fmt: skip
NUM_TOKENS = 128


@pytest.fixture(scope="module")
def counted() -> dict[int, dict[str, int]]:
    return {layers: count_memory.count({**PICO, "num_hidden_layers": layers}, NUM_TOKENS) for layers in (1, 2, 3)}


def test_weights_are_those_of_the_plan_to_the_byte(counted: dict[int, dict[str, int]]) -> None:
    model = model_shapes({**PICO, "num_hidden_layers": 2, "tie_word_embeddings": False}, LoraSection())
    settings = step_settings(model, r=count_memory.RANK, num_tokens=NUM_TOKENS)
    weights_bytes = sum(base_parts(model, settings).values()) + 4 * adapter_numel(model, settings)
    rotary_buffers = 2 * 8 * 4
    assert counted[2]["weights"] == weights_bytes + rotary_buffers


def test_every_phase_grows_in_a_straight_line_with_depth(counted: dict[int, dict[str, int]]) -> None:
    for phase, peak in counted[3].items():
        assert peak - counted[2][phase] == pytest.approx(counted[2][phase] - counted[1][phase], rel=0.1), phase


def test_parity_check_keeps_no_more_of_a_layer_than_a_step_of_as_many_tokens(
    counted: dict[int, dict[str, int]],
) -> None:
    """It has no optimizer state, and the reference's gradients wait in host memory."""
    grows = {phase: counted[3][phase] - counted[2][phase] for phase in counted[3]}
    step = grows["memory probe and step, reference, accumulation 2"]
    assert grows["parity check, 1 x 128 tokens"] <= step


def test_committed_counts_keep_the_promise() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "memory-counted.json").read_text())
    assert {(line["model"], line["tokens"]) for line in results} == {
        (model, tokens) for model in count_memory.PROMISED_GB for tokens in (512, 2048)
    }
    for line in results:
        assert line["holds"] == (max(line["peak_gb"].values()) <= line["promised_gb"])
        assert line["holds"] or line["tokens"] > 512, line


@pytest.mark.parametrize("checkpointing", count_preference_memory.CHECKPOINTING)
def test_step_on_a_pair_takes_the_memory_of_a_step_of_sft_on_its_sequences(checkpointing: str) -> None:
    config = {**PICO, "num_hidden_layers": 2}
    sft, dpo, from_adapter = (
        count_preference_memory.count_step(config, NUM_TOKENS, objective, checkpointing)
        for objective in count_preference_memory.OBJECTIVES
    )
    model = model_shapes({**config, "tie_word_embeddings": False}, LoraSection())
    adapter_bytes = 4 * adapter_numel(model, step_settings(model, r=count_memory.RANK, num_tokens=NUM_TOKENS))
    assert dpo == sft
    assert from_adapter == sft + adapter_bytes, "the adapter that training began with, in float32"
