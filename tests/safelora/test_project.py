"""Projection of whole adapter directories against dense fp64 arithmetic, for every layout of files and names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from safelora import SafeLoraError, SafeLoraReport, project_adapter
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
COSINE_TOLERANCE = 1e-6
KERNEL = 1e-5  # the relative (Frobenius) error the kernels promise with fp32 arithmetic
# One rounding to the stored dtype, at most half a unit in the last place of every entry, on top of the kernel's error.
TOLERANCE = {torch.float32: KERNEL, torch.bfloat16: KERNEL + 2**-9, torch.float16: KERNEL + 2**-11}


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check_modules(
    report: SafeLoraReport,
    out: Path,
    given: dict[str, torch.Tensor],
    weights: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Every module of `report` has the true cosine, and the true factor or its own bits."""
    written = read_output(out)
    assert set(written) == set(given)
    for module in report.modules:
        b_name, a_name = (f"{PREFIX}{module.name}.lora_{factor}.weight" for factor in "BA")
        base, aligned = weights(module.name)
        expected, cosine, v_norm = truth(base, aligned, given[b_name], given[a_name])
        assert module.cosine == pytest.approx(cosine, abs=COSINE_TOLERANCE)
        assert module.v_norm == pytest.approx(v_norm, rel=1e-6)
        assert module.shrinkage == pytest.approx(float(expected.norm() / given[b_name].double().norm()), rel=1e-5)
        assert written[b_name].dtype == given[b_name].dtype
        if module.decision == "projected":
            assert error_of(written[b_name], expected) <= TOLERANCE[given[b_name].dtype]
        else:
            assert torch.equal(written[b_name], given[b_name])
    replaced = {f"{PREFIX}{module.name}.lora_B.weight" for module in report.projected}
    for name in set(given) - replaced:
        assert torch.equal(written[name].view(torch.uint8), given[name].view(torch.uint8))


def by_name(base: dict[str, torch.Tensor], aligned: dict[str, torch.Tensor]):
    return lambda module: (base[f"{module}.weight"], aligned[f"{module}.weight"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llama_layouts(tmp_path, shards, weight_dtype, factor_dtype):
    base = {name: tensor.to(weight_dtype) for name, tensor in llama_tensors().items()}
    aligned = shifted(base)
    given = factors(llama_modules(), dtype=factor_dtype)
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given),
        write_checkpoint(tmp_path / "base", base, shards),
        write_checkpoint(tmp_path / "aligned", aligned, 4 - shards),
        tmp_path / "out",
        num_layers=2,
    )
    assert len(report.projected) == 2
    check_modules(report, tmp_path / "out", given, by_name(base, aligned))


@pytest.mark.parametrize("normalize", ["frobenius", "none"])
def test_fp64_adapters_and_normalisation(tmp_path, pair, normalize):
    base, aligned = pair
    given = factors(llama_modules(), dtype=torch.float64)
    adapter = write_adapter(tmp_path / "adapter", given)
    report = project_adapter(
        adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1, normalize=normalize
    )
    written = read_output(tmp_path / "out")
    for module in report.modules:
        name = f"{PREFIX}{module.name}.lora_B.weight"
        expected, _, v_norm = truth(*by_name(base, aligned)(module.name), given[name], given[name.replace("_B", "_A")])
        factor = v_norm if normalize == "none" else 1.0
        torch.testing.assert_close(written[name], expected * factor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pickled", [False, True])
def test_subsets_patterns_and_regexes_pair_by_name(tmp_path, pickled):
    """layers_to_transform, rank_pattern, a regex for target_modules, r = d_out and .bin files change nothing."""
    base = llama_tensors(layers=12)
    aligned = shifted(base)
    shapes = {
        "model.layers.10.self_attn.q_proj": (24, 24),
        "model.layers.2.self_attn.v_proj": (8, 24),
        "model.layers.11.mlp.down_proj": (24, 40),
    }
    ranks = dict(zip(shapes, (3, 8, 1), strict=True))
    given = factors(shapes, rank=ranks)
    report = project_adapter(
        write_adapter(
            tmp_path / "adapter", given, pickled, target_modules=r".*layers\.(10|2|11)\..*",
            layers_to_transform=[2, 10], rank_pattern={"q_proj": 3}, use_rslora=True,
        ),
        write_checkpoint(tmp_path / "base", base, shards=2),
        write_checkpoint(tmp_path / "aligned", aligned),
        tmp_path / "out",
        threshold=1.0,
    )  # fmt: skip
    assert [module.rank for module in report.modules] == [8, 3, 1]
    assert len(report.projected) == 3
    check_modules(report, tmp_path / "out", given, by_name(base, aligned))


def test_pickled_factors_that_are_kept_keep_their_bits(tmp_path, pair):
    """They are held in memory once: what a projection tried must not come back from there."""
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given, pickled=True)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", num_layers=1)
    assert len(report.projected) == 1
    check_modules(report, tmp_path / "out", given, by_name(*pair))


def test_result_of_a_module_does_not_depend_on_the_others(tmp_path, pair):
    """Each module alone gives the same bits as all of them together."""
    given = factors(llama_modules(names=("q_proj", "k_proj", "v_proj", "o_proj")))
    adapter = write_adapter(tmp_path / "adapter", given)
    project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "all", threshold=1)
    together = read_output(tmp_path / "all")
    for number, module in enumerate(llama_modules(names=("q_proj", "v_proj"))):
        part = {name: tensor for name, tensor in given.items() if f"{module}." in name}
        alone = write_adapter(tmp_path / f"alone{number}", part)
        project_adapter(alone, tmp_path / "base", tmp_path / "aligned", tmp_path / f"out{number}", threshold=1)
        for name, tensor in read_output(tmp_path / f"out{number}").items():
            assert torch.equal(tensor, together[name])


def test_unusual_pieces_are_passed_through_and_named(tmp_path, pair):
    given = factors(llama_modules())
    extra = {
        "base_model.model.lm_head.weight": torch.randn(31, 24),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": torch.randn(24),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.randn(24),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 24),
        "base_model.model.model.layers.0.steps": torch.arange(3),
    }
    adapter = write_adapter(tmp_path / "adapter", {**given, **extra})
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert sorted(report.passed_through) == sorted(extra)
    assert "unprojected" in report.warnings[0]
    check_modules(report, tmp_path / "out", {**given, **extra}, by_name(*pair))


def test_modules_of_one_weight_are_grouped(tmp_path):
    """layer_replication: layers 2 and 3 of the enlarged stack are layers 1 and 0 of the checkpoint."""
    base = llama_tensors(layers=2)
    aligned = shifted(base)
    given = factors(llama_modules(layers=4))
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given, layer_replication=[[0, 2], [1, 2], [0, 1]]),
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "aligned", aligned),
        tmp_path / "out",
        threshold=1,
    )
    source = (0, 1, 1, 0)

    def weights(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        name = re.sub(r"layers\.(\d)", lambda found: f"layers.{source[int(found[1])]}", module) + ".weight"
        return base[name], aligned[name]

    assert len(report.projected) == 8
    check_modules(report, tmp_path / "out", given, weights)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_embedding_and_head(tmp_path, tied, flag):
    """ΔWᵀ = B·A for embeddings; a tied head is the embedding matrix, the other way round."""
    base = llama_tensors(head=not tied)
    aligned = shifted(base)
    config = {"model_type": "llama", "tie_word_embeddings": tied}
    draw = torch.Generator().manual_seed(5)
    given = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(3, 31, generator=draw),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(24, 3, generator=draw),
        f"{PREFIX}lm_head.lora_A.weight": torch.randn(3, 24, generator=draw),
        f"{PREFIX}lm_head.lora_B.weight": torch.randn(31, 3, generator=draw),
    }
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given, fan_in_fan_out=flag),
        write_checkpoint(tmp_path / "base", base, config=config),
        write_checkpoint(tmp_path / "aligned", aligned, config=config),
        tmp_path / "out",
        threshold=1,
    )
    written = read_output(tmp_path / "out")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    matched = {module.name: (module.kind, module.matched) for module in report.modules}
    assert matched == {"lm_head": ("linear", "tied" if tied else "exact"), "model.embed_tokens": ("embedding", "exact")}
    embedding = (base["model.embed_tokens.weight"].T, aligned["model.embed_tokens.weight"].T)
    for stem, suffix, weights in (
        ("model.embed_tokens.lora_embedding_", "", embedding),
        ("lm_head.lora_", ".weight", (base[head], aligned[head])),
    ):
        b, a = (given[f"{PREFIX}{stem}{factor}{suffix}"] for factor in "BA")
        expected, cosine, _ = truth(*weights, b, a)
        assert report.modules[suffix == ""].cosine == pytest.approx(cosine, abs=COSINE_TOLERANCE)
        assert error_of(written[f"{PREFIX}{stem}B{suffix}"], expected) <= KERNEL


@pytest.mark.parametrize("shape", [(33, 16), (24, 33)])
def test_embeddings_of_another_width_are_no_resized_vocabulary(tmp_path, shape):
    weights = {"model.embed_tokens.weight": torch.randn(shape)}
    given = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(4, 33),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(24, 4),
    }
    adapter = write_adapter(tmp_path / "adapter", given)
    models = [write_checkpoint(tmp_path / name, tensors) for name, tensors in (("b", weights), ("a", shifted(weights)))]
    with pytest.raises(SafeLoraError, match="fit a weight of shape"):
        project_adapter(adapter, *models, threshold=1, dry_run=True)


def test_resized_vocabulary_is_skipped_and_said(tmp_path):
    base, wide = llama_tensors(), llama_tensors(vocab=33)
    aligned = {**shifted(base), **{name: tensor for name, tensor in wide.items() if "model.layers" not in name}}
    given = {**factors(llama_modules(layers=1)), **factors({"lm_head": (33, 24)})}
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given),
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "aligned", aligned),
        tmp_path / "out",
        threshold=1,
    )  # fmt: skip
    (skipped,) = [module for module in report.modules if module.decision == "skipped"]
    assert skipped.name == "lm_head"
    assert "vocabulary resized" in skipped.reason
    name = f"{PREFIX}lm_head.lora_B.weight"
    assert torch.equal(read_output(tmp_path / "out")[name], given[name])


@pytest.mark.parametrize("flag", [True, False])
def test_gpt2_conv1d(tmp_path, flag):
    """Conv1D stores d_in × d_out; the square attn.c_proj is known by the model type even where PEFT wrote False."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"attn.c_attn": (72, 24), "attn.c_proj": (24, 24), "mlp.c_fc": (96, 24), "mlp.c_proj": (24, 96)}
    base = {
        f"transformer.h.{layer}.{name}.weight": torch.randn(d_in, d_out, generator=draw) * 0.1
        for layer in range(2)
        for name, (d_out, d_in) in shapes.items()
    }
    base |= {name.replace(".weight", ".bias"): torch.zeros(tensor.shape[1]) for name, tensor in base.items()}
    aligned = shifted(base)
    given = factors({f"transformer.h.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()})
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given, fan_in_fan_out=flag),
        write_checkpoint(tmp_path / "base", base, config={"model_type": "gpt2"}),
        write_checkpoint(tmp_path / "aligned", aligned, config={"model_type": "gpt2"}),
        tmp_path / "out",
        threshold=1,
    )
    check_modules(
        report, tmp_path / "out", given, lambda module: (base[f"{module}.weight"].T, aligned[f"{module}.weight"].T)
    )


def test_convolution_kernels_are_flattened(tmp_path):
    base = {"features.0.weight": torch.randn(6, 4, 3, 3), "features.0.bias": torch.zeros(6)}
    aligned = shifted(base)
    given = {
        f"{PREFIX}features.0.lora_A.weight": torch.randn(2, 4, 3, 3),
        f"{PREFIX}features.0.lora_B.weight": torch.randn(6, 2, 1, 1),
    }
    project_adapter(
        write_adapter(tmp_path / "adapter", given),
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "aligned", aligned),
        tmp_path / "out",
        threshold=1,
    )
    written = read_output(tmp_path / "out")[f"{PREFIX}features.0.lora_B.weight"]
    flat = [tensor["features.0.weight"].flatten(1) for tensor in (base, aligned)]
    expected, _, _ = truth(*flat, *(given[f"{PREFIX}features.0.lora_{factor}.weight"].flatten(1) for factor in "BA"))
    assert written.shape == (6, 2, 1, 1)
    assert error_of(written.flatten(1), expected) <= KERNEL


# Selection


def cosines_of(report: SafeLoraReport) -> dict[str, float]:
    return {module.name: module.cosine for module in report.modules}


def authors(
    base: dict[str, torch.Tensor],
    aligned: dict[str, torch.Tensor],
    given: dict[str, torch.Tensor],
    threshold: float | None,
    num_layers: int | None,
) -> dict[str, torch.Tensor]:
    """The published procedure: dense C, flattened cosine rounded to 5 decimals, `<=`, ties included."""
    out = dict(given)
    results = {}
    for name in (name for name in given if "lora_B" in name):
        module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        projected, cosine, _ = truth(*by_name(base, aligned)(module), given[name], given[name.replace("_B", "_A")])
        results[name] = (round(cosine, 5), projected)
    if num_layers is not None:
        threshold = sorted(cosine for cosine, _ in results.values())[num_layers - 1]
    for name, (cosine, projected) in results.items():
        if cosine <= threshold:
            out[name] = projected
    return out


@pytest.mark.parametrize("criterion", [{"threshold": 0.65}, {"num_layers": 3}, {"num_layers": 1}])
def test_parity_with_the_published_procedure(tmp_path, pair, criterion):
    given = factors(llama_modules(names=("q_proj", "k_proj", "v_proj", "o_proj")))
    # Two identical updates tie exactly, so that num_layers=1 has to take both.
    twin = [f"{PREFIX}model.layers.{layer}.self_attn.q_proj.lora_" for layer in (0, 1)]
    base, aligned = pair
    for models in (base, aligned):
        models["model.layers.1.self_attn.q_proj.weight"] = models["model.layers.0.self_attn.q_proj.weight"].clone()
    for factor in "AB":
        given[f"{twin[1]}{factor}.weight"] = given[f"{twin[0]}{factor}.weight"].clone()
    adapter = write_adapter(tmp_path / "adapter", given)
    models = [write_checkpoint(tmp_path / f"{name}2", tensors) for name, tensors in (("base", base), ("al", aligned))]
    report = project_adapter(adapter, *models, tmp_path / "out", rule="authors", **criterion)
    expected = authors(base, aligned, given, criterion.get("threshold"), criterion.get("num_layers"))
    changed = {name for name in given if expected[name] is not given[name]}
    assert {f"{PREFIX}{module.name}.lora_B.weight" for module in report.projected} == changed
    assert 0 < len(changed) < 8
    for name, tensor in read_output(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=0, atol=1e-6)


def test_threshold_is_monotone_and_num_layers_is_exact(tmp_path, pair):
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules(names=("q_proj", "k_proj", "v_proj"))))

    def projected(**criterion) -> set[str]:
        report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", dry_run=True, **criterion)
        return {module.name for module in report.projected}

    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", threshold=1, dry_run=True)
    order = sorted(cosines_of(report), key=cosines_of(report).get)
    for count in range(8):
        assert projected(num_layers=count) == set(order[:count])
    for position, name in enumerate(order):
        assert projected(threshold=cosines_of(report)[name]) == set(order[: position + 1])
    assert projected(threshold=-1) == set()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_diagnostic_of_the_published_code(tmp_path, pair, count):
    """Pdst is the mean of 1/(1 + ‖B_final − C·B‖_F), which is 1 for a projected module."""
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", num_layers=count)
    written = read_output(tmp_path / "out")
    values = []
    for module in report.modules:
        b_name, a_name = (f"{PREFIX}{module.name}.lora_{factor}.weight" for factor in "BA")
        expected, _, _ = truth(*by_name(*pair)(module.name), given[b_name], given[a_name])
        values.append(1 / (1 + float((written[b_name].double() - expected).norm())))
    assert report.pdst == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_margins_and_near_threshold_flags(tmp_path, pair):
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()))
    sources = (adapter, tmp_path / "base", tmp_path / "aligned")
    plain = project_adapter(*sources, threshold=0.5, dry_run=True)
    lowest = min(plain.modules, key=lambda module: module.cosine)
    assert all(module.margin == pytest.approx(module.cosine - 0.5) for module in plain.modules)
    assert not plain.near_threshold
    close = project_adapter(*sources, threshold=lowest.cosine + 5e-6, dry_run=True)
    assert [module.name for module in close.near_threshold] == [lowest.name]
    assert [module.name for module in close.projected] == [lowest.name]
    counted = project_adapter(*sources, num_layers=1, dry_run=True)
    ranked = sorted(module.cosine for module in counted.modules)
    margins = {module.cosine: module.margin for module in counted.modules}
    assert margins[ranked[0]] == pytest.approx(ranked[0] - ranked[1])
    assert margins[ranked[3]] == pytest.approx(ranked[3] - ranked[0])


def test_unchanged_weight_and_zero_update_are_kept(tmp_path, pair):
    base, aligned = pair
    frozen = "model.layers.1.self_attn.q_proj"
    aligned[f"{frozen}.weight"] = base[f"{frozen}.weight"].clone()
    given = factors(llama_modules())
    given[f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight"].zero_()
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given),
        tmp_path / "base",
        write_checkpoint(tmp_path / "aligned2", aligned),
        tmp_path / "out",
        num_layers=2,
    )
    reasons = {module.name: module.reason for module in report.modules}
    assert "V = 0" in reasons[frozen]
    assert "zero" in reasons["model.layers.0.self_attn.v_proj"]
    assert {module.name for module in report.projected} == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    }  # fmt: skip
    written = read_output(tmp_path / "out")
    for module in (frozen, "model.layers.0.self_attn.v_proj"):
        name = f"{PREFIX}{module}.lora_B.weight"
        assert torch.equal(written[name], given[name])
    assert json.loads((tmp_path / "out" / "safelora_report.json").read_text())["num_projected"] == 2


# What is written


def test_output_directory(tmp_path, pair):
    adapter = write_adapter(
        tmp_path / "adapter", factors(llama_modules()), base_model_name_or_path=str(tmp_path / "aligned")
    )
    kept = {
        "README.md": "---\nlibrary_name: peft\ntags:\n- lora\n---\n# My adapter\n",
        "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free",
    }  # fmt: skip
    for name, text in {**kept, "optimizer.pt": "x", "training_args.bin": "x", "rng_state.pth": "x"}.items():
        (adapter / name).write_text(text)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    report = project_adapter(adapter, tmp_path / "base", out=tmp_path / "deep" / "out", threshold=1)
    out = tmp_path / "deep" / "out"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert {path.name for path in out.iterdir()} == {
        *kept, "adapter_config.json", "adapter_model.safetensors", "safelora_report.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "adapter_config.json").read_bytes() == before["adapter_config.json"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- lora\n- safelora\nsafelora:\n  projected: 4\n")
    assert "# My adapter" in card
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "safelora": "projected"}
    assert SafeLoraReport.load(out) == report
    assert report.inputs["aligned"]["source"] == str(tmp_path / "aligned")


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_large_adapters_are_copied_piece_by_piece(tmp_path, pair, monkeypatch, size):
    from hashlib import sha256

    import safelora.output

    monkeypatch.setattr(safelora.output, "_COPY_BYTES", size)
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=0.65)
    check_modules(report, tmp_path / "out", given, by_name(*pair))
    assert (
        report.inputs["adapter"]["sha256"] == sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    )


def test_nothing_projected_leaves_no_mark(tmp_path, pair):
    given = factors(llama_modules())
    adapter = write_adapter(tmp_path / "adapter", given)
    sources = (tmp_path / "base", tmp_path / "aligned")
    project_adapter(adapter, *sources, tmp_path / "out", threshold=0)
    assert all(torch.equal(tensor, given[name]) for name, tensor in read_output(tmp_path / "out").items())
    again = project_adapter(tmp_path / "out", *sources, tmp_path / "out2", threshold=1)
    assert len(again.projected) == 4


@pytest.mark.parametrize("mark", ["metadata", "report", "card"])
def test_a_second_projection_is_refused_by_each_mark_alone(tmp_path, pair, mark):
    given = factors(llama_modules())
    sources = (tmp_path / "base", tmp_path / "aligned")
    project_adapter(write_adapter(tmp_path / "adapter", given), *sources, tmp_path / "out", threshold=1)
    once = tmp_path / "out"
    if mark != "metadata":
        from safetensors.torch import save_file

        save_file(read_output(once), once / "adapter_model.safetensors", {"format": "pt"})
    for file in {"report": ["README.md"], "card": ["safelora_report.json"]}.get(mark, []):
        (once / file).unlink()
    if mark == "metadata":
        (once / "README.md").unlink()
        (once / "safelora_report.json").unlink()
    with pytest.raises(SafeLoraError, match="has been projected already"):
        project_adapter(once, *sources, tmp_path / "twice", threshold=1)
    assert not (tmp_path / "twice").exists()
    report = project_adapter(once, *sources, tmp_path / "twice", threshold=1, allow_projected=True)
    assert "second time" in " ".join(report.warnings)


def test_dry_run_decides_the_same_and_writes_nothing(tmp_path, pair):
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()))
    sources = (adapter, tmp_path / "base", tmp_path / "aligned")
    names = sorted(path.name for path in tmp_path.iterdir())
    dry = project_adapter(*sources, num_layers=2, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    wet = project_adapter(*sources, tmp_path / "out", num_layers=2)
    assert dry.modules == wet.modules
    assert dry.pdst == wet.pdst


def test_report_identifies_its_inputs(tmp_path, pair):
    from hashlib import sha256

    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()))
    sharded = write_checkpoint(tmp_path / "sharded", pair[0], shards=2)
    report = project_adapter(adapter, sharded, tmp_path / "aligned", threshold=1, dry_run=True)
    assert (
        report.inputs["adapter"]["sha256"] == sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    index = sha256((sharded / "model.safetensors.index.json").read_bytes()).hexdigest()
    assert report.inputs["base"]["index_sha256"] == index
    file = tmp_path / "aligned" / "model.safetensors"
    raw = file.read_bytes()
    header = sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
    assert report.inputs["aligned"]["files"] == {file.name: {"bytes": len(raw), "header_sha256": header}}
    assert report.options == {"threshold": 1, "num_layers": None, "rule": "strict", "normalize": "frobenius"}
    assert set(report.versions) == {"safelora", "torch", "python"}


@pytest.mark.parametrize(("named", "warned"), [("org/base", 1), ("org/aligned", 0), ("org/other", 0), (None, 0)])
def test_models_given_the_wrong_way_round_are_said(tmp_path, pair, named, warned):
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()), base_model_name_or_path=named)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", threshold=1, dry_run=True)
    assert len(report.warnings) == warned
    assert all("org/base, which was given as base" in warning for warning in report.warnings)


def test_progress_counts_the_bytes_of_both_models(tmp_path, pair):
    seen: list[tuple[int, int]] = []
    project_adapter(
        write_adapter(tmp_path / "adapter", factors(llama_modules())), tmp_path / "base", tmp_path / "aligned",
        threshold=1, dry_run=True, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    total = 2 * 4 * 2 * (24 * 24 + 8 * 24)
    assert seen[-1] == (total, total)
