"""Read the base's config.json with Transformers."""

from importlib.metadata import version
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_train.architectures import detect
from qlora_train.models.base_source import BaseSource
from qlora_train.utils.errors import ModelError


def read_config(source: BaseSource, *, trust_remote_code: bool) -> Any:
    """Return the Transformers config of a base.

    Raises:
        ModelError: a model type unknown to Transformers, contradictory values, or untrusted remote code.
    """
    where = f"model.model_name_or_path: {source.name}"
    detect(source.config)  # for its error message: Transformers would guess the type from the folder's name
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise untrusted_code(where) from error
        kind = source.config.get("model_type")
        if isinstance(kind, str) and kind not in CONFIG_MAPPING:
            raise ModelError(
                f"{where}: config.json: model_type: {kind!r} is unknown to the installed Transformers "
                f"{version('transformers')} (written by {source.config.get('transformers_version')}); check its "
                "spelling, or upgrade Transformers"
            ) from error
        reason = " ".join(str(error).split())
        raise ModelError(f"{where}: config.json cannot be read: {reason.rstrip('.')}; download it again") from error
    text = config.get_text_config()
    pad, num_tokens = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(num_tokens, int) and pad >= num_tokens:
        raise ModelError(
            f"{where}: config.json: pad_token_id: {pad} is beyond the {num_tokens} tokens of vocab_size; set it to null"
        )
    return config


def untrusted_code(where: str) -> ModelError:
    """Return the error for a base that needs untrusted code; `where` names the base."""
    return ModelError(
        f"{where} runs Python code of its own (auto_map); if you trust it, set model.trust_remote_code: true and, "
        "for a model of the Hub, model.revision to the 40-digit commit that you have read"
    )
