"""Functions that an attention module's forward looks up by name, in its file, and operations in their place.

Rotary embedding and eager attention are functions of the file that a module is defined in, under the same names in nearly
all files of Transformers. A module gets a copy of its own forward for which such a name means an operation of this package;
the file, and other modules of it, are not changed. An operation takes a function's place where it computes the same from
what the function was seen to be called with.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.kernels.grouped_attention import grouped_attention
from qlora_train.kernels.ops.rotary import rotate

Function = Callable[..., Any]

TOLERANCE = 1e-5
"""Of the comparison, in float32."""


def _rotary(own: Function) -> Function:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **keywords: Any) -> Any:
        if more or keywords:
            return own(q, k, cos, sin, *more, **keywords)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb


def _attention(own: Function) -> Function:
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
            return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **keywords)
        return grouped_attention(query, key, value, attention_mask, scaling), None

    return eager_attention_forward


@dataclass(frozen=True, slots=True)
class Replacement:
    """What takes a function's place.

    Attributes:
        said: what several of it are called.
        make: makes the operation, which hands on to the function what it does not compute.
    """

    said: str
    make: Callable[[Function], Function]


REPLACEMENTS: Mapping[str, Replacement] = {
    "apply_rotary_pos_emb": Replacement("rotary embeddings", _rotary),
    "eager_attention_forward": Replacement("attentions", _attention),
}
"""By name of the function."""


@dataclass
class LookedUp:
    """The functions of `REPLACEMENTS` that a module looks up.

    Attributes:
        module: it.
        own: the functions, by name.
        made: the operations that may replace them.
        is_same: whether these computed the same whenever the functions were called while watched.
    """

    module: Any
    own: dict[str, Function]
    made: dict[str, Function]
    is_same: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> "LookedUp | None":
        """Return what a module looks up; None for nothing."""
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or "forward" in vars(module):
            return None
        names = REPLACEMENTS.keys() & set(forward.__code__.co_names) & forward.__globals__.keys()
        own = {name: forward.__globals__[name] for name in sorted(names)}
        return cls(module, own, {name: REPLACEMENTS[name].make(own[name]) for name in own}) if own else None

    def forward_with(self, functions: Mapping[str, Function]) -> Function:
        """Return the module's own forward, for which these names are these functions."""
        own = type(self.module).forward
        names = {**own.__globals__, **functions}
        copied = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        copied.__kwdefaults__ = own.__kwdefaults__
        return MethodType(copied, self.module)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Try the operations on what the functions are called with, at once: it need not be stored for every layer."""

        def noting(name: str, own: Function) -> Function:
            def note(*arguments: Any, **keywords: Any) -> Any:
                self.is_same[name] = self.is_same.get(name, True) and _same(own, self.made[name], arguments, keywords)
                return own(*arguments, **keywords)

            return note

        self.module.forward = self.forward_with({name: noting(name, own) for name, own in self.own.items()})
        try:
            yield
        finally:
            del self.module.forward

    def replaced(self) -> dict[str, Function]:
        """Return the operations that compute what the functions did."""
        return {name: self.made[name] for name, same in self.is_same.items() if same}


@torch.no_grad()
def _same(own: Function, other: Function, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    exact = [_exact(each) for each in arguments], {name: _exact(each) for name, each in keywords.items()}
    try:
        wanted, found = own(*exact[0], **exact[1]), other(*exact[0], **exact[1])
        pairs = [(one, two) for one, two in zip(wanted, found, strict=True) if two is not None]
        same = [one.shape == two.shape and torch.allclose(one, two, TOLERANCE, TOLERANCE) for one, two in pairs]
    except torch.OutOfMemoryError:  # says nothing about the function
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError):  # other arguments, or other results
        return False
    return bool(same) and all(same)


def _exact(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
