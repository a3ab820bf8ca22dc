"""One row of the table of architectures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: as in config.json.
        linear_names: last name of each linear layer but the head, for an early check of `lora.target_modules`.
        default_positions: positions of a config.json that names none: the config class's default.
        chat_template: turns of a base model whose vocabulary has no token for them.
        attention: the kernel that `model.attn_implementation: auto` takes.
        attention_reason: why `attention` is not sdpa; empty where it is. sdpa is refused where this is set.
        unlimited_key: a true value under this key of config.json means that positions do not end.
        linear_classes: subclasses of nn.Linear that compute the plain product; the library quantises none of them, so the
            loader does.
        packing_error: why documents that are packed into one row would see each other; empty where they do not.
        keep_16bit: last names of linear layers whose weight is read past the layer, so that it cannot be in 4 bits.
        lora_unsupported: last names of linear layers that cannot carry LoRA.
        lora_unsupported_reason: why they cannot.
        known: False for the generic row.
    """

    model_type: str
    linear_names: tuple[str, ...]
    default_positions: int | None
    chat_template: str = "chatml"
    attention: str = "sdpa"
    attention_reason: str = ""
    unlimited_key: str | None = None
    linear_classes: tuple[str, ...] = ()
    packing_error: str = ""
    keep_16bit: tuple[str, ...] = ()
    lora_unsupported: tuple[str, ...] = ()
    lora_unsupported_reason: str = ""
    known: bool = True
