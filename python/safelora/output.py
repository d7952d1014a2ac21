"""Writing an adapter directory whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from .adapter import COMPANIONS, CONFIG_FILE, PROJECTED, REPORT_FILE, WEIGHTS_FILE, Adapter, Mark, tensor_bytes
from .card import write_mention
from .checkpoint import INDEX_FILE, Checkpoint, TensorInfo
from .errors import SafeLoraError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from .report import Report

try:
    import fcntl
except ImportError:  # not a POSIX system: stale directories are then left alone
    fcntl = None  # type: ignore[assignment]

_COPY_BYTES = 1 << 20
_SPARE_BYTES = 4 << 20


def output_place(out: str | os.PathLike[str] | None, dry_run: bool) -> Path | None:
    """The absolute path of an output directory, None in a dry run. Raises SafeLoraError where none was given."""
    if dry_run:
        return None
    if out is None:
        raise SafeLoraError("give an output directory (out), or ask for a dry run.")
    return Path(out).expanduser().resolve()


def check_target(
    out: Path, adapter: Path, checkpoints: list[Path], needed: int, overwrite: bool, report: str = REPORT_FILE
) -> None:
    """Refuse an output location before any work: touching an input, or as :func:`check_place` does.

    Raises SafeLoraError.
    """
    for source in (adapter, *checkpoints):
        if out == source or out in source.parents or (source == adapter and adapter in out.parents):
            raise SafeLoraError(f"the output {out} would touch the input {source}; inputs are never changed.")
    check_place(out, needed, overwrite, report)


def check_place(out: Path, needed: int, overwrite: bool, report: str) -> None:
    """Refuse an output location before any work: taken, unwritable, or with less room than `needed` bytes.

    An earlier output, which may be overwritten, is known by its `report`.

    Raises SafeLoraError.
    """
    if out.exists():
        if not out.is_dir():
            raise SafeLoraError(f"the output {out} exists and is not a directory.")
        names = os.listdir(out)
        if names and not overwrite:
            raise SafeLoraError(f"the output directory {out} is not empty; choose another, or allow overwriting.")
        if names and (report not in names or any((out / name).is_dir() for name in names)):
            raise SafeLoraError(f"{out} is not an earlier output of this tool, so it is not overwritten.")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SafeLoraError(f"cannot write the output {out}: {parent} is not a writable directory.")
    free = shutil.disk_usage(parent).free
    if free < needed + _SPARE_BYTES:
        raise SafeLoraError(
            f"the output {out} needs {(needed + _SPARE_BYTES) / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free."
        )


class StagedDirectory:
    """A directory under construction, hidden and locked, beside its final place.

    `files` are those that are written piece by piece. Leaving the context without :meth:`publish` removes the
    directory. A killed process leaves it behind unlocked; the next run for the same output removes it.
    """

    def __init__(self, out: Path, files: Sequence[str] = ()) -> None:
        self.out = out
        self._names = files
        self._files: dict[str, BinaryIO] = {}
        self._prefix = f".{out.name[:100]}.safelora-"
        self._lock: int | None = None
        self._opened = ExitStack()
        self.path = out.parent / f"{self._prefix}{os.getpid()}-{os.urandom(4).hex()}"

    def __enter__(self) -> Self:
        with self.writing():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.path.mkdir()
            self._lock = _try_lock(self.path)
            for name in self._names:
                self._files[name] = self._opened.enter_context((self.path / name).open("xb+", buffering=0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        if self._lock is not None:
            os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, report: Report) -> None:
        """Write report and model card, and move everything to its place."""
        with self.writing():
            report.save_json(self.path / report.mark.report)
            if report.changed:
                write_mention(self.path / "README.md", report.mark.key, report.mention())
            self.publish()

    def publish(self) -> None:
        """Make everything durable and move it to its place."""
        for name in os.listdir(self.path):
            _sync(self.path / name)
        _sync(self.path)
        self._move()
        _sync(self.out.parent)

    def copy_companions(self, root: Path, patterns: Sequence[str]) -> None:
        """Copy the files of `root` whose names match."""
        for name in sorted(os.listdir(root)):
            source = root / name
            if source.is_file() and any(fnmatchcase(name, pattern) for pattern in patterns):
                shutil.copyfile(source, self.path / name)

    def _move(self) -> None:
        if self.out.exists() and os.listdir(self.out):
            old = self.out.parent / f"{self._prefix}old-{os.urandom(4).hex()}"
            os.rename(self.out, old)
            try:
                os.rename(self.path, self.out)
            except BaseException:
                os.rename(old, self.out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(self.path, self.out)

    def _remove_stale(self) -> None:
        for entry in os.scandir(self.out.parent):
            if entry.name.startswith(self._prefix) and entry.is_dir(follow_symlinks=False):
                lock = _try_lock(Path(entry.path))
                if lock is not None:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failing write into one clear OSError that says what became of the output."""
        try:
            yield
        except OSError as error:
            remedy = "Free some space and run again" if error.errno == errno.ENOSPC else "Nothing else was changed"
            raise OSError(
                error.errno, f"writing {self.out} failed ({error.strerror or error}). No output was left. {remedy}."
            ) from error


class StagedAdapter(StagedDirectory):
    """An adapter directory under construction."""

    def __init__(self, out: Path, adapter: Adapter, mark: Mark = PROJECTED) -> None:
        super().__init__(out, (WEIGHTS_FILE,))
        self.adapter = adapter
        self._mark = mark
        self._header = _header_bytes(adapter, mark, marked=True)

    def copy_input(self) -> str:
        """Copy every tensor and companion file of the input; returns the sha256 of its weight file."""
        with self.writing():
            digest = copy_and_hash(self.adapter, self._files[WEIGHTS_FILE], len(self._header))
            shutil.copyfile(self.adapter.root / CONFIG_FILE, self.path / CONFIG_FILE)
            self.copy_companions(self.adapter.root, COMPANIONS)
        return digest

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite tensor `name`; dtype and number of elements are those of the input's tensor."""
        header, file = self.adapter.header, self._files[WEIGHTS_FILE]
        with self.writing():
            file.seek(len(self._header) + header.tensors[name].begin - header.data_start)
            write_all(file, tensor_bytes(tensor))

    def written(self, name: str) -> torch.Tensor:
        """Tensor `name` as it stands in the output."""
        header = self.adapter.header
        info = header.tensors[name]
        shift = len(self._header) - header.data_start
        return _read(info._replace(file=self.path / WEIGHTS_FILE, begin=info.begin + shift, end=info.end + shift))

    def commit(self, report: Report) -> None:
        """Write header, report and model card, and move everything to its place."""
        header = _header_bytes(self.adapter, self._mark, bool(report.changed), len(self._header))
        with self.writing():
            self._files[WEIGHTS_FILE].seek(0)
            write_all(self._files[WEIGHTS_FILE], memoryview(header))
        super().commit(report)


class StagedModel(StagedDirectory):
    """A full checkpoint under construction: the input's files under the input's names, some tensors replaced."""

    def __init__(self, out: Path, model: Checkpoint) -> None:
        super().__init__(out, [header.path.name for header in model.headers])
        self.model = model

    def copy_input(self) -> None:
        """Copy every shard and companion file of the input."""
        with self.writing():
            buffer = memoryview(bytearray(_COPY_BYTES))
            for header in self.model.headers:
                with open(header.path, "rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        write_all(self._files[header.path.name], buffer[:count])
            self.copy_companions(self.model.root, (*COMPANIONS, "config.json", INDEX_FILE, "*.py"))

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite tensor `name`."""
        info = self.model.tensors[name]
        file = self._files[info.file.name]
        with self.writing():
            file.seek(info.begin)
            write_all(file, tensor_bytes(tensor))

    def written(self, name: str) -> torch.Tensor:
        """Tensor `name` as it stands in the output."""
        info = self.model.tensors[name]
        return _read(info._replace(file=self.path / info.file.name))


def copy_and_hash(adapter: Adapter, target: BinaryIO | None, position: int) -> str:
    """The sha256 of the adapter's weight file; its tensors go to `target` from byte `position` on, if there is one."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_COPY_BYTES))
    skip = adapter.header.data_start
    if target is not None:
        target.seek(position)
    with open(adapter.weights, "rb", buffering=0) as source:
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            if target is not None and adapter.loaded is None:
                write_all(target, buffer[min(skip, count) : count])
                skip = max(skip - count, 0)
    if target is not None and adapter.loaded is not None:
        for info in sorted(adapter.header.tensors.values(), key=lambda info: info.begin):
            write_all(target, tensor_bytes(adapter.loaded[info.name]))
    return digest.hexdigest()


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, however often the system stops short."""
    while data:
        data = data[file.write(data) :]


def _header_bytes(adapter: Adapter, mark: Mark, marked: bool, size: int = 0) -> bytes:
    """Length prefix and JSON (padded to `size`) of the output's header: the input's tensors at the input's offsets."""
    metadata = {"format": "pt", **{key: text for key, text in adapter.header.metadata.items() if key != mark.key}}
    if marked or mark.key in adapter.header.metadata:
        metadata[mark.key] = mark.done
    start = adapter.header.data_start
    content: dict[str, Any] = {"__metadata__": metadata}
    for info in sorted(adapter.header.tensors.values(), key=lambda info: info.begin):
        offsets = [info.begin - start, info.end - start]
        content[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text = text.ljust(max(-(-len(text) // 8) * 8, size - 8))
    return len(text).to_bytes(8, "little") + text


def _read(info: TensorInfo) -> torch.Tensor:
    from .stream import map_range, to_tensor

    return to_tensor(map_range(info), info)


def _try_lock(directory: Path) -> int | None:
    """An exclusive lock on `directory` as a file descriptor, or None when another process holds it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
