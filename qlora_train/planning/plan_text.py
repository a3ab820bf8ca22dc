"""A plan as text of at most 24 lines of 80 characters."""

import textwrap
from collections.abc import Iterator, Sequence

from qlora_train.planning.run_plan import RunPlan
from qlora_train.utils.visible_text import visible

WIDTH = 80
INDENT = " " * 10
"""Of the further lines of a long text."""
SLOW_ON_CPU = 10**9
"""Weights above which a CPU is impractical."""
PART_LABELS = {
    "4-bit weights": "4-bit weights",
    "quantization constants": "quantization constants",
    "16-bit weights": "16-bit weights",
    "adapter": "adapter, float32",
    "gradients": "gradients, float32",
    "gradients to compare": "gradients to compare",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "workspace": "layer workspace",
    "adapter in the compute dtype": "adapter in the compute dtype",
    "heap fragmentation": "heap fragmentation",
    "largest tensor": "largest tensor while loading",
    "gathered weights": "gathered weights",
    "dequantized cache": "dequantized weight cache",
    "compiled kernels": "compiled kernels",
    "runtime": "CUDA context",
}
"""Parts of the memory in the order of the text."""


def plan_lines(plan: RunPlan, name: str, origin: str, notes: Sequence[str] = ()) -> list[str]:
    """Return the lines of a plan.

    Args:
        name: of the base.
        origin: where its config.json is from.
        notes: further lines.
    """
    lines = (*_facts(plan, name, origin), *_memory(plan), *_rest(plan), *notes)
    return [part for line in lines for part in textwrap.wrap(visible(line), WIDTH, subsequent_indent=INDENT)]


def _facts(plan: RunPlan, name: str, origin: str) -> Iterator[str]:
    yield f"base      {name}: {plan.model_type}, {short_count(plan.model.numel)} weights ({origin})"
    memory, work = plan.fitted.plan, plan.work
    yield f"adapter   {short_count(plan.num_trained)} trained weights, {memory.optimizer}"
    tokens = f"{plan.fitted.batch.num_tokens:,} tokens"
    how = "padding-free, " if plan.fitted.has_raised_budget else ""
    yield f"batch     {tokens} at most ({how}{work.num_rows} x {work.batch.num_tokens // work.num_rows:,} by the config)"
    if plan.num_ranks > 1:
        yield f"processes {plan.num_ranks}, {'fsdp: each holds a part of the base' if plan.is_sharded else 'ddp'}"


def _memory(plan: RunPlan) -> Iterator[str]:
    peak = plan.fitted.plan.peak
    each = " of each process" if plan.num_ranks > 1 else ""
    yield f"memory{each}, GB, at the peak ({peak.name})"
    for part, label in PART_LABELS.items():
        size = peak.parts.get(part, 0)
        if size:
            yield f"  {_labelled(plan, part, label):<42} {size / 1e9:8.2f}"
    device, needed = plan.device, plan.fitted.plan.needed_bytes
    yield f"  {'peak':<42} {peak.total_bytes / 1e9:8.2f}"
    kind = "" if device.on_gpu else "free memory of "
    room = f"{kind}{device.name}: {device.usable_bytes / 1e9:.1f} GB{' usable' if device.on_gpu else ''}"
    if not plan.fitted.fits:
        yield f"TOO LARGE {room}, needs {needed / 1e9:.1f} GB"
    elif plan.fitted.least_bytes < 0.95 * needed:
        yield f"fits      {room}; needs {plan.fitted.least_bytes / 1e9:.1f} GB at least, the rest saves time"
    else:
        yield f"fits      {room}"
    for caveat in plan.caveats:
        yield f"loose     {caveat}"


def _labelled(plan: RunPlan, part: str, label: str) -> str:
    if part == "runtime" and not plan.device.on_gpu:
        return "libraries and compiled kernels"
    if part == "activations" and plan.fitted.plan.peak.name == "training step":
        levels = plan.fitted.plan.levels
        summary = ", ".join(f"{level} x {levels.count(level)}" for level in dict.fromkeys(levels))
        return f"{label} (checkpointing {summary})"
    return label


def _rest(plan: RunPlan) -> Iterator[str]:
    parts = [] if plan.disk is None else plan.disk.parts()
    disk = [f"{name} {size / 1e9:.2f}" for name, size in parts if size >= 5e6]
    if plan.download_bytes:
        disk.append(f"download of the base {plan.download_bytes / 1e9:.1f}")
    if plan.seconds is None and not plan.device.on_gpu and plan.model.numel > SLOW_ON_CPU:
        yield "slow      on a CPU, training may take days: no GPU was found"
    yield f"disk, GB  {', '.join(disk) or 'unknown until the number of steps is known'}"
    work = plan.work
    if work.num_steps is None:
        yield "steps     unknown without the number of rows or train.max_steps"
        return
    tokens = "" if work.num_tokens is None else f", {short_count(work.num_tokens)} tokens"
    time = "unknown time (no timed run on this device)"
    if plan.seconds is not None:
        time = f"about {duration(plan.seconds)} without evaluations (speed of earlier runs here)"
        if plan.reference_seconds is not None:
            time += f", reference log-probabilities {duration(plan.reference_seconds)} before it"
    yield f"steps     {work.num_steps:,}{tokens}, {time}"


def duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as `12 min`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def short_count(number: int) -> str:
    """Return a count in billions or millions, such as `7.62 B`."""
    for least, unit in ((10**9, "B"), (10**6, "M")):
        if number >= least:
            return f"{number / least:.2f} {unit}"
    return f"{number:,}"
