"""Safe LoRA on a PEFT model in memory: the aligned weights are those that it holds, only the base is read."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from .adapter import tensor_bytes
from .changes import Changes
from .checkpoint import DTYPE_BITS, Checkpoint, TensorInfo
from .decision import check_options, decide
from .distributed import Kept, Ranks, modules_of, process_group, share
from .errors import SafeLoraError
from .full import FullTensor
from .live_pair import Factors, LivePair
from .mapping import PlannedModule, plan_modules
from .measure import Measured, Pair, Rewriter, batches_of, measure, pairs_of
from .peft_model import (
    MEMORY,
    QUANTISATION_ERROR,
    Gather,
    checkpoint_in_memory,
    chosen_adapter,
    inventory,
    is_transposed,
    quantisation,
    reshard,
    unwrap,
    weight_of,
)
from .report import SafeLoraReport
from .serving import serving_notes
from .stream import READ_AHEAD_BYTES, ReadAhead
from .weights import Normalize, Stored, WeightMatch

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_LIVE = "live"


class LiveReport(SafeLoraReport):
    """A :class:`SafeLoraReport` of a projection in memory, which can be taken back."""

    def __init__(self, *, changes: Changes | None = None, **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "_changes", changes)

    _changes: Changes | None

    def undo(self, *, force: bool = False) -> None:
        """Give every changed factor its former bits again; nothing happens a second time.

        Raises SafeLoraError when a factor has changed since, by training or loading, unless `force`: its later
        changes would be lost. Where the model is sharded, all ranks have to call it.
        """
        if self._changes is not None:
            self._changes.undo(force)

    def originals(self) -> dict[int, Any]:
        """The former parameters by the id of the present ones: a memo with which copy.deepcopy(model, memo) makes the
        model as it was."""
        import torch

        return {
            id(change.parameter): torch.nn.Parameter(change.original.clone(), change.parameter.requires_grad)
            for change in (self._changes.made if self._changes is not None else ())
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The per-layer picture as a matplotlib figure, also written to `path` where it is given."""
        figure = super().plot()
        if path is not None:
            figure.savefig(path, dpi=150, bbox_inches="tight")
        return figure


def apply_safe_lora(
    peft_model: Any,
    base: str | os.PathLike[str] | torch.nn.Module,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Literal["strict", "authors"] = "strict",
    normalize: Normalize = "frobenius",
    adapter_name: str | None = None,
    aligned: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    allow_projected: bool = False,
    distributed: bool | None = None,
    local_files_only: bool = False,
    revision_base: str | None = None,
    revision_aligned: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LiveReport:
    """Apply Safe LoRA (arXiv 2405.16833) to an adapter of a PeftModel, in place.

    What :func:`safelora.project_adapter` does to an adapter directory, with the same numbers: for every adapted weight,
    V = W_aligned − W_base and C = V Vᵀ/‖V‖_F, the cosine between B·A and C·B·A is measured, and where it is low,
    lora_B becomes C·lora_B. W_aligned are the frozen weights of the model. Only lora_B changes, under no_grad and by
    `copy_`, so that training may go on; the optimizer's moments stay as they are.

    Args:
        peft_model: a peft.PeftModel with a LoRA adapter, on any device; also wrapped in DistributedDataParallel or
            torch.compile, or sharded by fully_shard (FSDP2, tensor parallel).
        base: the model before alignment: directory, safetensors file, repository id, or a model in memory.
        threshold, num_layers, rule, normalize: as for :func:`safelora.project_adapter`.
        adapter_name: the adapter; by default the active one.
        aligned: a checkpoint to read W_aligned from instead, for models that are quantised or rounded in memory.
        dry_run: measure and decide, change nothing.
        allow_projected: accept an adapter that was projected before.
        distributed: share the work with the other ranks of torch's process group, all of which must make this call.
            By default where the model is wrapped in DistributedDataParallel or sharded.
        local_files_only, revision_base, revision_aligned: for models given as repository ids.
        progress: called with (bytes done, bytes in all) of this rank.

    Returns:
        The report, with `undo()`. It is the same on all ranks.

    Raises:
        SafeLoraError: for a model, state or option that cannot be handled: no LoRA module, several active adapters,
            merged adapters, DoRA and other updates that are not s·B·A, initialisations that changed the weights,
            factors that modules share, weights that are offloaded, not readable or of another shape than the
            base's, V = 0 everywhere, NaN. Nothing has been changed then.
    """
    with LiveJob(peft_model, distributed) as job:
        job.prepare(
            base,
            threshold=threshold,
            num_layers=num_layers,
            rule=rule,
            normalize=normalize,
            adapter_name=adapter_name,
            aligned=aligned,
            allow_projected=allow_projected,
            local_files_only=local_files_only,
            revision_base=revision_base,
            revision_aligned=revision_aligned,
        )
        return job.run(dry_run, progress)


@contextmanager
def safe_lora_applied(
    peft_model: Any, base: str | os.PathLike[str] | torch.nn.Module, **options: Any
) -> Iterator[LiveReport]:
    """The model is projected inside the context, and has its former bits again afterwards.

    Arguments and errors are those of :func:`apply_safe_lora`. Changes made to the projected factors inside are lost.
    """
    report = apply_safe_lora(peft_model, base, **options)
    try:
        yield report
    finally:
        report.undo(force=True)


class LiveJob:
    """One call of :func:`apply_safe_lora`, as a context in which all ranks of the job succeed or fail together."""

    def __init__(self, peft_model: Any, distributed: bool | None) -> None:
        wrapped, self.model = unwrap(peft_model)
        reshard(self.model)
        self.sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        shared = wrapped or self.sharded if distributed is None else distributed
        self.ranks = process_group() if shared else Ranks()
        self._names: dict[int, str] = {}
        self._gather = Gather()

    def __enter__(self) -> LiveJob:
        self._together = self.ranks.together()
        self._together.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._together.__exit__(kind, error, trace)
        finally:
            self.ranks.close()

    def prepare(
        self,
        base: Any,
        *,
        threshold: float | None = None,
        num_layers: int | None = None,
        rule: str = "strict",
        normalize: Normalize = "frobenius",
        adapter_name: str | None = None,
        aligned: str | os.PathLike[str] | None = None,
        allow_projected: bool = False,
        local_files_only: bool = False,
        revision_base: str | None = None,
        revision_aligned: str | None = None,
    ) -> None:
        """Refuse everything that can be refused before any weight is read."""
        self.options = check_options(threshold, num_layers, rule, normalize)
        self.normalize = normalize
        self.adapter_name = chosen_adapter(self.model, adapter_name)
        self.adapter, self.parameters, self.layers = inventory(self.model, self.adapter_name, allow_projected)
        self.warnings = list(self.adapter.warnings)
        table: dict[str, Any] = {}
        if hasattr(base, "named_parameters"):
            base_model, table = checkpoint_in_memory(base, self.model)
            self.base: dict[str, Any] = {"source": base_model.source}
        elif not isinstance(base, (str, os.PathLike)):
            raise SafeLoraError(f"base is a {type(base).__name__}, expected a path, a repository id or a model.")
        else:
            base_model = Checkpoint.open(base, revision=revision_base, local_files_only=local_files_only)
            self.base = base_model.fingerprint()
        aligned_model = None
        if aligned is not None:
            aligned_model = Checkpoint.open(aligned, revision=revision_aligned, local_files_only=local_files_only)
            self.aligned = aligned_model.fingerprint()
        else:
            self.aligned = {"source": self.adapter.base_model or "the model in memory", "in_memory": True}
        self.plan = plan_modules(self.adapter, base_model, aligned_model)
        if aligned is None:
            self.plan = [self._in_place(planned) for planned in self.plan]
            self.warnings += self._memory_warnings()
        if all(planned.skipped for planned in self.plan):
            raise SafeLoraError(f"no module of {self.adapter.root} can be projected: {self.plan[0].skipped}.")
        self.pairs = [self._live_pair(pair, table, aligned is None) for pair in pairs_of(self.plan)]
        self.pairs.sort(key=lambda pair: (str(pair.device), pair.base.info.file, pair.base.info.begin))
        self.ranks.gather(None)

    def run(self, dry_run: bool, progress: Callable[[int, int], None] | None) -> LiveReport:
        """Measure, select and, unless `dry_run`, change the model."""
        import torch

        ranks = self.ranks
        with torch.inference_mode(False), torch.no_grad():
            factors = Factors(self.parameters, self.adapter.root)
            if ranks.size > 1:
                ranks.same(self._identity(factors), "the adapter, the base model or the options")
            shares = share(self.pairs, ranks.size)
            mine: Any = shares[ranks.rank]
            own = {module.name for module in modules_of(mine)}
            kept = Kept(factors)
            rewriter = Rewriter(
                factors, None if dry_run else kept, [planned for planned in self.plan if planned.module.name in own]
            )
            outcomes = ranks.gather(self._measure(mine, factors, rewriter, progress))
            found = {name: numbers for outcome in outcomes for name, numbers in outcome[0].items()}
            norms = {name: norm for outcome in outcomes for name, norm in outcome[1].items()}
            measured = {entry.module.name: found[entry.module.name] for entry in self.plan if not entry.skipped}
            if all(result.v_norm == 0 for result in measured.values()):
                raise SafeLoraError(
                    f"the model and the base ({self.base['source']}) hold the same weights in every adapted module: "
                    "V = 0, there is no alignment to project onto. Is the base the wrong model?"
                )
            selected, outcome = decide(self.plan, measured, self.options)
            changes = Changes(self.model, self.adapter_name)
            if not dry_run and selected:
                rewriter.restore(measured, selected)
                self._exchange(kept, shares, selected, changes)
                changes.apply()
        return LiveReport(
            changes=changes,
            **outcome,
            inputs={
                "adapter": {
                    "source": f"adapter {self.adapter_name!r} of a model in memory",
                    "base_model_name_or_path": self.adapter.base_model,
                },
                "base": self.base,
                "aligned": self.aligned,
            },
            dry_run=dry_run,
            passed_through=self.adapter.passed_through,
            warnings=self.warnings + self._rounding_warnings(measured, norms),
            serving=[str(note) for note in serving_notes(self.adapter)],
        )

    def _measure(
        self, mine: Sequence[LivePair], factors: Factors, rewriter: Rewriter, progress: Any
    ) -> tuple[dict[str, Measured], dict[str, float]]:
        """The numbers of this rank's modules, and ‖W_base‖ of the quantised ones."""
        ready: Future[Any] = Future()
        ready.set_result(None)
        # Sharded weights are gathered by all ranks in the order of all pairs, whoever needs them.
        order: Any = [[pair] for pair in self.pairs]
        if not self.sharded:
            devices = groupby(mine, lambda pair: str(pair.device))
            order = [batch for _, pairs in devices for batch in batches_of(list(pairs))]
        owned = {id(pair) for pair in mine}
        batches = [batch for batch in order if id(batch[0]) in owned]
        measured: dict[str, Measured] = {}
        failure: Exception | None = None
        done, total = 0, sum(pair.nbytes for pair in mine)
        with ReadAhead(
            [[info for pair in batch for info in pair.tensors] for batch in batches], READ_AHEAD_BYTES
        ) as stream:
            reader = iter(stream)
            for batch in order:
                if self.sharded:
                    batch[0].hold()
                if id(batch[0]) not in owned or failure is not None:
                    batch[0].held = None
                    continue
                try:
                    window: Any = [next(reader)]
                    measured.update(measure(factors, [batch], window, self.normalize, rewriter, ready, None))
                except Exception as error:
                    if not self.sharded:
                        raise
                    failure = error
                done += sum(pair.nbytes for pair in batch)
                if progress is not None:
                    progress(done, total)
        if failure is not None:
            raise failure
        return measured, {m.name: pair.base_norm for pair in mine if pair.base_norm for m in pair.modules}

    def _exchange(self, kept: Kept, shares: Any, selected: set[str], changes: Changes) -> None:
        """Bring the projected factors to all ranks."""
        owner = {module.output.name: rank for rank, pairs in enumerate(shares) for module in modules_of(pairs)}
        for name in dict.fromkeys(entry.module.output.name for entry in self.plan if entry.module.name in selected):
            tensor = kept.written(name)
            if self.ranks.size > 1:
                tensor = tensor.to("cpu", copy=owner[name] != self.ranks.rank).contiguous()
                self.ranks.broadcast(tensor, owner[name])
            changes.make(name, self.parameters[name], tensor)

    def _identity(self, factors: Factors) -> str:
        """What has to be equal on all ranks."""
        digest = hashlib.sha256()
        files = self.base.get("files", self.base["source"])
        digest.update(repr((self.options, self.aligned.get("files"), files)).encode())
        for name in self.parameters:
            tensor = factors.read(name).detach().cpu().contiguous()
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def _in_place(self, planned: PlannedModule) -> PlannedModule:
        """The planned module with the model's own weight as the aligned one."""
        module, base = planned.module, planned.base
        if planned.skipped or base is None or isinstance(module, FullTensor):
            return planned
        layer = self.layers[module.lora_B.name]
        quantisation(layer, module.name)
        weight = weight_of(layer)
        held = layer.get_base_layer() if weight is None else weight
        name = self._names.setdefault(id(held), module.name)  # layers that share a weight share its reads
        transposed = is_transposed(layer, module)
        shape = tuple(weight.shape) if module.kind == "expert" else (module.d_out, module.d_in)
        stored = Stored(TensorInfo(name, "", shape, MEMORY, 0, 2 * math.prod(shape)))
        if module.kind == "expert":
            stored = stored.slab(module.expert)
        elif module.d_out == module.d_in:
            base = replace(base, transposed=transposed)
        return replace(planned, base=base, aligned=WeightMatch((stored,), _LIVE, transposed))

    def _live_pair(self, pair: Pair, table: dict[str, Any], in_memory: bool) -> LivePair:
        key = pair.modules[0].lora_B.name
        layer = self.layers[key] if in_memory else None
        device = self.parameters[key].device
        return LivePair(pair.aligned, pair.base, pair.modules, pair.full, layer, table, device, self._gather)

    def _memory_warnings(self) -> list[str]:
        """What makes the weights in memory other than those of the aligned checkpoint."""
        rounded, trained = [], []
        for entry in self.plan:
            if entry.skipped or entry.base is None:
                continue
            weight = weight_of(self.layers[entry.module.output.name])
            if weight is None:
                continue
            if weight.dtype.is_floating_point and weight.element_size() * 8 < DTYPE_BITS[entry.base.info.dtype]:
                rounded.append(entry.module.name)
            if weight.requires_grad:
                trained.append(entry.module.name)
        warnings = []
        if rounded:
            warnings.append(
                f"{len(rounded)} weights are held in fewer bits than the base's are stored in ({rounded[0]}): V "
                "includes their rounding. Load the model with dtype='auto', or give `aligned`."
            )
        if trained:
            warnings.append(
                f"{len(trained)} adapted weights are trainable themselves ({trained[0]}): what training did to them "
                "counts as alignment. Give `aligned` to measure against the aligned checkpoint."
            )
        return warnings

    def _rounding_warnings(self, measured: dict[str, Measured], norms: dict[str, float]) -> list[str]:
        """How much of V is quantisation error, by the typical error of each method."""
        if not norms:
            return []
        shares = []
        methods = set()
        for entry in self.plan:
            if entry.module.name in norms:
                method = quantisation(self.layers[entry.module.output.name])
                methods.add(method or "")
                v_norm = measured[entry.module.name].v_norm
                if method in QUANTISATION_ERROR and v_norm:
                    shares.append(min(1.0, (QUANTISATION_ERROR[method] * norms[entry.module.name] / v_norm) ** 2))
        kinds = ", ".join(sorted(methods))
        text = f"{len(norms)} adapted weights are quantised in memory ({kinds}): V includes the rounding. "
        if shares:
            text += (
                f"At the usual error of this format it makes up about {statistics.median(shares):.0%} of ‖V‖² (median "
                "over modules), and that part of each projection and cosine is noise. "
            )
        return [text + "Give `aligned`, the unquantised checkpoint, for a reliable result."]
