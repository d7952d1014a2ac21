"""Benchmarks of what stands on transformers, PEFT and files: added to the kernels' own by `safelora bench`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelora_kernels import functional
from safelora_kernels.bench import Case, Prepared, Variant
from safelora_kernels.bench.case import OURS, Draw, relative_error
from safelora_kernels.bench.projection import AUTHORS, arithmetic, traffic

PEFT_LAYER = "PEFT's LoRA layer (plain LoRA)"


def _write_model(root: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    root.mkdir()
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _write_pair(root: Path, draw: Draw, layers: int, d: int, ffn: int, rank: int) -> None:
    """A bf16 base and aligned model and an adapter on q_proj and v_proj of every layer."""
    from safetensors.torch import save_file

    base, aligned, factors = {}, {}, {}
    for layer in range(layers):
        attention = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        mlp = {"mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d), "mlp.down_proj": (d, ffn)}
        for module, shape in {**attention, **mlp}.items():
            name = f"model.layers.{layer}.{module}"
            weight = draw.normal(*shape, scale=0.02)
            base[f"{name}.weight"] = weight.bfloat16()
            aligned[f"{name}.weight"] = (weight + draw.normal(*shape, scale=0.002)).bfloat16()
            if module.endswith(("q_proj", "v_proj")):
                factors[f"base_model.model.{name}.lora_A.weight"] = draw.normal(rank, d, scale=0.02)
                factors[f"base_model.model.{name}.lora_B.weight"] = draw.normal(d, rank, scale=0.02)
    _write_model(root / "base", base)
    _write_model(root / "aligned", aligned)
    (root / "adapter").mkdir()
    save_file(factors, root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": str(root / "aligned")}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _authors_project(root: Path) -> dict[str, Tensor]:
    """The published code on files: both models whole in fp32, every C kept, then C B."""
    from safetensors.torch import load_file

    base, aligned = ({k: t.float() for k, t in load_file(root / m / "model.safetensors").items()} for m in
                     ("base", "aligned"))  # fmt: skip
    factors = load_file(root / "adapter" / "adapter_model.safetensors")
    names = [name for name in factors if ".lora_B." in name]
    complements = []
    for name in names:
        weight = name.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
        v = aligned[weight] - base[weight]
        complements.append(torch.mm(v, v.t()) / torch.norm(v))
    return {name: torch.mm(c, factors[name]) for name, c in zip(names, complements, strict=True)}


def project_files(layers: int, d: int, ffn: int, rank: int, default: bool = False) -> Case:
    """`safelora.project_adapter` from files to files; only the needed bytes of two checkpoints are read."""
    shapes = [(d, d)] * (2 * layers)
    whole = layers * (4 * d * d + 3 * d * ffn)

    def prepare(draw: Draw) -> Prepared:
        from safetensors.torch import load_file

        from .checkpoint import Checkpoint
        from .project import project_adapter

        folder = tempfile.TemporaryDirectory(prefix="safelora-bench-")
        root = Path(folder.name)
        _write_pair(root, draw, layers, d, ffn, rank)
        ranges = [
            (info.file, info.begin, info.nbytes)
            for model in ("base", "aligned")
            for name, info in Checkpoint.open(root / model).tensors.items()
            if name.split(".")[-2] in ("q_proj", "v_proj")
        ]

        def ours() -> object:
            project_adapter(root / "adapter", root / "base", out=root / "out", threshold=1.0, overwrite=True)
            return folder  # lives as long as the calls that read it

        def moving() -> None:
            buffer = memoryview(bytearray(max(length for _, _, length in ranges)))
            for file, begin, length in ranges:
                with open(file, "rb", buffering=0) as source:
                    source.seek(begin)
                    source.readinto(buffer[:length])

        name = f"base_model.model.model.layers.{layers - 1}.self_attn.v_proj.lora_B.weight"

        def error(run: Callable[[], Any]) -> float:
            result = run()
            if not isinstance(result, dict):
                result = load_file(root / "out" / "adapter_model.safetensors")
            weight = name.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
            base, aligned = (load_file(root / m / "model.safetensors")[weight].double() for m in ("base", "aligned"))
            given = load_file(root / "adapter" / "adapter_model.safetensors")[name].double()
            v = aligned - base
            return relative_error(result[name], v @ (v.T @ given) / v.norm())

        authors = partial(_authors_project, root)
        variants = [
            Variant(OURS, ours, partial(error, ours), 1e-5),
            Variant(AUTHORS + ", both models in memory", authors, partial(error, authors)),
        ]
        return Prepared(variants, moving)

    parameters = {"layers": layers, "d": d, "ffn": ffn, "rank": rank, "modules": len(shapes), "dtype": "bfloat16"}
    memory = 14 * whole + 6 * 4 * d * d * 2 * layers + 4 * 4 * d * ffn
    return Case(
        "safelora.project_adapter, files to files", f"{layers} layers of {d}, q and v, r={rank}",
        traffic(shapes, rank, torch.bfloat16), arithmetic(shapes, rank), memory, prepare, torch.float32, parameters,
        default,
    )  # fmt: skip


def lora_layer(tokens: int, d: int, rank: int, k: int, dtype: torch.dtype, default: bool = False) -> Case:
    """A frozen linear layer with its adapter, forward and backward: PEFT's, and ours with the complement.

    PEFT's layer gets the factor that is already outside the subspace, so that all compute one function.
    """

    def prepare(draw: Draw) -> Prepared:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        linear = torch.nn.Linear(d, d, bias=False, dtype=dtype)
        linear.weight.requires_grad_(False).copy_(draw.normal(d, d, scale=d**-0.5))
        lora_A, lora_B = draw.normal(rank, d, scale=d**-0.5), draw.normal(d, rank, scale=0.1)
        basis = draw.basis(d, k)
        x, dy = (draw.normal(tokens, d).to(dtype) for _ in range(2))
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False)
        layer = Linear(linear, "default", config=settings, r=rank, lora_alpha=2 * rank)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        with torch.no_grad():
            a.weight.copy_(lora_A)
            b.weight.copy_(functional.project_out(lora_B, basis))
        scaling = float(layer.scaling["default"])
        dense = (torch.eye(d) - basis @ basis.T).to(dtype)
        leaves = [lora_A.requires_grad_(), lora_B.requires_grad_()]

        def ours(x: Tensor) -> Tensor:
            return functional.salora_linear(x, linear(x), leaves[0], leaves[1], basis, scaling)

        def published(x: Tensor) -> Tensor:
            return linear(x) + (scaling * (x @ leaves[0].to(dtype).T) @ leaves[1].to(dtype).T) @ dense.T

        def step(forward: Callable[[Tensor], Tensor], factors: list[Tensor]) -> Tensor:
            inputs = x.detach().requires_grad_()
            y = forward(inputs)
            torch.autograd.grad(y, [inputs, *factors], dy)
            return y.detach()

        few = slice(0, min(tokens, 128))
        wide = x[few].double()
        folded = lora_B.detach().double()
        folded = folded - basis.double() @ (basis.double().T @ folded)
        truth = wide @ linear.weight.double().T + scaling * (wide @ lora_A.detach().double().T) @ folded.T

        def variant(
            name: str, forward: Callable[[Tensor], Tensor], factors: list[Tensor], bound: float | None = None
        ) -> Variant:
            call = partial(step, forward, factors)
            return Variant(name, call, lambda: relative_error(call()[few], truth), bound)

        # Two roundings to dtype: the base output and the sum.
        bound = 1e-5 + torch.finfo(dtype).eps
        return Prepared(
            [
                variant(OURS, ours, leaves, bound),
                variant(PEFT_LAYER, layer, [a.weight, b.weight]),
                variant("published form, dense C", published, leaves),
            ],
        )

    size = dtype.itemsize * (d * d + 4 * tokens * d)
    flops = tokens * d * (4.0 * d + 12.0 * rank)
    parameters = {"tokens": tokens, "d": d, "rank": rank, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    memory = 4 * size + 4 * 4 * d * d + 8 * 2 * d * d + 4 * (tokens * d + d * d)
    return Case(
        "linear layer with adapter, forward and backward", f"{tokens} tokens, {d}², r={rank}, k={k}, "
        f"{str(dtype).removeprefix('torch.')}", size, flops, memory, prepare, dtype, parameters, default,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """What needs safetensors, PEFT and transformers; PEFT's only where it is installed."""
    from importlib.util import find_spec

    yield project_files(2, 2048, 5632, 16, default=True)
    yield project_files(8, 2048, 5632, 16)
    if find_spec("peft") is not None:
        yield lora_layer(512, 2048, 16, 32, torch.bfloat16, default=True)
        yield lora_layer(512, 2048, 16, 32, torch.float32)
        if find_spec("transformers") is not None:
            from . import bench_salora

            yield from bench_salora.cases()
