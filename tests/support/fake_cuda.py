"""A CUDA device without a GPU: the CPU computes, and operations on tensors of two devices raise, as they do on a GPU.

`install()` changes torch for the whole process, before Transformers and accelerate are imported. With FAKE_CUDA=1,
`tests/conftest.py` calls it, so that tests marked `gpu` run on any machine: ``FAKE_CUDA=1 pytest -m gpu tests``.

Tensors stay CPU tensors with real values, so `.item()` and `.tolist()` work and whole runs do. The fake device is recorded
per storage. Python code sees it in `.device` and `.is_cuda`; a dispatch mode checks it before every operation, those of the
backward pass included, and a wrapper before every launch of an interpreted Triton kernel. The rules are torch's: pointwise
operations take CPU tensors of dimension 0, CPU indices index CUDA tensors, copies cross devices, the rest is a mismatch.

Not covered: C++ code that branches on the device (CUDA kernels, FlashAttention), streams, memory, other processes. Tensors
that C++ code creates have no device until they meet one. Autocast is that of the CPU.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IS_FAKE = os.environ.get("FAKE_CUDA") == "1"
"""Whether this process has the fake device."""

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TOTAL_BYTES = 8 << 30
CAPABILITY = (9, 0)

mismatches: list[str] = []
"""Mismatches so far; code under test may catch the exceptions."""

aten = torch.ops.aten
_CROSSES_DEVICES = {aten.copy_, aten._foreach_copy_, aten._to_copy, aten.set_}
_TAKES_CPU_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_TAKES_CPU_SCALARS = {
    aten.masked_fill,
    aten.masked_fill_,
    aten.fill_,
    aten.where,
    aten._amp_foreach_non_finite_check_and_unscale_,
}
_FACTORIES = (
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "as_tensor", "asarray",
    "empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
)  # fmt: skip
_METHOD_FACTORIES = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


class _Devices:
    """Storages on the fake device, or on a device that is not known yet; all others are on the CPU."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}
        self._purge_at = 1024
        self.in_kernel = 0

    def of(self, tensor: Tensor) -> torch.device | None:
        """Return the device; None while it is not known."""
        real = _real_device(tensor)
        if real != CPU or tensor.layout != torch.strided:
            return real
        with torch._C.DisableTorchFunction():
            return self._known.get(tensor.untyped_storage()._cdata, (None, CPU))[1]

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        """Record the device of a tensor's storage."""
        if _real_device(tensor) != CPU or tensor.layout != torch.strided:
            return
        if len(self._known) > self._purge_at:
            self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
            self._purge_at = 2 * len(self._known) + 1024
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if device == CPU:
            self._known.pop(storage._cdata, None)
        else:
            # the weak reference keeps the address from being taken by another storage
            self._known[storage._cdata] = StorageWeakRef(storage), device


devices = _Devices()
_real_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        device = CUDA if asked is not None and asked.type == "cuda" else _device_of_result(func, args, inputs)
        with as_kernel():
            if func.overloadpacket is aten.histc:  # of integers: there is none for the CPU
                args = (args[0].double(), *args[1:])
            result = func(*args, **kwargs)
        old = {id(tensor) for tensor in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in old and not func.is_view:
                devices.put(tensor, device)
        return result


def _device_of_result(func: Any, args: Sequence[Any], inputs: Sequence[Tensor]) -> torch.device | None:
    """Return the device of an operation's result, after checking its inputs.

    Raises:
        RuntimeError: the inputs are on different devices.
    """
    packet = func.overloadpacket
    found = [devices.of(tensor) for tensor in inputs]
    if packet in _CROSSES_DEVICES and inputs:
        return found[0]
    if not inputs:
        return None  # made by C++ code, whose options say CPU for tensors of either device
    if packet in _TAKES_CPU_INDICES and found[0] == CUDA:
        found = [device for device, tensor in zip(found, inputs, strict=True) if not _is_index(tensor)]
    if torch.Tag.pointwise in func.tags or packet in _TAKES_CPU_SCALARS:
        dimensional = [device for device, tensor in zip(found, inputs, strict=True) if tensor.dim()] or found
        found = found if CUDA not in found else [each for each in found if each != CPU or each in dimensional]
    kinds = {device for device in found if device is not None}
    if len(kinds) > 1:
        shapes = ", ".join(
            f"{device} {tuple(tensor.shape)}" for device, tensor in zip(map(devices.of, inputs), inputs, strict=True)
        )
        mismatches.append(f"{func}: {shapes}")
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices ({func}: {shapes})"
        )
    return kinds.pop() if kinds else None


def _is_index(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point


@contextmanager
def as_kernel() -> Iterator[None]:
    """Make tensors report the CPU to the code that computes there."""
    devices.in_kernel += 1
    try:
        yield
    finally:
        devices.in_kernel -= 1


# --- moves ------------------------------------------------------------------------------------------------------------


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = devices.of(tensor)
        return _copied(tensor, device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _copied(grads[0], ctx.device), None


def _copied(tensor: Tensor, device: torch.device | None) -> Tensor:
    with torch.no_grad():
        found = tensor.clone()
    devices.put(found, device)
    return found


def _device(tensor: Tensor) -> torch.device:
    if devices.in_kernel:
        return _real_device(tensor)
    return devices.of(tensor) or CPU


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replacement of `Tensor.to`."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    copy = kwargs.pop("copy", False) or (len(args) > 3 and args[3])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[:3], **kwargs)
    if device is None or _real_device(tensor) != CPU or device.type not in ("cpu", "cuda"):
        return _real_to(tensor, *args, **kwargs, **({"copy": True} if copy else {}))
    moved = tensor
    if (device.type == "cuda") != (_device(tensor).type == "cuda"):
        moved, copy = _Move.apply(tensor, CUDA if device.type == "cuda" else CPU), False
    options = {} if memory_format is None else {"memory_format": memory_format}
    return _real_to(moved, dtype=dtype or tensor.dtype, non_blocking=non_blocking, copy=copy, **options)


_real_to = torch.Tensor.to


def _makes(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make a tensor factory accept the fake device."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        if device is None and args and isinstance(args[0], Tensor):
            return make(*args, **kwargs)  # the device of its like
        if device is not None and device.type == "cuda":
            kwargs["device"] = CPU
        result = make(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                devices.put(tensor, CUDA if device is not None and device.type == "cuda" else CPU)
        return result

    return made


# --- torch.cuda -------------------------------------------------------------------------------------------------------


class _Stream:
    """A stream or event that completes immediately."""

    def __init__(self, *_args: Any, **_keywords: Any) -> None:
        self.device, self.cuda_stream = CUDA, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"query": lambda: True, "record_event": lambda *_: _Stream(), "elapsed_time": lambda *_: 0.0}.get(
            name, lambda *_args, **_keywords: None
        )


class _Scope(nullcontext[None]):
    def __init__(self, *_args: Any, **_keywords: Any) -> None:
        super().__init__()


def _nothing(*_args: Any, **_keywords: Any) -> None:
    return None


def _torch_cuda() -> dict[str, Any]:
    properties = SimpleNamespace(
        name="fake", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=TOTAL_BYTES, multi_processor_count=64,
        gcnArchName="sm_90", warp_size=32, max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
        uuid=f"fake-{os.getpid()}",
    )  # fmt: skip
    constants = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": "fake",
        "get_device_capability": CAPABILITY, "get_device_properties": properties, "is_bf16_supported": True,
        "mem_get_info": (TOTAL_BYTES, TOTAL_BYTES), "is_current_stream_capturing": False, "_is_in_bad_fork": False,
    }  # fmt: skip
    zeros = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    nothing = (
        "init", "_lazy_init", "empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "ipc_collect",
        "manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all", "set_stream",
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        **{name: lambda *_args, value=value, **_keywords: value for name, value in constants.items()},
        **{name: lambda *_args, **_keywords: 0 for name in zeros},
        **dict.fromkeys(nothing, _nothing),
        "default_generators": (torch.default_generator,),
        "get_arch_list": lambda: ["sm_90"],
        "memory_stats": lambda *_args, **_keywords: {},
        "get_rng_state": lambda *_: state.clone(),
        "get_rng_state_all": lambda: [state.clone()],
        **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), _Stream),
        **dict.fromkeys(("stream", "device", "device_of", "StreamContext"), _Scope),
    }


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an autocast function use the CPU when asked for CUDA."""

    @functools.wraps(function)
    def of_cpu(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if isinstance(each, str) and each.startswith("cuda") else each for each in args)
        if str(kwargs.get("device_type", "")).startswith("cuda"):
            kwargs["device_type"] = "cpu"
        return function(*args, **kwargs)

    return of_cpu


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _device(tensor).type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    return _real_numpy(tensor, *args, **kwargs)


_real_numpy = torch.Tensor.numpy


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    """Group tensors by fake device, as optimizers and clipping do."""

    def grouped(tensors: Any, *args: Any) -> Any:
        return {(lists[0][0].device, dtype): (lists, at) for (_, dtype), (lists, at) in group(tensors, *args).items()}

    return grouped


def _same_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make Triton kernel launches refuse CPU pointers."""

    @functools.wraps(launch)
    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for tensor in (
            tree_leaves((args, kwargs)) if not devices.in_kernel else ()
        ):  # inside an operator, which was checked
            if isinstance(tensor, Tensor) and not tensor.is_cuda:
                mismatches.append(f"{self.fn.__name__}: cpu {tuple(tensor.shape)}")
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return launch(self, *args, **kwargs)

    return launched


class _Generator(torch.Generator):
    """A CPU generator for every device."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, CPU)


@functools.cache
def install() -> None:
    """Install the fake device for the rest of this process."""
    import bitsandbytes  # noqa: F401 - it looks for a library for the GPU where it finds one

    _device_constructors()  # cached: `with torch.device(...)` looks for torch's own functions
    for name, value in _torch_cuda().items():
        setattr(torch.cuda, name, value)
    for name in _FACTORIES:
        setattr(torch, name, _makes(getattr(torch, name)))
    for name in _METHOD_FACTORIES:
        setattr(Tensor, name, _makes(getattr(Tensor, name)))
    changed: dict[str, Any] = {
        "device": property(_device), "is_cuda": property(lambda tensor: _device(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: _device(tensor).type == "cpu"),
        "to": _to, "cpu": lambda tensor, **_: tensor.to("cpu"), "cuda": lambda tensor, *_, **__: tensor.to("cuda"),
        "numpy": _numpy, "pin_memory": lambda tensor, *_: tensor.clone(), "record_stream": _nothing,
        "get_device": lambda tensor: 0 if tensor.is_cuda else -1,
    }  # fmt: skip
    for name, value in changed.items():
        setattr(Tensor, name, value)
    for name in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
        setattr(torch.backends.cuda, name, lambda *_: True)
    torch.Generator = _Generator  # type: ignore[misc]
    autocast = torch.amp.autocast_mode.autocast
    autocast.__init__ = _for_cpu(autocast.__init__)  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, _for_cpu(getattr(torch, name)))
    torch._C._group_tensors_by_device_and_dtype = _grouped(torch._C._group_tensors_by_device_and_dtype)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        GridExecutor.__call__ = _same_device(GridExecutor.__call__)
    torch._C._set_only_lift_cpu_tensors(True)
    _Dispatch().__enter__()
