"""Fused operations for functions that an attention module's forward looks up by name in its file.

Rotary embedding and eager attention are module-level functions, with the same names in nearly all of Transformers' files. A
module instance gets a copy of its own forward with other globals, in which such a name is a fused operation; the file and
other instances are unchanged. An override is used only if it matches the function on every call of a recorded forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.fused_mode import fused_kernels_apply
from qlora_train.kernels.grouped_attention import grouped_attention
from qlora_train.kernels.ops.rotary import rotate

Function = Callable[..., Any]

TOLERANCE = 1e-5
"""Of the comparison, in float32."""


def _rotary(reference: Function) -> Function:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **keywords: Any) -> Any:
        if more or keywords:
            return reference(q, k, cos, sin, *more, **keywords)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb


def _attention(reference: Function) -> Function:
    def eager_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> Any:
        if scaling is None or dropout:
            return reference(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **keywords)
        return grouped_attention(query, key, value, attention_mask, scaling), None

    return eager_attention_forward


OVERRIDES: Mapping[str, tuple[str, Callable[[Function], Function]]] = {
    "apply_rotary_pos_emb": ("rotary embeddings", _rotary),
    "eager_attention_forward": ("attentions", _attention),
}
"""By name of the function: the operation's name in summaries, and reference -> fused operation."""


class FunctionOverrides:
    """The functions of `OVERRIDES` that a module's forward looks up; without any, nothing is recorded or overridden."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._matches: dict[str, bool] = {}
        forward = type(module).forward
        names: set[str] = set()
        if isinstance(forward, FunctionType) and "forward" not in vars(module):
            names = OVERRIDES.keys() & set(forward.__code__.co_names) & forward.__globals__.keys()
        self._references: dict[str, Function] = {name: forward.__globals__[name] for name in sorted(names)}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Compare operations and references on each call, at once: the arguments of all layers would not fit in memory."""

        def compare(name: str, reference: Function) -> Function:
            fused = OVERRIDES[name][1](reference)

            def compared(*arguments: Any, **keywords: Any) -> Any:
                self._matches[name] = self._matches.get(name, True) and _match(reference, fused, arguments, keywords)
                return reference(*arguments, **keywords)

            return compared

        if not self._references:
            yield
            return
        self.module.forward = self._forward_with({name: compare(name, own) for name, own in self._references.items()})
        try:
            yield
        finally:
            del self.module.forward

    def operations(self) -> dict[str, Function]:
        """Return the operations that matched, by name of the function."""
        return {name: OVERRIDES[name][1](self._references[name]) for name, match in self._matches.items() if match}

    def forward(self) -> Function:
        """Return a forward that computes the matching operations if fused kernels apply."""
        own, fused = self.module.forward, self._forward_with(self.operations())

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return (fused if fused_kernels_apply() else own)(*arguments, **keywords)

        return forward

    def _forward_with(self, functions: Mapping[str, Function]) -> Function:
        own = type(self.module).forward
        names = {**own.__globals__, **functions}
        copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        copy.__kwdefaults__ = own.__kwdefaults__
        return MethodType(copy, self.module)


@torch.no_grad()
def _match(reference: Function, fused: Function, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    exact = [_exact(each) for each in arguments], {name: _exact(each) for name, each in keywords.items()}
    try:
        expected, actual = reference(*exact[0], **exact[1]), fused(*exact[0], **exact[1])
        pairs = [(one, two) for one, two in zip(expected, actual, strict=True) if two is not None]
        close = [one.shape == two.shape and torch.allclose(one, two, TOLERANCE, TOLERANCE) for one, two in pairs]
    except torch.OutOfMemoryError:  # no evidence against the operation
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError):  # other arguments, or other results
        return False
    return bool(close) and all(close)


def _exact(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
