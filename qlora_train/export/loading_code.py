"""The Python lines of a card: they load what the run trained, and nothing else that looks like it.

A QLoRA adapter belongs to the base in the 4 bits that it was trained on, with the run's RoPE scaling, attention and new
tokens. The lines say all of it. Where Transformers and PEFT alone would build another model (the experts of a mixture stay
in 16 bits there), the lines use this package, and the card says why.
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
from qlora_train.models.loading import auto_class_of
from qlora_train.models.moe import expert_modules
from qlora_train.models.prequantized import prequantized_format

THIS_ADAPTER, THIS_MODEL = "PATH-OR-ID-OF-THIS-ADAPTER", "PATH-OR-ID-OF-THIS-MODEL"
"""What a reader of a card puts the folder's path or Hub id for."""
QUESTION = "YOUR-QUESTION"


def adapter_code(loaded: LoadedModel, config: RunConfig, base: str, this: str = THIS_ADAPTER) -> str:
    """Return the lines that load the adapter as `model`, with its `tokenizer`.

    Args:
        loaded: the base as the run loaded it.
        config: the run's settings.
        base: Hub id or path that the lines name.
        this: path that the lines name for the adapter.
    """
    write = _package_lines if needs_package(loaded, config) else _plain_lines
    return "\n".join(write(loaded, config, base, this))


def merged_code(
    auto_class: str, *, attention: str | None, trust_remote_code: bool, this: str = THIS_MODEL, device_map: str = "auto"
) -> str:
    """Return the lines that load a merged folder as `model`, with its `tokenizer`.

    Args:
        auto_class: class of Transformers that loads it.
        attention: attention implementation that the architecture needs, None where the default is right.
        trust_remote_code: run Python code shipped with the model.
        this: path that the lines name for the folder.
        device_map: where it is loaded.
    """
    trusted = {"trust_remote_code": "True"} if trust_remote_code else {}
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
    """Return the lines that ask a loaded `model` a question as it was asked in training; empty without a chat template.

    Args:
        tokenizer: with the chat template.
        generation: the model's generation settings, whose penalties are switched off.
        system: the system prompt that the training rows share, empty where they share none.
        ends: tokens that end an answer, where the generation settings do not name them all.
    """
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "system", "content": system}] if system else []
    messages = [*turns, {"role": "user", "content": QUESTION}]
    settings = {"max_new_tokens": "256", "do_sample": "False"}
    if ends:
        settings["eos_token_id"] = f"tokenizer.convert_tokens_to_ids({_quoted(tokenizer.convert_ids_to_tokens(ends))})"
    if generation.repetition_penalty not in (None, 1.0):
        settings["repetition_penalty"] = "1.0"
    rendered = {"add_generation_prompt": "True", "return_dict": "True", "return_tensors": '"pt"'}
    return "\n".join(
        [
            "messages = [",
            *(f"    {_quoted(turn)}," for turn in messages),
            "]",
            f"prompt = {_call('tokenizer.apply_chat_template', ['messages'], rendered)}",
            f"output = {_call('model.generate', ['**prompt.to(model.device)'], settings)}",
            'answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)',
            "print(answer)",
        ]
    )


def needs_package(loaded: LoadedModel, config: RunConfig) -> str:
    """Return why Transformers and PEFT alone would load another model than the run's; empty where they load the same."""
    if config.model.model_name_or_path.endswith(".gguf"):
        return "the base is a GGUF file, which Transformers does not quantise to 4 bits"
    if stored_format := prequantized_format(loaded.source.config, loaded.source.name):
        return f"the base is stored in {stored_format.description} and was trained on in {_bits(config)} bits"
    if loaded.source.config.keys() & {"attn_implementation", "_attn_implementation"}:
        return (
            "the base's config.json names an attention kernel, which Transformers would fetch and the run did not use"
        )
    if not config.quantization.load_in_4bit:
        return ""
    if any(parametrize.is_parametrized(module) for _, module in expert_modules(loaded.model)):
        return "the run held the experts of this mixture in 4 bits, and Transformers leaves them in 16"
    if loaded.architecture.linear_classes:
        name = loaded.architecture.linear_classes[0]
        return f"the run held layers of class {name} in 4 bits, and Transformers leaves them in 16"
    if has_partial_blocks(loaded.model):
        return "bitsandbytes on a CPU dequantises rows wrongly that are no whole number of blocks, which this model has"
    return ""


def _bits(config: RunConfig) -> int:
    return 4 if config.quantization.load_in_4bit else 16


def _plain_lines(loaded: LoadedModel, config: RunConfig, base: str, this: str) -> Iterator[str]:
    auto_class = auto_class_of(loaded.source, config.model)
    trusted = {"trust_remote_code": "True"} if config.model.trust_remote_code else {}
    at = {"revision": _quoted(loaded.source.revision)} if loaded.source.revision else {}
    dtype = str(loaded.compute_dtype)
    changes = list(_config_changes(loaded, config))
    quantization = {} if _is_stored_in_4bit(loaded) else _quantization(loaded, config)
    has_4bit_layers = config.quantization.load_in_4bit
    # DoRA dequantises the weights, which bitsandbytes' bfloat16 path on CPUs repacks in place
    exact_on_cpus = has_4bit_layers and (loaded.compute_dtype == torch.float32 or config.lora.use_dora)
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
    trusted = {"trust_remote_code": "True"} if model.trust_remote_code else {}
    revision = model.revision if model.trust_remote_code else loaded.source.revision
    section = {
        "model_name_or_path": _quoted(base),
        **({"revision": _quoted(revision)} if revision else {}),
        **trusted,
        **({"rope_scaling": _quoted(model.rope_scaling)} if model.rope_scaling else {}),
        **({"new_tokens": repr(model.new_tokens)} if model.new_tokens else {}),
    }
    quantization = config.quantization
    stored = {
        "load_in_4bit": str(quantization.load_in_4bit),
        "bnb_4bit_quant_type": _quoted(quantization.bnb_4bit_quant_type),
        "bnb_4bit_use_double_quant": str(quantization.bnb_4bit_use_double_quant),
        "bnb_4bit_compute_dtype": _quoted(str(loaded.compute_dtype).removeprefix("torch.")),
        "min_quantized_share": str(quantization.min_quantized_share),
    }
    yield "from pathlib import Path"
    yield ""
    yield "from qlora_train.adapters import load_trained"
    yield "from qlora_train.config import ModelSection, QuantizationSection"
    yield "from qlora_train.models import load_model"
    yield "from transformers import AutoTokenizer"
    yield ""
    yield f"tokenizer = {_call('AutoTokenizer.from_pretrained', [_quoted(this)], trusted)}"
    yield f"base = {_call('ModelSection', [], section)}"
    yield f"quantization = {_call('QuantizationSection', [], stored)}"
    yield f"model = load_trained(load_model(base, quantization, tokenizer=tokenizer), Path({_quoted(this)}))"


def _quantization(loaded: LoadedModel, config: RunConfig) -> dict[str, str]:
    """Return the argument that quantises the base as the run did; none for a run in 16 bits."""
    if not config.quantization.load_in_4bit:
        return {}
    settings = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": _quoted(config.quantization.bnb_4bit_quant_type),
        "bnb_4bit_use_double_quant": str(config.quantization.bnb_4bit_use_double_quant),
        "bnb_4bit_compute_dtype": str(loaded.compute_dtype),
    }
    if loaded.architecture.keep_16bit:  # naming any replaces the library's own choice
        kept = [*loaded.architecture.keep_16bit, *get_keys_to_not_convert(loaded.model)]
        settings["llm_int8_skip_modules"] = _quoted(sorted(kept))
    return {"quantization_config": _call("BitsAndBytesConfig", [], settings, depth=1)}


def _config_changes(loaded: LoadedModel, config: RunConfig) -> Iterator[str]:
    """Yield lines that change the base's `config` to what the run trained with."""
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
    """Return the attention implementation that lines have to name; None where Transformers' default computes the same."""
    return architecture.attention if architecture.attention_reason else None


def _attention(name: str | None) -> dict[str, str]:
    return {} if name is None else {"attn_implementation": _quoted(name)}


def _call(function: str, positional: list[str], keywords: Mapping[str, str], *, depth: int = 0) -> str:
    """Return a call on one line where it is short, else a line an argument."""
    arguments = [*positional, *(f"{key}={value}" for key, value in keywords.items())]
    short = f"{function}({', '.join(arguments)})"
    if len(short) < 90 and "\n" not in short:
        return short
    indent = "    " * (depth + 1)
    return "\n".join([f"{function}(", *(f"{indent}{argument}," for argument in arguments), f"{'    ' * depth})"])


def _quoted(value: Any) -> str:
    """Return a Python literal, with the double quotes that formatted code has."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_quoted(key)}: {_quoted(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return repr(value)
