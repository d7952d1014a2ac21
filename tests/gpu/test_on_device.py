"""What only a GPU shows: graphs that are captured and replayed, streams other than the default, devices other than the
first. Skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import safelora_kernels as sk

from ..ops.truth import random_basis, random_layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

Call = Callable[[], list[Tensor]]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    status = sk.backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    return str(request.param)


def _layers(device: str) -> list[sk.LayerFactors]:
    shapes = [(300, 520, 8), (40, 50, 3)]
    return [
        sk.LayerFactors(*(tensor.to(device) for tensor in random_layer(*shape, torch.bfloat16))) for shape in shapes
    ]


def _project(device: str, backend: str) -> Call:
    layers = _layers(device)

    def call() -> list[Tensor]:
        return [p.lora_B for p in sk.project_layers(layers, backend=backend)]  # type: ignore[misc]

    return call


def _project_selected(device: str, backend: str) -> Call:
    layers = _layers(device)

    def call() -> list[Tensor]:
        result = sk.project_selected_layers(layers, num_layers=1, backend=backend)
        return [*result.lora_B, result.selected]  # type: ignore[list-item]

    return call


def _cosine(device: str, backend: str) -> Call:
    new, old, lora_A = (torch.randn(*shape, device=device) for shape in ((300, 8), (300, 8), (8, 90)))
    return lambda: [sk.update_cosine([new], [old], [lora_A], backend=backend)]


def _select(device: str, backend: str) -> Call:
    cosines = torch.rand(50, dtype=torch.float64, device=device)
    return lambda: [sk.select_layers(cosines, num_layers=20, backend=backend)]


def _project_out(device: str, backend: str) -> Call:
    xs = [torch.randn(300, 16, device=device), torch.randn(70, 5, device=device)]
    bases = [random_basis(len(x), 6).to(device) for x in xs]
    return lambda: sk.project_out_layers(xs, bases, backend=backend)


def _salora(device: str, backend: str) -> Call:
    x, base_output, lora_A, lora_B = (
        torch.randn(*shape, device=device) for shape in ((70, 40), (70, 90), (4, 40), (90, 4))
    )
    basis = random_basis(90, 5).to(device)
    return lambda: [sk.salora_linear(x, base_output, lora_A, lora_B, basis, 0.7, backend=backend)]


CALLS: dict[str, Callable[[str, str], Call]] = {
    "project_layers": _project,
    "project_selected_layers": _project_selected,
    "update_cosine": _cosine,
    "select_layers": _select,
    "project_out_layers": _project_out,
    "salora_linear": _salora,
}


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.flatten().view(torch.uint8).cpu() for tensor in tensors]


@pytest.mark.parametrize("op", CALLS)
def test_a_graph_repeats_the_call(op: str, backend: str) -> None:
    call = CALLS[op]("cuda", backend)
    expected = bits(call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    # What the host had for the capture belongs to others now.
    others = [torch.full((1 << 16,), 255, dtype=torch.uint8, pin_memory=True) for _ in range(64)]
    for _ in range(2):
        for tensor in results:
            tensor.zero_()
        graph.replay()
        assert all(map(torch.equal, bits(results), expected))
    assert len(others) == 64


@pytest.mark.parametrize("op", CALLS)
def test_the_current_stream_is_the_one_that_runs_it(op: str, backend: str) -> None:
    call = CALLS[op]("cuda", backend)
    expected = bits(call())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        results = call()
    assert not stream.query()  # it waits behind what the stream does, and the host did not wait
    stream.synchronize()
    assert all(map(torch.equal, bits(results), expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("op", CALLS)
def test_the_device_of_the_tensors_is_the_one_that_runs_it(op: str, backend: str) -> None:
    torch.manual_seed(0)
    call = CALLS[op]("cuda:1", backend)
    assert torch.cuda.current_device() == 0
    results = call()
    assert {tensor.device.index for tensor in results} == {1}
    torch.cuda.synchronize(1)
    assert all(map(torch.equal, bits(call()), bits(results)))
