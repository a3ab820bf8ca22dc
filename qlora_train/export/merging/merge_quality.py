"""What a merge was measured to be, for the log, results.json and the card."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_train.export.merging.verify import MergeResult
from qlora_train.export.predictions import Reference


@dataclass(frozen=True)
class Comparison:
    """The adapter on its base beside every merge of it that was made."""

    choice: MergeResult

    @property
    def reference(self) -> Reference:
        """The adapter, on the rows that were compared."""
        return self.choice.reference

    @property
    def rows(self) -> str:
        """Say which rows were measured."""
        count = len(self.reference.rows)
        return f"{count} held-out rows" if self.reference.held_out else f"{count} training rows (none were held out)"

    def results(self) -> dict[str, Any]:
        """Return it for results.json; losses and divergences are in nats per token."""
        candidates = {
            kind: {
                "loss": check.loss,
                "kl_divergence": check.divergence.kl,
                "top1_agreement": check.divergence.top1_agreement,
            }
            for kind, check in self.choice.checks.items()
        }
        kept = self.choice.report.merge_base
        return {
            "merge_base": kept,
            "rows": "held-out" if self.reference.held_out else "training",
            "num_rows": len(self.reference.rows),
            "num_tokens": self.choice.checks[kept].divergence.num_tokens,
            "adapter_loss": self.reference.loss,
            "candidates": candidates,
        }

    def lines(self) -> Iterator[str]:
        """Yield it for the log."""
        yield f"merge: loss with adapter: {self.reference.loss:.4f} nats/token on {self.rows}"
        for kind, check in self.choice.checks.items():
            yield (
                f"merge: onto {kind}, loaded in a fresh process: loss {check.loss:.4f}, divergence from the adapter "
                f"{check.divergence.kl:.2g} nats/token, the same first choice at "
                f"{100 * check.divergence.top1_agreement:.1f} % of {check.divergence.num_tokens} tokens"
            )

    def section(self) -> str:
        """Return it for the card."""
        kept = self.choice.report.merge_base
        num_tokens = self.choice.checks[kept].divergence.num_tokens
        rows = [
            "| | Loss | Divergence from the adapter | Same first choice |",
            "|---|---|---|---|",
            f"| adapter on the base it was trained on | {self.reference.loss:.4g} | | |",
        ]
        rows += [
            f"| merged onto the {kind} base{' (this model)' if kind == kept else ''} | {check.loss:.4g} | "
            f"{check.divergence.kl:.2g} | {100 * check.divergence.top1_agreement:.1f} % |"
            for kind, check in self.choice.checks.items()
        ]
        return (
            f"## Merge\n\nThe written files, loaded in a fresh process, beside the adapter, on {self.rows}. Losses and "
            f"Kullback-Leibler divergences are in nats a token; predictions are compared at {num_tokens} tokens.\n\n"
            + "\n".join(rows)
        )
