"""The table of objectives, which schema, data stage and trainer read; names and defaults are TRL's.

`sft_weight` is TRL's `cpo_alpha`, and the weight of `sft` in a list of `loss_type`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DatasetType = Literal["language_modeling", "preference", "unpaired_preference"]
"""TRL's types of data sets: rows to imitate, pairs of a chosen and a rejected answer, or answers with a label each."""


@dataclass(frozen=True)
class ObjectiveRow:
    """One row.

    Attributes:
        dataset_type: of the rows that the objective trains on.
        defaults: settings of `train` that only some objectives read.
        uses_reference: the loss compares with a reference model.
        estimates_kl: the loss reads a KL divergence, estimated on each row's prompt with the answer of another row.
    """

    name: str
    description: str
    dataset_type: DatasetType = "preference"
    defaults: Mapping[str, float] = field(default_factory=lambda: {"beta": 0.1, "sft_weight": 0.0})
    uses_reference: bool = True
    estimates_kl: bool = False

    def settings(self, train: object) -> dict[str, float]:
        """Return the settings of `defaults`: those that a `train` section sets, else the defaults."""
        chosen = {name: getattr(train, name) for name in self.defaults}
        return {name: default if chosen[name] is None else chosen[name] for name, default in self.defaults.items()}


UNPAIRED = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}

OBJECTIVES = {
    row.name: row
    for row in (
        ObjectiveRow("sft", "supervised fine-tuning", "language_modeling", {}, uses_reference=False),
        ObjectiveRow("dpo", "direct preference optimization, https://arxiv.org/abs/2305.18290"),
        ObjectiveRow("ipo", "identity preference optimization, https://arxiv.org/abs/2310.12036"),
        ObjectiveRow("hinge", "hinge loss of SLiC, https://arxiv.org/abs/2305.10425"),
        ObjectiveRow(
            "robust",
            "DPO for a share `label_smoothing` of flipped pairs, https://arxiv.org/abs/2403.00409",
            defaults={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0},
        ),
        ObjectiveRow("apo_zero", "anchored preference optimization, https://arxiv.org/abs/2408.06266"),
        ObjectiveRow("apo_down", "the same for chosen answers worse than the model's own"),
        ObjectiveRow("nca_pair", "noise contrastive alignment, https://arxiv.org/abs/2402.05369"),
        ObjectiveRow("sppo_hard", "self-play preference optimization, https://arxiv.org/abs/2405.00675"),
        ObjectiveRow("sigmoid_norm", "DPO on mean log-probabilities, https://arxiv.org/abs/2411.15124"),
        ObjectiveRow(
            "exo_pair",
            "efficient exact optimization, https://arxiv.org/abs/2402.00856",
            defaults={"beta": 0.1, "label_smoothing": 1e-3, "sft_weight": 0.0},
        ),
        ObjectiveRow("bco_pair", "binary classifier optimization of pairs, https://arxiv.org/abs/2404.04656"),
        ObjectiveRow(
            "discopop",
            "discovered preference optimization, https://arxiv.org/abs/2406.08414",
            defaults={"beta": 0.1, "discopop_tau": 0.05, "sft_weight": 0.0},
        ),
        ObjectiveRow(
            "simpo",
            "simple preference optimization, https://arxiv.org/abs/2405.14734",
            defaults={"beta": 0.1, "simpo_gamma": 0.5, "label_smoothing": 0.0, "sft_weight": 0.0},
            uses_reference=False,
        ),
        ObjectiveRow(
            "cpo",
            "contrastive preference optimization, https://arxiv.org/abs/2401.08417",
            defaults={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 1.0},
            uses_reference=False,
        ),
        ObjectiveRow(
            "orpo",
            "odds ratio preference optimization, https://arxiv.org/abs/2403.07691",
            defaults={"beta": 0.1, "sft_weight": 1.0},
            uses_reference=False,
        ),
        ObjectiveRow(
            "kto",
            "Kahneman-Tversky optimization, https://arxiv.org/abs/2402.01306",
            "unpaired_preference",
            UNPAIRED,
            estimates_kl=True,
        ),
        ObjectiveRow(
            "apo_zero_unpaired",
            "apo_zero on answers without pairs, https://arxiv.org/abs/2408.06266",
            "unpaired_preference",
            UNPAIRED,
        ),
    )
}
BATCH_OBJECTIVES = ("aot", "aot_unpaired")
"""TRL's losses of a micro-batch instead of a pair."""
ONLINE_OBJECTIVES = ("ppo", "grpo", "rloo", "online_dpo", "xpo", "nash_md")
SETTINGS = tuple(dict.fromkeys(name for row in OBJECTIVES.values() for name in row.defaults))
"""Settings of `train` that only some objectives read."""


def uses_reference(objective: str) -> bool:
    """Return whether an objective's loss compares with a reference model."""
    return OBJECTIVES[objective].uses_reference


def dataset_type_of(objective: str) -> DatasetType:
    """Return the type of data set that an objective trains on."""
    return OBJECTIVES[objective].dataset_type


def objectives_of(dataset_type: str) -> str:
    """Return the names of the objectives of a type of data set, for messages."""
    return ", ".join(row.name for row in OBJECTIVES.values() if row.dataset_type == dataset_type)
