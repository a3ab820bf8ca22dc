"""The data stage: files -> records -> rows -> examples -> stored tokens -> batches.

`sources` finds files and `readers` cut them into chunks of records; `formats` reads records into rows; `row_encoder` makes
examples (tokens and loss mask) of them; `tokenize_chunk` does that for a chunk in a worker process; `token_store` holds
the result, cached by `token_cache`. `prepare` runs all of it and chooses the rows, `data_report` describes them. `collate`,
`batch_order` and `packing` make batches; only `collate` imports torch.
"""

from qlora_train.data.chat_template import encode_chat, render_chat
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES, ChatTemplate, resolve_chat_template
from qlora_train.data.prepare import PreparedData, prepare_data
from qlora_train.data.types import Example, Message, Row

__all__ = [
    "prepare_data", "PreparedData", "Example", "Row", "Message",
    "render_chat", "encode_chat", "CHAT_TEMPLATES", "ChatTemplate", "resolve_chat_template",
]  # fmt: skip
