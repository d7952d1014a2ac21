"""The emulated drivers: they run kernels as the hardware does, and they find what the hardware would not forgive."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from . import emulated
from .emulated import ORDERS, SIMT, Copies, Device, Emulator, Order

PROBES = (SIMT / "probes.cu",)
HOPPER = Device(arch=90, shared_bytes=227 << 10)


class Params(ctypes.Structure):
    """safelora::cuda::ProbeParams."""

    _fields_ = (
        ("map", ctypes.c_char * 128),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("bug", ctypes.c_int32),
        ("padding", ctypes.c_char * 16),
    )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max().nan_to_num(nan=torch.inf))


@dataclass(frozen=True)
class Make:
    """The parameters of a probe; pickled for the process in which it runs."""

    names: tuple[str, ...]
    numbers: dict[str, int]
    boxed: bool

    def __call__(self, machine: Emulator, tensors: Sequence[Tensor]) -> bytes:
        pointers = {name: tensor.data_ptr() for name, tensor in zip(self.names, tensors, strict=True)}
        params = Params(**pointers, **self.numbers)
        if self.boxed:
            ctypes.memmove(ctypes.byref(params), machine.tensor_map(tensors[1], (8, 64), 128), 128)
        return bytes(params)


def launch(
    driver: str, kernel: str, order: Order, bug: int, tensors: dict[str, Tensor], *sizes: int, **shape: Any
) -> Tensor:
    """Runs a probe; what it leaves in ``tensors["out"]``."""
    numbers = {"bug": bug, **dict(zip("mnk", sizes, strict=False))}
    make = Make(tuple(tensors), numbers, kernel == "probe_cluster")
    shape = {"block": 64, "shared": 256, **shape}
    return emulated.launch(kernel, make, list(tensors.values()), driver=driver, sources=PROBES, order=order, **shape)[0]


def product(driver: str, order: Order, bug: int = 0, m: int = 50, n: int = 7, k: int = 200) -> float:
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    tensors = {"out": torch.full((m, n), torch.nan), "a": a, "b": b}
    out = launch(driver, "probe_product", order, bug, tensors, m, n, k, block=128, shared=3 * 72 * 16 * 2)
    return error(out, a.double() @ b.double().T)


def tf32(driver: str, order: Order, bug: int = 0) -> float:
    a, b = torch.randn(13, 40), torch.randn(6, 40)
    tensors = {"out": torch.full((13, 6), torch.nan), "a": a, "b": b}
    out = launch(driver, "probe_tf32", order, bug, tensors, 13, 6, 40, block=32)
    cut_a, cut_b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b))
    return error(out, cut_a @ cut_b.T)


def numbers() -> Tensor:
    return torch.randint(-99, 100, (64,)).float()


def tickets(driver: str, order: Order, bug: int = 0) -> float:
    a, flags = numbers(), torch.zeros(10, dtype=torch.int32)
    tensors = {"out": torch.full((9, 64), torch.nan), "a": a, "flags": flags}
    out = launch(driver, "probe_tickets", order, bug, tensors, 0, 9, grid=(4,))
    return error(out, a.double() + torch.arange(9)[:, None])


def reverse(driver: str, order: Order, bug: int = 0) -> float:
    a = numbers()
    out = launch(driver, "probe_reverse", order, bug, {"out": torch.full((64,), torch.nan), "a": a})
    return error(out, a.flip(0))


def warps(driver: str, order: Order, bug: int = 0) -> float:
    a, flags = numbers(), torch.zeros(1, dtype=torch.int32)
    tensors = {"out": torch.full((3, 64), torch.nan), "a": a, "flags": flags}
    out = launch(driver, "probe_warps", order, bug, tensors, grid=(3,))
    pairs = a + a.view(32, 2).flip(1).flatten()
    return error(out, (pairs + pairs.roll(32)).expand(3, 64))


def cluster(driver: str, order: Order, bug: int = 0) -> float:
    a = torch.randint(-9, 10, (30, 60)).bfloat16()
    padded = torch.zeros(32, 64)
    padded[:30, :60] = a
    a = torch.nn.functional.pad(a, (0, 4))[:, :60]  # rows a multiple of 16 bytes apart
    tensors = {"out": torch.full((4, 8, 64), torch.nan), "a": a}
    shape = {"device": HOPPER, "grid": (4,), "block": 32, "shared": 2064, "cluster": 4}
    out = launch(driver, "probe_cluster", order, bug, tensors, **shape)
    boxes = padded.view(4, 8, 64)
    return error(out, boxes.roll(-1, 0) + 1000 * boxes.roll(1, 0))


KERNELS = {f.__name__: f for f in (product, tf32, tickets, reverse, warps, cluster)}
EVERY_ORDER = [(driver, order) for driver in ("simt", "ptx", "asan", "tsan") for order in ORDERS[driver]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("driver", "order"), EVERY_ORDER, ids=lambda v: v if isinstance(v, str) else v.name)
def test_probe_is_right(kernel: str, driver: str, order: Order) -> None:
    emulated.need(driver)
    bound = 1e-4 if kernel in ("product", "tf32") else 0.0
    assert KERNELS[kernel](driver, order) <= bound


BOTH = ("simt", "ptx")
BUGS = {
    "no wait for the copies": ("product", 1, "", BOTH),
    "no barrier behind the copies": ("product", 2, "race", (*BOTH, "tsan")),
    "a store past the end of shared memory": (
        "product",
        3,
        "past the end|out-of-bounds|overflow",
        ("simt", "ptx", "asan"),
    ),
    "no guard at the end of a row": ("product", 4, "out-of-bounds|overflow", ("ptx", "asan")),
    "a stage refilled too early": ("product", 5, "race", (*BOTH, "tsan")),
    "a misaligned copy": ("product", 6, "aligned", BOTH),
    "nobody waits for the ticket before": ("tickets", 1, "race", (*BOTH, "tsan")),
    "a flag without release": ("tickets", 2, "race", ("tsan",)),
    "no barrier in shared memory": ("reverse", 1, "race", (*BOTH, "tsan")),
    "a misaligned vector": ("reverse", 2, "aligned|alignment", ("ptx", "asan")),
    "a warp function that half of the lanes miss": ("warps", 1, "lane|mask|warp|deadlock", BOTH),
    "a barrier that half of the lanes miss": ("warps", 2, "deadlock|barrier|diverge", BOTH),
    "blocks that write to one place": ("warps", 3, "race", ("tsan",)),
    "a flag that nobody sets": ("warps", 4, "deadlock|budget|endless", ("simt",)),
    "no wait for the box": ("cluster", 1, "race", BOTH),
    "more bytes expected than come": ("cluster", 2, "deadlock|budget|endless", BOTH),
    "no cluster barrier before a remote load": ("cluster", 3, "race", BOTH),
    "no cluster barrier before the end": ("cluster", 4, "has ended", ("simt",)),
    "no wait for the neighbour's copy": ("cluster", 5, "race", BOTH),
    "an mbarrier that nobody made": ("cluster", 6, "initialised", BOTH),
}
WHERE = [(bug, driver) for bug, (_, _, _, drivers) in BUGS.items() for driver in drivers]


def orders(driver: str) -> list[Order]:
    """More than the everyday ones: a bug need only show in one of them."""
    if driver in ("asan", "tsan"):
        return list(ORDERS[driver])
    extra = [Order("random", Copies.RANDOM, 2, seed) for seed in range(10, 16)]
    greedy = [Order(n, c, 4) for n, c in itertools.product(("greedy", "greedy_reverse"), (Copies.LAZY, Copies.EAGER))]
    return [*ORDERS[driver], *extra, *(greedy if driver == "simt" else ())]


@pytest.mark.parametrize(("bug", "driver"), WHERE)
def test_bug_is_found(bug: str, driver: str) -> None:
    """As an error that says so, or as a wrong result."""
    emulated.need(driver)
    kernel, number, message, _ = BUGS[bug]
    found = []
    for order in orders(driver):
        try:
            wrong = KERNELS[kernel](driver, order, number)
        except RuntimeError as fault:
            found.append(str(fault))
            if not re.search(message, str(fault), re.IGNORECASE):
                pytest.fail(f"found, but as something else: {fault}")
        else:
            if wrong > 1e-4:
                found.append(f"off by {wrong}")
        if found and driver in ("asan", "tsan"):
            break
    assert found, "no order shows it"
