"""The same bits in every run, and from the kernels for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk

from .truth import random_basis, random_layer

# The reference leaves its products to torch, whose order of summation may follow the number of threads.
THREADS = {"reference": (2, 2, 2)}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def projection(backend: str) -> list[Tensor]:
    shapes = [(257, 530, 16), (64, 1100, 5), (300, 40, 33), (96, 96, 64)]
    layers = [random_layer(*shape, weight=torch.bfloat16) for shape in shapes] + [random_layer(130, 700, 8)]
    results = sk.project_layers([sk.LayerFactors(*layer) for layer in layers], backend=backend)
    cosines = sk.update_cosine(
        [r.lora_B for r in results], [x[2] for x in layers], [x[3] for x in layers], backend=backend
    )  # type: ignore[misc]
    return [t for r in results for t in (r.lora_B, r.v_norm, r.cosine)] + [cosines]  # type: ignore[misc]


def complement(backend: str) -> list[Tensor]:
    xs = [torch.randn(d, m) for d, m in [(1025, 16), (64, 300), (700, 33)]]
    bases = [random_basis(x.shape[0], k) for x, k in zip(xs, (32, 7, 65), strict=True)]
    results = sk.project_out_layers(xs, bases, backend=backend)
    right = sk.project_out_layers([x.t() for x in xs], bases, side="right", backend=backend)
    sk.project_out_layers_(xs, bases, backend=backend)
    return [*results, *right, *xs]


def salora(backend: str, dtype: torch.dtype = torch.float32, factor: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(515, 300), (515, 260), (12, 300), (260, 12)]
    tensors = [torch.randn(shape).requires_grad_() for shape in shapes] + [random_basis(260, 9).requires_grad_()]
    x, base, a, b, u = tensors
    y = sk.salora_linear(x.to(dtype), base.to(dtype), a.to(factor), b.to(factor), u, 0.5, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors)]


def salora_on_bf16(backend: str) -> list[Tensor]:
    return [t for factor in (torch.float32, torch.bfloat16) for t in salora(backend, torch.bfloat16, factor)]


def gram(backend: str) -> list[Tensor]:
    shapes = [(1030, 70, 16), (300, 515, 5), (2050, 33, 40)]
    xs = [torch.randn(t, d).bfloat16() for t, d, _ in shapes]
    zs = [torch.randn(d, r) for _, d, r in shapes]
    return sk.gram_apply_layers(xs, zs, [torch.rand(1030), None, torch.rand(2050)], backend=backend)


@pytest.mark.parametrize("work", [projection, complement, salora, salora_on_bf16, gram])
def test_bits_do_not_depend_on_threads_or_runs(
    backend: str, threads: Callable[[int], None], work: Callable[[str], list[Tensor]]
) -> None:
    runs = []
    for count in THREADS.get(backend, (1, 2, 7, 7)):
        threads(count)
        torch.manual_seed(7)
        runs.append(work(backend))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_backends_agree(backend: str) -> None:
    torch.manual_seed(7)
    ours = projection(backend) + complement(backend) + salora(backend) + gram(backend)
    torch.manual_seed(7)
    plain = projection("reference") + complement("reference") + salora("reference") + gram("reference")
    for a, b in zip(ours, plain, strict=True):
        assert float((a.double() - b.double()).norm()) <= 2e-5 * float(b.double().norm())
