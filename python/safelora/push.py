"""Uploading what a method has made safe to the Hugging Face hub, when that is asked for and not before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from .adapter import COMPANIONS, CONFIG_FILE, PROJECTED, WEIGHTS_FILE, Adapter
from .card import front_matter, is_repository
from .checkpoint import INDEX_FILE, Checkpoint
from .errors import SafeLoraError
from .filter.report import FILTERED, FilterReport
from .report import Report, SafeLoraReport
from .salora.subspaces import REPORT_FILE as SALORA_FILE

# A training directory also holds checkpoints as trained, optimizer states and arguments: none of them is listed here.
_REPORTS = (PROJECTED.report, FILTERED.report, SALORA_FILE)
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *_REPORTS, *COMPANIONS)
_MODEL_FILES = ("*.safetensors", INDEX_FILE, "config.json", "*.py", *_REPORTS, *COMPANIONS)
_FACTOR_KINDS = ("linear", "conv", "embedding")  # modules that an adapter has under the names of the report
# Far above the leak of factors rounded to bf16, and below that of an update which no subspace constrains.
_LEAK = 1e-2


@dataclass(frozen=True)
class Push:
    """What :func:`push_to_hub` uploads, or has uploaded.

    files: names and sizes in bytes. left_out: what else lies in the folder and stays there. summary: that of its
    reports.
    warnings: what a reader of the repository would stumble over. url: of the commit, None until it is uploaded.
    """

    repo_id: str
    folder: str
    files: dict[str, int]
    left_out: list[str]
    summary: str
    warnings: list[str] = field(default_factory=list)
    url: str | None = None


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    upload: bool = False,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> Push:
    """Check what a method has made safe, say what would be uploaded, and with `upload` do it.

    Args:
        folder: output of :func:`safelora.project_adapter`, :func:`safelora.project_model`,
            :func:`safelora.filter_adapter` or :func:`safelora.salora.export` (forms "rank2r" and "merged"); an adapter
            that was saved with the report of :func:`safelora.apply_safe_lora` or of a filter in memory, or trained with
            :class:`safelora.salora.SaLoraCallback`. The subspaces of SaLoRA stay here.
        repo_id: "owner/name" on the hub.
        upload: nothing leaves this machine unless this is true.
        private: of a repository that does not exist yet; an existing one stays as it is.
        revision: the branch, by default main.
        create_pr: open a pull request instead of committing.
        commit_message: by default the report's summary.
        token: by default the one that huggingface_hub has stored.

    Raises:
        SafeLoraError: where the folder holds no adapter or model, no report, a report of another adapter, of a method
            that changed nothing or of SaLoRA with a leak above 1e-2, or a repository id is malformed. Nothing has been
            sent then.
        ImportError: huggingface_hub is not installed.
        huggingface_hub.errors.HfHubHTTPError: when the hub refuses.
    """
    root = Path(folder).expanduser()
    if not is_repository(repo_id):
        raise SafeLoraError(f"{repo_id!r} is not a repository id, expected 'owner/name'.")
    reports = list(_reports(root))
    if not reports:
        raise SafeLoraError(
            f"{root} has no {' or '.join(_REPORTS)}: it is not the output of a projection, a filter or an export of "
            "SaLoRA. Make one (safelora project, filter, export), or save the report of apply_safe_lora beside it."
        )
    is_adapter = (root / CONFIG_FILE).is_file()
    warnings = _check_adapter(root, reports) if is_adapter else _check_model(root)
    warnings += _card_warnings(root, reports)
    patterns = _ADAPTER_FILES if is_adapter else _MODEL_FILES
    entries = sorted(root.iterdir())
    chosen = {
        entry.name: entry.stat().st_size
        for entry in entries
        if entry.is_file() and any(fnmatchcase(entry.name, pattern) for pattern in patterns)
    }
    left_out = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if entry.name not in chosen]
    summary = " ".join(report.summary.partition(" Written to ")[0] for report in reports)
    push = Push(repo_id, str(root), chosen, left_out, summary, warnings)
    return _upload(push, private, revision, create_pr, commit_message, token) if upload else push


def _upload(
    push: Push, private: bool, revision: str | None, create_pr: bool, message: str | None, token: str | None
) -> Push:
    from dataclasses import replace

    from huggingface_hub import HfApi

    api: Any = HfApi(token=token)
    api.create_repo(push.repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=push.repo_id,
        folder_path=push.folder,
        allow_patterns=list(push.files),
        revision=revision,
        create_pr=create_pr,
        commit_message=message or push.summary,
    )
    return replace(push, url=str(getattr(commit, "pr_url", None) or commit.commit_url))


class _Found(NamedTuple):
    """A report in the folder, and the modules that an adapter must have if it is its own."""

    file: str
    summary: str
    content: dict[str, Any]
    modules: list[str]


def _reports(root: Path) -> Iterator[_Found]:
    """The reports in a folder. Raises SafeLoraError for one that says that nothing was made safe."""
    for kind in (SafeLoraReport, FilterReport):
        if (root / kind.mark.report).is_file():
            report: Report = kind.load(root)
            if report.dry_run or not report.changed:
                raise SafeLoraError(
                    f"{root} is not {kind.mark.done}: {kind.mark.report} says that no module was. It is not uploaded "
                    "as safe."
                )
            names = [module.name for module in report.changed if module.kind in _FACTOR_KINDS]
            yield _Found(kind.mark.report, report.summary(), report.to_dict(), names)
    if (root / SALORA_FILE).is_file():
        from .salora import ExportReport

        export = ExportReport.load(root)
        if export.form == "residual":
            raise SafeLoraError(
                f"{root} holds a model and an adapter of it, which are two repositories. Export it as rank2r or merged."
            )
        if not export.modules or not export.leak <= _LEAK:
            found = f"a leak of {export.leak:.1e}, expected at most {_LEAK:g}" if export.modules else "no module"
            raise SafeLoraError(
                f"{root} is not kept out of the protected subspace: {SALORA_FILE} has {found}. It is not uploaded as "
                "safe; safelora export projects it."
            )
        content = json.loads(export.to_json())
        yield _Found(SALORA_FILE, export.summary(), content, [module.name for module in export.modules])


def _check_adapter(root: Path, reports: list[_Found]) -> list[str]:
    adapter = Adapter.open(root, allow_projected=True)
    held = {module.name for module in adapter.modules}
    for report in reports:
        missing = [name for name in report.modules if name not in held]
        if missing:
            raise SafeLoraError(f"{root / report.file} is the report of another adapter: it changed {missing[0]}.")
    if adapter.weights.name != WEIGHTS_FILE:
        raise SafeLoraError(f"{root} holds pickled weights ({adapter.weights.name}); save it as safetensors.")
    warnings = []
    if adapter.base_model is None or not is_repository(adapter.base_model):
        warnings.append(
            f"{CONFIG_FILE} names the model {adapter.base_model!r}, which others cannot load: set "
            "base_model_name_or_path to its repository."
        )
    return warnings


def _check_model(root: Path) -> list[str]:
    if not (root / "config.json").is_file():
        raise SafeLoraError(f"{root} holds neither an adapter ({CONFIG_FILE}) nor a model (config.json).")
    Checkpoint.open(root)
    return []


def _card_warnings(root: Path, reports: list[_Found]) -> list[str]:
    warnings = []
    card = root / "README.md"
    named = front_matter(card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "").get("base_model")
    if named is None:
        warnings.append("README.md names no base_model, so that the hub does not link it to the model.")
    elif not is_repository(named):
        warnings.append(f"README.md gives base_model as {named!r}; the hub refuses a card without a repository id.")
    for report in reports:
        path = next(_paths(report.content), None)
        if path is not None:
            warnings.append(f"{report.file} and README.md tell paths of this machine, such as {path}.")
    return warnings


def _paths(content: Any) -> Iterator[str]:
    """The absolute paths among the strings of a report."""
    if isinstance(content, (dict, list)):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _paths(entry)
    elif isinstance(content, str) and os.path.isabs(content):
        yield content
