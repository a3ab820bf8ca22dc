"""What the tests of merging share: adapters with random weights on pico models, and independent references."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qlora_train.config.schema import ModelSection, QuantizationSection
from qlora_train.export.candidate_bases import MergeBase
from qlora_train.export.merging.merge_files import MergeReport, MergeSettings, merge_adapter
from qlora_train.models import load_model
from qlora_train.models.text_only import text_model

Pico = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
NF4 = QuantizationSection()
IDS = torch.randint(4, 300, (3, 17), generator=torch.Generator().manual_seed(1))

SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SMALL_EXPERTS, "head_dim": 16},
    "qwen2_moe": {**SMALL_EXPERTS, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64},
}
"""Three that store a tensor an expert, and one that stores (experts, in, out), gate and up interleaved, with biases."""
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def plain(folder: Path) -> Any:
    """Load a folder in float32, of a multimodal checkpoint the text part, ready to compare."""
    model_class = text_model(AutoConfig.from_pretrained(folder)).model_class
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def quantized(folder: Path, **settings: Any) -> Any:
    """Load a folder in 4 bits as a run does."""
    section = QuantizationSection(bnb_4bit_compute_dtype="bfloat16", **settings)
    return load_model(ModelSection(model_name_or_path=str(folder)), section).model


def dequantized_reference(folder: Path, **settings: Any) -> Any:
    """Return the base in float32 with the weights that the loaded 4-bit layers themselves hold."""
    reference = plain(folder)
    for name, module in quantized(folder, **settings).named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            put_4bit_weight(reference.get_submodule(name), module)
    return reference


def put_4bit_weight(layer: Any, quantized_layer: Any) -> None:
    """Give a layer the weight that a 4-bit layer computes with; GPT-2's layers hold the transpose."""
    weight = bnb.functional.dequantize_4bit(quantized_layer.weight.data, quantized_layer.weight.quant_state).float()
    layer.weight.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model folder by name."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
    return shapes


def save_adapter(model: Any, folder: Path, *, seed: int = 3, std: float = 0.05, **settings: Any) -> Path:
    """Put LoRA with non-zero random trainable weights on a model and save it as PEFT does."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def merge(
    base: Path, adapter: Path, output: Path, *, merge_base: MergeBase = "original", **settings: Any
) -> MergeReport:
    """Merge in float32 unless the settings say otherwise."""
    options: dict[str, Any] = {"quantization": NF4, "dtype": torch.float32, **settings}
    return merge_adapter(MergeSettings(base, adapter, **options), output, merge_base)


def merged_logits(base: Path, adapter: Path, output: Path, **settings: Any) -> torch.Tensor:
    merge(base, adapter, output, **settings)
    return logits(plain(output))


def peft_merged_logits(base: Path, adapter: Path) -> torch.Tensor:
    """PEFT's own merge into the 16-bit model, in float32."""
    return logits(PeftModel.from_pretrained(plain(base), adapter).merge_and_unload())


def mixture(pico: Pico, model_type: str, **arguments: Any) -> Path:
    """Return the folder of a pico mixture."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if model_type == "gpt_oss" else {}
    return pico(model_type, **MIXTURES[model_type], **layers, **arguments)


def adapted(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter of the attention and of the experts."""
    options = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS, **settings}
    return save_adapter(plain(base), folder, **options)


def change_adapter(adapter: Path, edit: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a saved adapter."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def with_tensors(base: Path, folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """Copy a base and give it other tensors."""
    shutil.copytree(base, folder)
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
