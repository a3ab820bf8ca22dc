"""The data stage: files -> rows -> tokens and loss mask -> batches.

In this order: `sources` finds files, `readers` split them into chunks of records, `formats` turns records into rows,
`render` turns rows into tokens and loss masks, `overflow` cuts long ones. `tokenize_chunk` does all that for one chunk, in
the processes of `worker_pool`; `token_store` and `token_cache` keep the result. `prepare` runs it and selects the rows to
train on and to hold out, `data_report` counts what became of each row. `collate` and `packing` build batches; only they
import torch.
"""

from qlora_train.data.chat_template import encode_chat, render_chat
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES, ChatTemplate, resolve_chat_template
from qlora_train.data.prepare import PreparedData, prepare_data
from qlora_train.data.types import Example, Message, Row

__all__ = [
    "prepare_data", "PreparedData", "Example", "Row", "Message",
    "render_chat", "encode_chat", "CHAT_TEMPLATES", "ChatTemplate", "resolve_chat_template",
]  # fmt: skip
