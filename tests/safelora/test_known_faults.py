"""What goes wrong in the published implementations of Safe LoRA, each as a case that has to come out right here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelora import SafeLoraError, project_adapter, project_adapters
from tests.safelora.test_bad_input import environment
from tests.safelora.zoo import (
    factors,
    llama_modules,
    llama_tensors,
    read_output,
    shifted,
    truth,
    write_adapter,
    write_checkpoint,
)  # fmt: skip

PREFIX = "base_model.model."
KERNEL = 1e-5


def check(tmp_path: Path, pair, given, **config) -> None:
    """Every module of an adapter is projected onto its own V."""
    adapter = write_adapter(tmp_path / "adapter", given, **config)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    base, aligned = pair
    written = read_output(tmp_path / "out")
    assert len(report.projected) == len(report.modules) > 0
    for module in report.modules:
        b, a = (given[f"{PREFIX}{module.name}.lora_{factor}.weight"] for factor in "BA")
        expected, cosine, _ = truth(base[f"{module.name}.weight"], aligned[f"{module.name}.weight"], b, a)
        got = written[f"{PREFIX}{module.name}.lora_B.weight"].double()
        assert float((got - expected).norm() / expected.norm()) <= KERNEL
        assert module.cosine == pytest.approx(cosine, abs=1e-6)


def test_a_subset_of_layers_is_paired_by_name(tmp_path):
    """layers_to_transform and exclude_modules: pairing by position takes the V of other layers, silently."""
    base = llama_tensors(layers=12)
    aligned = shifted(base)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "aligned", aligned)
    shapes = {name: shape for name, shape in llama_modules(layers=12).items() if ".10." in name or ".3." in name}
    check(tmp_path, (base, aligned), factors(shapes), layers_to_transform=[3, 10], exclude_modules="v_proj")


def test_a_rank_equal_to_d_out_is_projected(tmp_path, pair):
    """d_out == r: the shape test that tells A from B does nothing, silently."""
    check(tmp_path, pair, factors(llama_modules(names=("k_proj", "v_proj")), rank=8))


def test_ranks_that_differ(tmp_path, pair):
    """rank_pattern: a shape error."""
    shapes = llama_modules()
    check(tmp_path, pair, factors(shapes, rank={name: 2 + index for index, name in enumerate(shapes)}))


def test_target_modules_as_a_pattern(tmp_path, pair):
    """A regular expression is iterated character by character."""
    check(tmp_path, pair, factors(llama_modules()), target_modules=r".*\.(q|v)_proj")


def test_biases_of_the_model(tmp_path):
    """A 1-D tensor whose name also matches: a matrix product of a vector."""
    base = llama_tensors()
    base |= {f"{name}.bias": torch.ones(shape[0]) for name, shape in llama_modules().items()}
    aligned = shifted(base)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "aligned", aligned)
    check(tmp_path, (base, aligned), factors(llama_modules()))


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_several(tmp_path, shards):
    """A checkpoint in one file: an attribute error."""
    base = llama_tensors()
    aligned = shifted(base)
    write_checkpoint(tmp_path / "base", base, shards)
    write_checkpoint(tmp_path / "aligned", aligned, shards)
    check(tmp_path, (base, aligned), factors(llama_modules()))


def test_dora_is_refused(tmp_path, pair):
    """A magnitude vector: crashed, or was ignored."""
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()), use_dora=True)
    with pytest.raises(SafeLoraError, match="DoRA"):
        project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)


def test_two_adapters(tmp_path, pair):
    """Several adapters in one directory: wrong, or a crash."""
    given = {name: factors(llama_modules(), seed=seed) for seed, name in enumerate(("default", "second"))}
    write_adapter(tmp_path / "adapters", given["default"])
    write_adapter(tmp_path / "adapters" / "second", given["second"])
    reports = project_adapters(
        tmp_path / "adapters", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1
    )
    assert list(reports) == ["default", "second"]
    for name, tensors in given.items():
        alone = write_adapter(tmp_path / f"alone {name}", tensors)
        project_adapter(alone, tmp_path / "base", tmp_path / "aligned", tmp_path / f"out {name}", threshold=1)
        assert reports[name].output == str(tmp_path / "out" / name)
        for key, tensor in read_output(tmp_path / f"out {name}").items():
            assert torch.equal(read_output(tmp_path / "out" / name)[key], tensor)


def test_equal_weights_give_no_nan(tmp_path):
    """V = 0 in one module: NaN."""
    base = llama_tensors()
    aligned = shifted(base)
    frozen = "model.layers.0.self_attn.q_proj"
    aligned[f"{frozen}.weight"] = base[f"{frozen}.weight"].clone()
    given = factors(llama_modules())
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given), write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "aligned", aligned), tmp_path / "out", threshold=1,
    )  # fmt: skip
    (kept,) = [module for module in report.modules if module.decision == "kept"]
    assert (kept.name, kept.cosine) == (frozen, None)
    written = read_output(tmp_path / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in written.values())
    assert torch.equal(written[f"{PREFIX}{frozen}.lora_B.weight"], given[f"{PREFIX}{frozen}.lora_B.weight"])


@pytest.mark.parametrize("rule", ["strict", "authors"])
def test_no_module_at_all(tmp_path, pair, rule):
    """num_layers = 0: an IndexError."""
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given)
    out = tmp_path / "out"
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", out, num_layers=0, rule=rule)
    assert report.projected == []
    for name, tensor in read_output(out).items():
        assert torch.equal(tensor, given[name])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_mode_projects_once(tmp_path, pair, count):
    """num_layers first projected what a threshold of 0.3 selects, in place, and measured the result."""
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given)
    models = (tmp_path / "base", tmp_path / "aligned")
    measured = project_adapter(adapter, *models, threshold=0.3, dry_run=True)
    report = project_adapter(adapter, *models, tmp_path / "out", num_layers=count)
    assert [module.cosine for module in report.modules] == [module.cosine for module in measured.modules]
    lowest = sorted(measured.modules, key=lambda module: module.cosine)[:count]
    assert {module.name for module in report.projected} == {module.name for module in lowest}
    for module in report.projected:
        b, a = (given[f"{PREFIX}{module.name}.lora_{factor}.weight"] for factor in "BA")
        expected, _, _ = truth(*(model[f"{module.name}.weight"] for model in pair), b, a)
        got = read_output(tmp_path / "out")[f"{PREFIX}{module.name}.lora_B.weight"]
        assert float((got.double() - expected).norm() / expected.norm()) <= KERNEL


def test_no_projector_is_ever_held(tmp_path):
    """Every C (d_out × d_out) was kept in memory, beside two models."""
    d, modules = 4096, 16
    shapes = {f"model.layers.{index}.self_attn.q_proj": (d, 16) for index in range(modules)}
    base = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    paths = [
        write_adapter(tmp_path / "adapter", factors(shapes)), write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "aligned", shifted(base)), tmp_path / "out",
    ]  # fmt: skip
    code = (
        "import sys, torch, safelora_kernels, resource; from safelora.project import project_adapter\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); project_adapter(*sys.argv[1:], threshold=1); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < modules * d * d * 4 / 4
    assert json.loads((tmp_path / "out" / "safelora_report.json").read_text())["num_projected"] == modules


def test_embedding_and_head_are_projected(tmp_path, pair):
    """An adapted embedding has its factors under other names and its output in the columns: a crash."""
    base, aligned = pair
    draw = torch.Generator().manual_seed(3)
    given = factors({"lm_head": (31, 24)})
    stem = f"{PREFIX}model.embed_tokens.lora_embedding_"
    given[f"{stem}A"], given[f"{stem}B"] = torch.randn(4, 31, generator=draw), torch.randn(24, 4, generator=draw)
    adapter = write_adapter(tmp_path / "adapter", given)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert [module.decision for module in report.modules] == ["projected"] * 2
    written = read_output(tmp_path / "out")
    for key, a, weights in (
        (f"{stem}B", f"{stem}A", [model["model.embed_tokens.weight"].T for model in pair]),
        (f"{PREFIX}lm_head.lora_B.weight", f"{PREFIX}lm_head.lora_A.weight",
         [base["lm_head.weight"], aligned["lm_head.weight"]]),
    ):  # fmt: skip
        expected, _, _ = truth(*weights, given[key], given[a])
        assert float((written[key].double() - expected).norm() / expected.norm()) <= KERNEL


def test_conv1d_weights_are_turned(tmp_path):
    """GPT-2 stores d_in × d_out: a shape error, and where the weight is square the wrong side."""
    shapes = {"h.0.attn.c_attn": (72, 24), "h.0.attn.c_proj": (24, 24), "h.0.mlp.c_fc": (96, 24)}
    base = {f"{name}.weight": torch.randn(d_in, d_out) * 0.1 for name, (d_out, d_in) in shapes.items()}
    aligned = shifted(base)
    given = factors({f"transformer.{name}": shape for name, shape in shapes.items()})
    config = {"model_type": "gpt2"}
    project_adapter(
        write_adapter(tmp_path / "adapter", given, fan_in_fan_out=True),
        write_checkpoint(tmp_path / "base", base, config=config),
        write_checkpoint(tmp_path / "aligned", aligned, config=config), tmp_path / "out", threshold=1,
    )  # fmt: skip
    for name in shapes:
        b, a = (given[f"{PREFIX}transformer.{name}.lora_{factor}.weight"] for factor in "BA")
        expected, _, _ = truth(base[f"{name}.weight"].T, aligned[f"{name}.weight"].T, b, a)
        got = read_output(tmp_path / "out")[f"{PREFIX}transformer.{name}.lora_B.weight"].double()
        assert float((got - expected).norm() / expected.norm()) <= KERNEL


def test_unusable_options_are_value_errors(tmp_path, pair):
    """They were assert statements, which `python -O` removes."""
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()))
    models = (tmp_path / "base", tmp_path / "aligned")
    for options in ({}, {"threshold": 0.3, "num_layers": 2}, {"num_layers": -1}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match=r"threshold|num_layers"):
            project_adapter(adapter, *models, tmp_path / "out", **options)


def test_the_result_is_an_ordinary_adapter(tmp_path, pair):
    """The published class could not be saved: the output has the input's keys, shapes, dtypes and configuration."""
    given = factors(llama_modules(), dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", given)
    project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    written = read_output(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {
        name: (t.shape, t.dtype) for name, t in given.items()
    }
    assert all(torch.equal(written[name], given[name]) for name in given if "lora_A" in name)
    configuration = "adapter_config.json"
    assert (tmp_path / "out" / configuration).read_bytes() == (adapter / configuration).read_bytes()
