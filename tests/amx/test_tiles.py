"""The emulated tile instructions against exact rational arithmetic, against misuse, and against a CPU that has them."""

from __future__ import annotations

import ctypes
import math
import random
import struct
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest

from ..ops.truth import cpu_flags
from .emulation import HARDWARE, HERE, Tiles, compile_shared, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


class Shape(NamedTuple):
    """A sum of ``rows`` × ``columns`` fp32, over ``pairs`` pairs of bf16."""

    rows: int = 16
    columns: int = 16
    pairs: int = 16


Product = Callable[[Shape, bytes, bytes, bytes], bytes]


def configuration(shapes: dict[int, tuple[int, int]], palette: int = 1) -> bytearray:
    """Tiles by number, as rows and bytes per row."""
    config = bytearray(64)
    config[0] = palette
    for tile, (rows, row_bytes) in shapes.items():
        struct.pack_into("<H", config, 16 + 2 * tile, row_bytes)
        config[48 + tile] = rows
    return config


def of_product(shape: Shape) -> bytearray:
    return configuration(
        {
            0: (shape.rows, 4 * shape.columns),
            1: (shape.rows, 4 * shape.pairs),
            2: (shape.pairs, 4 * shape.columns),
        }
    )


def build(folder: Path, *arguments: object) -> tuple[ctypes.CDLL, Product]:
    """``product`` of product.cpp, on operands without gaps between their rows."""
    library = ctypes.CDLL(str(compile_shared(folder / "product.so", "-O2", *arguments)))
    function = library.product
    function.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p, ctypes.c_long] * 3]

    def product(shape: Shape, a: bytes, b: bytes, c: bytes) -> bytes:
        buffers = [ctypes.create_string_buffer(data, len(data)) for data in (a, b, c)]
        strides = [4 * shape.pairs, 4 * shape.columns, 4 * shape.columns]
        function(bytes(of_product(shape)), *(x for pair in zip(buffers, strides, strict=True) for x in pair))
        return buffers[2].raw

    return library, product


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    return Tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def product(tiles: Tiles, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """By the intrinsics, on emulated tiles."""
    arguments = ["-mamx-tile", "-mamx-bf16", "-include", HERE / "tiles.h", HERE / "product.cpp", tiles.path]
    return build(tmp_path_factory.mktemp("emulated"), *arguments)[1]


# The instruction as the manual states it, in numbers of any size.

SMALLEST = Fraction(1, 2**126)
LARGEST = Fraction(2**128 - 2**104)
Number = Fraction | float  # a float is an infinity or NaN


def number(bits: int, exponent_bits: int, mantissa_bits: int) -> Number:
    """A binary floating-point number; one below the normal range counts as zero."""
    sign = -1 if bits >> (exponent_bits + mantissa_bits) else 1
    exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return Fraction(0)
    bias = (1 << exponent_bits - 1) - 1
    return sign * Fraction((1 << mantissa_bits) + mantissa) * Fraction(2) ** (exponent - bias - mantissa_bits)


def rounded(x: Number) -> Number:
    """To fp32, to nearest even; a result below the normal range is zero."""
    if isinstance(x, float) or x == 0:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    x = round(x / unit) * unit
    if abs(x) < SMALLEST:
        return Fraction(0)
    return x if abs(x) <= LARGEST else math.copysign(math.inf, x)


def fused(a: Number, b: Number, c: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if isinstance(c, Fraction):
            return rounded(a * b + c)
        return c
    product = math.nan if a == 0 or b == 0 else math.copysign(1, a) * math.copysign(1, b) * math.inf
    if a != a or b != b:
        product = math.nan
    return product + (0.0 if isinstance(c, Fraction) else c)


def expected(shape: Shape, a: bytes, b: bytes, c: bytes) -> list[Number]:
    """Even and odd terms are summed apart and in order from zero, then with each other, then added to C."""
    left = [number(x, 8, 7) for x in struct.unpack(f"<{len(a) // 2}H", a)]
    right = [number(x, 8, 7) for x in struct.unpack(f"<{len(b) // 2}H", b)]
    sums = [number(x, 8, 23) for x in struct.unpack(f"<{len(c) // 4}I", c)]
    for m in range(shape.rows):
        for n in range(shape.columns):
            halves: list[Number] = [Fraction(0), Fraction(0)]
            for k in range(shape.pairs):
                for half in range(2):
                    x = left[2 * (m * shape.pairs + k) + half]
                    y = right[2 * (k * shape.columns + n) + half]
                    halves[half] = fused(x, y, halves[half])
            one = Fraction(1)
            at = m * shape.columns + n
            sums[at] = fused(one, fused(one, halves[0], halves[1]), sums[at])
    return sums


def same(bits: int, value: Number) -> bool:
    (found,) = struct.unpack("<f", struct.pack("<I", bits))
    if isinstance(value, float):
        return math.isnan(found) if math.isnan(value) else found == value
    return math.isfinite(found) and Fraction(found) == value


def bf16(x: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return int(bits >> 16)


def operands(shape: Shape, exponents: tuple[int, int], sums: tuple[int, int], seed: int) -> list[bytes]:
    """Random signs and mantissas, and exponents of factors and sums in these ranges; 128 makes NaN and Inf."""
    rng = random.Random(seed)

    def draw(count: int, mantissa_bits: int, low: int, high: int) -> list[int]:
        return [
            rng.getrandbits(1) << (8 + mantissa_bits)
            | rng.randint(low, high) + 127 << mantissa_bits
            | rng.getrandbits(mantissa_bits)
            for _ in range(count)
        ]

    a = draw(2 * shape.rows * shape.pairs, 7, *exponents)
    b = draw(2 * shape.pairs * shape.columns, 7, *exponents)
    c = draw(shape.rows * shape.columns, 23, *sums)
    return [struct.pack(f"<{len(a)}H", *a), struct.pack(f"<{len(b)}H", *b), struct.pack(f"<{len(c)}I", *c)]


CASES = {
    "ordinary": (Shape(), (-8, 0), (-8, 2)),
    "far apart": (Shape(), (-30, 30), (-60, 60)),
    "one row, column and pair": (Shape(1, 1, 1), (-3, 3), (-3, 3)),
    "odd shape": (Shape(5, 3, 7), (-3, 3), (-3, 3)),
    "wide": (Shape(2, 16, 1), (-3, 3), (-3, 3)),
    "deep": (Shape(3, 2, 16), (-3, 3), (-3, 3)),
    "below the normal range": (Shape(8, 8, 16), (-127, 60), (-127, -120)),
    "sums below the normal range": (Shape(8, 8, 16), (-66, -60), (-127, -122)),
    "results below the normal range": (Shape(8, 8, 2), (-66, -62), (-127, -126)),
    "overflow": (Shape(8, 8, 16), (61, 64), (120, 127)),
    "not finite": (Shape(8, 8, 4), (126, 128), (126, 128)),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_manual(product: Product, tiles: Tiles, case: str) -> None:
    shape, exponents, sums = CASES[case]
    for seed in range(2):
        a, b, c = operands(shape, exponents, sums, seed)
        found = struct.unpack(f"<{len(c) // 4}I", product(shape, a, b, c))
        for i, (bits, value) in enumerate(zip(found, expected(shape, a, b, c), strict=True)):
            assert same(bits, value), f"entry {i}: {bits:#x}, expected {value}"
    assert (tiles.fault(), tiles.products()) == ("", 2)


def test_the_order_of_the_sums_matters(product: Product) -> None:
    """2²⁴ + 1 − 2²⁴ + 1 within the even terms loses the first 1; the odd ones are a sum of their own."""
    shape = Shape(1, 1, 4)
    big, ones = [2.0**24, 1.0, -(2.0**24), 1.0], [1.0] * 4
    b = struct.pack("<8H", *[bf16(1.0)] * 8)
    for even, odd, total in [(big, [0.0] * 4, 1.0), ([0.0] * 4, big, 1.0), (big, ones, 5.0)]:
        a = struct.pack("<8H", *(bf16(x) for pair in zip(even, odd, strict=True) for x in pair))
        assert struct.unpack("<f", product(shape, a, b, bytes(4))) == (total,)


@pytest.mark.skipif(not cpu_flags() >= HARDWARE, reason="this CPU has no AMX to compare with")
@pytest.mark.parametrize("case", CASES)
def test_the_cpu_computes_the_same(product: Product, tmp_path: Path, case: str) -> None:
    library, real = build(tmp_path, "-mamx-tile", "-mamx-bf16", HERE / "product.cpp")
    if library.permission() != 0:
        pytest.skip("the system gives no leave to use AMX")
    shape, exponents, sums = CASES[case]
    for seed in range(20):
        a, b, c = operands(shape, exponents, sums, seed)
        pairs = [struct.unpack(f"<{len(c) // 4}f", run(shape, a, b, c)) for run in (product, real)]
        assert all(x == y or (x != x and y != y) for x, y in zip(*pairs, strict=True))


def test_the_program_for_the_cpu_is_built_everywhere(tmp_path: Path) -> None:
    build(tmp_path, "-mamx-tile", "-mamx-bf16", HERE / "product.cpp")


def test_rows_are_strided_and_what_lies_between_them_stays(tiles: Tiles) -> None:
    run = tiles.library
    run.emulated_loadconfig(bytes(configuration({3: (5, 12), 4: (5, 12)})))
    source = ctypes.create_string_buffer(bytes(range(200)), 200)
    target = ctypes.create_string_buffer(b"\xaa" * 200, 200)
    run.emulated_loadd(3, source, ctypes.c_long(33))
    run.emulated_stored(3, target, ctypes.c_long(40))
    rows = [target.raw[r * 40 : r * 40 + 40] for r in range(5)]
    assert rows == [bytes(range(r * 33, r * 33 + 12)) + b"\xaa" * 28 for r in range(5)]
    run.emulated_zero(4)
    run.emulated_stored(4, target, ctypes.c_long(12))
    assert target.raw[:60] == bytes(60)
    run.emulated_release()
    assert tiles.fault() == ""


FULL = configuration({t: (16, 64) for t in range(8)})
SCRATCH = ctypes.create_string_buffer(1024)
MISUSE = {
    "while none is configured": [("zero", 0)],
    "none is configured": [("loadconfig", FULL), ("release",), ("loadd", 0)],
    "configured again": [("loadconfig", FULL), ("loadconfig", FULL)],
    "palette": [("loadconfig", configuration({0: (16, 64)}, palette=2))],
    "reserved": [("loadconfig", FULL[:63] + b"\1")],
    "later row": [("loadconfig", FULL[:1] + b"\1" + FULL[2:])],
    "at most 16 rows of 64": [("loadconfig", configuration({0: (17, 64)}))],
    "16 rows of 64 bytes": [("loadconfig", configuration({7: (16, 65)}))],
    "rows without bytes": [("loadconfig", configuration({0: (16, 0)}))],
    "tiles 0 to 7": [("loadconfig", FULL), ("zero", 8)],
    "no shape": [("loadconfig", configuration({0: (16, 64)})), ("zero", 1)],
    "read before it is written": [("loadconfig", FULL), ("stored", 2)],
    "a tile is read before": [("loadconfig", FULL), ("zero", 0), ("zero", 1), ("dpbf16ps", 0, 1, 2)],
    "three different tiles": [("loadconfig", FULL), ("zero", 0), ("zero", 1), ("dpbf16ps", 0, 1, 1)],
    "whole number of dwords": [
        ("loadconfig", configuration({0: (4, 6), 1: (4, 8), 2: (2, 6)})),
        *[("zero", t) for t in range(3)],
        ("dpbf16ps", 0, 1, 2),
    ],
    "do not fit": [
        ("loadconfig", configuration({0: (4, 16), 1: (4, 8), 2: (3, 16)})),
        *[("zero", t) for t in range(3)],
        ("dpbf16ps", 0, 1, 2),
    ],
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_noted(tiles: Tiles, message: str) -> None:
    run = tiles.library
    run.emulated_release()
    tiles.products()
    before = bytes(SCRATCH.raw)
    for name, *arguments in MISUSE[message]:  # type: ignore[misc]
        values = [bytes(x) if isinstance(x, bytearray) else x for x in arguments]
        memory = [SCRATCH, ctypes.c_long(64)] if name in ("loadd", "stored") else []
        assert tiles.fault() == "", "the last step alone is wrong"
        getattr(run, f"emulated_{name}")(*values, *memory)
    assert message in tiles.fault()
    assert (tiles.fault(), tiles.products(), SCRATCH.raw) == ("", 0, before)
    run.emulated_release()


def test_each_thread_has_tiles_of_its_own(tiles: Tiles) -> None:
    run, found = tiles.library, []

    def elsewhere() -> None:
        run.emulated_zero(0)
        found.append(tiles.fault())

    run.emulated_loadconfig(bytes(FULL))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    run.emulated_zero(0)
    run.emulated_release()
    assert found == ["a tile is used while none is configured"]
    assert tiles.fault() == ""
