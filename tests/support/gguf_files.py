"""Write pico models as GGUF."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def interleave_heads(weight: Tensor, num_heads: int) -> Tensor:
    """Row order of query and key in llama.cpp: the two halves of a head's rows alternate."""
    heads = weight.view(num_heads, 2, -1, weight.shape[-1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def write_gguf(
    folder: Path,
    path: Path,
    *,
    settings: dict[str, str] | None = None,
    extra: dict[str, Tensor] | None = None,
    leave_out: str = "",
    quantized: bool = False,
    part_tensors: int = 0,
) -> Path:
    """Write a saved pico model as GGUF, in float32 or (the matrices) Q8_0; in parts of so many tensors, if asked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, config.model_type, split_max_tensors=part_tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for key, value in (settings or {}).items():
        writer.add_string(f"{config.model_type}.{key}", value)
    add_tokenizer(writer, tokenizer)
    for name, tensor in {**gguf_tensors(model), **(extra or {})}.items():
        if name != leave_out:
            add_tensor(writer, name, tensor, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, quantized: bool) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    if quantized and tensor.dim() == 2:
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def gguf_tensors(model: Any) -> dict[str, Tensor]:
    config = model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        tensors[f"{names.get_name(module)}.{kind}"] = parameter.detach()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if config.model_type == "llama":
        for name, tensor in tensors.items():
            if num_heads := heads.get(name.split(".")[-2]):
                tensors[name] = interleave_heads(tensor, num_heads)
    return tensors


def write_vocabulary(
    path: Path, tokenizer: Tokenizer, *, pre: str = "", space: bool = True, bos: bool | None = None
) -> Path:
    """Write a llama of one small layer with a vocabulary of the tokenizer grid.

    Args:
        pre: llama.cpp's name of the split rule; empty for SentencePiece.
        space: `add_space_prefix`, of SentencePiece.
    """
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 1), (writer.add_vocab_size, len(tokens)),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(token, special) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] if pre else [])
    if not pre:
        writer.add_token_scores([float(-index) for index in range(len(tokens))])
        writer.add_add_space_prefix(space)
    if bos is not None:
        writer.add_add_bos_token(bos)
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        **{f"blk.0.{name}": (32, 32) for name in square},
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _token_type(token: str, special: set[str]) -> gguf.TokenType:
    if token.startswith("<0x"):
        return gguf.TokenType.BYTE
    if token == "<unk>":
        return gguf.TokenType.UNKNOWN
    return gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
