"""Measures the operators beside what one runs without them, and beside the ceilings of the machine.

A :class:`~safelora_kernels.bench.case.Case` says what is to be done, which variants do it, and how much work and memory
that takes; :func:`~safelora_kernels.bench.run.run_cases` gates, times and judges. Every result is checked against fp64
first, and where ours is wrong nothing is timed. ``safelora bench`` is the command; it adds what needs transformers and
PEFT. ``pytest benchmarks`` runs the same cases under pytest-benchmark.
"""

from .case import Case, Prepared, Variant
from .run import Curve, Options, Row, Run, run_cases

__all__ = ["Case", "Curve", "Options", "Prepared", "Row", "Run", "Variant", "run_cases"]
