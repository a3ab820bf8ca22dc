"""The data stage: files -> rows -> tokens and loss mask -> batches.

`formats` reads rows, `template` makes examples of them, `prepare` runs both and splits, `batches` (which alone imports
torch) feeds the trainer.
"""

from qlora_train.data.chat import encode_chat, render_chat
from qlora_train.data.chat_templates import CHAT_TEMPLATES, ChatTemplate, resolve_chat_template
from qlora_train.data.prepare import prepare_data
from qlora_train.data.types import Example, Message, PreparedData, Row

__all__ = [
    "prepare_data", "PreparedData", "Example", "Row", "Message",
    "render_chat", "encode_chat", "CHAT_TEMPLATES", "ChatTemplate", "resolve_chat_template",
]  # fmt: skip
