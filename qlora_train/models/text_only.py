"""Text-only loading of multimodal checkpoints: the whole model's class, built without vision and audio modules.

The language model keeps its names in the whole model, so that the adapter and the merged folder fit the whole model. The
other modules are removed before any weight is read, and cost neither memory nor time. No model is named here: the
language model is Transformers' decoder (`get_decoder`), and every module with weights beside the path from the root to it
is omitted.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM

from qlora_train.architectures import NEEDS_ENCODERS
from qlora_train.utils.errors import ModelError, first_line
from qlora_train.utils.eval_mode import eval_mode

logger = logging.getLogger(__name__)

CHECK_TOKENS = 16
CHECK_TOLERANCE = 1e-2


@dataclass(frozen=True)
class OmittedModule:
    """A module that text does not need, by its full name in the whole model."""

    name: str
    num_weights: int

    @property
    def pattern(self) -> str:
        """A regular expression for the names of its tensors and modules."""
        return self.name.replace(".", r"\.") + r"(\..*)?"


@dataclass(frozen=True)
class TextModel:
    """How to build the language model of a config.

    Attributes:
        model_class: has `from_pretrained`; AutoModelForCausalLM if nothing is omitted.
        language_model: name of the language model in the whole model; empty if it is the whole model.
    """

    model_class: Any
    language_model: str = ""
    omitted_modules: tuple[OmittedModule, ...] = ()

    def build(self, config: Any, *, trust_remote_code: bool = False) -> Any:
        """Return a randomly initialized model."""
        arguments: dict[str, Any] = {
            "attn_implementation": "eager"
        }  # other names could make Transformers download code
        if self.model_class is AutoModelForCausalLM:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **arguments)
        return self.model_class._from_config(config, **arguments)

    def attention(self, config: Any, name: str) -> str | dict[str, str]:
        """Return `attn_implementation` for the language model alone; encoders may not support it."""
        if not self.omitted_modules:
            return name
        text = config.get_text_config(decoder=True)
        parts = (part for part in type(config).sub_configs if getattr(config, part, None) is text)
        return {"": name, **dict.fromkeys(parts, name)}

    def log(self, model_type: str) -> None:
        """Log the omitted modules."""
        if self.omitted_modules:
            names = ", ".join(f"{each.name} ({each.num_weights / 1e6:,.2f} M weights)" for each in self.omitted_modules)
            logger.info("text-only: training %s of %s; not loaded: %s", self.language_model, model_type, names)


def text_model(config: Any) -> TextModel:
    """Return how to build the language model of a Transformers config.

    Raises:
        ModelError: a multimodal model whose language model does not work alone.
    """
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if whole is None:
        return TextModel(AutoModelForCausalLM)
    if reason := NEEDS_ENCODERS.get(config.model_type):
        raise _refusal(config, reason)
    text = config.get_text_config(decoder=True)
    if text is config:
        if type(config).sub_configs:
            raise _refusal(config, "its encoders are inside the language model")
        return TextModel(AutoModelForCausalLM)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise _refusal(config, "its text model is an encoder-decoder, not a causal language model")
    try:
        with torch.device("meta"):
            model = whole._from_config(config)
    except ImportError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise _refusal(config, f"Transformers needs a package to build it: {reason}") from error
    decoder = model.get_decoder()
    language_model = next((name for name, module in model.named_modules() if module is decoder), "")
    if not language_model or model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise _refusal(config, "Transformers names no language model in it that has embeddings and a head")
    omitted = tuple(_omitted_modules(model, language_model))
    return TextModel(_text_only_class(whole, omitted), language_model, omitted)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a text-only model that is not causal; multimodal models may build masks of their own.

    Raises:
        ModelError: a later token changes earlier predictions, or the model does not run without its encoders.
    """
    tokens = torch.arange(CHECK_TOKENS, device=model.device)[None]
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    try:
        with eval_mode(model):
            one, other = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].float()
                for ids in (tokens, changed)
            )
    except (AttributeError, TypeError, ValueError) as error:
        raise _refusal(model.config, f"its language model does not run alone ({first_line(error)})") from error
    # rounding may route a token to another expert; a mask that shows the future changes every position
    differs = (one - other).abs().amax(-1) > CHECK_TOLERANCE * one.abs().amax()
    if differs.float().mean() > 0.5:
        raise _refusal(model.config, "its predictions depend on later tokens, which are the labels")


def _refusal(config: Any, reason: str) -> ModelError:
    return ModelError(
        f"config.json: model_type: a {config.model_type} model cannot train on text: {reason}; use a text model, or a "
        "multimodal one with a separate language model"
    )


def _omitted_modules(model: Any, language_model: str) -> Iterator[OmittedModule]:
    """Yield the modules with weights beside the path to the language model, except the output head."""
    head = model.get_output_embeddings()
    path = language_model.split(".")
    for depth, on_path in enumerate(path):
        parent = ".".join(path[:depth])
        for name, child in model.get_submodule(parent).named_children():
            num_weights = sum(parameter.numel() for parameter in child.parameters())
            if name != on_path and child is not head and num_weights:
                yield OmittedModule(f"{parent}.{name}".lstrip("."), num_weights)


def _text_only_class(whole: Any, omitted_modules: tuple[OmittedModule, ...]) -> Any:
    """Return a subclass of the whole model's class with None in place of the omitted modules."""

    def build(self: Any, *arguments: Any, **settings: Any) -> None:
        whole.__init__(self, *arguments, **settings)
        for module in omitted_modules:
            parent, _, name = module.name.rpartition(".")
            setattr(self.get_submodule(parent), name, None)
        parameters = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {
            name: source for name, source in self.all_tied_weights_keys.items() if name in parameters
        }

    unused = [*(whole._keys_to_ignore_on_load_unexpected or ()), *(f"^{each.pattern}$" for each in omitted_modules)]
    content = {
        "__init__": build,
        "__module__": whole.__module__,
        "__doc__": whole.__doc__,
        "_keys_to_ignore_on_load_unexpected": unused,
    }
    return type(whole.__name__, (whole,), content)
