"""Writing a trained SaLoRA adapter as a plain PEFT adapter, a residual base with its adapter, or a merged model."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from ..card import Mention, write_mention
from ..distributed import Ranks
from ..errors import SafeLoraError
from ..output import StagedDirectory, check_place, check_target
from ..report import read_report
from .constraint import leak, update_factors
from .subspaces import METADATA_KEY, REPORT_FILE, SUBSPACE_FILE, Subspaces

if TYPE_CHECKING:
    import torch

    from .initialization import AdapterLayers

Form = Literal["rank2r", "residual", "merged"]
FORMS = ("rank2r", "residual", "merged")
BASE_FOLDER = "base"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class ModuleLeak:
    """One constrained module of an export.

    rank: of the adapter written. leak: ``‖Uᵀ ΔW‖/‖ΔW‖`` of what was written (the larger side with input bases).
    leak_before: the same of the factors as they were found; above about 1e-5 they had been trained unconstrained.
    update_norm: ``‖ΔW‖_F`` as written.
    """

    name: str
    rank: int
    leak: float
    leak_before: float
    update_norm: float


@dataclass(frozen=True)
class ExportReport:
    """The outcome of :func:`export`; also written as salora_report.json. base: the model that it is for."""

    form: Form
    mode: str
    modules: list[ModuleLeak]
    outside: dict[str, str]
    subspaces: dict[str, Any]
    output: str | None = None
    warnings: list[str] = field(default_factory=list)
    base: str | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExportReport:
        """Read a report that an export or a training run has written (a file, or the directory that holds it).

        Raises SafeLoraError when the file is not such a report.
        """
        return read_report(cls, path, REPORT_FILE, "the report of a SaLoRA export", lambda entry: ModuleLeak(**entry))

    @property
    def leak(self) -> float:
        """The largest leak of any module."""
        return max(module.leak for module in self.modules)

    def summary(self) -> str:
        """One or two sentences for a person."""
        text = f"SaLoRA: {len(self.modules)} modules, {self.form}; largest ‖UᵀΔW‖/‖ΔW‖ {self.leak:.1e}"
        return f"{text}." + (f" Written to {self.output}." if self.output else "")

    def to_json(self) -> str:
        """The report as indented JSON (strict: no NaN)."""
        content = {"format": "salora-report/1", **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write salora_report.json and the mention in the model card."""
        self.save_json(Path(directory) / REPORT_FILE)
        write_mention(Path(directory) / "README.md", METADATA_KEY, self.mention())

    def mention(self) -> Mention:
        """What the model card says."""
        values = {
            "form": self.form,
            "initialisation": self.mode,
            "modules": len(self.modules),
            "largest_leak": float(f"{self.leak:.1e}"),
            "calibrated_on": (self.subspaces.get("model") or {}).get("name_or_path") or self.base or "",
        }
        what = "model" if self.form == "merged" else "adapter"
        text = (
            f"Trained with SaLoRA (arXiv 2501.01765): the update of {len(self.modules)} modules stays out of the "
            f"subspace of their outputs on refusals. It is an ordinary {what} and needs no special software. "
            f"`{REPORT_FILE}` has the leak of each module."
        )
        if self.outside:
            text += f" Outside that guarantee: {', '.join(list(self.outside)[:5])}."
        return Mention(values, "SaLoRA", text, self.base or "", "finetune" if what == "model" else "adapter")

    def table(self) -> Any:
        """A rich table with one row per module."""
        from rich.table import Table

        table = Table(title=self.summary(), caption="\n".join(self.warnings) or None, title_justify="left")
        table.add_column("module", overflow="fold")
        for heading in ("rank", "leak", "leak before", "‖ΔW‖"):
            table.add_column(heading, justify="right")
        for module in self.modules:
            table.add_row(
                module.name, str(module.rank), f"{module.leak:.1e}", f"{module.leak_before:.1e}",
                f"{module.update_norm:.4g}",
            )  # fmt: skip
        return table


def export(
    peft_model: Any,
    out: str | os.PathLike[str],
    form: Form = "rank2r",
    *,
    subspaces: Subspaces | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    sidecar: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter trained in the complement, for software that knows nothing of SaLoRA.

    - "rank2r": one LoRA adapter of the original model, A₂ = [A; A₀], B₂ = [C B, −C B₀], rank 2r, alpha 2·alpha
      (√2·alpha with rsLoRA); of rank r where the initialisation was "plain".
    - "residual": `out`/base, the model with ``W' = W − s·C B₀ A₀``, and `out`/adapter, the adapter (C B, A) of it.
    - "merged": the model with ``W + s·(C B A − C B₀ A₀)``, without an adapter.

    All three compute what the live model computes. B is projected once more in fp64 on its way out, so that no adapter
    is written unprojected, whatever trained it. The live model is not changed.

    Args:
        peft_model: a PeftModel; also under DistributedDataParallel, fully_shard or torch.compile. Sharded, all ranks
            have to make this call; rank 0 writes.
        out: the directory to create. It appears whole or not at all.
        form: see above.
        subspaces: by default those attached to the adapter by :func:`initialize`.
        adapter_name: the adapter; by default the active one.
        tokenizer: saved beside a model ("residual", "merged").
        sidecar: write ``salora_subspace.safetensors`` beside an adapter, with which training can go on.
        overwrite: replace an earlier export at `out`.

    Returns:
        The report with the leak of each module; also in `out`/salora_report.json, and in the model card.

    Raises:
        SafeLoraError: for what :func:`initialize` refuses, subspaces that are missing or do not fit, a quantised base
            with "residual" or "merged", an output that exists, NaN. Nothing is written then.
    """
    from ..peft_model import chosen_adapter, reshard, unwrap
    from .initialization import adapter_layers, attached

    _check_form(form)
    wrapped, model = unwrap(peft_model)
    name = chosen_adapter(model, adapter_name)
    known = attached(model, name)
    if subspaces is None or (subspaces.mode is None and known is not None):
        subspaces = known
    if subspaces is None:
        raise SafeLoraError(f"adapter {name!r} has no subspaces attached; give those it was trained with.")
    reshard(model)
    found = adapter_layers(model, subspaces, name)
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    ranks = _ranks(wrapped or sharded)
    try:
        with ranks.together():
            return _export(found, Path(out).absolute(), form, subspaces, tokenizer, sidecar, overwrite, ranks)
    finally:
        ranks.close()


def export_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: Form = "rank2r",
    *,
    subspaces: Subspaces | None = None,
    model: Any = None,
    sidecar: bool = True,
    overwrite: bool = False,
    local_files_only: bool = False,
) -> ExportReport:
    """:func:`export` of a checkpoint that training has left on disk: an adapter and its salora_subspace.safetensors.

    "rank2r" reads nothing but these two. "residual" and "merged" load `model`, by default the adapter's
    ``base_model_name_or_path``, in its own dtype.

    Raises SafeLoraError as :func:`export` does, and where the directory is not an adapter.
    """
    _check_form(form)
    adapter = Adapter.open(directory, local_files_only=local_files_only, allow_projected=True)
    if subspaces is None:
        subspaces = Subspaces.load(adapter.root)
    place = Path(out).absolute()
    if form == "rank2r":
        return _export_files(adapter, place, subspaces, sidecar, overwrite)
    from peft import PeftModel
    from transformers import AutoTokenizer

    from ..loading import load_bare_model
    from .initialization import restore

    source = model or adapter.base_model
    if source is None:
        raise SafeLoraError(f"{adapter.root} does not name its model; give it (model=..., --model).")
    tokenizer = None
    if isinstance(source, (str, os.PathLike)):
        loaded = load_bare_model(source, device="cpu", local_files_only=local_files_only)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        except (OSError, ValueError):
            tokenizer = None
    else:
        loaded = copy.deepcopy(source)
    live = PeftModel.from_pretrained(loaded, adapter.root)
    restore(live, subspaces)
    return export(live, place, form, subspaces=subspaces, tokenizer=tokenizer, sidecar=sidecar, overwrite=overwrite)


def _export(
    found: AdapterLayers,
    out: Path,
    form: Form,
    subspaces: Subspaces,
    tokenizer: Any,
    sidecar: bool,
    overwrite: bool,
    ranks: Ranks,
) -> ExportReport:
    import torch
    from peft import get_peft_model_state_dict

    from ..peft_model import whole
    from .initialization import exempt_modules, outside_warning, rescaled

    model, name = found.model, found.adapter
    _check_expressible(found, form, subspaces)
    with torch.no_grad():
        modules, factors = [], {}
        for entry in found.layers:
            scaling = entry.layer.scaling[name]
            factors[entry.name], numbers = _final(
                entry.name, whole(entry.lora_A), whole(entry.lora_B), scaling, subspaces
            )
            modules.append(numbers)
        warnings = ([outside_warning(found.outside)] if found.outside else []) + _unconstrained_warning(modules)
        config = copy.deepcopy(model.peft_config[name])
        config.inference_mode = True
        base = _base_state(found, form, subspaces, factors) if form != "rank2r" else {}
        if form == "rank2r" and subspaces.mode == "residual":
            _set(config, rescaled(config, exempt_modules(found), 2))
        elif form == "residual":
            factors = {key: _trained_half(pair) for key, pair in factors.items()}
            modules = [dataclasses.replace(entry, rank=len(factors[entry.name][0])) for entry in modules]
            if subspaces.mode == "packed":
                _set(config, rescaled(config, exempt_modules(found), 0.5))
        state = {
            key: whole(value).cpu()
            for key, value in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()
        }
        for entry in found.layers:
            state[entry.module.lora_A.name], state[entry.module.lora_B.name] = factors[entry.name]
    mode, of = str(subspaces.mode or "plain"), model.peft_config[name].base_model_name_or_path
    report = ExportReport(form, mode, modules, found.outside, subspaces.provenance, str(out), warnings, of)
    if ranks.rank != 0:
        ranks.gather(None)
        return report
    needed = sum(tensor.nbytes for tensor in (*state.values(), *base.values()))
    check_place(out, needed, overwrite, REPORT_FILE)
    with StagedDirectory(out) as staged, staged.writing():
        if form != "rank2r":
            place = staged.path / BASE_FOLDER if form == "residual" else staged.path
            _save_model(found, place, base, tokenizer)
        if form != "merged":
            place = staged.path / ADAPTER_FOLDER if form == "residual" else staged.path
            place.mkdir(exist_ok=True)
            if form == "residual":
                config.base_model_name_or_path = str(out / BASE_FOLDER)
            config.save_pretrained(str(place))
            _write_adapter(place, state, subspaces if sidecar and form == "rank2r" else None)
        report.save(staged.path)
        staged.publish()
    ranks.gather(None)
    return report


def live_report(model: Any, adapter: str) -> ExportReport:
    """What :func:`export` would report of a live adapter, without writing it; collective where it is sharded."""
    import torch

    from ..peft_model import reshard, whole
    from .initialization import adapter_layers, outside_warning, subspaces_of

    subspaces = subspaces_of(model, adapter)
    reshard(model)
    found = adapter_layers(model, subspaces, adapter)
    with torch.no_grad():
        modules = [
            _final(entry.name, whole(entry.lora_A), whole(entry.lora_B), entry.layer.scaling[adapter], subspaces)[1]
            for entry in found.layers
        ]
    modules = [dataclasses.replace(module, leak=module.leak_before) for module in modules]
    warnings = [outside_warning(found.outside)] if found.outside else []
    mode, of = str(subspaces.mode or "plain"), model.peft_config[adapter].base_model_name_or_path
    return ExportReport("rank2r", mode, modules, found.outside, subspaces.provenance, None, warnings, of)


def _export_files(adapter: Adapter, out: Path, subspaces: Subspaces, sidecar: bool, overwrite: bool) -> ExportReport:
    """The rank-2r form of an adapter directory, without a model."""
    import shutil

    from .initialization import outside_warning, rescaled

    config = dict(adapter.config)
    modules, state, outside = [], {key: adapter.read(key) for key in adapter.header.tensors}, {}
    exempt: dict[str, tuple[int, float]] = {}
    if subspaces.mode is None:
        raise SafeLoraError(
            f"the subspaces of {adapter.root} do not say how the adapter was initialised; they were calibrated, not "
            "trained with. Give those of the run (checkpoint-N/salora_subspace.safetensors)."
        )
    for module in adapter.modules:
        if module.name not in subspaces.bases and module.name not in subspaces.input_bases:
            if module.name not in subspaces.skipped:
                raise SafeLoraError(f"{module.name} has no subspace; these are not the ones it was trained with.")
            outside[module.name] = subspaces.skipped[module.name]
            exempt[module.name] = _rank_and_alpha(config, module.name)
            continue
        a, b = adapter.read(module.lora_A.name), adapter.read(module.lora_B.name)
        rank, alpha = _rank_and_alpha(config, module.name)
        scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        (a, b), numbers = _final(module.name, a, b, scaling, subspaces)
        state[module.lora_A.name], state[module.lora_B.name] = a, b
        modules.append(numbers)
    if not modules:
        raise SafeLoraError(f"no module of {adapter.root} has a subspace.")
    outside.update(dict.fromkeys(adapter.passed_through, "it is trained in full, not as B·A"))
    if subspaces.mode == "residual":
        config.update(rescaled(config, exempt, 2))
    config["inference_mode"] = True
    warnings = ([outside_warning(outside)] if outside else []) + _unconstrained_warning(modules)
    report = ExportReport(
        "rank2r", subspaces.mode, modules, outside, subspaces.provenance, str(out), warnings, adapter.base_model
    )
    needed = sum(tensor.nbytes for tensor in state.values())
    check_target(out, adapter.root, [], needed, overwrite, report=REPORT_FILE)
    with StagedDirectory(out) as staged, staged.writing():
        (staged.path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_adapter(staged.path, state, subspaces if sidecar else None)
        if (adapter.root / "README.md").exists():
            shutil.copyfile(adapter.root / "README.md", staged.path / "README.md")
        report.save(staged.path)
        staged.publish()
    return report


def _final(
    name: str, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, subspaces: Subspaces
) -> tuple[tuple[torch.Tensor, torch.Tensor], ModuleLeak]:
    """The factors (A₂, B₂) of the update from W, projected, in the adapter's dtype; and their leak."""
    import torch

    from .initialization import project

    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        raise SafeLoraError(f"the factors of {name} hold NaN or Inf: the training has diverged.")
    left, right = subspaces.bases.get(name), subspaces.input_bases.get(name)
    b, a = update_factors(name, lora_A.cpu(), lora_B.cpu(), subspaces)
    before = leak(b, a, left, right)
    # The second half of a task-aware adapter is C B₀ A₀, projected already: it keeps its bits, by which it is known.
    half = len(a) // 2 if name in subspaces.initial_A else len(a)
    b = torch.cat([project(b[:, :half], left), b[:, half:]], dim=1).to(lora_B.dtype)
    a = torch.cat([project(a[:half], right, "right"), a[half:]]).to(lora_A.dtype)
    wide_b, wide_a = b.double(), a.double()
    norm = float((torch.linalg.qr(wide_b)[1] @ torch.linalg.qr(wide_a.t())[1].t()).norm()) * scaling
    a, b = a.contiguous(), b.contiguous()
    return (a, b), ModuleLeak(name, a.shape[0], leak(wide_b, wide_a, left, right), before, norm)


def _trained_half(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, C B) of the factors [A; A₀] and [C B, −C B₀]."""
    a, b = pair
    rank = len(a) // 2
    return a[:rank].contiguous(), b[:, :rank].contiguous()


def _set(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)


def _check_expressible(found: AdapterLayers, form: Form, subspaces: Subspaces) -> None:
    """Refuse a form that cannot hold all of the adapter."""
    from ..peft_model import quantisation

    if form == "rank2r":
        return
    if form == "residual" and not subspaces.initial_A:
        raise SafeLoraError(
            "an adapter initialised as 'plain' has no residual base: it belongs to the model as it is. Use "
            "form='rank2r', which writes it at its own rank."
        )
    if found.outside:
        first = next(iter(found.outside))
        raise SafeLoraError(f"{first} is trained beside the constrained modules; only form='rank2r' keeps it.")
    for entry in found.layers:
        kind = quantisation(entry.layer, entry.name)
        if kind:
            raise SafeLoraError(
                f"{entry.name} is quantised ({kind}), so a {form} model cannot be written. Use form='rank2r', or load "
                "the adapter on the unquantised model."
            )


def _base_state(
    found: AdapterLayers, form: str, subspaces: Subspaces, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The plain model's state dict with its adapted weights replaced; in the weights' own dtypes, on the CPU."""
    from ..peft_model import _WRAPPERS, is_transposed, weight_of, whole

    changed = {}
    for entry in found.layers:
        weight = whole(weight_of(entry.layer)).cpu()
        scaling = entry.layer.scaling[found.adapter]
        a, b = (part.double() for part in factors[entry.name])
        update = scaling * (b @ a)
        residual = 0 * update
        if entry.name in subspaces.initial_A:
            residual = scaling * (
                subspaces.initial_B[entry.name].cpu().double() @ subspaces.initial_A[entry.name].cpu().double()
            )
        change = update if form == "merged" else -residual
        if subspaces.mode == "residual":  # the model holds W' already
            change = change + residual
        turned = is_transposed(entry.layer, entry.module)
        changed[entry.name] = (weight.double() + (change.t() if turned else change)).to(weight.dtype)
    state = {}
    for key, value in found.model.base_model.model.state_dict().items():
        key = _WRAPPERS.sub("", key)
        if ".lora_" in key:
            continue
        key = key.replace(".base_layer.", ".")
        stem, _, last = key.rpartition(".")
        state[key] = changed[stem] if last == "weight" and stem in changed else whole(value).cpu()
    return state


def _save_model(found: AdapterLayers, place: Path, state: dict[str, torch.Tensor], tokenizer: Any) -> None:
    found.model.base_model.model.save_pretrained(place, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


def _write_adapter(place: Path, state: dict[str, torch.Tensor], subspaces: Subspaces | None) -> None:
    from safetensors.torch import save_file

    tensors = {key: value.contiguous().clone() for key, value in sorted(state.items())}
    save_file(tensors, place / WEIGHTS_FILE, {"format": "pt"})
    if subspaces is not None:
        mode = "packed" if subspaces.mode == "residual" else subspaces.mode
        dataclasses.replace(subspaces, mode=mode).save(place / SUBSPACE_FILE)


def _rank_and_alpha(config: dict[str, Any], name: str) -> tuple[int, float]:
    """Of a module, as PEFT reads its patterns."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return (
        ranks.get(get_pattern_key(list(ranks), name), config["r"]),
        alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]),
    )


def _unconstrained_warning(modules: list[ModuleLeak]) -> list[str]:
    worst = max(modules, key=lambda module: module.leak_before)
    if worst.leak_before <= 1e-4:
        return []
    return [
        f"Before its export {worst.name} reached into the protected subspace by {worst.leak_before:.1e} of its update: "
        "the adapter was trained without the constraint. What is written is projected, and differs from what was "
        "trained."
    ]


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise SafeLoraError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")


def _ranks(shared: bool) -> Ranks:
    from ..distributed import process_group

    return process_group() if shared else Ranks()
