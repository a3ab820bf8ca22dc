"""The loss that keeps the experts of a mixture evenly used: its weight in a run.

Transformers computes it from the routers' logits where the architecture has it (Switch Transformers,
https://arxiv.org/abs/2101.03961). Routers are frozen here: it acts on the adapter below them.
"""

import logging
from typing import Any

from qlora_train.objectives.sft_loss import has_aux_loss
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

ROUTER_AUX_LOSS = "router_aux_loss"
"""Its name in the metrics."""


def choose_router_aux_loss_coef(asked: float | None, model: Any) -> float:
    """Return the weight of the load-balancing loss; 0 is none.

    Args:
        asked: `train.router_aux_loss_coef`; None is what config.json says.
        model: the base with its adapter.

    Raises:
        ConfigError: it is asked for, and the architecture has none.
    """
    config = model.config.get_text_config()
    coefficient = _of_config(config) if asked is None else asked
    if coefficient == 0:
        return 0.0
    if not has_aux_loss(model):
        if asked is None:
            logger.info(
                "experts: config.json turns a load-balancing loss on, which Transformers has not for this model"
            )
            return 0.0
        raise ConfigError(
            f"train.router_aux_loss_coef: {asked:g}, but Transformers has no load-balancing loss for a {config.model_type} "
            "model; drop it"
        )
    logger.info("experts: load-balancing loss with weight %g (%s)", coefficient,
                "config.json" if asked is None else "train.router_aux_loss_coef")  # fmt: skip
    return coefficient


def _of_config(config: Any) -> float:
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0)
