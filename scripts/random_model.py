"""Make a checkpoint of a well-known model's exact shape with random weights, for a machine that downloads nothing.

A step on it costs what a step on the real model costs: dense arithmetic does not depend on the numbers, as long as they are
not zeros. It is written layer by layer, a shard each, so that memory never holds more than a layer; `--nf4` quantises each
matrix when it is made, and writes what bitsandbytes stores. Its tokenizer has one token per byte, and as many in all as
the model's own.

Example: ``python scripts/random_model.py llama-3.1-8b build/llama-3.1-8b --nf4``
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END, TEXT_END = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STD = 0.02
_LLAMA_3_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
"""Without the release's scaling, which bounds how long a row may be."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA_3_ROPE,
    },
    "llama-3.1-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA_3_ROPE,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    },
    "pico": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
"""From the config.json of each release; `pico` is for tries of the benchmarks themselves."""
COMMON = {
    "max_position_embeddings": 1 << 20,  # no row is too long for it; positions take no memory
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def main() -> None:
    """Write the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--nf4", action="store_true", help="stored in 4 bits, with double quantisation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.output / "config.json").is_file():
        print(f"model: {options.output} is there")
        return
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    num_bytes = write_model(options.output, shape, nf4=options.nf4, seed=options.seed)
    print(f"model: {options.output}, {num_bytes / 1e9:.2f} GB")


def write_model(folder: Path, shape: Mapping[str, Any], *, nf4: bool, seed: int) -> int:
    """Write tokenizer, shards, index and, last, the config; return the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**COMMON, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if nf4:
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ).to_dict()  # fmt: skip
    build_tokenizer(config.vocab_size).save_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    groups = [list(names) for _, names in groupby(model.state_dict(), key=_layer_of)]
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = dict(_tensors(model, names, generator, nf4=nf4))
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next one is made
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return num_bytes


def _layer_of(name: str) -> str:
    """Return what has a shard of its own: a decoder layer, or one of the tensors beside them."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else name


def _tensors(
    model: Any, names: list[str], generator: torch.Generator, *, nf4: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a shard by the names that they are stored under."""
    for name in names:
        owner, _, kind = name.rpartition(".")
        value = _value(model.get_parameter(name).shape, kind, generator)
        module = model.get_submodule(owner)
        quantized = nf4 and isinstance(module, nn.Linear) and kind == "weight" and module is not model.lm_head
        if not quantized:
            yield name, value.cpu()
            continue
        packed, state = quantize_4bit(value, quant_type="nf4", compress_statistics=True)
        yield name, packed.cpu()
        yield from ((f"{name}.{part}", tensor.cpu()) for part, tensor in state.as_dict(packed=True).items())


def _value(shape: torch.Size, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix of random numbers, a norm's weight of ones, or a bias of zeros."""
    if len(shape) == 1:
        return torch.full(shape, float(kind == "weight"), device=generator.device, dtype=torch.bfloat16)
    random = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return random.mul_(STD)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `vocab_size` tokens, of which text meets 256 bytes and a template four special ones."""
    special = [PAD, TURN_START, TURN_END, TEXT_END]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<|unused_{number}|>" for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, TEXT_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


if __name__ == "__main__":
    main()
