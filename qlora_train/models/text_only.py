"""The text part of a checkpoint that sees or hears: the whole model's class, built without its other modules.

Such a checkpoint holds a language model beside modules for images or sound and what joins them. A run on text needs the
language model alone. It is kept under the names that it has in the whole model, because these are the names that the
adapter and the merged folder must have to fit the whole model later; the other modules are taken out before any weight is
read, so that they cost neither memory nor time.

Nothing here knows a model: the language model is what Transformers calls the decoder, and a module is whatever lies
beside the way from the root to it.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM

from qlora_train.architectures import NEEDS_ENCODERS
from qlora_train.utils.errors import ModelError, first_line

logger = logging.getLogger(__name__)

CHECK_TOKENS = 16
CHECK_TOLERANCE = 1e-2
_SEES_THE_FUTURE = "a later token changes what it predicts before it, so that it would see what it is to learn"
_ALONE = "give a text model, or a multimodal one with a language model of its own"


@dataclass(frozen=True)
class OmittedModule:
    """A part that text does not need: its full name in the whole model, and how many weights it has."""

    name: str
    num_weights: int

    @property
    def pattern(self) -> str:
        """A regular expression for the names of its tensors and modules."""
        return self.name.replace(".", r"\.") + r"(\..*)?"


@dataclass(frozen=True)
class TextModel:
    """How to make the language model of a config.

    Attributes:
        model_class: has `from_pretrained`; Transformers' own choice where nothing is left out.
        language_model: name of the language model in the whole one; empty where it is the whole one.
        omitted_modules: the modules that are not there.
    """

    model_class: Any
    language_model: str = ""
    omitted_modules: tuple[OmittedModule, ...] = ()

    def build(self, config: Any, *, trust_remote_code: bool = False) -> Any:
        """Return the model with weights as the class draws them, on the device of the context.

        Its attention is eager, whatever the config names: a name may stand for code that Transformers would fetch.
        """
        if self.model_class is AutoModelForCausalLM:
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
        return self.model_class._from_config(config, attn_implementation="eager")

    def attention(self, config: Any, name: str) -> str | dict[str, str]:
        """Return an attention implementation for the language model alone; modules may have none of that name."""
        if not self.omitted_modules:
            return name
        text = config.get_text_config(decoder=True)
        parts = (part for part in type(config).sub_configs if getattr(config, part, None) is text)
        return {"": name, **dict.fromkeys(parts, name)}

    def report(self, model_type: str) -> None:
        """Log what is left out."""
        if self.omitted_modules:
            logger.info(
                "text part: %s of this %s model is trained; left out of memory: %s",
                self.language_model, model_type,
                ", ".join(f"{module.name} ({module.num_weights / 1e6:,.2f} M weights)" for module in self.omitted_modules),
            )  # fmt: skip


def text_model(config: Any) -> TextModel:
    """Return how to make the language model of a Transformers config.

    Raises:
        ModelError: a model of several modules whose language model cannot be taken out.
    """
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if whole is None:
        return TextModel(AutoModelForCausalLM)
    if obstacle := NEEDS_ENCODERS.get(config.model_type):
        raise _refusal(config, obstacle)
    text = config.get_text_config(decoder=True)
    if text is config:
        if type(config).sub_configs:
            raise _refusal(config, "its modules lie inside the language model")
        return TextModel(AutoModelForCausalLM)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise _refusal(config, "its text part is an encoder and a decoder, not a causal language model")
    model = _on_meta(config, whole)
    language_model = _language_model(config, model)
    omitted_modules = tuple(_omitted_modules(model, language_model))
    return TextModel(_without(whole, omitted_modules), language_model, omitted_modules)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a text part whose tokens see later ones, or that does not run without its modules.

    Whole models may make masks of their own: one that reads a text in both directions would be shown what it is to learn.

    Raises:
        ModelError: a later token changes what is predicted before it.
    """
    was_training = model.training
    tokens = torch.arange(CHECK_TOKENS, device=model.device)[None]
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    model.eval()
    try:
        one, other = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].float()
            for ids in (tokens, changed)
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise _refusal(model.config, f"its text part does not run alone ({first_line(error)})") from error
    finally:
        model.train(was_training)
    # a mixture may send a token elsewhere by rounding; a mask that shows the future moves every position
    moved = (one - other).abs().amax(-1) > CHECK_TOLERANCE * one.abs().amax()
    if moved.float().mean() > 0.5:
        raise _refusal(model.config, _SEES_THE_FUTURE)


def _refusal(config: Any, reason: str) -> ModelError:
    return ModelError(f"config.json: model_type: a {config.model_type} model cannot train on text: {reason}; {_ALONE}")


def _on_meta(config: Any, whole: Any) -> Any:
    try:
        with torch.device("meta"):
            return whole._from_config(config)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise _refusal(config, f"Transformers needs a package to build it: {reason.rstrip('.')}") from error


def _language_model(config: Any, model: Any) -> str:
    """Return the name of the language model in the whole one."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name or model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise _refusal(config, "Transformers names no language model in it that has embeddings and a head")
    return name


def _omitted_modules(model: Any, language_model: str) -> Iterator[OmittedModule]:
    """Yield what lies beside the way to the language model and has weights, but not the output head."""
    head = model.get_output_embeddings()
    parts = language_model.split(".")
    for depth, on_the_way in enumerate(parts):
        parent = ".".join(parts[:depth])
        for name, child in model.get_submodule(parent).named_children():
            num_weights = sum(parameter.numel() for parameter in child.parameters())
            if name != on_the_way and child is not head and num_weights:
                yield OmittedModule(f"{parent}.{name}".lstrip("."), num_weights)


def _without(whole: Any, omitted_modules: tuple[OmittedModule, ...]) -> Any:
    """Return the class of the whole model, whose models have None in the place of these modules."""

    def build(self: Any, *arguments: Any, **settings: Any) -> None:
        whole.__init__(self, *arguments, **settings)
        for module in omitted_modules:
            parent, _, name = module.name.rpartition(".")
            setattr(self.get_submodule(parent), name, None)
        self.all_tied_weights_keys = {
            name: source for name, source in self.all_tied_weights_keys.items() if _is_there(self, name)
        }

    unused = [*(whole._keys_to_ignore_on_load_unexpected or ()), *(f"^{module.pattern}$" for module in omitted_modules)]
    content = {
        "__init__": build,
        "__module__": whole.__module__,
        "__doc__": whole.__doc__,
        "_keys_to_ignore_on_load_unexpected": unused,
    }
    return type(whole.__name__, (whole,), content)


def _is_there(model: nn.Module, parameter: str) -> bool:
    try:
        model.get_parameter(parameter)
    except AttributeError:
        return False
    return True
