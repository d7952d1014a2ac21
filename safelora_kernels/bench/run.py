"""Gates, times and judges cases, and keeps what came out."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .case import MOVING, OURS, Case, Draw, Variant
from .measure import available_memory, interleaved, matmul_probe, median, peak_memory, quantiles

FORMAT = "safelora-bench/1"
MATMUL = "torch.mm"
NONSENSE = 0.1  # a baseline with a larger relative error than this is not timed
_SPARE = 0.5  # part of the available memory that may be used


@dataclass(frozen=True)
class Options:
    """``seconds`` is the time to spend on a warm case; ``memory`` the budget in bytes (None: half of what is free)."""

    device: str = "cpu"
    seconds: float = 2.0
    memory: int | None = None
    baselines: bool = True


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Times are in seconds for the whole work of the case. ``bandwidth_share`` is the time of moving the operands over the
    variant's, ``matmul_share`` its FLOP/s over those of ``torch.mm`` in ``arithmetic``; both ceilings were measured in
    turns with the variant. ``over_ours`` is its time over ours, ``peak_bytes`` the memory it takes beyond its inputs.
    """

    op: str
    case: str
    variant: str
    parameters: dict[str, Any]
    arithmetic: str
    rounds: int
    median: float
    low: float
    high: float
    minimum: float
    share: float
    bytes: int
    flops: float
    gb_per_s: float
    gflop_per_s: float
    bandwidth_share: float | None
    matmul_share: float | None
    over_ours: float | None
    peak_bytes: int | None
    error: float | None
    bound: float | None


@dataclass(frozen=True)
class Curve:
    """Times along an axis, and the straight line through them: ``seconds ≈ intercept + slope · at``.

    ``worst`` is the largest deviation of a time from the line, relative to the time.
    """

    op: str
    axis: str
    fixed: str
    at: list[float]
    seconds: list[float]
    low: list[float]
    high: list[float]
    peak_bytes: list[int | None]
    slope: float
    intercept: float
    worst: float


@dataclass
class Run:
    """Everything that a run of the benchmarks gives; written and read as JSON."""

    environment: dict[str, str]
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    started: str = ""
    elapsed: float = 0.0

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a run; ValueError where the file is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"{path} has format {found!r}, expected {FORMAT!r}: give the JSON of `safelora bench --out`"
            )
        content.pop("format")
        content["rows"] = [Row(**row) for row in content["rows"]]
        content["curves"] = [Curve(**curve) for curve in content["curves"]]
        return cls(**content)

    def to_csv(self) -> str:
        """One line a row; parameters as JSON."""
        out = io.StringIO()
        names = list(Row.__dataclass_fields__)
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            values = {**asdict(row), "parameters": json.dumps(row.parameters)}
            writer.writerow([values[name] for name in names])
        return out.getvalue()


def straight_line(at: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and largest relative deviation of the line that minimises the relative deviations' squares."""
    weights = [1 / t**2 for t in seconds]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, at, strict=True)) / total
    mean_t = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, at, strict=True))
    if not spread:
        return 0.0, mean_t, 0.0
    slope = sum(w * (x - mean_x) * (t - mean_t) for w, x, t in zip(weights, at, seconds, strict=True)) / spread
    intercept = mean_t - slope * mean_x
    worst = max(abs(intercept + slope * x - t) / t for x, t in zip(at, seconds, strict=True))
    return slope, intercept, worst


def _gate(case: Case, variants: Iterable[Variant], run: Run) -> tuple[list[tuple[Variant, float | None]], bool]:
    """The variants whose result is right, with their errors; and whether ours is."""
    sound: list[tuple[Variant, float | None]] = []
    for variant in variants:
        error = variant.error() if variant.error is not None else None
        allowed = variant.bound if variant.bound is not None else NONSENSE
        if error is not None and not error <= allowed:
            run.failed[f"{case.key}: {variant.name}"] = f"relative error {error:.1e} against fp64 is over {allowed:.1e}"
            if variant.bound is not None:
                return [], False
        else:
            sound.append((variant, error))
    return sound, True


def run_cases(
    cases: Iterable[Case],
    options: Options,
    environment: dict[str, str],
    done: Callable[[list[Row], Curve | None], None] | None = None,
) -> Run:
    """Run cases one after the other.

    A case whose estimate exceeds the memory budget is skipped, one whose result is wrong is not timed; both are noted
    with the reason. ``done`` hears of each finished case.
    """
    run = Run(environment, started=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    begun = time.perf_counter()
    draw = Draw(options.device)
    ceilings: dict[str, list[float]] = {}
    for case in cases:
        allowed = options.memory if options.memory is not None else int(_SPARE * available_memory(options.device))
        if case.memory > allowed:
            run.skipped[case.key] = f"needs about {case.memory / 1e9:.1f} GB, the budget is {allowed / 1e9:.1f} GB"
            continue
        finished = _measure(case, draw, options, run, ceilings)
        gc.collect()
        draw.release()
        if finished and done is not None:
            done(*finished)
    run.ceilings = {name: max(map(median, _thirds(samples))) for name, samples in ceilings.items() if samples}
    run.elapsed = time.perf_counter() - begun
    return run


def _thirds(samples: list[float]) -> list[list[float]]:
    """In order of time: a ceiling is what the machine gave in the best third of the run."""
    size = max(1, math.ceil(len(samples) / 3))
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _measure(
    case: Case, draw: Draw, options: Options, run: Run, ceilings: dict[str, list[float]]
) -> tuple[list[Row], Curve | None] | None:
    prepared = case.prepare(draw)
    wanted = [v for v in prepared.variants if options.baselines or v.name == OURS or case.axis]
    sound, right = _gate(case, wanted, run)
    if not right or not sound:
        return None
    probe, probe_flops = matmul_probe(case.arithmetic, options.device)
    calls = {variant.name: variant.call for variant, _ in sound}
    if not case.axis:
        calls[MATMUL] = probe
        if prepared.moving is not None:
            calls[MOVING] = prepared.moving
    samples = interleaved(calls, options.device, options.seconds)
    peaks = {v.name: peak_memory(v.call, options.device) if v.peak else None for v, _ in sound}
    if case.axis:
        curve = _curve(case, sound, samples, peaks)
        run.curves.append(curve)
        return [], curve
    mm = probe_flops / median(samples[MATMUL])
    ceilings.setdefault(f"{_name(case.arithmetic)} torch.mm, GFLOP/s", []).append(mm / 1e9)
    moved = median(samples[MOVING]) if MOVING in samples else None
    if moved is not None and case.bytes >= 64 << 20:  # smaller operands may come from a cache
        ceilings.setdefault("moving operands, GB/s", []).append(case.bytes / moved / 1e9)
    ours = median(samples[OURS]) if OURS in samples else None
    rows = []
    if moved is not None:
        rows.append(_row(case, Variant(MOVING, print), samples[MOVING], None, moved, None, ours, None))
    rows += [
        _row(case, variant, samples[variant.name], error, moved, mm, ours, peaks[variant.name])
        for variant, error in sound
    ]
    run.rows += rows
    return rows, None


def _row(
    case: Case,
    variant: Variant,
    samples: Sequence[float],
    error: float | None,
    moved: float | None,
    mm: float | None,
    ours: float | None,
    peak: int | None,
) -> Row:
    whole = [t / variant.share for t in samples]
    middle, (low, high) = median(whole), quantiles(whole)
    # Below this intensity a product says nothing about the ceiling of products.
    flops = case.flops if mm is not None else 0.0
    return Row(
        case.op, case.name, variant.name, dict(case.parameters), _name(case.arithmetic), len(samples), middle, low,
        high, min(whole), variant.share, case.bytes, flops, case.bytes / middle / 1e9, flops / middle / 1e9,
        moved / middle if moved is not None else None, flops / middle / mm if mm else None,
        middle / ours if ours is not None else None, peak, error, variant.bound,
    )  # fmt: skip


def _curve(
    case: Case,
    sound: Sequence[tuple[Variant, float | None]],
    samples: dict[str, list[float]],
    peaks: dict[str, int | None],
) -> Curve:
    at = [float(variant.at or 0) for variant, _ in sound]
    seconds = [median(samples[variant.name]) for variant, _ in sound]
    spread = [quantiles(samples[variant.name]) for variant, _ in sound]
    return Curve(
        case.op, case.axis, str(case.parameters["fixed"]), at, seconds, [low for low, _ in spread],
        [high for _, high in spread], [peaks[variant.name] for variant, _ in sound], *straight_line(at, seconds),
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
