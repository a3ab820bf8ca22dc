"""The data stage: files -> rows -> tokens and loss mask -> batches.

`sources` finds files, `readers` cut them into chunks of records, `formats` understands rows, `template` makes tokens and
masks of them; `tokenized` does all that for a chunk, in `workers`; `store` holds the result in the `cache`; `prepare` runs
it all and chooses what is trained on and held out, `report` says what became of every row. `batches` and `packing`, which
alone import torch, feed the trainer.
"""

from qlora_train.data.chat_template import encode_chat, render_chat
from qlora_train.data.default_chat_templates import CHAT_TEMPLATES, ChatTemplate, resolve_chat_template
from qlora_train.data.prepare import PreparedData, prepare_data
from qlora_train.data.types import Example, Message, Row

__all__ = [
    "prepare_data", "PreparedData", "Example", "Row", "Message",
    "render_chat", "encode_chat", "CHAT_TEMPLATES", "ChatTemplate", "resolve_chat_template",
]  # fmt: skip
