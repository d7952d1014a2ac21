"""Cases of the Gram matrix of layer inputs, applied to a thin matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import functional
from . import baselines
from .case import OURS, Case, Draw, Prepared, Variant, read_all, relative_error

BOUND = 1e-5


def gram_apply(
    name: str,
    modules: int,
    tokens: int,
    d: int,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    default: bool = False,
) -> Case:
    """Inputs of ``modules`` layers in ``dtype``, weighted; Z in fp32. The chain on bf16 inputs loses accuracy, the one
    on an fp32 copy of them loses time."""
    size = modules * tokens * d * dtype.itemsize

    def prepare(draw: Draw) -> Prepared:
        xs = [draw.normal(tokens, d).to(dtype) for _ in range(modules)]
        zs = [draw.normal(d, rank) for _ in range(modules)]
        weights = [draw.normal(tokens).square() for _ in range(modules)]
        few = slice(0, min(tokens, 512))
        part, z, w = xs[0][few], zs[0], weights[0][few]
        truth = baselines.torch_gram_apply(part.double(), z.double(), w.double())

        def ours() -> float:
            return relative_error(functional.gram_apply(part, z, w), truth)

        def chain(name: str, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Variant:
            def call() -> None:
                for triple in zip(xs, zs, weights, strict=True):
                    form(*triple)

            return Variant(name, call, lambda: relative_error(form(part, z, w), truth))

        variants = [
            Variant(OURS, lambda: functional.gram_apply_layers(xs, zs, weights), ours, BOUND),
            chain("torch chain in the dtype of X", baselines.torch_gram_apply),
        ]
        if dtype != torch.float32:
            variants.append(chain("torch chain on an fp32 copy of X", baselines.upcast_gram_apply))
        return Prepared(variants, lambda: read_all(xs))

    parameters = {
        "modules": modules,
        "tokens": tokens,
        "d": d,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
    }
    memory = size + 4 * tokens * d * 3 + 8 * 3 * 512 * d + 12 * modules * d * rank + 4 * (1 << 16)
    return Case(
        "gram_apply_layers",
        name,
        size,
        4.0 * modules * tokens * d * rank,
        memory,
        prepare,
        torch.float32,
        parameters,
        default,
    )


def cases() -> Iterator[Case]:
    yield gram_apply("8192 × 4096, r=16", 1, 8192, 4096, 16, default=True)
    yield gram_apply("8192 × 4096, r=16, fp32", 1, 8192, 4096, 16, torch.float32)
    for rank in (4, 8, 64):
        yield gram_apply(f"8192 × 4096, r={rank}", 1, 8192, 4096, rank)
    yield gram_apply("8192 × 11008, r=16", 1, 8192, 11008, 16)
    yield gram_apply("30 × (2048 × 576), r=8", 30, 2048, 576, 8)
