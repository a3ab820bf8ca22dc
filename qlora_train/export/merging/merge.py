"""Merge an adapter into 16-bit weights, from files to files.

What is merged onto. A QLoRA adapter was trained against 4-bit weights rounded from the original ones. `dequantized`
merges onto those rounded weights: the very function that was trained, in 16 bits. `original` merges onto the weights
before rounding, which are better weights but not the ones the adapter saw. Which gives the lower loss depends on the
model, so `verify` measures. Merging *into* 4 bits is not offered: the small change rounds back onto
the 4-bit grid and the fine-tune is gone.

The adapter speaks of the model's parameters and the files have names of their own; `tensor_layout` says which
tensors make which parameter. One parameter after the other is read, changed in float32, rounded once and written under
the names that it came from. Tensors that belong to no parameter, such as the other towers of a model of several, are
copied. Host memory holds one shard of output twice (safetensors copies what it writes) and the copies of one parameter.
Nothing is written in place, and what the merge does not understand it refuses.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from qlora_train.config.schema import QuantizationSection, RunConfig
from qlora_train.export.merging.adapter_deltas import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFile, listed
from qlora_train.export.merging.auxiliary_files import write_auxiliary_files
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint, Rounding
from qlora_train.export.merging.merge_math import merged_parameter
from qlora_train.export.merging.merge_plan import MergePlan, PlannedGroup, plan_merge
from qlora_train.export.merging.meta_model import MetaModel, build_meta_model
from qlora_train.export.merging.tensor_layout import NameMapping, TensorGroup, group_tensors
from qlora_train.models.shard_writer import bytes_of_size, write_shards
from qlora_train.utils.atomic_io import atomic_folder, sha256_of
from qlora_train.utils.errors import ConfigError, MergeError

logger = logging.getLogger(__name__)

MergeBase = Literal["original", "dequantized"]
MARKER = "merge.json"
"""Written into a merged folder: which adapters are in it, and onto what they were merged."""


@dataclass(frozen=True)
class MergeReport:
    """What was written.

    `num_changed` of `num_tensors` tensors carry the adapter; `num_rounded` weights of the model went through 4 bits.
    """

    merge_base: MergeBase
    num_tensors: int
    num_changed: int
    num_rounded: int
    num_shards: int
    total_bytes: int


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    output: Path,
    *,
    merge_base: MergeBase,
    quantization: QuantizationSection,
    dtype: torch.dtype | None,
    max_shard_size: str = "5GB",
    load_dtype: torch.dtype | None = None,
    model_config: Any = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> MergeReport:
    """Write `output`, a model folder that Transformers loads without PEFT.

    Args:
        base_folder: local checkpoint of safetensors: in 16 bits, released in FP8 or MXFP4, or as bitsandbytes stored it.
        adapter_folder: as PEFT saved it; its tokenizer and generation_config files go into the output, else the base's.
        output: a new folder, or a previous merge, which is replaced once the new one is whole.
        merge_base: `dequantized` rounds linear layers and experts through 4 bits first, as the run held them.
        quantization: how the run held them.
        dtype: of the written floating-point tensors; None keeps the base's own, tensor by tensor.
        load_dtype: dtype that the run quantised from (its compute dtype); None is `dtype`, or else bfloat16.
        model_config: Transformers config of the trained model where it differs from the base's (RoPE scaling).
        device: where weights are rounded through 4 bits.
        trust_remote_code: run Python code shipped with the base.

    Raises:
        MergeError: see the message; nothing has been written then.
    """
    check_output_folder(base_folder, adapter_folder, output)
    shard_bytes = bytes_of_size(max_shard_size)
    config = copy.deepcopy(model_config) or AutoConfig.from_pretrained(base_folder, trust_remote_code=trust_remote_code)
    config.__dict__.pop("quantization_config", None)
    meta_model = build_meta_model(config, trust_remote_code=trust_remote_code)
    config.architectures = [type(meta_model.model).__name__]  # a base may name a classifier
    adapter = AdapterFile(adapter_folder, meta_model)
    marker = _marker(base_folder, adapter, merge_base)
    load_dtype = load_dtype or dtype or torch.bfloat16
    with BaseCheckpoint(base_folder, load_dtype) as base:
        names = NameMapping(meta_model.model)
        groups = _units(base, meta_model, names)
        held_in_4bit = _held_in_4bit(base, meta_model, groups, merge_base, quantization)
        turned = frozenset(f"{name}.weight" for name in meta_model.conv1d)
        rounding = Rounding(held_in_4bit - base.stored_4bit, turned, quantization, load_dtype, device)
        plan = plan_merge(base, adapter, meta_model, names, groups, rounding.names, dtype)
        _report_mismatch(plan, meta_model)
        with atomic_folder(output) as staging:
            outputs = [tensor.name for tensor in plan.outputs]
            sizes_bytes = [tensor.size_bytes for tensor in plan.outputs]
            num_shards = write_shards(
                staging, outputs, sizes_bytes, shard_bytes, _tensors(base, adapter, plan, rounding)
            )
            adapter.assert_all_read_once()
            write_auxiliary_files(
                staging, base_folder, adapter_folder, config,
                tied=plan.tied, num_embeddings=plan.num_embeddings, dtype=dtype, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            (staging / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    report = MergeReport(
        merge_base=merge_base,
        num_tensors=len(outputs),
        num_changed=sum(len(planned.outputs) for planned in plan.groups if planned.updates),
        num_rounded=len(held_in_4bit),
        num_shards=num_shards,
        total_bytes=sum(sizes_bytes),
    )
    logger.info(
        "merged onto %s: %d of %d tensors changed, %d rounded through 4 bits, %.2f GB in %d files",
        merge_base, report.num_changed, report.num_tensors, report.num_rounded, report.total_bytes / 1e9, num_shards,
    )  # fmt: skip
    return report


def check_mergeable(source_config: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse, before anything is trained, a merge that the base cannot serve.

    Args:
        source_config: content of the base's config.json.
        config: the run's settings.

    Raises:
        ConfigError: the original weights are asked for and the base is stored in 4 bits.
    """
    stored = source_config.get("quantization_config") or {}
    if config.export.merge_base == "original" and stored.get("load_in_4bit"):
        raise ConfigError(
            f"export.merge_base: original, but {config.model.model_name_or_path} is stored in 4 bits and the original "
            "weights are not there; use dequantized or auto, or give the 16-bit base"
        )


def is_stored_in_4bit(base_folder: Path) -> bool:
    """Say whether bitsandbytes stored the checkpoint in 4 bits, so that the original weights are not there."""
    with BaseCheckpoint(base_folder) as base:
        return bool(base.stored_4bit)


def _units(base: BaseCheckpoint, meta_model: MetaModel, names: NameMapping) -> tuple[TensorGroup, ...]:
    """Return what the base consists of, with the 4-bit tensors of transposed layers turned."""
    turned = {f"{name}.weight" for name in meta_model.conv1d}
    base.turn(frozenset(name for name in base.stored_4bit if names.target(name)[0] in turned))
    return group_tensors(names, {name: base.shape(name) for name in base.names})


def _report_mismatch(plan: MergePlan, meta_model: MetaModel) -> None:
    if plan.missing:
        logger.warning(
            "merge: %d parameters of %s are not in the base, and each load draws them anew: %s",
            len(plan.missing), type(meta_model.model).__name__, listed(plan.missing, 3),
        )  # fmt: skip
    if plan.unmapped:
        logger.info(
            "merge: %d tensors belong to no parameter of the model and are copied as they are: %s",
            len(plan.unmapped), listed(plan.unmapped, 3),
        )  # fmt: skip


def _tensors(base: BaseCheckpoint, adapter: AdapterFile, plan: MergePlan, rounding: Rounding) -> Iterator[torch.Tensor]:
    """Yield what is written, in order; a unit is made when its first tensor is asked for."""
    for planned in plan.groups:
        if planned.is_made:
            yield from _made(base, adapter, planned, rounding)
        else:
            for source, output in zip(planned.group.sources, planned.outputs, strict=True):
                yield base.read(source).to(output.dtype)


def _made(
    base: BaseCheckpoint, adapter: AdapterFile, planned: PlannedGroup, rounding: Rounding
) -> Iterator[torch.Tensor]:
    """Yield a unit's tensors with the adapter's change: read, round through 4 bits, change in float32, round once."""
    dtype = planned.outputs[0].dtype
    parameters = planned.group.load(base.read)
    for name in planned.group.parameters:
        update = planned.updates.get(name)
        parameters[name] = merged_parameter(adapter, name, parameters[name], update, rounding, dtype)
    tensors = planned.group.store(parameters)
    del parameters
    for output in planned.outputs:
        tensor = tensors.pop(output.name)
        if planned.updates and tensor.is_floating_point() and not tensor.isfinite().all():
            raise MergeError(
                f"{output.name}: the merged weight is beyond the range of {dtype}; use the adapter unmerged"
            )
        yield tensor


def _held_in_4bit(
    base: BaseCheckpoint,
    meta_model: MetaModel,
    groups: tuple[TensorGroup, ...],
    merge_base: MergeBase,
    quantization: QuantizationSection,
) -> frozenset[str]:
    """Return the names of the weights that the run held in 4 bits, or none for a merge onto the original ones."""
    if base.stored_4bit:
        if merge_base == "original":
            raise MergeError(
                f"{base.folder}: export.merge_base is original, but the base is stored in 4 bits and "
                "the original weights are not there; use dequantized, or give the 16-bit base"
            )
        return base.stored_4bit
    if merge_base == "original":
        return frozenset()
    if not quantization.load_in_4bit:
        raise MergeError(
            "export.merge_base is dequantized, but quantization.load_in_4bit is false: the adapter was trained on the "
            "original weights; use original or auto"
        )
    missing = sorted(meta_model.quantized.difference(*(group.parameters for group in groups)))
    if missing:
        raise MergeError(
            f"{base.folder}: {len(missing)} weights that the run held in 4 bits are not in the files, e.g. {missing[0]}; "
            f"names there are like {base.names[0]}; save the base with this version of transformers, or use original"
        )
    return meta_model.quantized


def check_output_folder(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    """Refuse an output that would overwrite something else than a previous merge.

    Raises:
        MergeError: there is no base, or `output` overlaps base or adapter or is a folder of something else.
    """
    if not (base_folder / "config.json").is_file():
        raise MergeError(f"{base_folder}: no config.json; the base of a merge is a local model folder")
    target = output.resolve()
    for what, folder in (("base", base_folder.resolve()), ("adapter", adapter_folder.resolve())):
        if target == folder or target.is_relative_to(folder) or folder.is_relative_to(target):
            raise MergeError(f"{output}: the merge would overlap the {what} in {folder}; give a folder of its own")
    if output.exists() and not (output / MARKER).is_file():
        raise MergeError(
            f"{output}: exists and is not a previous merge (no {MARKER}); give another folder or remove it"
        )


def _marker(base_folder: Path, adapter: AdapterFile, merge_base: MergeBase) -> dict[str, Any]:
    """Return the content of the marker: the adapters merged so far, this one last."""
    digest, earlier = sha256_of(adapter.path), []
    if (base_folder / MARKER).is_file():
        earlier = json.loads((base_folder / MARKER).read_text(encoding="utf-8"))["adapters"]
    if any(entry["sha256"] == digest for entry in earlier):
        raise MergeError(
            f"{base_folder}: this adapter is already merged into it; merge onto the base it was trained on"
        )
    return {"adapters": [*earlier, {"sha256": digest, "merge_base": merge_base}]}


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "MARKER",
    "MergeBase",
    "MergeReport",
    "check_mergeable",
    "is_stored_in_4bit",
    "merge_adapter",
    "check_output_folder",
]
