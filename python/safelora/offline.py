"""A projection from files to files, shared over the processes of a job: the common part of adapters and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from .checkpoint import Checkpoint
from .decision import decide, refuse_equal_models
from .distributed import Ranks, collect, modules_of, share, together
from .mapping import PlannedModule
from .measure import Rewriter, Source, Target, batches_of, measure, pairs_of
from .output import StagedDirectory
from .report import SafeLoraReport
from .stream import READ_AHEAD_BYTES, ReadAhead


def project_files(
    plan: Sequence[PlannedModule],
    source: Source,
    base: Checkpoint,
    aligned: Checkpoint,
    options: dict[str, Any],
    ranks: Ranks,
    writer: AbstractContextManager[Target] | None,
    copy: Callable[[], Any],
    report_of: Callable[[dict[str, Any], Any], SafeLoraReport],
    progress: Callable[[int, int], None] | None,
) -> SafeLoraReport:
    """Measure every module of the plan once, decide, and write what is selected; a collective call.

    Args:
        plan: the modules with their weights, the same on all ranks, each of which reads the weights that it owns.
        source: the updates. base, aligned: the checkpoints of the plan. options: as `check_options` gives them.
        writer: rank 0's output under construction; on other ranks, what keeps their projected tensors until rank 0 has
            fetched them; None in a dry run.
        copy: fills rank 0's output with the input, in a thread of its own while the first weights are read.
        report_of: the report, from the fields that follow from the decision and from what `copy` returned.
        progress: called with (bytes done, bytes in all) of this rank.

    Raises SafeLoraError where V = 0 everywhere or a tensor is not finite, OSError when writing fails.
    """
    shares = share(pairs_of(plan), ranks.size)
    batches = batches_of(shares[ranks.rank])
    own = {module.name for module in modules_of(shares[ranks.rank])}
    with ExitStack() as stack:
        stream = stack.enter_context(
            ReadAhead([[info for pair in batch for info in pair.tensors] for batch in batches], READ_AHEAD_BYTES)
        )
        target = stack.enter_context(writer) if writer is not None else None
        copied = stack.enter_context(ThreadPoolExecutor(1, "safelora-copy")).submit(copy)
        rewriter = Rewriter(source, target, [planned for planned in plan if planned.module.name in own])
        mine = measure(source, batches, stream, options["normalize"], rewriter, copied, progress)
        measured = together(ranks, plan, mine)
        refuse_equal_models(measured, base, aligned)
        selected, outcome = decide(plan, measured, options)
        report = report_of(outcome, copied.result())
        if target is not None:
            rewriter.restore(measured, selected)
            collect(ranks, shares, selected, source, target)
        if isinstance(target, StagedDirectory):
            target.commit(report)
    return report
