"""Where Triton works, its kernels are found to."""

import torch

from qlora_train.kernels.ops.dispatch import works_on
from tests.support.triton_interpreter import DEVICE, needs_its_device

pytestmark = needs_its_device


def test_a_kernel_is_tried_and_works() -> None:
    assert works_on(torch.device(DEVICE))
