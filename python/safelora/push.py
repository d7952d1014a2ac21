"""Uploading a projected adapter or model to the Hugging Face hub, when that is asked for and not before."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .adapter import COMPANIONS, CONFIG_FILE, REPORT_FILE, WEIGHTS_FILE, Adapter
from .card import front_matter, is_repository
from .checkpoint import INDEX_FILE, Checkpoint
from .errors import SafeLoraError
from .report import SafeLoraReport

# A training directory also holds checkpoints as trained, optimizer states and arguments: none of them is listed here.
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE, *COMPANIONS)
_MODEL_FILES = ("*.safetensors", INDEX_FILE, "config.json", "*.py", REPORT_FILE, *COMPANIONS)


@dataclass(frozen=True)
class Push:
    """What :func:`push_to_hub` uploads, or has uploaded.

    files: names and sizes in bytes. left_out: what else lies in the folder and stays there. summary: the report's.
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
    """Check a projected adapter or model, say what would be uploaded, and with `upload` do it.

    Args:
        folder: output of :func:`safelora.project_adapter` or :func:`safelora.project_model`, or an adapter that was
            saved with the report of :func:`safelora.apply_safe_lora`.
        repo_id: "owner/name" on the hub.
        upload: nothing leaves this machine unless this is true.
        private: of a repository that does not exist yet; an existing one stays as it is.
        revision: the branch, by default main.
        create_pr: open a pull request instead of committing.
        commit_message: by default the report's summary.
        token: by default the one that huggingface_hub has stored.

    Raises:
        SafeLoraError: where the folder holds no adapter or model, no report, a report of another adapter or of a
            projection that changed nothing, or a repository id is malformed. Nothing has been sent then.
        ImportError: huggingface_hub is not installed.
        huggingface_hub.errors.HfHubHTTPError: when the hub refuses.
    """
    root = Path(folder).expanduser()
    if not is_repository(repo_id):
        raise SafeLoraError(f"{repo_id!r} is not a repository id, expected 'owner/name'.")
    if not (root / REPORT_FILE).is_file():
        raise SafeLoraError(
            f"{root} has no {REPORT_FILE}: it is not the output of a projection. Project it first "
            "(safelora project), or save the report of apply_safe_lora beside it."
        )
    report = SafeLoraReport.load(root)
    if report.dry_run or not report.projected:
        raise SafeLoraError(f"{root} is not projected: its report says that no module was. It is not uploaded as safe.")
    is_adapter = (root / CONFIG_FILE).is_file()
    warnings = _check_adapter(root, report) if is_adapter else _check_model(root)
    patterns = _ADAPTER_FILES if is_adapter else _MODEL_FILES
    entries = sorted(root.iterdir())
    chosen = {
        entry.name: entry.stat().st_size
        for entry in entries
        if entry.is_file() and any(fnmatchcase(entry.name, pattern) for pattern in patterns)
    }
    left_out = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if entry.name not in chosen]
    summary = report.summary().partition(" Written to ")[0]
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


def _check_adapter(root: Path, report: SafeLoraReport) -> list[str]:
    adapter = Adapter.open(root, allow_projected=True)
    held = {module.name for module in adapter.modules}
    missing = [m.name for m in report.projected if m.kind in ("linear", "conv", "embedding") and m.name not in held]
    if missing:
        raise SafeLoraError(f"{root / REPORT_FILE} is the report of another adapter: it projected {missing[0]}.")
    if adapter.weights.name != WEIGHTS_FILE:
        raise SafeLoraError(f"{root} holds pickled weights ({adapter.weights.name}); save it as safetensors.")
    warnings = _card_warnings(root, report)
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
    return _card_warnings(root, SafeLoraReport.load(root))


def _card_warnings(root: Path, report: SafeLoraReport) -> list[str]:
    warnings = []
    card = root / "README.md"
    named = front_matter(card.read_text(encoding="utf-8", errors="replace") if card.is_file() else "").get("base_model")
    if named is None:
        warnings.append("README.md names no base_model, so that the hub does not link it to the model.")
    elif not is_repository(named):
        warnings.append(f"README.md gives base_model as {named!r}; the hub refuses a card without a repository id.")
    paths = [entry["path"] for entry in report.inputs.values() if isinstance(entry, dict) and entry.get("path")]
    if paths or report.output:
        warnings.append(f"{REPORT_FILE} and README.md tell paths of this machine, such as {report.output or paths[0]}.")
    return warnings
