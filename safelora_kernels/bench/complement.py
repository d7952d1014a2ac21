"""Cases of the complement: ``X − U (Uᵀ X)`` for all layers at once, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import functional
from . import baselines
from .case import OURS, Case, Draw, Prepared, Variant, read_all, relative_error

BOUND = 1e-6


def complement(
    name: str, modules: int, d: int, columns: int, k: int, dtype: torch.dtype = torch.float32, default: bool = False
) -> Case:
    size = modules * (2 * d * columns * dtype.itemsize + 4 * d * k)

    def prepare(draw: Draw) -> Prepared:
        xs = [draw.normal(d, columns).to(dtype) for _ in range(modules)]
        bases = [draw.basis(d, k)] * 1
        bases += [bases[0].roll(shift, dims=0) for shift in range(1, modules)]
        narrow = [u.to(dtype) for u in bases]
        stacked_x, stacked_basis = torch.stack(xs), torch.stack(narrow)
        x, u = xs[0].clone(), bases[0]
        truth = x.double() - u.double() @ (u.double().T @ x.double())

        def moving() -> None:
            read_all(bases)
            for each in xs:
                each.neg_()

        def theirs() -> float:
            copy = x.clone()
            baselines.addmm_project_out_([copy], narrow[:1])
            return relative_error(copy, truth)

        bound = BOUND + torch.finfo(dtype).eps / 2
        variants = [
            Variant(
                OURS,
                lambda: functional.project_out_layers_(xs, bases),
                lambda: relative_error(functional.project_out(x, u), truth),
                bound,
            ),
            Variant("torch, a loop", lambda: baselines.loop_project_out_(xs, narrow), theirs),
            Variant("torch, addmm_", lambda: baselines.addmm_project_out_(xs, narrow), theirs),
            Variant(
                "torch, baddbmm_ on stacked tensors",
                lambda: baselines.baddbmm_project_out_(stacked_x, stacked_basis),
                theirs,
            ),
        ]
        return Prepared(variants, moving)

    flops = 4.0 * modules * d * columns * k
    parameters = {"modules": modules, "d": d, "columns": columns, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    memory = 4 * size + 8 * 4 * d * (columns + k)
    return Case("project_out_layers_", name, size, flops, memory, prepare, torch.float32, parameters, default)


def cases() -> Iterator[Case]:
    yield complement("224 × (4096×16), k=32", 224, 4096, 16, 32, default=True)
    yield complement("210 × (576×16), k=32", 210, 576, 16, 32)
    for k in (8, 128):
        yield complement(f"224 × (4096×16), k={k}", 224, 4096, 16, k)
    yield complement("224 × (4096×16), k=32, bfloat16", 224, 4096, 16, 32, torch.bfloat16)
    yield complement("64 × (4096×64), k=32", 64, 4096, 64, 32)
