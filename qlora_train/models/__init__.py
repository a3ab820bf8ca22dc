"""Load a base model in 4 bits and its tokenizer, from a folder, the Hub or a GGUF file."""

from qlora_train.models.base_source import BaseSource, resolve_base
from qlora_train.models.loading import LoadedModel, load_model
from qlora_train.models.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "load_model", "BaseSource", "resolve_base", "load_tokenizer"]
