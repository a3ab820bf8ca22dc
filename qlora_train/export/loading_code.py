"""The Python code on a card, which loads exactly the model that the run trained.

A QLoRA adapter belongs to the base in the 4 bits it was trained on, with the run's RoPE scaling, attention and new tokens.
If Transformers and PEFT alone would build another model (they leave experts in 16 bits), the code uses this package.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize
from transformers import GenerationConfig
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_train.architectures import Architecture
from qlora_train.config.schema import RunConfig
from qlora_train.models import LoadedModel
from qlora_train.models.bnb_cpu_blocksize import has_partial_blocks
from qlora_train.models.checkpoint_tensors import find_stored_format
from qlora_train.models.loading import auto_class_of
from qlora_train.models.moe import expert_modules

THIS_ADAPTER, THIS_MODEL = "PATH-OR-ID-OF-THIS-ADAPTER", "PATH-OR-ID-OF-THIS-MODEL"
"""Placeholders on a card for the folder's path or Hub id."""
QUESTION = "YOUR-QUESTION"
_TRUST = {"trust_remote_code": "True"}


def adapter_code(loaded: LoadedModel, config: RunConfig, base: str, this: str = THIS_ADAPTER) -> str:
    """Return the code that loads the adapter `this` on `base` as `model`, with its `tokenizer`."""
    write = _package_lines if needs_package(loaded, config) else _plain_lines
    return "\n".join(write(loaded, config, base, this))


def merged_code(
    auto_class: str, *, attention: str | None, trust_remote_code: bool, this: str = THIS_MODEL, device_map: str = "auto"
) -> str:
    """Return the code that loads the merged folder `this` as `model`, with its `tokenizer`."""
    trusted = _TRUST if trust_remote_code else {}
    settings = {**trusted, **_attention(attention), "dtype": '"auto"', "device_map": _quoted(device_map)}
    return "\n".join(
        [
            f"from transformers import {auto_class}, AutoTokenizer",
            "",
            f"tokenizer = {_call('AutoTokenizer.from_pretrained', [_quoted(this)], trusted)}",
            f"model = {_call(f'{auto_class}.from_pretrained', [_quoted(this)], settings)}",
        ]
    )


def usage_code(tokenizer: Any, generation: GenerationConfig, *, system: str, ends: Sequence[int] = ()) -> str:
    """Return the code that asks a loaded `model` a question as in training; empty without a chat template.

    Args:
        generation: the model's generation config; its repetition penalty is turned off.
        system: shared system prompt of the training rows; empty for none.
        ends: tokens that end an answer, if the generation config does not list them all.
    """
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "system", "content": system}] if system else []
    settings = {"max_new_tokens": "256", "do_sample": "False"}
    if ends:
        settings["eos_token_id"] = f"tokenizer.convert_tokens_to_ids({_quoted(tokenizer.convert_ids_to_tokens(ends))})"
    if generation.repetition_penalty not in (None, 1.0):
        settings["repetition_penalty"] = "1.0"
    rendered = {"add_generation_prompt": "True", "return_dict": "True", "return_tensors": '"pt"'}
    return "\n".join(
        [
            "messages = [",
            *(f"    {_quoted(turn)}," for turn in [*turns, {"role": "user", "content": QUESTION}]),
            "]",
            f"prompt = {_call('tokenizer.apply_chat_template', ['messages'], rendered)}",
            f"output = {_call('model.generate', ['**prompt.to(model.device)'], settings)}",
            'answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)',
            "print(answer)",
        ]
    )


def needs_package(loaded: LoadedModel, config: RunConfig) -> str:
    """Return why Transformers and PEFT alone would load another model; empty if they load the same."""
    if config.model.model_name_or_path.endswith(".gguf"):
        return "the base is a GGUF file, which Transformers does not quantize to 4 bits"
    if stored_format := find_stored_format(loaded.source.config, loaded.source.name):
        num_bits = 4 if config.quantization.load_in_4bit else 16
        return f"the base is stored in {stored_format.description} and the run held it in {num_bits} bits"
    if loaded.source.config.keys() & {"attn_implementation", "_attn_implementation"}:
        return "the base's config.json names an attention kernel, which Transformers would download and the run did not"
    if not config.quantization.load_in_4bit:
        return ""
    if any(parametrize.is_parametrized(module) for _, module in expert_modules(loaded.model)):
        return "the run held the experts in 4 bits, and Transformers leaves them in 16"
    if loaded.architecture.linear_classes:
        name = loaded.architecture.linear_classes[0]
        return f"the run held layers of class {name} in 4 bits, and Transformers leaves them in 16"
    if has_partial_blocks(loaded.model):
        return (
            "rows of this model are not a multiple of the block size, which bitsandbytes dequantizes wrongly on a CPU"
        )
    return ""


def _plain_lines(loaded: LoadedModel, config: RunConfig, base: str, this: str) -> Iterator[str]:
    auto_class = auto_class_of(loaded.source, config.model)
    trusted = _TRUST if config.model.trust_remote_code else {}
    at = {"revision": _quoted(loaded.source.revision)} if loaded.source.revision else {}
    dtype = str(loaded.compute_dtype)
    changes = list(_config_changes(loaded, config))
    quantization = {} if _is_stored_in_4bit(loaded) else _quantization(loaded, config)
    # DoRA dequantizes the weights, which bitsandbytes' bfloat16 path on CPUs repacks in place
    exact_on_cpus = config.quantization.load_in_4bit and (loaded.compute_dtype == torch.float32 or config.lora.use_dora)
    names = [auto_class, "AutoTokenizer", *["AutoConfig"] * bool(changes), *["BitsAndBytesConfig"] * bool(quantization)]

    yield "import torch"
    if exact_on_cpus:
        yield "from bitsandbytes.nn import Linear4bit"
    yield "from peft import PeftModel"
    yield f"from transformers import {', '.join(sorted(names))}"
    yield ""
    yield f"tokenizer = {_call('AutoTokenizer.from_pretrained', [_quoted(this)], trusted)}"
    if changes:
        yield f"config = {_call('AutoConfig.from_pretrained', [_quoted(base)], {**at, **trusted})}"
        yield from changes
    settings = {
        **at,
        **trusted,
        **({"config": "config"} if changes else {}),
        **quantization,
        **_attention(needed_attention(loaded.architecture)),
        "dtype": dtype,
        "device_map": '"auto"',
    }
    yield f"base = {_call(f'{auto_class}.from_pretrained', [_quoted(base)], settings)}"
    if exact_on_cpus:
        yield "for module in base.modules():"
        yield "    if isinstance(module, Linear4bit):  # on a CPU it may repack its weights to compute in bfloat16"
        yield "        module.support_avx512bf16_for_cpu = False"
    if config.model.new_tokens:
        yield "if len(tokenizer) > base.get_input_embeddings().num_embeddings:"
        yield "    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)"
    yield f"model = PeftModel.from_pretrained(base, {_quoted(this)})"


def _package_lines(loaded: LoadedModel, config: RunConfig, base: str, this: str) -> Iterator[str]:
    model = config.model
    trusted = _TRUST if model.trust_remote_code else {}
    revision = model.revision if model.trust_remote_code else loaded.source.revision
    settings = {
        "model_name_or_path": base,
        "revision": revision,
        "trust_remote_code": model.trust_remote_code,
        "rope_scaling": model.rope_scaling,
        "new_tokens": model.new_tokens,
    }
    section = {key: _quoted(value) for key, value in settings.items() if value}
    dtype = str(loaded.compute_dtype).removeprefix("torch.")
    stored = {**config.quantization.model_dump(), "bnb_4bit_compute_dtype": dtype}
    quantization = {key: _quoted(value) for key, value in stored.items()}
    yield "from pathlib import Path"
    yield ""
    yield "from qlora_train.adapters import load_trained"
    yield "from qlora_train.config import ModelSection, QuantizationSection"
    yield "from qlora_train.models import load_model"
    yield "from transformers import AutoTokenizer"
    yield ""
    yield f"tokenizer = {_call('AutoTokenizer.from_pretrained', [_quoted(this)], trusted)}"
    yield f"base = {_call('ModelSection', [], section)}"
    yield f"quantization = {_call('QuantizationSection', [], quantization)}"
    yield f"model = load_trained(load_model(base, quantization, tokenizer=tokenizer), Path({_quoted(this)}))"


def _quantization(loaded: LoadedModel, config: RunConfig) -> dict[str, str]:
    """Return the argument that quantizes the base as the run did; empty for 16 bits."""
    if not config.quantization.load_in_4bit:
        return {}
    settings = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": _quoted(config.quantization.bnb_4bit_quant_type),
        "bnb_4bit_use_double_quant": str(config.quantization.bnb_4bit_use_double_quant),
        "bnb_4bit_compute_dtype": str(loaded.compute_dtype),
    }
    if loaded.architecture.keep_16bit:  # an explicit list replaces the library's default
        skipped = [*loaded.architecture.keep_16bit, *get_keys_to_not_convert(loaded.model)]
        settings["llm_int8_skip_modules"] = _quoted(sorted(skipped))
    return {"quantization_config": _call("BitsAndBytesConfig", [], settings, depth=1)}


def _config_changes(loaded: LoadedModel, config: RunConfig) -> Iterator[str]:
    """Yield the lines that set the run's RoPE scaling and compute dtype in the base's `config`."""
    if config.model.rope_scaling is not None:
        text = loaded.model.config.get_text_config()
        yield f"config.get_text_config().rope_parameters = {_quoted(dict(text.rope_parameters))}"
        yield f"config.get_text_config().max_position_embeddings = {text.max_position_embeddings}"
    if _is_stored_in_4bit(loaded):
        dtype = str(loaded.compute_dtype).removeprefix("torch.")
        if loaded.source.config["quantization_config"].get("bnb_4bit_compute_dtype", "float32") != dtype:
            yield f'config.quantization_config["bnb_4bit_compute_dtype"] = {_quoted(dtype)}'


def _is_stored_in_4bit(loaded: LoadedModel) -> bool:
    return bool((loaded.source.config.get("quantization_config") or {}).get("load_in_4bit"))


def needed_attention(architecture: Architecture) -> str | None:
    """Return the attention implementation that an architecture needs; None for Transformers' default."""
    return architecture.attention if architecture.attention_reason else None


def _attention(name: str | None) -> dict[str, str]:
    return {} if name is None else {"attn_implementation": _quoted(name)}


def _call(function: str, positional: list[str], keywords: Mapping[str, str], *, depth: int = 0) -> str:
    """Format a call on one line if it is short, else with one line per argument."""
    arguments = [*positional, *(f"{key}={value}" for key, value in keywords.items())]
    short = f"{function}({', '.join(arguments)})"
    if len(short) < 90 and "\n" not in short:
        return short
    indent = "    " * (depth + 1)
    return "\n".join([f"{function}(", *(f"{indent}{argument}," for argument in arguments), f"{'    ' * depth})"])


def _quoted(value: Any) -> str:
    """Format a Python literal with double quotes, as code formatters do."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_quoted(key)}: {_quoted(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return repr(value)
