"""The kernels compiled for NVIDIA GPUs, without a GPU, with the arguments of their launches."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_train.kernels.ops import (
    cross_entropy_triton,
    dequantize_triton,
    gated_triton,
    rms_norm_triton,
    rotary_triton,
)
from qlora_train.kernels.ops.dequantize import by_triton
from qlora_train.kernels.ops.rms_norm import Variant
from tests.support.triton_interpreter import IS_INTERPRETED

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="this process interprets kernels")
CAPABILITIES = pytest.mark.parametrize("capability", [75, 90], ids="sm_{}".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
            torch.int64: "*i64"}  # fmt: skip


class Compiled:
    """Compiles a kernel for a GPU instead of launching it.

    Attributes:
        assembly: PTX of each launch.
        machine_code: cubin of each launch.
    """

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.target = kernel, GPUTarget("cuda", capability, 32)
        self.assembly: list[str] = []
        self.machine_code: list[bytes] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        given = dict(zip(self.kernel.arg_names, arguments, strict=False))
        given |= {name: keywords.pop(name) for name in self.kernel.arg_names if name in keywords}
        signature, constants, aligned = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                aligned[place,] = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                aligned[place,] = value % 16 == 0
        attributes = {place: [["tt.divisibility", 16]] for place, is_so in aligned.items() if is_so}
        source = ASTSource(self.kernel, signature, constants, attributes)
        made = compile_kernel(source, target=self.target, options=keywords).asm
        self.assembly.append(made["ptx"])
        self.machine_code.append(made["cubin"])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[[ModuleType, str, int], Compiled]:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))

    def get(module: ModuleType, name: str, capability: int) -> Compiled:
        compiler = Compiled(getattr(module, name), capability)
        monkeypatch.setattr(module, name, compiler)
        return compiler

    return get


@CAPABILITIES
@DTYPES
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_dequantization_rounds_every_product_and_sum(
    double_quant: bool, dtype: torch.dtype, capability: int, compiled: Callable[..., Compiled]
) -> None:
    kernel = compiled(dequantize_triton, "_dequantize", capability)
    packed, state = bnb.quantize_4bit(torch.randn(64, 64), compress_statistics=double_quant, quant_type="nf4")
    by_triton(packed, state, dtype, None)
    by_triton(packed, state, dtype, torch.empty(64, 128, dtype=dtype)[:, :64])
    assert len(kernel.assembly) == 2
    for assembly in kernel.assembly:
        assert "mul.rn.f32" in assembly
        assert ("add.rn.f32" in assembly) == double_quant
        assert "fma.rn.f32" not in assembly


@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, 75), (torch.float32, 90)], ids=str)
def test_every_other_operation_compiles(dtype: torch.dtype, capability: int, compiled: Callable[..., Compiled]) -> None:
    kernels = [
        compiled(module, name, capability)
        for module, name in (
            (rms_norm_triton, "_forward"), (rms_norm_triton, "_backward"),
            (gated_triton, "_forward"), (gated_triton, "_backward"),
            (rotary_triton, "_rotate"), (cross_entropy_triton, "_losses_and_gradient"),
        )
    ]  # fmt: skip
    x = torch.randn(3, 192).to(dtype)
    for variant in (Variant(0.0, False), Variant(1.0, True)):
        _, scale = rms_norm_triton.forward(x, x[0], 1e-6, variant)
        rms_norm_triton.backward(x, x, x[0], scale, variant)
    for activation in ("silu", "gelu", "gelu_tanh"):
        gated_triton.forward(x, x, activation)
        gated_triton.backward(x, x, x, activation)
    heads, angles = x.view(1, 3, 2, 96), x[:1].view(1, 1, 2, 96)
    rotary_triton.forward(heads, angles, angles)
    rotary_triton.backward(heads, angles, angles)
    cross_entropy_triton.losses_and_gradient_(x, torch.arange(3))
    assert [len(kernel.assembly) for kernel in kernels] == [2, 2, 3, 3, 2, 1]
    for kernel in kernels:
        for assembly in kernel.assembly:
            assert f".target sm_{capability}" in assembly


KERNELS = {rms_norm_triton: ("_forward", "_backward"), gated_triton: ("_forward", "_backward"),
              rotary_triton: ("_rotate",),
              dequantize_triton: ("_dequantize",), cross_entropy_triton: ("_losses_and_gradient",)}  # fmt: skip


def test_large_models_fit_into_registers_and_move_sixteen_bytes_at_a_time(compiled: Callable[..., Compiled]) -> None:
    kernels = [compiled(module, name, 90) for module, names in KERNELS.items() for name in names]
    x = torch.randn(2, 16384).bfloat16()  # as wide as the largest dense models
    variant = Variant(0.0, rounds_first=True)
    _, scale = rms_norm_triton.forward(x, x[0], 1e-6, variant)
    rms_norm_triton.backward(x, x, x[0], scale, variant)
    gated_triton.forward(x, x, "silu")
    gated_triton.backward(x, x, x, "silu")
    rotary_triton.forward(x.view(1, 128, 2, 128), x[:1, :256].view(1, 1, 2, 128), x[:1, :256].view(1, 1, 2, 128))
    by_triton(*bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4"), torch.bfloat16, None)
    cross_entropy_triton.losses_and_gradient_(torch.randn(2, 128256).bfloat16(), torch.arange(2))
    for kernel in kernels:
        [assembly], [machine_code] = kernel.assembly, kernel.machine_code
        used = resource_usage(machine_code)
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel.kernel.__name__}: {used}"
        assert "ld.global.v4.b32" in assembly
        assert "st.global.v4.b32" in assembly
        alone = re.findall(r"(?:ld|st)\.global(?:\.v2)?\.b16", assembly)
        assert len(alone) == (kernel.kernel.__name__ == "_losses_and_gradient"), (
            "only the target logit is a scalar load"
        )


def resource_usage(machine_code: bytes) -> dict[str, int]:
    """Return registers per thread, and bytes of stack and shared memory, of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
