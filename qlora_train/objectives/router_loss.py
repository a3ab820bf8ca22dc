"""The weight of the load-balancing loss of a mixture of experts (Switch Transformers, https://arxiv.org/abs/2101.03961).

Transformers computes the loss from the router logits. Routers are frozen here: it acts on the adapter below them.
"""

import logging
from typing import Any

from qlora_train.objectives.label_losses import has_aux_loss
from qlora_train.utils.errors import ConfigError

logger = logging.getLogger(__name__)

ROUTER_AUX_LOSS = "router_aux_loss"
"""Its name in the metrics."""


def choose_router_aux_loss_coef(setting: float | None, model: Any) -> float:
    """Return the weight of the load-balancing loss; 0: none.

    Args:
        setting: `train.router_aux_loss_coef`; None: that of config.json.

    Raises:
        ConfigError: it is set, and the architecture has no such loss.
    """
    config = model.config.get_text_config()
    coefficient = _of_config(config) if setting is None else setting
    if coefficient == 0:
        return 0.0
    if has_aux_loss(model):
        source = "config.json" if setting is None else "train.router_aux_loss_coef"
        logger.info("experts: load-balancing loss with weight %g (%s)", coefficient, source)
        return coefficient
    if setting is None:
        logger.info("experts: no load-balancing loss (set in config.json, but not in Transformers for this model)")
        return 0.0
    raise ConfigError(
        f"train.router_aux_loss_coef: {setting:g}, but Transformers has no load-balancing loss for a {config.model_type} "
        "model; drop it"
    )


def _of_config(config: Any) -> float:
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0)
