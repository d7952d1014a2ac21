"""The benchmarks refuse wrong results and unaffordable memory, and report what they measured."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora.cli import main
from safelora_kernels import functional
from safelora_kernels.bench import (
    Case,
    Options,
    Prepared,
    Run,
    Variant,
    complement,
    projection,
    run_cases,
    salora,
    suite,
)
from safelora_kernels.bench.case import MOVING, OURS, Draw
from safelora_kernels.bench.curves import against_layers
from safelora_kernels.bench.measure import interleaved, peak_memory
from safelora_kernels.bench.models import MODELS
from safelora_kernels.bench.run import straight_line
from safelora_kernels.bench.show import comparison

QUICK = Options(seconds=0.02, memory=4 << 30)
ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = [
    projection.projection("tiny", [(96, 160)] * 3, 8, against=(projection.CHAIN, projection.AUTHORS)),
    projection.projection("several adapters", [(96, 160)] * 2, 4, torch.float16, adapters=3, against=()),
    projection.cosine("tiny", 6, 96, 4),
    complement.complement("tiny", 5, 96, 8, 4),
    salora.salora("tiny", 64, 96, 4, 4, torch.float32, backward=False),
    salora.salora("tiny", 64, 96, 4, 4, backward=True),
]


@pytest.fixture(scope="module")
def small() -> Run:
    cases = [*EVERYTHING, against_layers((1, 2, 3))]
    return run_cases(cases, QUICK, {"device": "test", "torch": torch.__version__, "processor": "test"})


def test_every_kind_of_case_runs_and_is_judged(small: Run) -> None:
    assert not small.failed and not small.skipped
    assert {(row.op, row.case) for row in small.rows} == {(case.op, case.name) for case in EVERYTHING}
    for row in small.rows:
        assert 0 < row.minimum <= row.low <= row.median <= row.high and row.rounds >= 3
        if row.variant == OURS:
            assert row.over_ours == 1 and row.error is not None and row.bound is not None and row.error <= row.bound
        elif row.variant != MOVING:
            assert row.error is not None and row.error < 0.1
    (curve,) = small.curves
    assert curve.at == [1, 2, 3] and len(curve.seconds) == len(curve.peak_bytes) == 3


def test_rates_follow_from_times(small: Run) -> None:
    moving = {(row.op, row.case): row.median for row in small.rows if row.variant == MOVING}
    ours = {(row.op, row.case): row.median for row in small.rows if row.variant == OURS}
    for row in small.rows:
        assert row.gb_per_s == pytest.approx(row.bytes / row.median / 1e9)
        assert row.gflop_per_s == pytest.approx(row.flops / row.median / 1e9)
        assert row.bandwidth_share == pytest.approx(moving[row.op, row.case] / row.median)
        assert row.over_ours == pytest.approx(row.median / ours[row.op, row.case])


def test_work_is_counted_as_in_the_formula() -> None:
    """4·d_out·d_in·r for the products; both weights and lora_A read once, lora_B read and written."""
    case = projection.projection("one", [(64, 32)], 8)
    assert case.bytes == 2 * 64 * 32 * 2 + 4 * 8 * (2 * 64 + 32)
    assert case.flops == (4 * 8 + 3) * 64 * 32
    assert complement.complement("one", 1, 64, 8, 4).bytes == 2 * 4 * 64 * 8 + 4 * 64 * 4


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = functional.project_layers

    def wrong(*args: Any, **options: Any) -> Any:
        return [p._replace(lora_B=p.lora_B * (1 + 1e-4)) for p in honest(*args, **options)]

    monkeypatch.setattr(functional, "project_layers", wrong)
    run = run_cases(EVERYTHING[:1], QUICK, {})
    assert not run.rows
    assert "over 1.0e-05" in run.failed[f"project_layers/tiny: {OURS}"]


def _case(*variants: Variant, memory: int = 0) -> Case:
    return Case("op", "name", 8, 1.0, memory, lambda draw: Prepared(variants))


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_baseline_is_left_out(error: float) -> None:
    run = run_cases([_case(Variant(OURS, int), Variant("theirs", int, lambda: error))], QUICK, {})
    assert [row.variant for row in run.rows] == [OURS]
    assert "op/name: theirs" in run.failed


def test_what_does_not_fit_is_not_even_prepared() -> None:
    def prepare(draw: Draw) -> Prepared:
        raise AssertionError("prepared")

    case = Case("op", "name", 8, 1.0, 10**9, prepare)
    run = run_cases([case], replace(QUICK, memory=10**9 - 1), {})
    assert "needs about 1.0 GB, the budget is 1.0 GB" in run.skipped["op/name"] and not run.rows


@pytest.mark.parametrize(
    "case",
    [
        projection.projection("big", [(1536, 2048)] * 4, 16, against=(projection.CHAIN, projection.AUTHORS)),
        projection.cosine("big", 16, 1536, 32),
        complement.complement("big", 48, 4096, 32, 32),
        salora.salora("big", 1024, 1536, 8, 8, torch.float32, backward=True),
        against_layers((1, 4)),
    ],
    ids=lambda case: case.key,
)
def test_the_estimate_of_memory_covers_the_need(case: Case) -> None:
    taken = peak_memory(lambda: run_cases([case], QUICK, {}), "cpu")
    if taken is None:
        pytest.skip("the peak of the resident set cannot be read here")
    assert case.memory > 64 << 20
    assert taken <= case.memory + (16 << 20), f"took {taken / 1e6:.0f} MB, estimated {case.memory / 1e6:.0f} MB"


def test_peak_memory_sees_what_a_call_takes() -> None:
    taken = peak_memory(lambda: torch.ones(16 << 20), "cpu")
    if taken is None:
        pytest.skip("the peak of the resident set cannot be read here")
    assert 63 << 20 <= taken <= 80 << 20


def test_variants_take_turns() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: (lambda n=name: order.append(n)) for name in "abc"}  # type: ignore[misc]
    samples = interleaved(calls, "cpu", budget=0.0, least=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {len(times) for times in samples.values()} == {3}


def test_straight_lines_are_found_and_bent_ones_told() -> None:
    assert straight_line([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx((2, 1, 0), abs=1e-12)
    assert straight_line([1, 2, 3, 4], [1, 4, 9, 16])[2] > 0.2


def test_json_and_csv_hold_everything(small: Run, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(small.to_json())
    assert Run.load(path) == small
    rows = list(csv.DictReader(io.StringIO(small.to_csv())))
    assert [float(row["median"]) for row in rows] == [row.median for row in small.rows]
    assert [json.loads(row["parameters"]) for row in rows] == [row.parameters for row in small.rows]


def test_charts_hold_any_number_of_operators(small: Run, tmp_path: Path) -> None:
    from safelora_kernels.bench import charts

    many = [replace(row, op=f"op {i}") for i in range(20) for row in small.rows[:3]]
    written = charts.save(replace(small, rows=many), tmp_path)
    assert [path.name for path in written] == ["roofline.png", "speedups.png", "curves.png"]
    assert all(path.stat().st_size > 10_000 for path in written)


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"format": "safelora-bench/0"}'])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        Run.load(tmp_path / "x.json")


def test_comparison_marks_changes_beyond_the_machine(small: Run) -> None:
    """All times twice as long, moving the operands included: the machine. Ours alone: a change."""
    machine = replace(small, rows=[replace(row, median=2 * row.median) for row in small.rows])
    assert "slower" not in comparison(machine, small)
    ours = [
        replace(row, median=2 * row.median, bandwidth_share=(row.bandwidth_share or 0) / 2)
        if row.variant == OURS
        else row
        for row in small.rows
    ]
    assert comparison(replace(small, rows=ours), small).count("slower") == len(EVERYTHING)
    assert comparison(small, replace(small, rows=ours)).count("faster") == len(EVERYTHING)
    assert comparison(small, Run({})) == "no case is in both runs"


def test_names_are_unique_and_the_default_run_is_modest() -> None:
    from safelora import bench

    cases = [*suite.cases("cpu"), *bench.cases()]
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    assert max(case.memory for case in cases if case.default) < 3e9


def test_models_have_the_parameters_of_their_names() -> None:
    """Linear weights of all layers, in millions, from the models' cards less embeddings."""
    for name, millions in {
        "SmolLM2-135M": 106, "Llama-2-7B": 6476, "Llama-3-8B": 6979, "Llama-3-70B": 68451, "Qwen3-30B-A3B": 29897,
    }.items():  # fmt: skip
        model = MODELS[name]
        mlp = model.experts * sum(a * b for a, b in model.mlp.values())
        count = model.layers * (sum(a * b for a, b in model.attention.values()) + mlp)
        assert count / 1e6 == pytest.approx(millions, rel=0.005), name


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["bench", "--only", r"210 × \(576×16\)", "--seconds", "0.05", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "project_out_layers_" in printed and "1 cases and 0 curves" in printed
    written = {path.name for path in out.iterdir()}
    assert written >= {"bench.json", "bench.csv", "bench.md", "roofline.png", "speedups.png"}
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-2], "--compare", str(out / "bench.json"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["format"] == "safelora-bench/1"
    assert "at equal bandwidth" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such case"], "no case matches"),
        (["--only", "["], "no regular expression"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--compare", "pyproject.toml"], "is no JSON"),
    ],
)
def test_unusable_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELORA_DEBUG", "0")
    monkeypatch.chdir(ROOT)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_result_ends_in_status_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(functional, "project_out", lambda x, u: 2 * x)
    assert main(["bench", "--only", r"210 × \(576×16\)", "--seconds", "0.05"]) == 1
    assert "WRONG project_out_layers_" in capsys.readouterr().out


def test_the_cases_run_under_pytest_benchmark(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-k", "210 and 576"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, for which it would take the child
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-p", "no:xdist", f"--benchmark-json={saved}"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(saved.read_text())["benchmarks"]
    assert (
        entry["group"] == "project_out_layers_" and entry["stats"]["rounds"] == 7 and entry["extra_info"]["bytes"] > 0
    )
