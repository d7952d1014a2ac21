"""Cases of SaLoRA's linear layer, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import functional
from . import baselines
from .case import OURS, Case, Draw, Prepared, Variant, read_all, relative_error

SCALING = 2.0


def salora(
    name: str,
    tokens: int,
    d: int,
    rank: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    factor: torch.dtype = torch.float32,
    *,
    backward: bool,
    compiled: bool = False,
    default: bool = False,
) -> Case:
    """A square layer on ``tokens`` rows of activations in ``dtype``; our factors in ``factor``, theirs in dtype."""
    size = dtype.itemsize * tokens * d * (5 if backward else 3)

    def prepare(draw: Draw) -> Prepared:
        x, base_output, dy = (draw.normal(tokens, d).to(dtype) for _ in range(3))
        lora_A, lora_B = draw.normal(rank, d, scale=d**-0.5).to(factor), draw.normal(d, rank).to(factor)
        basis = draw.basis(d, k)
        narrow = [t.to(dtype) for t in (lora_A, lora_B, basis)]
        complement = (torch.eye(d, device=x.device) - basis @ basis.T).to(dtype)

        def step(form: Callable[..., Tensor], lora_A: Tensor, lora_B: Tensor, operand: Tensor) -> Tensor:
            leaves = [t.detach().requires_grad_(backward) for t in (x, lora_A, lora_B)]
            y = form(leaves[0], base_output, leaves[1], leaves[2], operand, SCALING)
            if backward:
                torch.autograd.grad(y, leaves, dy)
            return y.detach()

        few = slice(0, min(tokens, 256))
        truth = baselines.torch_salora(
            x[few].double(), base_output[few].double(), lora_A.double(), lora_B.double(), basis.double(), SCALING
        )

        def variant(name: str, form: Callable[..., Tensor], *operands: Tensor, bound: float | None = None) -> Variant:
            call = partial(step, form, *operands)
            return Variant(name, call, lambda: relative_error(call()[few], truth), bound)

        bound = 1e-5 + torch.finfo(dtype).eps / 2
        variants = [
            variant(OURS, functional.salora_linear, lora_A, lora_B, basis, bound=bound),
            variant("best torch form", baselines.torch_salora, *narrow),
            variant("published form, dense C", baselines.dense_salora, *narrow[:2], complement),
        ]
        if compiled:
            variants.append(variant("torch.compile of the best", torch.compile(baselines.torch_salora), *narrow))
        moved = [x, base_output, dy] if backward else [x, base_output]

        def moving() -> None:
            read_all(moved)
            for _ in range(2 if backward else 1):
                base_output.clone()

        return Prepared(variants, moving)

    flops = tokens * d * rank * (4.0 if not backward else 12.0) + 4.0 * d * rank * k
    parameters = {"tokens": tokens, "d": d, "rank": rank, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    memory = 3 * size + 3 * 4 * d * d + 8 * 3 * 256 * d + 4 * (tokens * d + (1 << 16))
    op = "salora_linear, forward and backward" if backward else "salora_linear, forward"
    return Case(op, name, size, flops, memory, prepare, dtype, parameters, default)


def cases() -> Iterator[Case]:
    for backward in (False, True):
        yield salora(
            "2048 tokens, 4096², r=16, k=32", 2048, 4096, 16, 32, backward=backward, compiled=backward, default=True
        )
        yield salora("2048 tokens, 4096², r=16, k=32, fp32", 2048, 4096, 16, 32, torch.float32, backward=backward)
        yield salora("8192 tokens, 4096², r=16, k=32", 8192, 4096, 16, 32, backward=backward)
        yield salora("2048 tokens, 576², r=16, k=32", 2048, 576, 16, 32, backward=backward)
        wide = "2048 tokens, 4096², r=64, k=32"
        yield salora(wide, 2048, 4096, 64, 32, backward=backward)
        yield salora(f"{wide}, bf16 factors", 2048, 4096, 64, 32, factor=torch.bfloat16, backward=backward)
