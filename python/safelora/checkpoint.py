"""Checkpoints as tables of named byte ranges: safetensors headers, shard indexes and the Hugging Face cache.

Nothing here reads a weight. Every header is validated in full before a byte range is handed out, so that the reader
(:mod:`safelora.stream`) can map any :class:`TensorInfo` without checking it again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import SafeLoraError

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
MAX_NAME_LENGTH = 1000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_SHARD_NAME = re.compile(r"[\w.+-]+\.safetensors")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REVISION = re.compile(r"[\w./+-]+")
_SHA = re.compile(r"[0-9a-f]{40}")
_NOT_WEIGHTS = ("consolidated", "adapter_")


class TensorInfo(NamedTuple):
    """Where one tensor lies: dtype is the safetensors name, [begin, end) are absolute byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A validated safetensors header; `data_start` is the file offset of the first tensor byte."""

    path: Path
    file_size: int
    data_start: int
    sha256: str
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_json(path: Path, what: str) -> tuple[dict[str, Any], bytes]:
    """Parse `path` as a JSON object; returns it with the bytes it came from.

    Raises SafeLoraError when the file is missing, too large, not UTF-8 JSON or not an object.
    """
    size = _regular_file_size(path, what)
    if size > MAX_JSON_BYTES:
        raise SafeLoraError(f"{what} {path} has {size} bytes; more than {MAX_JSON_BYTES} is refused.")
    raw = path.read_bytes()
    return _parse_object(raw, f"{what} {path}"), raw


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file without touching its tensors.

    Checked: the header's length, that it is a JSON object, each entry's dtype, shape and offsets, that size and shape
    agree, and that the byte ranges tile the rest of the file exactly (no overlap, hole, missing or surplus byte).

    Raises SafeLoraError naming the file, and the tensor where there is one.
    """
    file_size = _regular_file_size(path, "the safetensors file")
    with open(path, "rb", buffering=0) as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SafeLoraError(f"{path} is not a safetensors file: it has {file_size} bytes, fewer than 8.")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, file_size - 8):
            raise SafeLoraError(
                f"{path} is truncated or not a safetensors file: it announces a header of {length} bytes, but "
                f"{file_size - 8} bytes follow (and at most {MAX_HEADER_BYTES} are accepted). Download it again."
            )
        raw = file.read(length)
    entries = _parse_object(raw, f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafeLoraError(f"{path}: __metadata__ must map names to strings.")
    data_start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}
    _check_tiling(path, tensors.values(), data_start, file_size)
    digest = hashlib.sha256(prefix + raw).hexdigest()
    return Header(path, file_size, data_start, digest, metadata, tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights on disk: `tensors` maps every stored name to its place. Open one with :meth:`open`."""

    source: str
    root: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    headers: list[Header]
    index_sha256: str | None = None
    commit: str | None = None
    lookups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> Checkpoint:
        """Open a checkpoint directory, one safetensors file, or a Hugging Face repository id.

        A repository id is looked up in (or, unless `local_files_only`, downloaded to) the Hugging Face cache at
        `revision`. In a directory, `model.safetensors` comes before `model.safetensors.index.json`, as in
        transformers; without either, all `*.safetensors` files are taken together.

        Raises SafeLoraError for anything missing, truncated or inconsistent, naming the file.
        """
        patterns = ["*.safetensors", INDEX_FILE, "config.json"]
        root = locate(source, revision, local_files_only, patterns, ["*/*", *(f"{stem}*" for stem in _NOT_WEIGHTS)])
        if root.is_file():
            headers, names, index_sha256 = [read_header(root)], None, None
            root = root.parent
        else:
            headers, names, index_sha256 = _open_directory(root)
        tensors: dict[str, TensorInfo] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if names is not None and names.get(name) != header.path.name:
                    continue
                if name in tensors:
                    raise SafeLoraError(f"{root}: tensor {name} is in {tensors[name].file.name} and {info.file.name}.")
                tensors[name] = info
        for name, shard in (names or {}).items():
            if name not in tensors:
                raise SafeLoraError(
                    f"{root / INDEX_FILE} places tensor {name} in {shard}, but that file does not hold it. "
                    "The shard is mislabelled or belongs to another model; download the checkpoint again."
                )
        config_path = root / "config.json"
        config = read_json(config_path, "the model configuration")[0] if config_path.exists() else {}
        return cls(os.fspath(source), root, tensors, config, headers, index_sha256, _commit_of(root))

    def same_files(self, other: Checkpoint) -> bool:
        """Whether both are the same files, by whatever path they were given."""
        mine, others = ({header.path.resolve() for header in model.headers} for model in (self, other))
        return mine == others

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the weights without reading them: header and index hashes, file sizes, cache commit."""
        files = {
            header.path.name: {"bytes": header.file_size, "header_sha256": header.sha256} for header in self.headers
        }
        return {
            "source": self.source,
            "path": str(self.root),
            "commit": self.commit,
            "index_sha256": self.index_sha256,
            "files": files,
        }


def locate(
    source: str | os.PathLike[str],
    revision: str | None,
    local_files_only: bool,
    patterns: list[str],
    ignored: Sequence[str] = (),
) -> Path:
    """The local path of `source`: itself when it exists, else the cache snapshot of the repository of that name.

    Of a repository, the files that match `patterns` and none of `ignored` are fetched.

    Raises SafeLoraError when it is neither, or when the repository cannot be found or fetched.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        return path
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SafeLoraError(f"{revision!r} is not a revision (a branch, tag or commit) of {text!r}.")
    if not _REPO_ID.fullmatch(text) or text.startswith("."):
        raise SafeLoraError(f"{text!r} does not exist (and is not a Hugging Face repository id).")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise SafeLoraError(
            f"{text} is not a local directory, and huggingface_hub is not installed to look it up: "
            "pip install huggingface_hub, or give a directory."
        ) from error
    try:
        return Path(
            snapshot_download(
                text,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=list(ignored),
            )
        )
    except (OSError, ValueError) as error:
        where = "in the local Hugging Face cache" if local_files_only else "locally or on the Hugging Face hub"
        raise SafeLoraError(
            f"{text} is not a directory, and no such repository was found {where}"
            f"{f' at revision {revision}' if revision else ''}: {_first_line(error)}"
        ) from error


def _open_directory(root: Path) -> tuple[list[Header], dict[str, str] | None, str | None]:
    """Headers of a checkpoint directory, the index's name -> shard map if there is one, and the index's hash."""
    if (root / SINGLE_FILE).exists():
        return [read_header(root / SINGLE_FILE)], None, None
    index_path = root / INDEX_FILE
    if index_path.exists():
        index, raw = read_json(index_path, "the shard index")
        names = index.get("weight_map")
        if not isinstance(names, dict) or not names:
            raise SafeLoraError(f"{index_path} has no weight_map (tensor name -> file name).")
        for name, shard in names.items():
            check_name(index_path, name)
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise SafeLoraError(
                    f"{index_path} places tensor {name} in {shard!r}, which is not the plain name of a .safetensors "
                    "file beside the index. Such an index is refused."
                )
        headers = []
        for shard in sorted(set(names.values())):
            if not (root / shard).exists():
                raise SafeLoraError(
                    f"{index_path} names the shard {shard}, which is not there: the checkpoint is incomplete. "
                    "Download it again (hf download, without local_files_only)."
                )
            headers.append(read_header(root / shard))
        return headers, names, hashlib.sha256(raw).hexdigest()
    files = sorted(path for path in root.glob("*.safetensors") if not path.name.startswith(_NOT_WEIGHTS))
    if files:
        return [read_header(path) for path in files], None, None
    raise SafeLoraError(f"{root} holds no safetensors weights. {_absence_hint(root)}")


def _absence_hint(root: Path) -> str:
    listing = sorted(os.listdir(root))
    if "adapter_config.json" in listing:
        return "It is an adapter; base and aligned must be full models."
    if any(name.startswith(("consolidated", "mp_rank_")) for name in listing):
        return "It is in its trainer's own (tensor-parallel) layout; convert it to the Hugging Face layout first."
    if any(name.startswith("pytorch_model") for name in listing):
        return (
            "It holds pickled weights (pytorch_model*.bin), which cannot be read tensor by tensor. Convert it once: "
            "AutoModelForCausalLM.from_pretrained(dir, dtype='auto').save_pretrained(new_dir)."
        )
    if any(name.endswith(".gguf") for name in listing):
        return "It holds GGUF weights; use the original safetensors checkpoint."
    return "Expected model.safetensors, or model.safetensors.index.json with its shards."


def _commit_of(root: Path) -> str | None:
    resolved = root.resolve()
    return resolved.name if resolved.parent.name == "snapshots" and _SHA.fullmatch(resolved.name) else None


def _regular_file_size(path: Path, what: str) -> int:
    try:
        status = path.stat()
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = "is not there (a dangling link?)" if missing else f"cannot be read: {error.strerror}"
        raise SafeLoraError(f"{what} {path} {reason}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise SafeLoraError(f"{what} {path} is not a regular file.")
    return status.st_size


def _parse_object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SafeLoraError(f"{what} is not valid JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise SafeLoraError(f"{what} is a JSON {type(value).__name__}, expected an object.")
    return value


def check_name(path: Path, name: str) -> None:
    """Refuse a tensor name that cannot be shown as it is: terminals obey control characters.

    Raises SafeLoraError.
    """
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise SafeLoraError(
            f"{path} holds a tensor named {name[:40]!a}…, {len(name)} characters long; expected printable names "
            f"of at most {MAX_NAME_LENGTH}. Such a file is refused."
        )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    check_name(path, name)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise SafeLoraError(f"{path}: the header entry of {name} lacks dtype, shape or two data_offsets.")
    if dtype not in DTYPE_BITS:
        raise SafeLoraError(f"{path}: tensor {name} has the unknown dtype {dtype[:40]!r}.")
    if len(shape) > 64:
        raise SafeLoraError(f"{path}: tensor {name} has {len(shape)} dimensions; at most 64 are possible.")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**63:
            raise SafeLoraError(f"{path}: tensor {name} has the impossible dimension {str(size)[:40]}.")
        bits *= size
    if not 0 <= begin <= end or bits != 8 * (end - begin):
        needed = f"{bits / 8:g}" if bits < 2**66 else "more than 2**63"
        raise SafeLoraError(
            f"{path}: tensor {name} ({dtype}, shape {shape}) needs {needed} bytes, but its data_offsets are "
            f"[{begin}, {end}]."
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _check_tiling(path: Path, tensors: Any, position: int, file_size: int) -> None:
    for info in sorted(tensors, key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            fault = "overlaps another tensor" if info.begin < position else "leaves a hole before it"
            raise SafeLoraError(f"{path}: the byte range of tensor {info.name} {fault}.")
        position = info.end
    if position != file_size:
        fault = "truncated" if position > file_size else "longer than its header says"
        raise SafeLoraError(
            f"{path} is {fault}: the header describes {position} bytes, the file has {file_size}. Download it again."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
