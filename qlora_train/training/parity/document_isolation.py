"""Documents of a pack attend to themselves only: set the attention function, and check the isolation on the model.

- FlashAttention reads document boundaries from positions that restart at 0;
- `eager`, if the config asks for it, gets a (tokens, tokens) mask from Transformers;
- otherwise `kernels.packed.attention` computes each document by itself.

The check replaces the first of two packed documents: the loss of the second must not change, measured against its change
when both are one document.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from qlora_train.adapters import AdaptedModel
from qlora_train.architectures import check_packing
from qlora_train.config import RunConfig
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.objectives.label_losses import label_losses
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import ConfigError, first_line
from qlora_train.utils.eval_mode import eval_mode

CHECK_TOKENS = 32
"""Tokens of each document in the check."""
MAX_INFLUENCE = 1e-4
"""Max change of a document's loss, in nats per token, if another document of the pack is replaced."""
MAX_INFLUENCE_SHARE = 0.1
"""The same, relative to the change without isolation: rounding grows with a model's activations."""
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Max difference between packed and separate documents, in nats per token, by compute dtype."""


def isolate_documents(adapted: AdaptedModel, config: RunConfig, rows: Sequence[Example]) -> str:
    """Set the model's attention function for packs, check that it isolates documents, and return how it does.

    Args:
        adapted: the model; its attention function is changed.
        rows: training rows; the check uses tokens of the first ones.

    Raises:
        ConfigError: the model does not isolate documents.
    """
    check_packing(adapted.loaded.architecture)
    if "position_ids" not in inspect.signature(adapted.model.get_base_model().forward).parameters:
        _refuse(adapted, "it takes no position_ids")
    ids = np.concatenate([rows[index].input_ids for index in range(min(len(rows), 2 * CHECK_TOKENS))])
    tokens = torch.from_numpy(np.resize(ids, 2 * CHECK_TOKENS)).long()
    separate = _last_losses(adapted, tokens[CHECK_TOKENS:])
    how = _choose_attention(adapted.loaded.model, config)
    _check_isolation(adapted, tokens, separate)
    return how


def _choose_attention(model: Any, config: RunConfig) -> str:
    name = model.config._attn_implementation
    if name not in (PACKED_ATTENTION, "sdpa", "eager"):
        return f"{name}, by position_ids"
    if name != PACKED_ATTENTION:
        if config.model.attn_implementation == "eager":
            return "eager, with a tokens x tokens mask"
        attention.register()
        model.set_attn_implementation(PACKED_ATTENTION)
        if model.config._attn_implementation != PACKED_ATTENTION:
            return f"{name}, with a tokens x tokens mask"
    return "one attention call per document"


def _check_isolation(adapted: AdaptedModel, tokens: torch.Tensor, separate: torch.Tensor) -> None:
    first, second = tokens[:CHECK_TOKENS], tokens[CHECK_TOKENS:]
    packed_losses = partial(_last_losses, adapted, positions=torch.arange(CHECK_TOKENS).repeat(2))
    packed = packed_losses(tokens)
    replaced = packed_losses(torch.cat([first.flip(0), second]))
    joined = _last_losses(adapted, tokens)
    influence, leak = (float((losses - packed).abs().mean()) for losses in (replaced, joined))
    difference = float((packed - separate).abs().mean())
    # "not <=", so that NaN does not pass
    if not influence <= max(MAX_INFLUENCE, MAX_INFLUENCE_SHARE * leak):
        _refuse(adapted, f"a document changes the loss of the next one by {influence:.2g} nats per token")
    if not difference <= MAX_DIFFERENCE[adapted.loaded.compute_dtype]:
        _refuse(adapted, f"the loss of a packed document differs from its own by {difference:.2g} nats per token")


def _refuse(adapted: AdaptedModel, problem: str) -> NoReturn:
    raise ConfigError(
        f"data.packing: true, but this {adapted.loaded.architecture.model_type} model does not isolate the documents of a "
        f"pack: {problem}; set data.packing to false"
    )


@torch.no_grad()
def _last_losses(adapted: AdaptedModel, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Return the losses, (CHECK_TOKENS - 1,), of the last document in `tokens`, (seq,)."""
    labels = tokens.clone()
    labels[: 1 - CHECK_TOKENS] = IGNORE_INDEX
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    inputs |= {"attention_mask": torch.ones_like(tokens)} if positions is None else {"position_ids": positions}
    batch = {name: tensor[None].to(adapted.loaded.device) for name, tensor in inputs.items()}
    try:
        with eval_mode(adapted.model):
            return label_losses(adapted.model, **batch).nll
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        if positions is None:
            raise
        _refuse(adapted, f"its attention fails on packs ({first_line(error)})")
