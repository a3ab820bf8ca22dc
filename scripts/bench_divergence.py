"""How far roundings and damage move a model's predictions: the numbers behind `export.max_divergence`.

Divergences from the model in float32 are in nats/token, at the tokens of this project's own documents.

Example: ``python scripts/bench_divergence.py .demo/SmolLM2-135M-Instruct``
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.data.types import Example
from qlora_train.export.predictions import Predictions, compared_rows, measure_divergence
from qlora_train.models import load_model

ROOT = Path(__file__).parents[1]
ROW_TOKENS = 256
DAMAGED_LAYERS = (0, 0.25, 0.5, 0.75, 1)
"""Places of the layers of which a matrix becomes zero, as shares of the depth."""


def main() -> None:
    """Print a line for each rounding and each damage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    model_folder = parser.parse_args().model
    rows = compared_rows(rows_of_text(AutoTokenizer.from_pretrained(model_folder)))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    wanted = Predictions.of(model, rows)
    report("bfloat16", AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval(), rows, wanted)
    quantization = QuantizationSection(bnb_4bit_compute_dtype="float32")
    report(
        "NF4", load_model(ModelSection(model_name_or_path=str(model_folder)), quantization).model.eval(), rows, wanted
    )
    layers = model.model.layers
    for share in DAMAGED_LAYERS:
        number = round(share * (len(layers) - 1))
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            weight = layers[number].get_submodule(name).weight
            kept = weight.detach().clone()
            weight.data.zero_()
            report(f"layer {number}: {name} is zero", model, rows, wanted)
            weight.data.copy_(kept)


def rows_of_text(tokenizer: Any) -> list[Example]:
    """Return the documents as rows of label tokens."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    pieces = [ids[begin : begin + ROW_TOKENS] for begin in range(0, len(ids), ROW_TOKENS)]
    return [Example(f"piece {number}", piece, np.ones(len(piece), np.bool_)) for number, piece in enumerate(pieces)]


def report(what: str, model: Any, rows: list[Example], wanted: Predictions) -> None:
    """Print how far a model is from what was predicted."""
    found = measure_divergence(model, rows, wanted)
    print(
        f"{what:36} {found.kl:8.4f} nats/token, {100 * found.top1_agreement:5.1f} % of {found.num_tokens} first "
        "choices the same",
        flush=True,
    )


if __name__ == "__main__":
    main()
