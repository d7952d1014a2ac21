"""Any shape, dtype and stride: the kernels against the truth on inputs that hypothesis chooses."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import safelora_kernels as sk

from ..conftest import AVAILABLE
from . import truth
from .truth import FLOATS, UNIT_ROUNDOFF, assert_accurate, random_basis, random_layer

small = st.integers(1, 40)
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**31 - 1)
fixed = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[bool, int, int, int, int]:
    return (
        draw(st.booleans()),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
    )


def arrange(tensor: Tensor, how: tuple[bool, int, int, int, int]) -> Tensor:
    """The same values, transposed in memory, strided and off the start of a larger buffer."""
    transposed, row_step, column_step, row_offset, column_offset = how
    if transposed:
        tensor = tensor.t()
    rows, columns = tensor.shape
    buffer = torch.full(
        (row_offset + rows * row_step, column_offset + columns * column_step), torch.nan, dtype=tensor.dtype
    )
    view = buffer[row_offset::row_step, column_offset::column_step]
    view.copy_(tensor)
    return view.t() if transposed else view


@fixed
@given(
    st.sampled_from(AVAILABLE),
    small,
    small,
    st.integers(1, 24),
    dtypes,
    dtypes,
    dtypes,
    st.tuples(*[arrangements()] * 4),
    seeds,
)
def test_project_lowrank(
    backend: str,
    d_out: int,
    d_in: int,
    rank: int,
    aligned: torch.dtype,
    base: torch.dtype,
    factor: torch.dtype,
    how: tuple[tuple[bool, int, int, int, int], ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = random_layer(d_out, d_in, rank, aligned, factor, base)
    arranged = truth.Layer(*(arrange(t, h) for t, h in zip(layer, how, strict=True)))
    assume(sk.explain("project_lowrank", *arranged, backend=backend).backend)
    result = sk.project_lowrank(*arranged, backend=backend)
    assert isinstance(result.lora_B, Tensor)
    assert result.lora_B.dtype == factor
    v, expected = truth.difference(layer.aligned, layer.base), truth.project(*layer[:3])
    if not v.any():
        return
    # Element by element, since few and opposite terms may cancel to any relative error of the whole.
    terms = v.abs() @ (v.abs().T @ layer.lora_B.double().abs()) / v.norm()
    allowed = 2.0**-24 * (d_out + d_in + 4) * terms
    tiny = torch.finfo(factor).smallest_normal * torch.finfo(factor).eps
    rounding = UNIT_ROUNDOFF[factor] * (expected.abs() + allowed) + tiny
    assert bool(((result.lora_B.double() - expected).abs() <= allowed + rounding).all())
    if expected.any():
        relative = float(allowed.norm() / expected.norm())
        error = float(result.cosine - truth.cosine(expected, layer.lora_B, layer.lora_A))  # type: ignore[operator]
        assert abs(error) <= 1e-6 + 2 * relative


@fixed
@given(
    st.sampled_from(AVAILABLE),
    st.lists(st.tuples(small, small, st.integers(0, 12), dtypes, dtypes, arrangements(), arrangements()), max_size=4),
    st.sampled_from(["left", "right"]),
    st.booleans(),
    seeds,
)
def test_project_out_layers(
    backend: str,
    pairs: list[
        tuple[int, int, int, torch.dtype, torch.dtype, tuple[bool, int, int, int, int], tuple[bool, int, int, int, int]]
    ],
    side: str,
    in_place: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    xs, bases = [], []
    for d, m, k, dtype, basis_dtype, how_x, how_u in pairs:
        xs.append(arrange(torch.randn((d, m) if side == "left" else (m, d)).to(dtype), how_x))
        u = 0.7 * random_basis(d, min(d, k), basis_dtype)
        bases.append(arrange(u, how_u) if k else u)
    expected = [truth.project_out(x, u, side) for x, u in zip(xs, bases, strict=True)]
    assume(sk.explain("project_out_layers", xs, bases, side=side, backend=backend).backend)
    if in_place:
        sk.project_out_layers_(xs, bases, side=side, backend=backend)  # type: ignore[arg-type]
        results = xs
    else:
        results = sk.project_out_layers(xs, bases, side=side, backend=backend)  # type: ignore[arg-type]
    for y, x, e in zip(results, xs, expected, strict=True):
        assert y.dtype == x.dtype
        assert_accurate(y, e, 1e-5)


@fixed
@given(
    st.sampled_from(AVAILABLE),
    st.integers(0, 40),
    small,
    small,
    st.integers(1, 20),
    st.integers(0, 12),
    st.tuples(*[dtypes] * 5),
    st.tuples(*[arrangements()] * 5),
    seeds,
)
def test_salora_linear(
    backend: str,
    tokens: int,
    d_in: int,
    d_out: int,
    rank: int,
    k: int,
    kinds: tuple[torch.dtype, ...],
    how: tuple[tuple[bool, int, int, int, int], ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shapes = [(tokens, d_in), (tokens, d_out), (rank, d_in), (d_out, rank)]
    plain = [torch.randn(shape) for shape in shapes] + [random_basis(d_out, min(d_out, k))]
    given_tensors = [arrange(t.to(kind), h) for t, kind, h in zip(plain, kinds, how, strict=True)]
    assume(sk.explain("salora_linear", *given_tensors, 0.5, backend=backend).backend)
    y = sk.salora_linear(*given_tensors, 0.5, backend=backend)  # type: ignore[arg-type]
    assert y.dtype == kinds[1]
    assert_accurate(y, truth.salora(*given_tensors, 0.5), 1e-5)  # type: ignore[arg-type]


@fixed
@given(
    st.sampled_from(AVAILABLE),
    st.integers(0, 300),
    small,
    st.integers(1, 40),
    st.tuples(dtypes, dtypes, dtypes),
    st.booleans(),
    st.tuples(*[arrangements()] * 2),
    seeds,
)
def test_gram_apply(
    backend: str,
    tokens: int,
    d: int,
    rank: int,
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype],
    weighted: bool,
    how: tuple[tuple[bool, int, int, int, int], ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, z = torch.randn(tokens, d).to(kinds[0]), torch.randn(d, rank).to(kinds[1])
    weights = torch.randn(tokens).to(kinds[2]) if weighted else None
    assume(sk.explain("gram_apply", x, z, weights, backend=backend).backend)
    y = sk.gram_apply(arrange(x, how[0]), arrange(z, how[1]), weights, backend=backend)
    wide = torch.float64 in (*kinds[:2], *kinds[2 if weighted else 3 :])
    assert y.dtype == (torch.float64 if wide else torch.float32)
    # Element by element, since few and opposite terms may cancel to any relative error of the whole.
    ones = torch.ones(tokens) if weights is None else weights
    terms = truth.gram_apply(x.abs(), z.abs(), ones.abs())
    unit = 2.0**-53 if wide else 2.0**-24
    error = (y.double() - truth.gram_apply(x, z, weights)).abs()
    assert bool((error <= unit * ((tokens + d + 12) * terms + 1)).all())
