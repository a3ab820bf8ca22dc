"""Rows of embedding and head for `model.new_tokens`."""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MEAN_CHUNK_BYTES = 16 << 20
"""Float32 rows that are summed at once."""


def add_new_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str]
) -> tuple[int, ...]:
    """Grow embedding and head to the tokenizer's length, and return the rows to train.

    These are the rows of the new tokens and all added rows: a tokenizer may be longer than the embedding, and the adapter
    file contains trained rows alone.
    """
    num_rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_rows:
        with torch.random.fork_rng():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for tensor in (module.weight.data, *(() if getattr(module, "bias", None) is None else (module.bias.data,))):
                tensor[num_rows:] = _mean_row(tensor[:num_rows])
        model.requires_grad_(False)
        logger.debug("vocabulary: %d rows added (mean of the others)", len(tokenizer) - num_rows)
    return tuple(dict.fromkeys([*tokenizer.convert_tokens_to_ids(list(new_tokens)), *range(num_rows, len(tokenizer))]))


def _mean_row(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension, summed in float32 in chunks.

    Transformers' `mean_resizing` would make 3 float32 copies of the embedding.
    """
    chunks = rows.split(max(1, MEAN_CHUNK_BYTES // (4 * rows[0].numel())))
    return torch.stack([chunk.sum(0, dtype=torch.float32) for chunk in chunks]).sum(0) / len(rows)
