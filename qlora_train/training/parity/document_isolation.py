"""Documents of a pack attend to themselves alone: how that is done on this model, and a check on the model itself.

- flash attention takes documents from positions that restart at 0;
- `eager`, when the config asks for it, gets a mask of (tokens, tokens) from Transformers;
- otherwise the row is cut at its documents (`kernels.document_attention`).
"""

import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from qlora_train.adapters import AdaptedModel
from qlora_train.architectures import check_packing
from qlora_train.config import RunConfig
from qlora_train.data.types import Example
from qlora_train.kernels.packed import attention
from qlora_train.objectives.sft_loss import label_losses
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import ConfigError, first_line

CHECK_TOKENS = 32
"""Tokens of each document of the check."""
NO_INFLUENCE = 1e-4
"""Nats a token by which one document may change the loss of another: nothing but rounding."""
SHARE_OF_LEAK = 0.1
"""The same, as a share of the change where nothing keeps documents apart: rounding grows with a model's activations."""
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Nats a token between the loss of packed and of separate documents, by the dtype of the products."""


def isolate_documents(adapted: AdaptedModel, config: RunConfig, rows: Sequence[Example]) -> str:
    """Let a model attend within the documents of a pack alone, check that it does, and say how.

    Args:
        adapted: the model; its attention function is changed.
        config: the run's settings.
        rows: some training rows; the check takes its text from the first of them.

    Raises:
        ConfigError: the model does not keep documents apart.
    """
    check_packing(adapted.loaded.architecture)
    check = _Check(adapted, rows)
    check.takes_positions()
    separate = check.separate_losses()
    how = _choose_attention(adapted.loaded.model, config)
    check.compare_with(separate)
    return how


def _choose_attention(model: Any, config: RunConfig) -> str:
    """Set the attention function for packs and say how documents are kept apart."""
    name = model.config._attn_implementation
    if name == attention.NAME:
        return "each computed apart"
    if name not in ("sdpa", "eager"):
        return f"{name} takes their positions"
    if config.model.attn_implementation == "eager":
        return "model.attn_implementation: eager, with a mask of tokens x tokens"
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation == attention.NAME:
        return "each computed apart"
    return f"{name}, with a mask of tokens x tokens"


class _Check:
    """Losses of short documents, packed and by themselves.

    Whether one document sees another is measured by exchanging the first: the loss of the second must stay what it was,
    measured against how far it moves when the two are one text.
    """

    def __init__(self, adapted: AdaptedModel, rows: Sequence[Example]) -> None:
        self._model, self._architecture = adapted.model, adapted.loaded.architecture
        self._device, self._dtype = adapted.loaded.device, adapted.loaded.compute_dtype
        text = np.concatenate([rows[i].input_ids for i in range(min(len(rows), 2 * CHECK_TOKENS))])
        tokens = torch.from_numpy(np.resize(text, 2 * CHECK_TOKENS)).long()
        self._first, self._second = tokens[:CHECK_TOKENS], tokens[CHECK_TOKENS:]

    def takes_positions(self) -> None:
        """Raise `ConfigError` for a model that cannot be told where documents begin."""
        if "position_ids" not in inspect.signature(self._model.get_base_model().forward).parameters:
            self._refuse("it takes no position_ids")

    def separate_losses(self) -> torch.Tensor:
        """Return the losses of the second document by itself, (CHECK_TOKENS - 1,)."""
        return self._losses(self._second)

    def compare_with(self, separate: torch.Tensor) -> None:
        """Raise `ConfigError` unless the second document's losses in a pack are those by itself."""
        positions = torch.arange(CHECK_TOKENS).repeat(2)
        packed = self._losses(torch.cat([self._first, self._second]), positions)
        exchanged = self._losses(torch.cat([self._first.flip(0), self._second]), positions)
        joined = self._losses(torch.cat([self._first, self._second]))
        influence, leak = (float((losses - packed).abs().mean()) for losses in (exchanged, joined))
        difference = float((packed - separate).abs().mean())
        # "not <=", so that a number that is not finite does not pass
        if not influence <= max(NO_INFLUENCE, SHARE_OF_LEAK * leak):
            self._refuse(f"a document changes the loss of the one behind it by {influence:.2g} nats a token")
        if not difference <= LARGEST_DIFFERENCE[self._dtype]:
            self._refuse(f"a packed document's loss differs from its own by {difference:.2g} nats a token")

    def _refuse(self, found: str) -> NoReturn:
        raise ConfigError(
            f"data.packing: true, but this {self._architecture.model_type} model does not keep the documents of a pack "
            f"apart: {found}; set data.packing to false"
        )

    @torch.no_grad()
    def _losses(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return the losses of the last document of a row of tokens (seq,), (CHECK_TOKENS - 1,)."""
        labels = tokens.clone()
        labels[: 1 - CHECK_TOKENS] = IGNORE_INDEX
        inputs: dict[str, Any] = {"input_ids": tokens, "labels": labels}
        inputs |= {"attention_mask": torch.ones_like(tokens)} if positions is None else {"position_ids": positions}
        was_training = self._model.training
        self._model.eval()
        try:
            return label_losses(
                self._model, **{name: tensor[None].to(self._device) for name, tensor in inputs.items()}
            ).nll
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
            if positions is None:
                raise
            self._refuse(f"its own attention fails on them ({first_line(error)})")
        finally:
            self._model.train(was_training)
