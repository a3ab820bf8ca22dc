"""A training step does not synchronize with the GPU before its end.

Exception: padded rows with sdpa, where Transformers checks for padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_train.kernels import host_copies
from tests.support.fake_cuda import IS_FAKE
from tests.support.runs import make_config
from tests.support.trainers import trainer_of

WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive"
}  # fmt: skip
"""Operations whose result, or its shape, the host reads."""
READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""Methods that dispatch no operation on the CPU."""


class OnDevice(TorchDispatchMode):
    """Treats some tensors, and all computed from them, as on a GPU, and records what would synchronize."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._storages: dict[int, Tensor] = {}  # kept alive, so that no address is reused
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> Tensor:
        self._storages[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = any(self.has(value) for value in tree_leaves((args, kwargs)))
        name = function.overloadpacket.__name__
        boolean = name == "index" and any(each.dtype == torch.bool for each in args[1] if self.has(each))
        if on_device and (name in WAITING or boolean):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        if on_device:
            for value in tree_leaves(result):
                if isinstance(value, Tensor) and value.numel():
                    self.add(value)
        return result


class Reads(TorchFunctionMode):
    def __init__(self, device: OnDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READING and self._device.has(args[0]):
            self._device.waits.append(function.__name__)
        return function(*args, **(kwargs or {}))


PADDING_FREE = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")
EAGER = ("model.attn_implementation=eager",)


@contextmanager
def on_device(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the operations that would synchronize with the model's device."""
    device = OnDevice([*model.parameters(), *model.buffers()])
    monkeypatch.setattr(host_copies, "to_device", lambda tensor, _device: device.add(tensor.clone()))
    with device, Reads(device):
        yield device.waits


@pytest.mark.parametrize(
    "settings",
    [
        PADDING_FREE,
        ("data.packing=true",),
        ("train.padding_free=false", "data.packing=true"),
        EAGER,
    ],
    ids=["padding-free", "packs", "packs without shared prefixes", "padded"],
)
def test_training_step_synchronizes_at_its_end_only(
    settings: tuple[str, ...], pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, pico_llama, "data.eval=null", "train.eval_steps=null", *settings)
    trainer, _ = trainer_of(config)
    trainer.create_optimizer()
    trainer._tr_loss = torch.zeros(())
    step = next(iter(trainer.get_train_dataloader()))
    assert any("position_ids" in batch for batch in step) == (settings != EAGER)
    num_labels = trainer._get_num_items_in_batch([step], torch.device("cpu"))
    model = trainer.model.train()
    with on_device(model, monkeypatch) as waits:
        trainer.training_step(model, step, num_labels)
        assert not waits
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert not waits
        trainer._get_grad_norm(model, norm)
        assert len(waits) == 2, "the loss and the norm"


@pytest.mark.gpu
@pytest.mark.skipif(IS_FAKE or not torch.cuda.is_available(), reason="needs a CUDA device that reports what waits")
@pytest.mark.parametrize("settings", [PADDING_FREE, ("data.packing=true",)], ids=["padding-free", "packs"])
def test_torch_sees_no_synchronization_on_a_gpu(settings: tuple[str, ...], pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, "data.eval=null", "train.eval_steps=null", *settings)
    trainer, _ = trainer_of(config)
    trainer.create_optimizer()
    trainer._tr_loss = torch.zeros((), device="cuda")
    step = next(iter(trainer.get_train_dataloader()))
    num_labels = trainer._get_num_items_in_batch([step], torch.device("cuda"))
    model = trainer.model.train()
    trainer.training_step(model, step, num_labels)  # the first step fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(model, step, num_labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
