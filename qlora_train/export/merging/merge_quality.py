"""The measurements of a merge for results.json, the log and the card."""

from collections.abc import Iterator
from typing import Any

from qlora_train.export.merging.verify import MergeResult


def merge_results(result: MergeResult) -> dict[str, Any]:
    """Return the entry of results.json; losses and divergences are in nats per token."""
    kept = result.report.merge_base
    return {
        "merge_base": kept,
        "rows": "held-out" if result.reference.held_out else "training",
        "num_rows": len(result.reference.rows),
        "num_tokens": result.checks[kept].divergence.num_tokens,
        "adapter_loss": result.reference.loss,
        "candidates": {
            kind: {
                "loss": check.loss,
                "kl_divergence": check.divergence.kl,
                "top1_agreement": check.divergence.top1_agreement,
            }
            for kind, check in result.checks.items()
        },
    }


def merge_log(result: MergeResult) -> Iterator[str]:
    """Yield the log lines."""
    yield f"merge: loss with adapter {result.reference.loss:.4f} nats/token ({_rows(result)})"
    for kind, check in result.checks.items():
        divergence = check.divergence
        yield (
            f"merge onto {kind}: loss {check.loss:.4f}, KL {divergence.kl:.2g} nats/token, top-1 equal at "
            f"{100 * divergence.top1_agreement:.1f} % of {divergence.num_tokens} tokens (in a fresh process)"
        )


def merge_section(result: MergeResult) -> str:
    """Return the section of the card."""
    kept = result.report.merge_base
    lines = [
        f"| merged onto the {kind} base{' (this model)' if kind == kept else ''} | {check.loss:.4g} | "
        f"{check.divergence.kl:.2g} | {100 * check.divergence.top1_agreement:.1f} % |"
        for kind, check in result.checks.items()
    ]
    return "\n".join(
        [
            "## Merge\n",
            f"The written files, loaded in a fresh process, compared with the adapter on {_rows(result)}. Losses and KL "
            "divergences are in nats per token; predictions are compared at "
            f"{result.checks[kept].divergence.num_tokens} tokens.\n",
            "| | Loss | KL divergence from the adapter | Top-1 agreement |",
            "|---|---|---|---|",
            f"| adapter on the base it was trained on | {result.reference.loss:.4g} | | |",
            *lines,
        ]
    )


def _rows(result: MergeResult) -> str:
    count = len(result.reference.rows)
    return f"{count} held-out rows" if result.reference.held_out else f"{count} training rows (none were held out)"
