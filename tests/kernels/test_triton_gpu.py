"""The probe of Triton passes on a device where Triton works."""

import torch

from qlora_train.kernels.ops.dispatch import works_on
from tests.support.triton_interpreter import DEVICE, needs_its_device

pytestmark = needs_its_device


def test_probe_passes() -> None:
    assert works_on(torch.device(DEVICE))
