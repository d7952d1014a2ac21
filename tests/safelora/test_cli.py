"""The command line: what it prints, what it returns, and that help costs next to nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from safelora.cli import main
from tests.safelora.zoo import factors, llama_modules, llama_tensors, shifted, write_adapter, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELORA_DEBUG", "0")


@pytest.fixture
def inputs(tmp_path: Path) -> SimpleNamespace:
    base = llama_tensors()
    aligned = write_checkpoint(tmp_path / "aligned", shifted(base))
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()), base_model_name_or_path=str(aligned))
    return SimpleNamespace(
        adapter=str(adapter), base=str(write_checkpoint(tmp_path / "base", base)), out=str(tmp_path / "out")
    )


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=120)


def test_project_writes_and_says_so(inputs, capsys):
    assert main(["project", inputs.adapter, "--base", inputs.base, "--out", inputs.out, "--num-layers", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Safe LoRA projected 2 of 4 modules")
    assert inputs.out in printed.out
    assert (Path(inputs.out) / "adapter_model.safetensors").exists()


def test_json_is_the_report_and_nothing_else(inputs, capsys):
    command = ["project", inputs.adapter, "--base", inputs.base, "--dry-run", "--threshold", "0.65", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_projected"] == sum(module["decision"] == "projected" for module in report["modules"]) > 0
    assert report["dry_run"] is True
    assert {"cosine", "margin", "shrinkage", "v_norm", "decision", "reason"} <= set(report["modules"][0])


def test_dry_run_prints_the_table_and_writes_nothing(inputs, capsys, tmp_path):
    names = sorted(tmp_path.iterdir())
    assert main(["project", inputs.adapter, "--base", inputs.base, "--dry-run", "--threshold", "0.65"]) == 0
    table = capsys.readouterr().out
    for word in ("would project", "cosine", "margin", "‖CB‖/‖B‖", "model.layers.1.self_attn.v_proj", "kept"):
        assert word in table
    assert sorted(tmp_path.iterdir()) == names


def test_reports(inputs, tmp_path):
    files = [tmp_path / f"report.{suffix}" for suffix in ("html", "json", "png")]
    command = ["project", inputs.adapter, "--base", inputs.base, "--dry-run", "--threshold", "0.65", "--quiet"]
    assert main([*command, *(word for file in files for word in ("--report", str(file)))]) == 0
    page, data, picture = files
    assert page.read_text().startswith("<!doctype html>")
    # A dot in each figure, a cell of the picture and a row of the table.
    assert page.read_text().count('class="projected"') == 4 * json.loads(data.read_text())["num_projected"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_without_matplotlib_is_refused_before_any_work(inputs, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["project", inputs.adapter, "--base", inputs.base, "--out", inputs.out, "--threshold", "1"]
    assert main([*command, "--report", "layers.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not Path(inputs.out).exists()


@pytest.mark.parametrize("place", ["adapter", "base", "aligned"])
def test_reports_never_land_on_an_input(inputs, tmp_path, capsys, place):
    """--report base/config.json is a slip that would cost a model."""
    config = tmp_path / place / ("adapter_config.json" if place == "adapter" else "config.json")
    before = config.read_bytes()
    command = ["project", inputs.adapter, "--base", inputs.base, "--aligned", str(tmp_path / "aligned")]
    assert main([*command, "--threshold", "1", "--dry-run", "--report", str(config)]) == 2
    assert "inputs are never changed" in capsys.readouterr().err
    assert config.read_bytes() == before


def test_reports_that_cannot_be_written_are_refused_before_any_work(inputs, tmp_path, capsys, monkeypatch):
    command = ["project", inputs.adapter, "--base", inputs.base, "--threshold", "1", "--out", inputs.out, "--report"]
    (tmp_path / "taken.html").mkdir()
    assert main([*command, str(tmp_path / "taken.html")]) == 2
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main([*command, str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("cannot be written there") == 2
    assert not Path(inputs.out).exists()


def test_a_report_is_written_whole_or_not_at_all(inputs, tmp_path, monkeypatch):
    from safelora.report import SafeLoraReport

    page = tmp_path / "page.html"
    command = ["project", inputs.adapter, "--base", inputs.base, "--threshold", "1", "--dry-run"]
    assert main([*command, "--report", str(page)]) == 0
    before, listing = page.read_bytes(), sorted(tmp_path.iterdir())

    def full(self, path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafeLoraReport, "save_html", full)
    assert main([*command, "--report", str(page)]) == 1
    assert page.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == listing


def test_paths_of_any_bytes(inputs, tmp_path):
    """Names that are no UTF-8 are shown as far as they can be."""
    odd = os.fsencode(tmp_path) + b"/odd\xff"
    Path(inputs.adapter).rename(os.fsdecode(odd))
    command = [
        "project",
        os.fsdecode(odd),
        "--base",
        inputs.base,
        "--threshold",
        "1",
        "--out",
        os.fsdecode(odd) + "-out",
    ]
    assert main([*command, "--report", str(tmp_path / "page.html"), "--report", str(tmp_path / "page.json")]) == 0
    assert "odd?" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "page.json").read_text())["inputs"]["adapter"]["source"] == os.fsdecode(odd)


def test_html_escapes_names(tmp_path):
    from safelora import ModuleReport, SafeLoraReport

    module = ModuleReport("<script>.0.x", "linear", 1, (2, 2), None, None, None, "kept", cosine=0.5, reason='"><b>')
    report = SafeLoraReport([module], {"a": "</pre><script>"}, {}, {}, warnings=["<i>"])
    report.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_inspect(inputs, capsys):
    assert main(["inspect", inputs.adapter, "--base", inputs.base, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    first = content["modules"][0]
    assert first["module"] == "model.layers.0.self_attn.q_proj"
    assert first["base"]["tensor"] == "model.layers.0.self_attn.q_proj.weight"
    assert first["base"]["matched"] == "exact"
    assert first["aligned"] is None
    assert main(["inspect", inputs.adapter]) == 0
    assert "4 modules" in capsys.readouterr().out


def test_inspect_shows_a_projected_adapter_too(inputs, capsys):
    project = ["project", inputs.adapter, "--base", inputs.base, "--threshold", "1", "--out", inputs.out, "--quiet"]
    assert main(project) == 0
    assert main(["inspect", inputs.out]) == 0
    assert "had been projected before" in " ".join(capsys.readouterr().out.split())


def test_a_terminal_gets_a_progress_bar(inputs, monkeypatch, capsys):
    """On standard error, so that standard output stays for programs."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    command = ["project", inputs.adapter, "--base", inputs.base, "--dry-run", "--threshold", "1", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["num_projected"] == 4
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "reading weights" in shown
    assert re.search(r"([1-9][\d.]*)/\1 \w?B", shown), "the bytes of both models, at the end"


def test_inspect_reads_no_tensor_and_imports_no_torch(inputs):
    code = (
        "import sys; from safelora.cli import main; import safelora.stream as s; s.map_range = None;"
        f"status = main(['inspect', {inputs.adapter!r}, '--base', {inputs.base!r}]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.self_attn.v_proj.weight [F32] exact" in done.stdout


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (["--threshold", "0.3", "--num-layers", "2"], 2, "not allowed with"),
        ([], 2, "one of the arguments"),
        (["--threshold", "much"], 2, "invalid float"),
        (["--threshold", "0.3", "--report", "x.pdf"], 2, ".json, .html, .png"),
        (["--threshold", "0.3", "--report", "absent/x.html"], 2, "does not exist"),
        (["--threshold", "0.3", "--aligned", "./nowhere"], 2, "does not exist"),
    ],
)
def test_bad_usage(inputs, capsys, change, status, message):
    try:
        result = main(["project", inputs.adapter, "--base", inputs.base, "--out", inputs.out, *change])
    except SystemExit as error:  # argparse
        result = int(str(error.code))
    assert result == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not Path(inputs.out).exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_cannot_show_every_letter(inputs, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    for command in (["project", inputs.adapter, "--threshold", "1", "--dry-run"], ["inspect", inputs.adapter]):
        done = python("-m", "safelora", *command, "--base", inputs.base)
        assert done.returncode == 0, done.stderr
        assert "model.layers.1.self_attn.v_proj" in done.stdout


def test_nothing_in_an_error_reaches_the_terminal_as_a_command(inputs, capsys):
    assert main(["project", inputs.adapter, "--base", "./\x1b[2J\nabsent", "--threshold", "1", "--dry-run"]) == 2
    assert main(["inspect", "./\x1b[2Jabsent/\x07"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_every_option_reaches_the_function(monkeypatch):
    """One that is parsed and forgotten would change nothing, without a word."""
    import inspect

    import safelora.project

    given = {
        "rule": "authors", "normalize": "none", "modules_to_save": "project", "split_fused": True, "dry_run": True,
        "overwrite": True, "allow_projected": True, "local_files_only": True, "revision": "r0", "revision_base": "r1",
        "revision_aligned": "r2", "out": "o", "num_layers": 7,
    }  # fmt: skip
    parameters = inspect.signature(safelora.project.project_adapter).parameters
    assert set(parameters) - set(given) == {"adapter", "base", "aligned", "threshold", "progress", "ranks"}
    calls = []

    def record(*sources, **options):
        calls.append((sources, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(safelora.project, "project_adapter", record)
    words = ["project", "a", "--base", "b", "--aligned", "c"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert main(words) == 130
    assert main(["project", "a", "--base", "b", "--threshold", "0.5"]) == 130
    (sources, options), (_, plain) = calls
    assert sources == ("a", "b", "c")
    assert {name: options[name] for name in given} == given
    assert plain["threshold"] == 0.5
    assert {name: plain[name] for name in given} == {
        name: None if name in ("out", "num_layers") else parameters[name].default for name in given
    }


def test_quiet(inputs, capsys):
    command = ["project", inputs.adapter, "--base", inputs.base, "--threshold", "1", "--quiet"]
    assert main([*command, "--dry-run"]) == main([*command, "--out", inputs.out]) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_unexpected_errors_are_one_line_unless_asked(inputs, capsys, monkeypatch):
    import safelora.project

    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(safelora.project, "project_adapter", broken)
    command = ["project", inputs.adapter, "--base", inputs.base, "--dry-run", "--threshold", "1"]
    assert main(command) == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("SAFELORA_DEBUG", "1")
    with pytest.raises(KeyError):
        main(command)


def test_a_reader_that_stops_listening_is_no_error(inputs):
    code = f"{sys.executable} -m safelora inspect {inputs.adapter} --json | true; exit ${{PIPESTATUS[0]}}"
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    done = subprocess.run(
        ["bash", "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_as_a_program(inputs):
    """The process that ends itself has printed everything, and says how it went."""
    command = ["-m", "safelora", "project", inputs.adapter, "--base", inputs.base, "--out", inputs.out, "--json"]
    done = python(*command, "--threshold", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_projected"] == 4
    again = python(*command, "--threshold", "1")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    assert again.stdout == ""


def test_module_and_version():
    done = python("-m", "safelora", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("safelora ")


@pytest.mark.parametrize("arguments", [["--help"], ["project", "--help"], ["evaluate", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom safelora.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'rich', 'transformers', 'peft', 'huggingface_hub', 'matplotlib', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_is_fast():
    """Bounded by a multiple of the bare interpreter's own start, so that a slow machine does not matter."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        assert python(*arguments).returncode == 0
        return time.perf_counter() - start

    times = [(seconds("-c", "pass"), seconds("-m", "safelora", "--help")) for _ in range(5)]
    bare, helped = (statistics.median(column) for column in zip(*times, strict=True))
    assert helped < 10 * bare


def test_projecting_never_imports_transformers_or_peft(inputs):
    code = (
        "import sys; from safelora.cli import main;"
        f"status = main(['project', {inputs.adapter!r}, '--base', {inputs.base!r}, '--out', {inputs.out!r},"
        "'--threshold', '1']);"
        "assert not {'transformers', 'peft', 'huggingface_hub', 'rich', 'matplotlib'} & set(sys.modules);"
        "sys.exit(status)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_lazy_package():
    code = (
        "import sys, safelora; assert 'safelora.project' not in sys.modules; dir(safelora);"
        "safelora.SafeLoraError; assert 'torch' not in sys.modules;"
        "assert all(hasattr(safelora, name) for name in safelora.__all__); assert safelora.__version__"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_directory_of_adapters(inputs, capsys):
    second = write_adapter(Path(inputs.adapter) / "second", factors(llama_modules(), seed=9))
    (second / "adapter_config.json").write_text((Path(inputs.adapter) / "adapter_config.json").read_text())
    command = ["project", inputs.adapter, "--base", inputs.base, "--out", inputs.out, "--threshold", "1"]
    assert main([*command, "--all-adapters"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["default", "second"]
    assert (Path(inputs.out) / "second" / "adapter_model.safetensors").exists()
    assert main([*command, "--all-adapters", "--dry-run", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"default", "second"}
    assert main([*command, "--all-adapters", "--report", "x.json"]) == 2
    shutil.rmtree(Path(inputs.out) / "default")
    assert main([*command, "--all-adapters"]) == 2
    assert not (Path(inputs.out) / "default").exists(), "a place that is taken is found before the first projection"


def test_a_full_fine_tune(inputs, tmp_path, capsys):
    aligned = shifted(llama_tensors())
    tuned = str(write_checkpoint(tmp_path / "tuned", shifted(aligned, seed=8)))
    command = [
        "project-model",
        tuned,
        "--base",
        inputs.base,
        "--aligned",
        str(tmp_path / "aligned"),
        "--num-layers",
        "3",
    ]
    page = tmp_path / "page.html"
    assert main([*command, "--out", inputs.out, "--exclude", "lm_head", "--report", str(page)]) == 0
    assert capsys.readouterr().out.startswith("Safe LoRA projected 3 of 12 modules")
    assert "</html>" in page.read_text()
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_projected"] == 3


def test_converting_an_adapter(tmp_path, capsys):
    root = tmp_path / "mlx"
    root.mkdir()
    save_file(
        {
            "model.layers.0.self_attn.q_proj.lora_a": torch.ones(24, 4),
            "model.layers.0.self_attn.q_proj.lora_b": torch.ones(4, 24),
        },
        root / "adapters.safetensors",
    )
    (root / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}')
    assert main(["convert", str(root), str(tmp_path / "peft"), "--model", "org/aligned", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "mlx", "output": str(tmp_path / "peft")}
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (8.0, "org/aligned")
    assert main(["convert", str(root), str(tmp_path / "peft")]) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_sweep_counts_what_a_projection_would_take(inputs, capsys, tmp_path):
    command = [inputs.adapter, "--base", inputs.base]
    assert main(["sweep", *command, "--thresholds", "0.3,0.6,1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    for row in rows:
        assert main(["project", *command, "--dry-run", "--threshold", str(row["threshold"]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_projected"] == row["selected"]
    assert rows[-1]["selected"] > 0
    saved = tmp_path / "r.json"
    assert main(["project", *command, "--dry-run", "--num-layers", "1", "--quiet", "--report", str(saved)]) == 0
    assert main(["sweep", str(saved), "--thresholds", "1"]) == 0
    assert str(rows[-1]["selected"]) in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [([], "--base"), (["--base", "b", "--thresholds", "x"], "--thresholds")])
def test_sweep_refuses(inputs, capsys, words, message):
    assert main(["sweep", inputs.adapter, *words]) == 2
    assert message in capsys.readouterr().err


def test_doctor(capsys, monkeypatch):
    from safelora_kernels import doctor

    monkeypatch.setattr(doctor, "_available", lambda: iter([("cpu", "cpu")]))
    assert main(["doctor", "--no-speed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"]
