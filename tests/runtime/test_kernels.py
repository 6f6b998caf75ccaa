"""The kernels against the PyTorch specification, over odd shapes and special values, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquant.compensation import ALL_TOKENS
from masquant.errors import KernelError
from masquant.modality import Modality, ModalityState, ModalityTokens
from masquant.quantization import absmax_scale, dequantize_weight, pack, quantize_weight
from masquant.rotation import Rotation
from masquant.runtime import MasquantLinear, native, ops
from masquant.runtime.linear import GroupInput, LinearSpec
from masquant.runtime.packed import PackedGroup

pytestmark = pytest.mark.skipif(native.library() is None, reason="masquant was installed without kernels")
SETS = native.instruction_sets()


@pytest.fixture(autouse=True)
def best_afterwards() -> Iterator[None]:
    yield
    native.select(SETS[0])


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Linears:
    """A group of linears with the tensors of a checkpoint."""

    def __init__(self, seed: int, features: int, group_size: int | None, bits: int, rows: tuple[int, ...]) -> None:
        self.bits, self.features = bits, features
        weights = [rand(seed + i, n, features) for i, n in enumerate(rows)]
        scales = [absmax_scale(w, bits, group_size) for w in weights]
        self.q = [quantize_weight(w, s, bits) for w, s in zip(weights, scales, strict=True)]
        self.packed = [pack(q, bits) for q in self.q]
        self.scales = [s.bfloat16() for s in scales]
        self.biases = [rand(seed + 9, n) if i % 2 == 0 else None for i, n in enumerate(rows)]

    def group(self, activation_bits: int = 8, **more: object) -> PackedGroup:
        return PackedGroup(
            self.packed, self.scales, self.biases, in_features=self.features, num_bits=self.bits,
            activation_bits=activation_bits, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def specification(self, member: int, q: Tensor, scale: Tensor, projected: list[Tensor], b: list[Tensor]) -> Tensor:
        arguments = (self.packed[member], self.scales[member], self.biases[member], projected, b, self.bits)
        return torch.ops.masquant.linear(q, scale, *arguments, torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from(SETS),
    st.sampled_from([0, 1, 2, 3, 4, 5, 31, 255]),
    st.sampled_from([(64, 32), (96, 32), (64, 64), (128, 128), (40, None), (17, None), (1, None)]),
    st.sampled_from([(1,), (16,), (33, 5), (48, 16, 17)]),
    st.sampled_from([4, 8]),
    st.sampled_from([6, 8]),
    st.booleans(),
)
def test_group_equals_the_specification(
    seed: int,
    name: str,
    tokens: int,
    size: tuple[int, int | None],
    rows: tuple[int, ...],
    bits: int,
    activation_bits: int,
    media: bool,
) -> None:
    native.select(name)
    features, group_size = size
    linears = Linears(seed, features, group_size, bits, rows)
    smooth = (rand(seed + 1, 3, features).abs() + 0.3).bfloat16()
    smooth[0] = 1
    vision = ([1], rand(seed + 2, 5, features).bfloat16(), [rand(seed + 3, n, 5).bfloat16() for n in rows], None)
    audio = (
        [2],
        (20 * rand(seed + 4, 2, features)).to(torch.int8),
        [(20 * rand(seed + 5, n, 2)).to(torch.int8) for n in rows],
        rand(seed + 6, 2).bfloat16() / 400,
    )
    group = linears.group(activation_bits, smooth=smooth, patches={"vision": vision, "audio": audio}, modalities=3)
    x = rand(seed + 7, tokens, features)
    ids = torch.randint(0, 3, (tokens,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    modality = ids if media else None
    q, scale = torch.ops.masquant.quantize_input(x, modality, smooth if media else None, activation_bits)
    for found, wanted in zip(group.quantize(x, modality), (q, scale), strict=True):
        assert torch.equal(found, wanted)  # bit for bit: the same divisions, the same ties
    projected, factors = [], []
    if media:
        for rows_of, a, b, factor_scale in (vision, audio):
            u = torch.ops.masquant.project_input(x, ids, smooth, a, rows_of[0])
            projected.append(u if factor_scale is None else u * factor_scale.float())
            factors.append(b)
    for member, y in enumerate(group.forward(x, modality)):
        wanted = linears.specification(member, q, scale, projected, [b[member] for b in factors])
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_16_bit_activations_keep_15_bits(name: str, bits: int) -> None:
    native.select(name)
    linears = Linears(0, 192, 64, bits, (33, 16))
    for tokens in (1, 2, 3, 20):
        x = rand(tokens, tokens, 192)
        for member, y in enumerate(linears.group(16).forward(x, None)):
            bias = linears.biases[member]
            exact = x.double() @ dequantize_weight(linears.q[member], linears.scales[member]).double().t()
            exact = exact if bias is None else exact + bias
            assert float((y - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("size", [64, 96, 576, 1536, 6])
def test_rotated_input(name: str, size: int) -> None:
    native.select(name)
    rotation = Rotation(size, 3)
    linears = Linears(1, size, None, 4, (24,))
    x = rand(2, 5, size)
    (y,) = linears.group(16, rotation=rotation).forward(x, None)
    bias = linears.biases[0]
    assert bias is not None
    wanted = rotation.apply(x) @ dequantize_weight(linears.q[0], linears.scales[0]).t() + bias
    assert float((y - wanted).norm() / wanted.norm()) < 1e-4  # of 16-bit activations


@pytest.mark.parametrize("name", SETS)
def test_a_patch_for_all_tokens_and_bfloat16(name: str) -> None:
    native.select(name)
    linears = Linears(3, 64, 32, 4, (40,))
    a, b = rand(1, 4, 64).bfloat16(), rand(2, 40, 4).bfloat16()
    group = linears.group(patches={ALL_TOKENS: (range(2), a, [b], None)}, modalities=2)
    x = rand(4, 9, 64).bfloat16()
    (y,) = group.forward(x, None)
    q, scale = torch.ops.masquant.quantize_input(x, None, None, 8)
    u = torch.ops.masquant.project_input(x, None, None, a, -1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), linears.specification(0, q, scale, [u], [b]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", SETS)
def test_special_values(name: str) -> None:
    """Zero rows give the bias, extreme scales stay exact, NaN and infinity show in their own token only."""
    native.select(name)
    linears = Linears(5, 64, 32, 4, (24,))
    group = linears.group()
    x = rand(6, 9, 64)
    x[0] = 0
    x[1] *= 1e30
    x[2] *= 1e-30
    clean = group.forward(x, None)[0]
    bias = linears.biases[0]
    assert bias is not None
    assert torch.equal(clean[0], bias) and bool(clean.isfinite().all())
    q, scale = torch.ops.masquant.quantize_input(x, None, None, 8)
    wanted = linears.specification(0, q, scale, [], [])
    torch.testing.assert_close(clean, wanted, rtol=1e-4, atol=1e-5)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[4, 7] = bad
        y = group.forward(broken, None)[0]
        assert not y[4].isfinite().any()
        others = torch.arange(9) != 4
        assert torch.equal(y[others], clean[others])
        single = group.forward(broken[4:5], None)[0]
        assert not single.isfinite().any()


def test_strides_and_single_tokens_do_not_matter() -> None:
    linears = Linears(7, 128, 64, 4, (48, 16))
    group = linears.group()
    x = rand(8, 21, 128)
    whole = group.forward(x, None)
    strided = torch.stack((x, x), -1)[..., 0]
    assert not strided.is_contiguous()
    for a, b in zip(whole, group.forward(strided, None), strict=True):
        assert torch.equal(a, b)
    for t in range(len(x)):
        for a, b in zip(whole, group.forward(x[t : t + 1], None), strict=True):
            torch.testing.assert_close(a[t : t + 1], b, rtol=1e-5, atol=1e-5)


def test_threads_are_torchs_and_do_not_matter() -> None:
    linears = Linears(9, 256, 32, 4, (80, 32))
    group = linears.group()
    x = rand(10, 130, 256)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            library = native.library()
            assert library is not None and library.mq_threads() == threads
            results.append([*group.forward(x, None), *group.forward(x[:1], None)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 8]),
    st.integers(1, 70),
    st.integers(1, 90),
)
def test_packing_is_undone(seed: int, bits: int, rows: int, features: int) -> None:
    low = -(2 ** (bits - 1))
    q = torch.randint(low, -low, (rows, features), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    scale = rand(seed, rows, 1).bfloat16()
    group = PackedGroup([pack(q, bits)], [scale], [None], in_features=features, num_bits=bits, activation_bits=8)
    words, scales = group.unpack(0)
    assert torch.equal(words, pack(q, bits)) and torch.equal(scales, scale)
    if bits == 8:
        index = torch.tensor([0, rows - 1, rows // 2])
        taken, taken_scale = group.take_rows(index)
        assert torch.equal(taken, q[index]) and torch.equal(taken_scale, scale[index])


@pytest.mark.parametrize("factors", ["bfloat16", "int8"])
def test_a_packed_group_replaces_its_linears_tensors(factors: str) -> None:
    state, group = (
        ModalityState(ModalityTokens(tuple(Modality), {Modality.VISION: (1,), Modality.AUDIO: (2,)})),
        GroupInput(2),
    )
    linears = torch.nn.ModuleList(
        MasquantLinear(
            LinearSpec(40, n, True, 4, None, 8, True, {"vision": 3, "audio": 5}, factors, None, torch.float32),
            state,
            group,
        )
        for n in (24, 7)
    )
    for number, tensor in enumerate(linears.buffers()):
        values = 20 * rand(number, *tensor.shape)
        tensor.copy_(values) if tensor.dtype != torch.int64 else None
    wanted = {name: tensor.clone() for name, tensor in linears.state_dict().items()}
    packed = group.pack()
    left = {name.rpartition(".")[2] for name, _ in linears.named_buffers()}
    assert left <= {"weight_shape", "bias", "smooth_scale", "scale"}  # small; all else would be held twice
    found = linears.state_dict()
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(linears[1].compensation["audio"].b, wanted["1.compensation.audio.b"])
    assert linears[1].compensation["audio"].a is None
    linears.load_state_dict(wanted)
    assert group.packed is None and group.pack() is not packed
    linears.double()
    assert group.packed is None
    found = linears.state_dict()
    assert set(found) == set(wanted) and all(torch.equal(found[name].float(), wanted[name].float()) for name in wanted)


def test_the_specification_is_what_runs_without_kernels() -> None:
    """The environment variable turns the kernels off, with one warning, or refuses what this CPU lacks."""
    program = (
        "import torch, masquant\nfrom masquant.runtime import native\n"
        "print(native.library() is None, native.library() is None)"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, native.VARIABLE: value},
            capture_output=True, text=True,
        )  # fmt: skip

    off = run("off")
    assert off.stdout.split() == ["True", "True"] and off.stderr.count("many times slower") == 1
    wrong = run("sse9")
    assert wrong.returncode != 0 and "this CPU has" in wrong.stderr


def test_unknown_instruction_set() -> None:
    with pytest.raises(KernelError, match="cannot select"):
        native.select("sse9")


def test_compiled_graphs_run_the_kernels() -> None:
    linears = Linears(11, 64, 32, 4, (24, 8))
    group = linears.group()
    x = rand(12, 5, 64)
    arguments = (x, None, group.handle, list(group.rows))
    torch.library.opcheck(torch.ops.masquant.group_forward, arguments)
    for a, b in zip(torch.ops.masquant.group_forward(*arguments), group.forward(x, None), strict=True):
        assert torch.equal(a, b)


assert ops  # registers the specification
