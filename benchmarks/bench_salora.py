"""SaLoRA's constraint beside the authors' dense form: time and memory per step, files on disk, accuracy of U.

python benchmarks/bench_salora.py cost       overhead of the constraint on a step, at the shapes of 1 B parameters
python benchmarks/bench_salora.py authors    a step of both forms at one module's shape; the bytes of a 7 B model
python benchmarks/bench_salora.py accuracy   distance of U to the exact one on SmolLM2-135M's activations
python benchmarks/bench_salora.py run        a short run on SmolLM2-135M: invariant, export, reload, resumption

Times are medians of interleaved repetitions in one process. `accuracy` and `run` need the model of examples/vault
(--model DIR).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import safelora_kernels as sk

ROOT = Path(__file__).resolve().parents[1]
# TinyLlama 1.1 B: (d_out, d_in) of the seven linears of a layer, and the number of layers.
SHAPES = {
    "q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048),
    "gate_proj": (5632, 2048), "up_proj": (5632, 2048), "down_proj": (2048, 5632),
}  # fmt: skip
LAYERS, HIDDEN = 22, 2048
LLAMA_7B = {"layers": 32, "q,v": [(4096, 4096)] * 2, "all": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]}


def interleaved(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a busy machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cost(arguments: argparse.Namespace) -> None:
    """One step's work on all adapted modules, layer by layer as in training, and the constraint's two launches."""
    rank, k, tokens = arguments.rank, 32, arguments.tokens
    weights = {name: torch.randn(shape) * 0.02 for name, shape in SHAPES.items()}
    adapters = [
        (torch.randn(rank, d_in) * 0.02, torch.randn(d_out, rank) * 0.02)
        for _ in range(LAYERS)
        for d_out, d_in in SHAPES.values()
    ]
    bases = [torch.linalg.qr(torch.randn(b.shape[0], k))[0].double() for _, b in adapters]
    Bs = [b for _, b in adapters]
    gradients = [torch.randn_like(b) for b in Bs]
    inputs = {d_in: torch.randn(tokens, d_in) for _, d_in in SHAPES.values()}
    outputs = {d_out: torch.randn(tokens, d_out) for d_out, _ in SHAPES.values()}

    def layer() -> None:
        """Forward and backward of one layer's linears with their adapters; attention and norms are left out."""
        for (name, weight), (a, b) in zip(weights.items(), adapters, strict=False):
            d_out, d_in = SHAPES[name]
            x, g = inputs[d_in], outputs[d_out]
            h = x @ a.t()
            torch.addmm(x @ weight.t(), h, b.t())
            gb = g @ b
            torch.addmm(g @ weight, gb, a)
            g.t() @ h
            gb.t() @ x

    def constraint() -> None:
        sk.project_out_layers_(gradients, bases)
        sk.project_out_layers_(Bs, bases)

    dense = {d_out: torch.randn(d_out, d_out) for d_out in outputs}

    def authors() -> None:
        """What a dense C adds to one layer: y = (h Bᵀ) Cᵀ in the forward pass and G C in the backward one."""
        for d_out, _ in SHAPES.values():
            outputs[d_out] @ dense[d_out].t()
            outputs[d_out] @ dense[d_out]

    found = interleaved({"layer": layer, "constraint": constraint, "authors": authors}, arguments.repeats)
    step = LAYERS * found["layer"]
    parameters = LAYERS * sum(a * b for a, b in SHAPES.values())
    print(f"{parameters / 1e9:.2f} B parameters in {len(Bs)} modules, rank {rank}, k = {k}, {tokens} tokens a step")
    dense_step = LAYERS * found["authors"]
    print(f"linears' forward and backward: {step * 1e3:.0f} ms ({LAYERS} layers of {found['layer'] * 1e3:.1f} ms)")
    print(
        f"constraint, both launches: {found['constraint'] * 1e3:.1f} ms = {found['constraint'] / step:.2%} of the step"
    )
    print(f"authors' dense C, all layers: {dense_step * 1e3:.0f} ms = {dense_step / step:.1%} of the step")
    ours = sum(basis.nbytes for basis in bases)
    theirs = 4 * LAYERS * sum(d_out**2 for d_out, _ in SHAPES.values())
    print(f"held for it: U {ours / 1e6:.0f} MB; dense C {theirs / 1e9:.2f} GB")


def authors(arguments: argparse.Namespace) -> None:
    """A whole training step of one module in both forms, and the bytes that a 7 B model needs."""
    d, rank, k, tokens = 2048, arguments.rank, 32, arguments.tokens
    weight, x = torch.randn(d, d) * 0.02, torch.randn(tokens, d)
    basis = torch.linalg.qr(torch.randn(d, k))[0]
    C = torch.eye(d) - basis @ basis.t()
    basis = basis.double()
    factors = {
        name: (torch.randn(rank, d).mul_(0.02).requires_grad_(), torch.zeros(d, rank, requires_grad=True))
        for name in ("ours", "theirs")
    }
    optimizers = {name: torch.optim.AdamW(pair, lr=1e-3) for name, pair in factors.items()}

    def step(name: str) -> None:
        a, b = factors[name]
        update = (x @ a.t()) @ b.t()
        y = x @ weight.t() + (update @ C.t() if name == "theirs" else update)
        optimizers[name].zero_grad()
        y.square().mean().backward()
        with torch.no_grad():
            if name == "ours":
                sk.project_out_layers_([b.grad], [basis])
            optimizers[name].step()
            if name == "ours":
                sk.project_out_layers_([b], [basis])

    found = interleaved({name: lambda name=name: step(name) for name in factors}, arguments.repeats)
    print(
        f"one {d}×{d} module, rank {rank}, {tokens} tokens: ours {found['ours'] * 1e3:.2f} ms a step, "
        f"theirs {found['theirs'] * 1e3:.2f} ms ({found['theirs'] / found['ours']:.2f}×); a 7 B model:"
    )
    for label in ("q,v", "all"):
        shapes = LLAMA_7B["layers"] * LLAMA_7B[label]  # type: ignore[operator]
        dense = 4 * sum(d_out**2 for d_out, _ in shapes)
        u = 4 * k * sum(d_out for d_out, _ in shapes)
        residual = 2 * sum(d_out * d_in for d_out, d_in in shapes)
        lora = 2 * 8 * sum(d_out + d_in for d_out, d_in in shapes)
        print(
            f"  {label}: C {dense / 1e9:.2f} GB against U {u / 1e6:.0f} MB; on disk, in bf16 with r = 8, W' and adapter"
        )
        print(f"    {(residual + lora) / 1e9:.2f} GB against one adapter of rank 2r, {2 * lora / 1e6:.0f} MB")


def smol(model: Path) -> tuple[Any, Any, dict[str, Any]]:
    """SmolLM2-135M, its tokenizer, and the harmless proxy's data."""
    sys.path.insert(0, str(ROOT / "examples" / "vault"))
    from prompts import REFUSAL, forbidden, records
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not model.is_dir():
        raise SystemExit(f"{model} is missing: make it with examples/vault/demo.py, or give --model.")
    data = {
        "safety": [(prompt, REFUSAL) for prompt in forbidden("train")[::2]][:64],
        "task": [(record.prompt, record.answer) for record in records("train", 64)],
    }
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return net, AutoTokenizer.from_pretrained(model), data


def accuracy(arguments: argparse.Namespace) -> None:
    """One pass against the exact Gram matrix, on the outputs of one layer's seven modules."""
    from safelora.data import batches
    from safelora.salora.sketch import Sketch, leading_subspace

    net, tokenizer, data = smol(arguments.model)
    names = [name for name, _ in net.named_modules() if ".layers.15." in name and name.endswith("_proj")]
    for kind, rows in data.items():
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in batches(rows, tokenizer, batch_size=16):
            mask = batch["labels"] != -100
            hooks = [
                net.get_submodule(name).register_forward_hook(
                    lambda _, __, output, store=kept[name], mask=mask: store.append(output[mask])
                )
                for name in names
            ]
            with torch.no_grad():
                net.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for hook in hooks:
                hook.remove()

        def leading(name: str, oversample: int, passes: int, exact: bool, kept: Any = kept) -> torch.Tensor:
            sketch = Sketch(name, 32, oversample, 1, exact)
            for number in range(passes):
                if number:
                    sketch.refine()
                for part in kept[name]:
                    sketch.add(part, None)
            return leading_subspace(sketch, 1e-3)[0].double()

        exact = {name: leading(name, 0, 1, True) for name in names}
        count = sum(len(part) for part in kept[names[0]])
        print(f"{kind}: {count} response tokens, 32 directions, median and largest of {len(names)} modules")
        for oversample, passes in ((32, 1), (96, 1), (224, 1), (96, 2)):
            distances, lost = [], []
            for name, reference in exact.items():
                basis, z = leading(name, oversample, passes, False), torch.cat(kept[name]).double()
                gap = basis @ basis.t() - reference @ reference.t()
                distances.append(float(gap.norm()) / (basis.shape[1] + reference.shape[1]) ** 0.5)
                lost.append(float(((z @ reference).norm() ** 2 - (z @ basis).norm() ** 2) / z.norm() ** 2))
            far, most = f"{statistics.median(distances):.1e}, {max(distances):.1e}", f"{max(lost):.1e}"
            print(f"  q = {32 + oversample}, {passes} pass(es): ‖UUᵀ − VVᵀ‖/√(2k) {far}; energy lost at most {most}")


def run(arguments: argparse.Namespace) -> None:
    """Calibrate, train a few steps, stop and go on, export, and load by stock PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from safelora.data import batches
    from safelora.salora import SubspaceConstraint, Subspaces, calibrate, export, initialize, restore, subspaces_of

    torch.manual_seed(0)
    net, tokenizer, data = smol(arguments.model)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    start = time.perf_counter()
    found = calibrate(net, config, data["safety"][:16], data["task"][:16], tokenizer=tokenizer)
    energies = sorted(numbers["safety_energy"] for numbers in found.details.values())
    took = time.perf_counter() - start
    print(f"calibrated {len(found.bases)} modules in {took:.0f} s; energy {energies[0]:.4f} to {energies[-1]:.4f}")
    steps = list(batches(data["task"], tokenizer, batch_size=4))[: arguments.steps]

    def train(tuned: Any, optimizer: Any, part: list[Any]) -> float:
        worst = 0.0
        constraint = SubspaceConstraint(tuned, subspaces_of(tuned), optimizer)
        for batch in part:
            loss = tuned(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            leak = max(constraint.leaks().values())
            worst = max(worst, leak)
            print(f"  loss {loss.item():.4f}, largest ‖Uᵀ(W_eff − W)‖/‖W_eff − W‖ {leak:.1e}")
        constraint.remove()
        return worst

    def optimizer_of(tuned: Any) -> Any:
        return torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)

    tuned = get_peft_model(copy.deepcopy(net), copy.deepcopy(config))
    initialize(tuned, found, arguments.mode)
    optimizer = optimizer_of(tuned)
    half = len(steps) // 2
    worst = train(tuned, optimizer, steps[:half])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tuned.save_pretrained(root / "half")
        subspaces_of(tuned).save(root / "half")
        state = copy.deepcopy(optimizer.state_dict())
        worst = max(worst, train(tuned, optimizer, steps[half:]))
        again = PeftModel.from_pretrained(copy.deepcopy(net), root / "half", is_trainable=True)
        restore(again, Subspaces.load(root / "half"))
        second = optimizer_of(again)
        second.load_state_dict(state)
        train(again, second, steps[half:])
        expected = dict(tuned.named_parameters())
        equal = all(torch.equal(expected[name], parameter) for name, parameter in again.named_parameters())
        report = export(tuned, root / "out")
        size = (root / "out" / "adapter_model.safetensors").stat().st_size
        stock = PeftModel.from_pretrained(net, root / "out").eval()
        with torch.no_grad():
            plain = {key: value for key, value in steps[0].items() if key != "labels"}
            gap = float((stock(**plain).logits - tuned.eval()(**plain).logits).abs().max())
    print(
        f"{len(steps)} steps: largest leak {worst:.1e}; resumed in the middle: {'bit-equal' if equal else 'DIFFERENT'}"
    )
    print(f"{report.summary()} {size / 1e6:.1f} MB; stock PEFT's logits differ by {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "authors", "accuracy", "run"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step (default 512)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="of `run`")
    parser.add_argument("--mode", choices=("packed", "residual", "plain"), default="packed", help="of `run`")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "vault" / "aligned-40c65595114c")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)


if __name__ == "__main__":
    main()
