"""What the tests of sharded bases run in each process: a base loaded whole beside the same one loaded in parts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.kernels.checkpointing_levels import LEVELS
from qlora_train.kernels.expert_weights import ExpertWeights, quantized_experts
from qlora_train.kernels.frozen_weight import packed_weight
from qlora_train.kernels.fsdp_units import gathering_modules, local_tensor
from qlora_train.kernels.install import FusedKernels, install
from qlora_train.models import LoadedModel, load_model
from qlora_train.models.byte_check import check_gathered_bytes, hash_own_rows
from qlora_train.models.moe import stacks
from qlora_train.models.shard_base import decoder_layers
from qlora_train.objectives.label_losses import label_losses, supports_chunking
from qlora_train.parallel import context
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing
from qlora_train.training.parity.gradients import Gradients, compare_gradients, gradients_of
from qlora_train.utils.errors import ConfigError, ModelError
from tests.support.batches import BATCH
from tests.support.runs import make_config

CHUNK_TOKENS = 7


def load(folder: Path, base: Path, *overrides: str, shard: bool) -> LoadedModel:
    """Load a base in float32, whole or in parts; every rank needs a folder of its own."""
    config = make_config(folder, base, "quantization.bnb_4bit_compute_dtype=float32", *overrides)
    return load_model(config.model, config.quantization, shard=shard)


def adapted(folder: Path, loaded: LoadedModel, base: Path, *overrides: str) -> AdaptedModel:
    """Attach an adapter of random, nonzero matrices."""
    model = attach_adapter(loaded, make_config(folder, base, *overrides).lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(model.model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def frozen_bytes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the bytes of every frozen tensor of a base in full, with what dequantization reads."""
    names = {module: name for name, module in model.named_modules()}
    for module in gathering_modules(model):
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # some models zero the padding row after loading, when they are loaded whole
            tensors["weight"] = module.weight.detach().index_fill(0, torch.tensor([module.padding_idx]), 0)
        if isinstance(module, Linear4bit):
            codes, state = packed_weight(module)
            tensors |= {"weight": codes, "absmax": state.absmax, "code": state.code}
            if state.nested:
                tensors |= {"offset": state.offset, "scales": state.state2.absmax, "table": state.state2.code}
        for stack in stacks(module):
            if found := quantized_experts(module, stack):
                tensors |= {f"{stack}.codes": found[0], **_named(stack, found[1])}
        if not isinstance(module, ExpertWeights) and "parametrizations" not in names[module]:
            yield from ((f"{names[module]}.{name}", _bytes(tensor)) for name, tensor in tensors.items())


def _named(stack: str, weights: ExpertWeights) -> dict[str, Tensor]:
    tensors = (*weights.scale_tensors, *weights.table_tensors)
    return {f"{stack}.{index}": tensor for index, tensor in enumerate(tensors)}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def compare_families(bases: Mapping[str, Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Compare a whole base and a sharded one of every family, and return what this rank found."""
    return {name: _compare(base, folder / f"{name}-{context().rank}") for name, base in bases.items()}


def _compare(base: Path, folder: Path) -> dict[str, Any]:
    whole, parts = (load(folder, base, shard=shard) for shard in (False, True))
    expected, actual = (dict(frozen_bytes(loaded.model)) for loaded in (whole, parts))
    found: dict[str, Any] = {
        "different": [name for name in expected if not torch.equal(expected[name], actual.get(name, Tensor()))],
        "num_tensors": len(expected),
        "share": parts.quantization_summary.weight_bytes / whole.quantization_summary.weight_bytes,
        "held": parts.quantization_summary.total_bytes / whole.quantization_summary.total_bytes,
        "summary": parts.quantization_summary.quantized_share == whole.quantization_summary.quantized_share,
    }
    models = [adapted(folder, loaded, base) for loaded in (whole, parts)]
    found["parameters"] = models[0].num_total == models[1].num_total
    found["reference"] = _difference(*(gradients_of(model, BATCH) for model in models))
    kernels = [_install(model) for model in models]
    found["kernels"] = kernels[0].summary() == kernels[1].summary()
    found["fused"] = _difference(*(gradients_of(model, BATCH) for model in models))
    chunked = [supports_chunking(model.model) for model in models]
    found["chunked"] = chunked[0] == chunked[1]
    layers = [LayerCheckpointing(model.model, fused.mlps) for model, fused in zip(models, kernels, strict=True)]
    for level in filter(layers[0].supports, LEVELS):
        if level != "full" or whole.model.supports_gradient_checkpointing:
            found[level] = _difference(
                *(_step(model, each, level, chunked[0]) for model, each in zip(models, layers, strict=True))
            )
    return found


def _install(model: AdaptedModel) -> FusedKernels:
    return install(model.model, lambda: label_losses(model.model, **BATCH))


def _step(model: AdaptedModel, layers: LayerCheckpointing, level: Any, chunked: bool) -> Gradients:
    """Compute a training step of two micro-batches at a checkpointing level."""
    layers.set(level)
    model.model.train()
    torch.manual_seed(0)  # GPT-2 has dropouts
    total = 0.0
    for rows in (slice(0, 2), slice(2, 3)):
        batch = {name: tensor[rows] for name, tensor in BATCH.items()}
        nll = label_losses(model.model, CHUNK_TOKENS if chunked else None, **batch).nll.sum() / 57
        nll.backward()
        total += float(nll.detach())
    trained = trainable_state(model.model)
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    model.model.zero_grad(set_to_none=True)
    model.model.eval()
    return Gradients(total, gradients)


def _difference(expected: Gradients, actual: Gradients) -> tuple[float, float, float]:
    difference = compare_gradients(expected, actual)
    return difference.loss, difference.gradient, difference.tensor


def compare_adapters(base: Path, folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Compare the gradients of adapters with other settings on a whole and on a sharded base; return errors as text."""
    return {setting: _compare_adapter(base, folder / f"{context().rank}", *setting.split()) for setting in settings}


def _compare_adapter(base: Path, folder: Path, *overrides: str) -> Any:
    gradients = []
    for shard in (False, True):
        try:
            model = adapted(folder, load(folder, base, *overrides, shard=shard), base, *overrides)
        except ConfigError as error:
            return str(error)
        _install(model)
        layers = LayerCheckpointing(model.model, [])
        gradients.append(_step(model, layers, "full", supports_chunking(model.model)))
    assert gradients[0].by_name
    return _difference(*gradients)


def evaluate_with_too_little_memory(base: Path, folder: Path) -> str:
    """Evaluate batches of two rows where the second rank has memory for one, and return how this rank ends."""
    model = load(folder / f"{context().rank}", base, shard=True).model

    def allocate(_module: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
        if len(keywords["input_ids"]) > context().world_size - context().rank:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    row = Example("rows.jsonl:1", BATCH["input_ids"][0].int().numpy(), np.arange(20) > 0)
    try:
        held_out_loss(model, [row] * 4, batch_size=2, pad_token_id=0)
    except (ModelError, RuntimeError) as error:
        return str(error)
    return "passed"


def flip_a_byte(base: Path, folder: Path) -> list[str]:
    """Check the gathered bytes of a layer, flip one byte on the last rank, and return both results."""
    model = load(folder / f"{context().rank}", base, shard=True).model
    layer = decoder_layers(model)[1]
    own = hash_own_rows(layer)
    results = []
    for flipped in (False, True):
        if flipped and context().rank == context().world_size - 1:
            local_tensor(layer.get_parameter("mlp.down_proj.weight"))[3, 5] ^= 1
        try:
            check_gathered_bytes(layer, "model.layers.1", own)
            results.append("passed")
        except ModelError as error:
            results.append(str(error))
    return results
