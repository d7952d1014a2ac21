"""Captured Triton launches: a replay gets its tables from nothing but the arguments of kernels, and repeats the bits.

A CUDA graph keeps which operations ran on which device memory, and the arguments of kernels; the host's memory and
code are gone when it is replayed. So the launches and the fills of a call are recorded in the interpreter, everything
that it allocated is spoiled, and what was recorded runs once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from safelora_kernels.triton import complement, cosine, gram, project, salora, select, tables
from tests.ops.truth import random_basis, random_layer

pytestmark = pytest.mark.interpreted

aten = torch.ops.aten
FILLS = {aten.zeros.default: 0.0, aten.zero_.default: 0.0}


class Graph(TorchDispatchMode):
    """What a capture keeps of a call: launches, fills, and the memory that it handed out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: list[Callable[[], Any]] = []
        self.memory: list[Tensor] = []
        self.launched: list[str] = []
        original = tables.run

        def run(launches: Iterable[tables.Launch], device: torch.device) -> None:
            for launch in launches:
                self.launched.append(launch.kernel.fn.__name__)
                self.steps.append(lambda launch=launch: original([launch], device))
                self.memory += [value for value in launch.args if isinstance(value, Tensor)]
                self.steps[-1]()

        monkeypatch.setattr(tables, "run", run)
        monkeypatch.setattr(tables, "capturing", lambda device: True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FILLS:
            self.steps.append(lambda: result.fill_(FILLS[func]))
        elif func is aten.new_full.default:
            self.steps.append(lambda: result.fill_(args[2]))
        return result

    def replay(self, inputs: Any, results: Any) -> None:
        """After everything that is not an input was spoiled."""
        kept = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(inputs)}
        for tensor in (*self.memory, *tensors_of(results)):
            if tensor.untyped_storage().data_ptr() not in kept:
                tensor.untyped_storage().fill_(0xA5)
        for step in self.steps:
            step()


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bits(value: Any) -> list[Tensor]:
    return [tensor.flatten().clone().view(torch.uint8) for tensor in tensors_of(value)]


def projection_inputs() -> tuple[list[Any], ...]:
    layers = [random_layer(128, 136, 3, torch.bfloat16), random_layer(9, 10, 2)]
    return (*(list(tensors) for tensors in zip(*layers, strict=True)), [0, 1])


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    xs = [torch.randn(70, 5), torch.randn(260, 16).bfloat16()]
    return xs, [random_basis(len(x), 6) for x in xs]


def gram_inputs() -> tuple[list[Tensor], ...]:
    xs = [torch.randn(70, 24), torch.randn(40, 16).bfloat16()]
    return xs, [torch.randn(x.shape[1], 4) for x in xs], [torch.rand(70), torch.zeros(0)]


def salora_inputs() -> list[Any]:
    return [torch.randn(20, 24), torch.randn(20, 40), torch.randn(4, 24), torch.randn(40, 4), random_basis(40, 5), 0.7]


def backward(inputs: list[Any]) -> Any:
    x, _, a, b, u, scaling = inputs
    h, projected_B = x @ a.T, b - u @ (u.T @ b)
    dy = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    return (dy, x, h, a, b, projected_B, u, scaling, [True, True, True, False])


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Sequence[Any]]]] = {
    "project_layers": (project.project_layers, projection_inputs),
    "project_selected_layers": (project.project_selected_layers, lambda: (*projection_inputs(), None, 1)),
    "update_cosine": (
        cosine.update_cosine,
        lambda: (
            [[torch.randn(40, 3), torch.randn(30, 20)] for _ in range(2)] + [[torch.randn(3, 50), torch.randn(20, 9)]]
        ),
    ),
    "select_layers": (select.select_layers, lambda: (torch.rand(50, dtype=torch.float64), None, 20, "strict")),
    "project_out_layers": (complement.project_out_layers, pairs),
    "project_out_layers_": (complement.project_out_layers_, pairs),
    "gram_apply_layers": (gram.gram_apply_layers, gram_inputs),
    "salora_linear": (salora.salora_linear, salora_inputs),
    "salora_linear_backward": (salora.salora_linear_backward, lambda: backward(salora_inputs())),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_replay_repeats_the_call(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, make = CALLS[op]
    torch.manual_seed(3)
    inputs = make()
    given = [tensor.clone() for tensor in tensors_of(inputs)]
    expected = bits((function(*inputs), inputs))  # with the tables copied
    for tensor, before in zip(tensors_of(inputs), given, strict=True):
        tensor.copy_(before)
    graph = Graph(monkeypatch)
    with graph:
        result = function(*inputs)
    assert all(map(torch.equal, bits((result, inputs)), expected))
    assert ("write_kernel" in graph.launched) == (op != "select_layers")
    for tensor, before in zip(tensors_of(inputs), given, strict=True):
        tensor.copy_(before)
    graph.replay(inputs, result)
    assert all(map(torch.equal, bits((result, inputs)), expected))


def test_a_table_that_is_copied_while_capturing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    function, make = CALLS["project_out_layers"]
    inputs = make()
    graph = Graph(monkeypatch)
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    with graph:
        result = function(*inputs)
    expected = bits(result)
    graph.replay(inputs, result)
    assert not any(map(torch.equal, bits(result), expected))


@pytest.mark.parametrize("size", [1, tables.PIECE - 1, tables.PIECE, 2 * tables.PIECE + 3])
def test_written_tables_are_the_copied_ones(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(-(1 << 60), 1 << 60, (size,))
    more = [0, 1, -1, 16, 1 << 47]
    copied = tables.upload(values.device, values, more)
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    written = tables.upload(values.device, values, more)
    for table, found, expected in zip(written, (values, torch.tensor(more)), (values, torch.tensor(more)), strict=True):
        assert torch.equal(table, expected)
        assert torch.equal(found, expected)
        assert table.data_ptr() % 16 == 0
    assert all(map(torch.equal, written, copied))
