"""Export a model folder as GGUF in every kind of numbers and compare llama.cpp with Transformers in float32.

Example: ``python scripts/bench_export.py .demo/SmolLM2-135M-Instruct``, with the packages of the test extra.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.export.gguf.convert_model import write_model
from qlora_train.export.gguf.converter import find_converter
from qlora_train.export.gguf.gguf_quants import ADAPTER_QUANTS

QUESTIONS = ("What is the capital of France?", "Write a haiku about rain.", "Which is larger, 9.9 or 9.11?")
NUM_NEW = 20


def main() -> None:
    """Print a line for each kind of numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    folder: Path = parser.parse_args().model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(
        "| numbers | MB | seconds | largest difference of log-probabilities | same greedy tokens |\n|---|---|---|---|---|"
    )
    for quant in ADAPTER_QUANTS:
        with tempfile.TemporaryDirectory() as temporary:
            path, began = Path(temporary) / f"{quant}.gguf", time.perf_counter()
            write_model(folder, tokenizer, path, folder.name, find_converter(None), quant)
            seconds, size = time.perf_counter() - began, path.stat().st_size
            found = [compare(path, model, tokenizer, question) for question in QUESTIONS]
        differences, equal = zip(*found, strict=True)
        print(
            f"| {quant} | {size / 1e6:.0f} | {seconds:.1f} | {max(differences):.4f} | {sum(equal)}/{len(found) * NUM_NEW} |"
        )


@torch.no_grad()
def compare(path: Path, model: Any, tokenizer: Any, question: str) -> tuple[float, int]:
    """Return the largest difference among the five likeliest tokens of each step, and how many choices are the same.

    Both go along llama.cpp's tokens.
    """
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    steps = complete(path, text)
    tokens = [step["id"] for step in steps]
    logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    differences = [
        abs(float(expected[position, entry["id"]]) - entry["logprob"])
        for position, step in enumerate(steps)
        for entry in step["top_logprobs"]
    ]
    return max(differences), sum(int(row.argmax()) == token for row, token in zip(expected, tokens, strict=True))


def complete(path: Path, text: str) -> list[dict[str, Any]]:
    """Return llama.cpp's greedy steps after a prompt given as text, so that its tokenizer is compared too."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 512, 1, False, -1
    parameters.cpuparams.n_threads = 2
    asked = {"prompt": text, "n_predict": NUM_NEW, "temperature": 0, "n_probs": 5, "ignore_eos": True}
    steps: list[dict[str, Any]] = xllamacpp.Server(parameters).handle_completions(asked)["choices"][0]["logprobs"][
        "content"
    ]
    return steps


if __name__ == "__main__":
    main()
