"""Merge an adapter into 16-bit weights, from files to files.

A QLoRA adapter was trained on 4-bit weights that were rounded from the original ones. `dequantized` merges onto the rounded
weights, in 16 bits: the trained function. `original` merges onto the weights before rounding, which are better but
not those that the adapter saw. Which one gives the lower loss depends on the model, so `verify` measures. Merging into 4
bits is not offered: the small update rounds back onto the 4-bit grid.

The adapter uses the model's names and the files their own; `tensor_layout` maps between them. Each parameter is read,
updated in float32, rounded once (stochastically) and written under the file's names. Tensors without a parameter, such as
vision encoders, are copied. Host memory holds one output shard twice (safetensors copies it) and the copies of one
parameter. Nothing is written in place, and what the merge does not understand is refused.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qlora_train.config.schema import QuantizationSection, RunConfig
from qlora_train.export.candidate_bases import MergeBase
from qlora_train.export.merging.adapter_deltas import AdapterFile
from qlora_train.export.merging.auxiliary_files import write_auxiliary_files
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.export.merging.meta_model import MetaModel, build_meta_model
from qlora_train.export.merging.output_tensors import MergePlan, PlannedGroup, plan_merge
from qlora_train.export.merging.tensor_layout import NameMapping, TensorGroup, group_tensors
from qlora_train.export.merging.weight_update import QuantizationRoundTrip, merge_parameter
from qlora_train.models.shard_writer import bytes_of_size, write_shards
from qlora_train.utils.atomic_io import atomic_folder, sha256_of
from qlora_train.utils.errors import ConfigError, MergeError, listed
from qlora_train.utils.run_events import tracked

logger = logging.getLogger(__name__)

MARKER = "merge.json"
"""In a merged folder: the merged adapters, and the kind of base of each."""


@dataclass(frozen=True)
class MergeSettings:
    """What all merges of a run share.

    Attributes:
        base_folder: local checkpoint of safetensors in 16 bits, FP8, MXFP4, or 4 bits of bitsandbytes.
        adapter_folder: a PEFT folder; its tokenizer and generation config go into the output, else the base's.
        quantization: how the run held the base.
        dtype: of the floating-point tensors to write; None for the base's own, tensor by tensor.
        max_shard_size: as in `save_pretrained`.
        load_dtype: dtype that the run quantized from (its compute dtype); None for `dtype`, or else bfloat16.
        model_config: Transformers config of the trained model if it differs from the base's (RoPE scaling).
        device: on which weights are quantized to 4 bits and back.
        trust_remote_code: run Python code shipped with the base.
    """

    base_folder: Path
    adapter_folder: Path
    quantization: QuantizationSection
    dtype: torch.dtype | None
    max_shard_size: str = "5GB"
    load_dtype: torch.dtype | None = None
    model_config: Any = None
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was written: `num_changed` tensors carry an update, `num_quantized` were quantized to 4 bits and back."""

    merge_base: MergeBase
    num_tensors: int
    num_changed: int
    num_quantized: int
    num_shards: int
    total_bytes: int


def merge_adapter(settings: MergeSettings, output: Path, merge_base: MergeBase) -> MergeReport:
    """Write `output`, a model folder that Transformers loads without PEFT.

    Args:
        output: a new folder, or a previous merge, which is replaced atomically.
        merge_base: `dequantized` quantizes linear layers and experts to 4 bits and back first, as the run held them.

    Raises:
        MergeError: nothing was written.
    """
    base_folder, dtype, trust = settings.base_folder, settings.dtype, settings.trust_remote_code
    check_output_folder(base_folder, settings.adapter_folder, output)
    config = copy.deepcopy(settings.model_config) or AutoConfig.from_pretrained(base_folder, trust_remote_code=trust)
    config.__dict__.pop("quantization_config", None)
    meta_model = build_meta_model(config, trust_remote_code=trust)
    config.architectures = [type(meta_model.model).__name__]  # a base may name a classifier
    adapter = AdapterFile(settings.adapter_folder, meta_model)
    marker = _marker(base_folder, adapter, merge_base)
    load_dtype = settings.load_dtype or dtype or torch.bfloat16
    with BaseCheckpoint(base_folder, load_dtype) as base:
        names = NameMapping(meta_model.model)
        conv1d = frozenset(f"{name}.weight" for name in meta_model.conv1d)
        base.transpose(frozenset(name for name in base.stored_4bit if names.target(name)[0] in conv1d))
        groups = group_tensors(names, {name: base.shape(name) for name in base.names})
        quantized = _quantized_names(base, meta_model, groups, merge_base, settings.quantization)
        round_trip = QuantizationRoundTrip(
            quantized - base.stored_4bit, conv1d, settings.quantization, load_dtype, settings.device
        )
        plan = plan_merge(base, adapter, meta_model, names, groups, round_trip.names, dtype)
        _log_mismatch(plan, meta_model)
        sizes_bytes = [tensor.size_bytes for tensor in plan.outputs]
        with atomic_folder(output) as staging:
            num_shards = write_shards(
                staging, [tensor.name for tensor in plan.outputs], sizes_bytes, bytes_of_size(settings.max_shard_size),
                tracked(
                    _tensors(base, adapter, plan, round_trip), f"merging onto {merge_base}", sum(sizes_bytes), "bytes",
                    lambda tensor: tensor.nbytes,
                ),
            )  # fmt: skip
            adapter.assert_all_read_once()
            write_auxiliary_files(
                staging, base_folder, settings.adapter_folder, config,
                tied=plan.tied, num_embeddings=plan.num_embeddings, dtype=dtype, trust_remote_code=trust,
            )  # fmt: skip
            (staging / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    num_changed = sum(len(planned.outputs) for planned in plan.groups if planned.updates)
    report = MergeReport(merge_base, len(sizes_bytes), num_changed, len(quantized), num_shards, sum(sizes_bytes))
    logger.debug(
        "merged onto %s: %d of %d tensors changed, %d quantized to 4 bits and back, %.2f GB in %d files",
        merge_base, num_changed, report.num_tensors, report.num_quantized, report.total_bytes / 1e9, num_shards,
    )  # fmt: skip
    return report


def check_mergeable(source_config: Mapping[str, Any], config: RunConfig) -> None:
    """Check before training that the base, with this config.json, allows the merge that the config asks for.

    Raises:
        ConfigError: `original` is asked for and the base is stored in 4 bits.
    """
    stored = source_config.get("quantization_config") or {}
    if config.export.merge_base == "original" and stored.get("load_in_4bit"):
        raise ConfigError(
            f"export.merge_base: original, but {config.model.model_name_or_path} is stored in 4 bits and has no original "
            "weights; use dequantized or auto, or give the 16-bit base"
        )


def is_stored_in_4bit(base_folder: Path) -> bool:
    """Return whether bitsandbytes stored the checkpoint in 4 bits, so that it has no original weights."""
    with BaseCheckpoint(base_folder) as base:
        return bool(base.stored_4bit)


def check_output_folder(base_folder: Path, adapter_folder: Path, output: Path) -> None:
    """Refuse an output that would overwrite anything but a previous merge.

    Raises:
        MergeError: there is no base, `output` overlaps base or adapter, or is another folder.
    """
    if not (base_folder / "config.json").is_file():
        raise MergeError(f"{base_folder}: no config.json; the base of a merge is a local model folder")
    target = output.resolve()
    for what, folder in (("base", base_folder.resolve()), ("adapter", adapter_folder.resolve())):
        if target.is_relative_to(folder) or folder.is_relative_to(target):
            raise MergeError(f"{output}: the merge would overlap the {what} in {folder}; give its own folder")
    if output.exists() and not (output / MARKER).is_file():
        raise MergeError(
            f"{output}: exists and is not a previous merge (no {MARKER}); give another folder or remove it"
        )


def _log_mismatch(plan: MergePlan, meta_model: MetaModel) -> None:
    if plan.missing:
        logger.warning(
            "merge: %d parameters of %s are missing in the base and random after each load: %s",
            len(plan.missing), type(meta_model.model).__name__, listed(plan.missing, 3),
        )  # fmt: skip
    if plan.unmapped:
        logger.debug(
            "merge: %d tensors copied (no parameter of the model): %s", len(plan.unmapped), listed(plan.unmapped, 3)
        )


def _tensors(
    base: BaseCheckpoint, adapter: AdapterFile, plan: MergePlan, round_trip: QuantizationRoundTrip
) -> Iterator[torch.Tensor]:
    """Yield the tensors to write in order; a group is computed when its first tensor is asked for."""
    for planned in plan.groups:
        if planned.is_changed:
            yield from _merge_group(base, adapter, planned, round_trip)
        else:
            for source, output in zip(planned.group.sources, planned.outputs, strict=True):
                yield base.read(source).to(output.dtype)


def _merge_group(
    base: BaseCheckpoint, adapter: AdapterFile, planned: PlannedGroup, round_trip: QuantizationRoundTrip
) -> Iterator[torch.Tensor]:
    dtype = planned.outputs[0].dtype
    parameters = planned.group.load(base.read)
    for name in planned.group.parameters:
        update = planned.updates.get(name)
        parameters[name] = merge_parameter(adapter, name, parameters[name], update, round_trip, dtype)
    tensors = planned.group.store(parameters)
    del parameters
    for output in planned.outputs:
        tensor = tensors.pop(output.name)
        if planned.updates and tensor.is_floating_point() and not tensor.isfinite().all():
            raise MergeError(
                f"{output.name}: the merged weight is beyond the range of {dtype}; use the adapter unmerged"
            )
        yield tensor


def _quantized_names(
    base: BaseCheckpoint,
    meta_model: MetaModel,
    groups: tuple[TensorGroup, ...],
    merge_base: MergeBase,
    quantization: QuantizationSection,
) -> frozenset[str]:
    """Return the parameters to merge onto as the run held them, in 4 bits; none for `original`."""
    if base.stored_4bit:
        if merge_base == "original":
            raise MergeError(
                f"{base.folder}: export.merge_base is original, but the base is stored in 4 bits and has no original "
                "weights; use dequantized, or give the 16-bit base"
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


def _marker(base_folder: Path, adapter: AdapterFile, merge_base: MergeBase) -> dict[str, Any]:
    """Return the adapters merged so far, this one last."""
    digest, earlier = sha256_of(adapter.path), []
    if (base_folder / MARKER).is_file():
        earlier = json.loads((base_folder / MARKER).read_text(encoding="utf-8"))["adapters"]
    if any(entry["sha256"] == digest for entry in earlier):
        raise MergeError(
            f"{base_folder}: this adapter is already merged into it; merge onto the base it was trained on"
        )
    return {"adapters": [*earlier, {"sha256": digest, "merge_base": merge_base}]}
