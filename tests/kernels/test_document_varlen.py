"""Varlen attention of packed documents, with a reference in place of torch's kernel, which needs a GPU.

Tested are cu_seqlens, the gathered shared prefixes, and their gradients.
"""

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay, sliding_window_overlay

from qlora_train.kernels.packed import varlen
from qlora_train.kernels.packed.attention import Documents, packed_mask
from qlora_train.kernels.packed.document_index import Document
from qlora_train.kernels.packed.row_positions import packed_row
from qlora_train.kernels.packed.varlen import (
    CAUSAL,
    TRIAL,
    SequenceLengths,
    Window,
    supports,
    varlen_documents,
    works_on,
)
from tests.support.fake_cuda import IS_FAKE
from tests.support.varlen_reference import reference_varlen, use_reference_kernel

SCALING = 0.3
UNSHARED = (Document(0, 0, 0, 5), Document(5, 0, 5, 6), Document(6, 0, 6, 19))
SHARED = (
    Document(0, 0, 0, 9),
    Document(0, 4, 9, 12),
    Document(0, 8, 12, 13),
    Document(13, 0, 13, 20),
    Document(13, 6, 20, 31),
)


def leaves_for(spans: Sequence[Document]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    seq = max(span.end for span in spans)
    shapes = [(1, heads, seq, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Document], window: Window) -> Tensor:
    actual = []
    for span in sorted(spans, key=lambda span: span.begin):
        tokens = torch.tensor([*range(span.root, span.root + span.num_shared), *range(span.begin, span.end)])
        q, k, v = (states[:, :, tokens] for states in (query, key, value))
        sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        sees = sees if window == CAUSAL else sees.triu(-window[0])
        whole = functional.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=SCALING, enable_gqa=True)
        actual.append(whole[:, :, span.num_shared :])
    return torch.cat(actual, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [CAUSAL, (4, 0)])
@pytest.mark.parametrize("spans", [UNSHARED, SHARED, tuple(reversed(SHARED)), TRIAL])
def test_documents_attend_to_themselves_and_their_shared_prefix(
    spans: tuple[Document, ...], window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_reference_kernel(monkeypatch)
    computed: list[Callable[..., Tensor]] = [
        lambda *states: varlen_documents(*states, SequenceLengths.of(spans, torch.device("cpu"), window), SCALING),
        lambda *states: one_by_one(*states, spans, window),
    ]
    results = []
    for compute in computed:
        leaves = leaves_for(spans)
        output = compute(*leaves)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # shared gradients are summed in float32


def test_keys_without_shared_prefixes_are_not_gathered() -> None:
    cpu = torch.device("cpu")
    assert SequenceLengths.of(UNSHARED, cpu).keys is None
    keys = SequenceLengths.of(SHARED, cpu).keys
    assert keys is not None
    assert keys.tokens.tolist()[9:16] == [0, 1, 2, 3, 9, 10, 11]


@pytest.mark.parametrize("distance", [4, 5])
def test_only_a_sliding_window_mask_sets_the_window(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference_kernel(monkeypatch)

    def mask_function(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < distance)

    with packed_row(torch.arange(8).repeat(2)[None]):
        actual = packed_mask(
            batch_size=1, q_length=16, kv_length=16, mask_function=mask_function, local_size=4,
            device=torch.device("cpu"),
        )  # fmt: skip
    assert isinstance(actual, Documents)
    assert (actual.lengths is not None) == (distance == 4)
    assert actual.lengths is None or actual.lengths.window == (3, 0)


def test_sliding_window_is_detected_without_a_device_synchronization(monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference_kernel(monkeypatch)

    def find(mask_function: Callable[..., Tensor]) -> Documents:
        with packed_row(torch.arange(8).repeat(2)[None]):
            actual = packed_mask(
                batch_size=1, q_length=16, kv_length=16, mask_function=mask_function, local_size=4,
                device=torch.device("meta"),
            )  # fmt: skip
        assert isinstance(actual, Documents)
        return actual

    window = find(and_masks(sliding_window_overlay(4), causal_mask_function)).lengths
    assert window is not None
    assert window.window == (3, 0)
    chunks = chunked_overlay(4, torch.zeros(1, dtype=torch.long, device="meta"))
    assert find(and_masks(chunks, causal_mask_function)).lengths is None


@pytest.mark.parametrize("sizes", [(2, 16, 16), (1, 16, 20), (1, 12, 12)])
def test_masks_of_other_shapes_are_refused(sizes: tuple[int, int, int]) -> None:
    batch_size, q_length, kv_length = sizes
    with packed_row(torch.arange(8).repeat(2)[None]), pytest.raises(NotImplementedError, match=r"for 16 tokens"):
        packed_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=causal_mask_function,
            device=torch.device("cpu"),
        )  # fmt: skip


def test_unsupported_heads() -> None:
    def heads(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(1, 2, 3, size, dtype=dtype)

    assert supports(heads(64), heads(64))
    for query, value in (
        (heads(64, torch.float32), heads(64, torch.float32)), (heads(60), heads(60)), (heads(512), heads(512)),
        (heads(64), heads(32)),
    ):  # fmt: skip
        assert not supports(query, value)


def test_trial_computes_gradients_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    with torch.no_grad():  # as in the check that documents are isolated
        assert len(varlen._trial(torch.device("cpu"), CAUSAL, reference=False)) == 4


def test_options_of_later_torch_versions_are_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_2_11(*arguments: Tensor, scale: float, window_size: Window) -> Tensor:
        return reference_varlen(*arguments, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", torch_2_11)
    monkeypatch.setattr(varlen, "OPTIONS", inspect.signature(torch_2_11).parameters)
    assert len(varlen._trial(torch.device("cpu"), CAUSAL, reference=False)) == 4  # with grouped heads


def test_not_used_without_a_gpu() -> None:
    assert not works_on(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or IS_FAKE, reason="needs a CUDA device")
def test_trial_passes_on_a_gpu() -> None:
    assert works_on(torch.device("cuda", 0))
    assert works_on(torch.device("cuda", 0), windowed=True)
