"""The ops against a plain float64 oracle written from the formula, over odd shapes and special values."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquant.quantization import absmax_scale, pack, quantize_weight
from masquant.runtime import ops


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(
    seed: int, tokens: int, features: int, out: int, bits: int, group_size: int | None, modalities: int = 3
) -> Any:
    w = rand(seed, out, features)
    scale = absmax_scale(w, bits, group_size)
    q = quantize_weight(w, scale, bits)
    rows = torch.randint(0, modalities, (tokens,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    smooth = torch.rand(modalities, features, generator=torch.Generator().manual_seed(seed + 1)) + 0.2
    return rand(seed + 2, tokens, features), rows, smooth.bfloat16(), q, scale.bfloat16()


def oracle(x: Tensor, rows: Tensor, smooth: Tensor, q: Tensor, scale: Tensor, act_bits: int) -> Tensor:
    """Token by token in float64, integers summed exactly."""
    groups = scale.shape[1]
    out = torch.zeros(len(x), len(q), dtype=torch.float64)
    for t in range(len(x)):
        v = x[t].float() / smooth[rows[t].long()].float()
        if act_bits < 16:
            limit = 2 ** (act_bits - 1) - 1
            step = v.abs().max() / limit
            step = step if step != 0 else torch.tensor(1.0)
            integers, step = (v / step).round().clamp(-limit, limit).double(), step.double()
        else:
            integers, step = v.double(), torch.tensor(1.0, dtype=torch.float64)
        sums = integers.view(groups, 1, -1) * q.double().view(len(q), groups, -1).transpose(0, 1)
        out[t] = step * (sums.sum(-1) * scale.double().t()).sum(0)
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0, 1, 3, 17, 129, 255]),
    st.sampled_from([(64, 32), (96, 32), (64, 64), (40, None), (17, None)]),
    st.sampled_from([1, 5, 33]),
    st.sampled_from([4, 8]),
    st.sampled_from([6, 8, 16]),
)
def test_linear_equals_the_formula(
    seed: int, tokens: int, size: tuple[int, int | None], out: int, bits: int, act_bits: int
) -> None:
    features, group_size = size
    x, rows, smooth, q, scale = make(seed, tokens, features, out, bits, group_size)
    xq, xs = torch.ops.masquant.quantize_input(x, rows, smooth, act_bits)
    assert xq.dtype == (torch.float32 if act_bits == 16 else torch.int8)
    bias = rand(seed + 3, out)
    y = torch.ops.masquant.linear(xq, xs, pack(q, bits), scale, bias, [], [], bits, torch.float32)
    wanted = oracle(x, rows, smooth, q, scale, act_bits) + bias.double()
    # float32 sums of up to 4 groups, or of 96 products at 16-bit activations
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max() if tokens else 1))


def test_one_product_equals_one_product_per_modality() -> None:
    x, rows, smooth, q, scale = make(0, 40, 64, 24, 4, 32)
    packed = pack(q, 4)

    def run(part: Tensor, part_rows: Tensor) -> Tensor:
        xq, xs = torch.ops.masquant.quantize_input(part, part_rows, smooth, 8)
        return torch.ops.masquant.linear(xq, xs, packed, scale, None, [], [], 4, torch.float32)

    together = run(x, rows)
    for m in range(3):
        chosen = rows == m
        assert torch.equal(together[chosen], run(x[chosen], rows[chosen]))


def test_patch_touches_only_its_modality() -> None:
    x, rows, smooth, q, scale = make(1, 30, 64, 24, 4, 32)
    a, b = rand(5, 6, 64).bfloat16(), rand(6, 24, 6).bfloat16()
    xq, xs = torch.ops.masquant.quantize_input(x, rows, smooth, 8)
    u = torch.ops.masquant.project_input(x, rows, smooth, a, 2)
    plain = torch.ops.masquant.linear(xq, xs, pack(q, 4), scale, None, [], [], 4, torch.float32)
    patched = torch.ops.masquant.linear(xq, xs, pack(q, 4), scale, None, [u], [b], 4, torch.float32)
    chosen = rows == 2
    assert torch.equal(plain[~chosen], patched[~chosen])
    wanted = (x[chosen] / smooth[2].float()) @ a.float().t() @ b.float().t()
    torch.testing.assert_close(patched[chosen] - plain[chosen], wanted, rtol=1e-4, atol=1e-3)


def test_zero_rows_extreme_scales_and_strides() -> None:
    x, rows, smooth, q, scale = make(2, 6, 64, 24, 4, 32)
    x[0] = 0
    x[1] *= 1e30
    x[2] *= 1e-30
    packed = pack(q, 4)

    def run(inputs: Tensor) -> Tensor:
        xq, xs = torch.ops.masquant.quantize_input(inputs, rows, smooth, 8)
        return torch.ops.masquant.linear(xq, xs, packed, scale, None, [], [], 4, torch.float32)

    y = run(x)
    assert not y[0].any() and bool(y.isfinite().all())
    strided = torch.stack((x, x), -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(run(strided), y)
    wanted = oracle(x, rows, smooth, q, scale, 8)
    torch.testing.assert_close(y[1:3].double() / wanted[1:3], torch.ones(2, 24).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_tokens_show_and_stay_where_they_are(bad: float) -> None:
    x, rows, smooth, q, scale = make(3, 4, 64, 24, 4, 32)
    x[1, 5] = bad
    xq, xs = torch.ops.masquant.quantize_input(x, rows, smooth, 8)
    y = torch.ops.masquant.linear(xq, xs, pack(q, 4), scale, None, [], [], 4, torch.float32)
    assert not y[1].isfinite().all()
    assert bool(y[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_dtype(dtype: torch.dtype) -> None:
    x, rows, smooth, q, scale = make(4, 3, 64, 8, 8, None)
    xq, xs = torch.ops.masquant.quantize_input(x.to(dtype), rows, smooth, 8)
    y = torch.ops.masquant.linear(xq, xs, pack(q, 8), scale, None, [], [], 8, dtype)
    assert y.dtype == dtype


def test_fake_implementations_agree() -> None:
    x, rows, smooth, q, scale = make(5, 7, 64, 24, 4, 32)
    packed = pack(q, 4)
    a, b = rand(5, 6, 64).bfloat16(), rand(6, 24, 6).bfloat16()
    for bits in (8, 16):
        torch.library.opcheck(ops.quantize_input, (x, rows, smooth, bits))
        xq, xs = torch.ops.masquant.quantize_input(x, rows, smooth, bits)
        u = torch.ops.masquant.project_input(x, rows, smooth, a, 2)
        torch.library.opcheck(ops.linear, (xq, xs, packed, scale, None, [u], [b], 4, torch.bfloat16))
    torch.library.opcheck(ops.project_input, (x, rows, smooth, a, 1))
