"""`safelora project` and `safelora project-model`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .common import (
    add_rule,
    add_sources,
    check_reports,
    chosen,
    command,
    finish,
    print_json,
    progress_bar,
    rule_options,
    show,
)

_PROJECT = """\
Apply Safe LoRA to a PEFT adapter directory and write a plain PEFT adapter that loads anywhere.

With V = W_aligned - W_base and C = V V^T / |V|, a module's cosine compares its update B A with C B A. A low cosine
means that the update points away from what alignment changed; lora_B of those modules is replaced by C lora_B. All
else stays bit-identical. Start with --dry-run: it prints the cosines, from which to choose --threshold or --num-layers.
"""
_PROJECT_MODEL = """\
Apply Safe LoRA's rule to a model that was fine-tuned in full, and write a checkpoint of the same shards.

The update of every linear weight is W_ft - W_aligned; where the cosine of the update and its projection is low, the
weight becomes W_aligned plus the projected update. Embeddings, norms and biases stay as fine-tuning left them.
"""


def add(commands: Any) -> None:
    project = command(commands, "project", "project an adapter (Safe LoRA)", _PROJECT, _run_project)
    project.add_argument("--base", required=True, metavar="MODEL", help="the model before alignment")
    project.add_argument(
        "--aligned", metavar="MODEL", help="the aligned model (default: the adapter's base_model_name_or_path)"
    )
    add_rule(project, "adapter")
    project.add_argument(
        "--modules-to-save", choices=("keep", "project"), default="keep",
        help="tensors tuned in full: keep (default) copies them, project applies the rule to W_ft - W_aligned",
    )  # fmt: skip
    project.add_argument(
        "--split-fused", action="store_true",
        help="decide and project q, k and v of qkv_proj, gate and up of gate_up_proj each by itself",
    )  # fmt: skip
    project.add_argument(
        "--all-adapters", action="store_true", help="ADAPTER is a directory of several; --out gets a directory for each"
    )
    add_sources(project)

    model = command(commands, "project-model", "project a full fine-tune", _PROJECT_MODEL, _run_project_model, "model")
    model.add_argument("--base", required=True, metavar="MODEL", help="the model before alignment")
    model.add_argument("--aligned", required=True, metavar="MODEL", help="the aligned model that was fine-tuned")
    add_rule(model, "model")
    model.add_argument("--include", metavar="REGEX", help="measure only tensors whose name it is found in")
    model.add_argument("--exclude", metavar="REGEX", help="leave tensors whose name it is found in")
    add_sources(model)


def _run_project(arguments: argparse.Namespace) -> int:
    from ..errors import SafeLoraError
    from ..project import project_adapter, project_adapters

    if arguments.all_adapters and arguments.report:
        raise SafeLoraError("--report writes one report; with --all-adapters there is one beside each adapter.")
    run = project_adapters if arguments.all_adapters else project_adapter
    return _project(arguments, run, arguments.adapter, "modules_to_save", "split_fused")


def _run_project_model(arguments: argparse.Namespace) -> int:
    from ..full_model import project_model

    return _project(arguments, project_model, arguments.model, "include", "exclude")


def _project(arguments: argparse.Namespace, run: Callable[..., Any], source: str, *names: str) -> int:
    """Run on all ranks with the common options and those of these names; rank 0 prints."""
    from ..distributed import launched

    check_reports(arguments.report, (source, arguments.base, arguments.aligned))
    options = {**rule_options(arguments), **chosen(arguments, *names)}
    with launched() as ranks, progress_bar(arguments.quiet or ranks.rank > 0) as progress:
        result = run(source, arguments.base, arguments.aligned, progress=progress, ranks=ranks, **options)
    if ranks.rank > 0:
        return 0
    if not isinstance(result, dict):
        return finish(arguments, result)
    if arguments.json:
        print_json({name: report.to_dict() for name, report in result.items()})
    elif not arguments.quiet:
        for name, report in result.items():
            print(f"{name}: ", end="" if not report.dry_run else "\n", flush=True)
            show(report)
    return 0
