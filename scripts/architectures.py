"""Write docs/architectures.md from the table of architectures and from the models that Transformers builds of it.

    python scripts/architectures.py [FILE]

A test holds the page to what this writes.
"""

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

from qlora_train.adapters import choose_targets, find_linears
from qlora_train.architectures import ARCHITECTURES, NEEDS_ENCODERS, Architecture, detect
from qlora_train.architectures.gguf_configs import GGUF_ARCHITECTURES, GGUF_VARIANTS
from qlora_train.config import LoraSection
from qlora_train.kernels.expert_linear import follows_interface
from qlora_train.models.moe import expert_modules, expert_parameters
from qlora_train.models.text_only import text_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
sys.path.insert(0, str(ROOT))  # beside a script lie only scripts
from tests.support.pico import build_config  # noqa: E402
from tests.support.pico_multimodal import WHOLE, build_whole_config  # noqa: E402

HEAD = """# Architectures

This page is made by `python scripts/architectures.py` from `qlora_train/architectures/table.py`. Each row is a
`model_type` of `config.json`. `make test-architectures` builds a small model of each, loads it in 4 bits, trains it,
stops and resumes it, merges the adapter, and compares the merged model, which is plain Transformers code, with the
adapter on the 4-bit base.

A type that is not here trains on a generic row: its layers, experts and routers are found by walking the model, and one
warning says what was found.

- **LoRA on**: the layers that `lora.target_modules: all-linear` takes, and the expert weights that
  `lora.target_parameters: auto` takes. Routers and the output head carry none.
- **stays in 16 bits**: besides embeddings, head, norms, routers, convolutions and small recurrent parameters.
- **experts**: *one at a time*: an expert's weights are dequantised when its tokens are computed. *a layer at a time*:
  the architecture computes all experts of a layer at once, outside Transformers' interface, and needs their weights
  together.
- **packing**: whether `data.packing` keeps documents apart (`tests/training/test_packed_training.py`),
  or why it is refused.

Every row merges (`qlora-train merge`); the merged folder has the tensor names of the base. Whether it leaves as GGUF is
up to llama.cpp's converter, which says so in one line: [export.md](export.md). Fused kernels replace adapted linear layers,
gated MLPs, RMS norms, rotary embeddings (rotate-half) and eager attention whose results they match; `Conv1D` layers (GPT-2)
and experts are not fused. `make test-architectures` prints the number of each.

In some mixtures PEFT 0.21 takes the names `gate_proj`, `up_proj` and `down_proj` for experts, which earlier versions of
Transformers kept as layers of these names. The shared expert and the dense layers of those models carry no adapter; the
log names them.

| model_type | attention | LoRA on | stays in 16 bits | experts | packing |
|---|---|---|---|---|---|
"""
WHOLE_HEAD = """
## Multimodal checkpoints

A multimodal checkpoint trains on text: its language model alone is loaded, in 4 bits with LoRA, under its names in the
whole model. Vision and audio encoders are not read; the log names them with their sizes. The adapter loads onto the whole
16-bit model with PEFT and leaves the encoders alone (`exclude_modules`). The merged folder is a whole checkpoint of the
base's own type and tensor names, with the encoders' tensors copied bit for bit.

`tests/architectures/test_multimodal.py` compares each type of this table with the whole model in plain Transformers. Other
types are tried, and refused in one line if they have no separate language model, if it does not run alone, or if a later
token changes an earlier prediction.

| model_type | language model | not loaded | packing |
|---|---|---|---|
"""


GGUF_HEAD = """
## GGUF files as a base

`model.model_name_or_path` may be a `.gguf` file of one of these architectures, of any number format: it is dequantized
once into a cached folder, and trained in NF4. Every setting of the file must be known and every tensor have its place, or
the file is refused in one line. `tests/models/test_gguf_families.py` writes a file of each with llama.cpp's converter and
compares weights and logits with the model that it was made of.

Transformers' own reader (5.23) gives other logits for some of these files without an error, because it ignores settings:
biases of Llama; attention scale, soft-capping and layer pattern of Gemma 2; RoPE bases of Gemma 3 and StarCoder 2; partial
rotation and long RoPE of Phi-3 and Nemotron; experts of Mixtral. It fails on Qwen2-MoE, Qwen3 and Qwen3-MoE unless their
sizes are the defaults, on Falcon 40B, GPT-OSS and Gemma.

| GGUF architecture | model_type |
|---|---|
"""


def line_of(row: Architecture) -> str:
    """Return the row of the page for a row of the table."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(row.model_type))
    linears = find_linears(model)
    layers = {name.rpartition(".")[2] for name in choose_targets(model, linears, LoraSection(), row)}
    stacks = {name.rpartition(".")[2] for name in expert_parameters(model)}
    carried = [*sorted(layers), *(f"experts.{name}" for name in sorted(stacks))]
    one_by_one = all(follows_interface(module) for _, module in expert_modules(model))
    cells = (
        row.model_type,
        row.attention if row.attention_reason else model.config._attn_implementation,
        ", ".join(f"`{name}`" for name in carried),
        ", ".join(f"`{name}`" for name in row.keep_16bit),
        ("one at a time" if one_by_one else "a layer at a time") if stacks else "",
        f"refused: {row.packing_error}" if row.packing_error else "yes",
    )
    return f"| {' | '.join(cells)} |"


def line_of_whole(model_type: str) -> str:
    """Return the row of the page for a multimodal checkpoint."""
    config = build_whole_config(model_type)
    text, row = text_model(config), detect(config.to_dict())
    cells = (
        model_type,
        f"`{text.language_model}` ({row.model_type})",
        ", ".join(f"`{module.name}`" for module in text.omitted_modules),
        f"refused: {row.packing_error}" if row.packing_error else "yes",
    )
    return f"| {' | '.join(cells)} |"


def wholes() -> str:
    """Return the section on multimodal checkpoints."""
    refused = "; ".join(f"`{model_type}`: {reason}" for model_type, reason in NEEDS_ENCODERS.items())
    return WHOLE_HEAD + "\n".join(map(line_of_whole, sorted(WHOLE))) + f"\n\nRefused: {refused}.\n"


def ggufs() -> str:
    """Return the section on GGUF files."""
    variants = {architecture: row.model_type for (architecture, _), row in GGUF_VARIANTS.items()}
    lines = [
        f"| {name} | {row.model_type}{f', {variants[name]}' if name in variants else ''} |"
        for name, row in sorted(GGUF_ARCHITECTURES.items())
    ]
    return GGUF_HEAD + "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    return HEAD + "\n".join(line_of(row) for _, row in sorted(ARCHITECTURES.items())) + "\n" + wholes() + ggufs()


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
