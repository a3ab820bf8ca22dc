"""The memory of 7B, 8B and 70B models on one row of 512 tokens, as the table of docs/plan.md.

Example: ``PYTHONPATH=. python scripts/plan_table.py`` rewrites the table.
"""

from collections.abc import Iterator
from pathlib import Path

from qlora_train.config import LoraSection
from qlora_train.planning.base_config import well_known_models
from qlora_train.planning.memory import plan_memory, step_settings
from qlora_train.planning.run_plan import model_shapes

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- plan-table -->", "<!-- /plan-table -->"
MODELS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "meta-llama/Llama-2-70b-hf")
RANK, NUM_TOKENS = 16, 512
COLUMNS = {
    "weights": ("4-bit weights", "quantization constants", "16-bit weights"),
    "adapter, gradients, optimizer": ("adapter", "gradients", "optimizer"),
    "step": ("activations", "logits", "workspace"),
    "CUDA": ("runtime",),
}


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| model | {' | '.join(COLUMNS)} | peak |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for name in MODELS:
        model = model_shapes(well_known_models()[name], LoraSection(r=RANK))
        plan = plan_memory(model, step_settings(model, r=RANK, num_tokens=NUM_TOKENS))
        steps = [moment for moment in plan.moments if not moment.shrinks]
        peak = max(steps, key=lambda moment: moment.total_bytes)
        sums = [sum(peak.parts.get(part, 0) for part in parts) for parts in COLUMNS.values()]
        cells = " | ".join(f"{size / 1e9:.2f}" for size in (*sums, peak.total_bytes))
        yield f"| {name} | {cells} |"


def page() -> str:
    """Return docs/plan.md with the table as it is computed now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return "\n".join([before + BEGIN, *table(), END]) + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
