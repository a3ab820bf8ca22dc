"""Verify a merge by measurement: compare the written files with the adapter on its base.

The files are loaded in a fresh process as any user would load them. The loss on held-out rows shows whether the merged
model is as good. The KL divergence from the adapter's predictions shows whether it is the same model: a damaged tensor can
leave the loss of a poor model unchanged, or lower it. It is limited if only rounding to 16 bits lies between the two. On
SmolLM2-135M that rounding costs 0.001 nats per token and a zeroed matrix 0.015 to 7, but the step from 4-bit to original
weights 0.16: a merge onto those is another model on purpose, and its loss decides (benchmarks/results/divergence.txt).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_train.config.schema import ExportSection
from qlora_train.export.candidate_bases import MergeBase, candidate_bases
from qlora_train.export.fresh_process import ReloadCheck, check_in_fresh_process
from qlora_train.export.loading_code import THIS_MODEL, merged_code
from qlora_train.export.merging.check_budget import bounded_reference
from qlora_train.export.merging.merge_files import (
    MergeReport,
    MergeSettings,
    check_output_folder,
    is_stored_in_4bit,
    merge_adapter,
)
from qlora_train.export.predictions import Reference
from qlora_train.utils.atomic_io import STAGING, atomic_folder, remove_folder
from qlora_train.utils.errors import MergeError

logger = logging.getLogger(__name__)

INSTEAD = "use the adapter unmerged, or raise the limit"


@dataclass(frozen=True)
class MergeRun(MergeSettings):
    """Settings of a run's merges, and of the code on the card that loads the result."""

    auto_class: str = "AutoModelForCausalLM"
    attention: str | None = None

    def loading_code(self, this: str = THIS_MODEL, device_map: str = "auto") -> str:
        """Return the code on the card."""
        return merged_code(
            self.auto_class, attention=self.attention, trust_remote_code=self.trust_remote_code, this=this,
            device_map=device_map,
        )  # fmt: skip


@dataclass(frozen=True)
class MergeResult:
    """The kept merge, and the checks of all candidates by base kind; `reference` is the adapter on the same rows."""

    reference: Reference
    report: MergeReport
    checks: dict[MergeBase, ReloadCheck]

    @property
    def losses(self) -> dict[MergeBase, float]:
        """Loss by base kind."""
        return {kind: check.loss for kind, check in self.checks.items()}


Finish = Callable[[Path, MergeResult], None]
"""Adds files to the kept merge in its staging folder."""


def choose_merge_base(
    run: MergeRun, output: Path, *, reference: Reference, export: ExportSection, batch_size: int, finish: Finish
) -> MergeResult:
    """Merge into `output`; `auto` merges onto each kind of base and keeps the lower held-out loss.

    Candidates are written beside `output` under hidden names; `auto` needs disk space for two. `output` is written or
    replaced atomically, once the checks have passed and `finish` has run.

    Raises:
        MergeError: the merge is refused, cannot be loaded, or exceeds a limit; `output` is unchanged.
    """
    check_output_folder(run.base_folder, run.adapter_folder, output)
    kinds, reason = candidate_bases(
        export.merge_base,
        stored_in_4bit=is_stored_in_4bit(run.base_folder),
        load_in_4bit=run.quantization.load_in_4bit,
        measured=reference.held_out,
    )
    if reason:
        logger.info("merge_base auto: %s (%s)", kinds[0], reason)
    folders = {kind: output.with_name(f".{output.name}-{kind}{STAGING}") for kind in kinds}
    reference_folder = output.with_name(f".{output.name}-reference{STAGING}")
    reports: dict[MergeBase, MergeReport] = {}
    checks: dict[MergeBase, ReloadCheck] = {}
    try:
        remove_folder(reference_folder)  # left by a killed merge
        reference_folder.mkdir()
        for kind, folder in folders.items():
            remove_folder(folder)
            reports[kind] = merge_adapter(run, folder, kind)
            if not checks:  # all candidates have the same size, and are checked on the same rows
                reference = bounded_reference(reference, folder, run.device)
                reference.save(reference_folder / "reference.safetensors")
            checks[kind] = check_in_fresh_process(
                output,
                run.loading_code(str(folder), "cpu" if run.device == "cpu" else "auto"),
                reference_folder / "reference.safetensors",
                batch_size=batch_size,
                error=MergeError,
            )
            _check_tokens(output, checks[kind])
        best = min(kinds, key=lambda kind: (math.isnan(checks[kind].loss), checks[kind].loss))
        _check_loss(output, checks, best, reference, export)
        if best == "dequantized" or not run.quantization.load_in_4bit:
            _check_divergence(output, checks[best], export)
        result = MergeResult(reference, reports[best], checks)
        with atomic_folder(output) as staging:  # its manifest replaces the candidate's
            for path in folders[best].iterdir():
                path.rename(staging / path.name)
            finish(staging, result)
    finally:
        for folder in (*folders.values(), reference_folder):
            remove_folder(folder)
    return result


def _check_tokens(output: Path, check: ReloadCheck) -> None:
    if check.token_differences:
        raise MergeError(
            f"{output}: the tokenizer of the merged model encodes text differently than the run's: "
            f"{check.token_differences[0]}; the merged model is discarded, use the adapter"
        )


def _check_loss(
    output: Path, checks: dict[MergeBase, ReloadCheck], best: MergeBase, reference: Reference, export: ExportSection
) -> None:
    check = checks[best]
    increase = check.loss - reference.loss
    if increase <= export.max_loss_increase:  # False for NaN
        return
    others = "".join(f" ({kind}: {other.loss:.4f})" for kind, other in checks.items() if kind != best)
    raise MergeError(
        f"{output}: {'held-out' if reference.held_out else 'training'} loss {check.loss:.4f} after merging onto {best}"
        f"{others} and {reference.loss:.4f} with the adapter: an increase of {increase:.4f} nats/token, but "
        f"export.max_loss_increase allows {export.max_loss_increase:g}; {INSTEAD}: qlora-train merge {output.parent} "
        f"export.max_loss_increase={increase + 0.005:.2f}"
    )


def _check_divergence(output: Path, check: ReloadCheck, export: ExportSection) -> None:
    divergence = check.divergence
    if divergence.kl <= export.max_divergence:
        return
    raise MergeError(
        f"{output}: the merged model differs from the adapter: KL divergence {divergence.kl:.4f} nats/token at "
        f"{divergence.num_tokens} tokens, but export.max_divergence allows {export.max_divergence:g}; top-1 equal at "
        f"{100 * divergence.top1_agreement:.1f} %; {INSTEAD}: qlora-train merge {output.parent} "
        f"export.max_divergence={divergence.kl + 0.005:.2f}"
    )
