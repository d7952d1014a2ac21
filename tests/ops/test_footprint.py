"""Nothing of the size of a weight, or of d_out×d_out, is ever allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import safelora_kernels as sk

from .test_backends import NATIVE, python
from .truth import random_basis, random_layer


class LargestAllocation(TorchDispatchMode):
    """Records the largest storage, in elements, that an operation makes."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


def largest(given: list[Tensor], function: Callable[[], Any]) -> int:
    with LargestAllocation(given) as mode:
        function()
    assert mode.elements > 0
    return mode.elements


def test_reference_projection_allocates_no_weight() -> None:
    layer = random_layer(640, 1280, 8, torch.bfloat16)
    used = largest(list(layer), lambda: sk.project_lowrank(*layer, backend="reference"))
    assert used <= 640 * sk.reference.STRIP_COLUMNS < 640 * 640


def test_reference_complement_and_salora_allocate_nothing_square() -> None:
    d_out, tokens = 512, 32
    x, base, a, b = torch.randn(tokens, 96), torch.randn(tokens, d_out), torch.randn(4, 96), torch.randn(d_out, 4)
    u = random_basis(d_out, 8)
    tensors = [t.requires_grad_() for t in (x, base, a, b, u)]

    def step() -> None:
        y = sk.salora_linear(*tensors, 1.0, backend="reference")  # type: ignore[arg-type]
        (y.sum() + sk.project_out(b, u, backend="reference").square().sum()).backward()

    assert largest(tensors, step) <= tokens * d_out


def test_reference_gram_allocates_one_block_of_rows() -> None:
    tokens, d = 4096, 640
    x, z, w = torch.randn(tokens, d).bfloat16(), torch.randn(d, 4).requires_grad_(), torch.rand(tokens).requires_grad_()

    def step() -> None:
        sk.gram_apply(x, z, w, backend="reference").square().sum().backward()

    assert largest([x, z, w], step) <= sk.reference.BLOCK_ROWS * d
    assert largest([x], lambda: sk.gram(x)) <= d * d


MEASURE = """
import json, torch, safelora_kernels as sk

def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
d, r = 4096, %d
def filled(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype).uniform_(-1, 1)

def grown(work, *tensors):
    before = kib("VmRSS:")
    work(*tensors)
    return kib("VmHWM:") - before

small = [filled(64, 64, dtype=torch.bfloat16), filled(64, 64, dtype=torch.bfloat16), filled(64, 4), filled(4, 64)]
sk.project_lowrank(*small, backend="cpu")
sk.project_out_layers_([small[2]], [filled(64, 2)], backend="cpu")
sk.gram_apply(*small[1:3], backend="cpu")
result = {}
if "%s" == "project":
    tensors = [filled(d, d, dtype=torch.bfloat16), filled(d, d, dtype=torch.bfloat16), filled(d, r), filled(r, d)]
    result["grown"] = grown(lambda *t: sk.project_lowrank(*t, backend="cpu"), *tensors)
elif "%s" == "gram":
    x, z, w = filled(8192, d, dtype=torch.bfloat16), filled(d, r), filled(8192)
    result["grown"] = grown(lambda *t: sk.gram_apply(*t, backend="cpu"), x, z, w)
else:
    b, u = filled(d, r), filled(d, 32)
    result["grown"] = grown(lambda x, y: sk.project_out_layers_([x], [y], backend="cpu"), b, u)
print(json.dumps(result))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.skipif(not NATIVE, reason=f"no native kernels: {sk.backends()['cpu'].reason}")
@pytest.mark.parametrize(("work", "rank"), [("project", 16), ("project", 64), ("complement", 16), ("gram", 16)])
def test_native_peak_memory(work: str, rank: int) -> None:
    """One thread: 16 MiB of scratch, the result included. A bf16 copy of V, or C or XᵀX in bf16, would take 32."""
    done = python(MEASURE % (rank, work, work))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["grown"] <= 16 * 1024
