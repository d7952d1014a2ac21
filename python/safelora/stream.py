"""Tensors straight from the page cache, mapped ahead of use by a thread.

A mapped range costs no copy: with `MADV_POPULATE_READ` the read-ahead thread makes the kernel read it and enter it
into the page tables in one call, several times faster than `read` into a buffer, and a failing disk is an error of
that call rather than a fault in the kernel that computes. A mapping lives as long as the tensors made from it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from .checkpoint import TensorInfo
from .errors import SafeLoraError

if TYPE_CHECKING:
    import torch

READ_AHEAD_BYTES = 384 << 20
_MADV_POPULATE_READ = 22
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class MappedRange(NamedTuple):
    """A private mapping of a file and where in it the tensor begins."""

    memory: mmap.mmap
    offset: int


def map_range(info: TensorInfo) -> MappedRange:
    """Map the bytes of one tensor and bring them into memory.

    Raises SafeLoraError when the file has shrunk since its header was read, or cannot be read.
    """
    start = info.begin - info.begin % mmap.ALLOCATIONGRANULARITY
    with open(info.file, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < info.end:
            raise SafeLoraError(f"{info.file} shrank while it was read; {info.name} is no longer whole.")
        memory = mmap.mmap(file.fileno(), info.end - start, access=mmap.ACCESS_COPY, offset=start)
    if hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_WILLNEED)  # a cold file: requests for the whole range at once, not window by window
        try:
            memory.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: a system without it; the pages then come in on first use
                raise SafeLoraError(f"{info.file}: reading {info.name} failed: {error.strerror}.") from error
    return MappedRange(memory, info.begin - start)


def to_tensor(mapped: MappedRange, info: TensorInfo) -> torch.Tensor:
    """The mapped range as a tensor of the stored dtype and shape (a view of it; writes stay private)."""
    import torch

    dtype = getattr(torch, _DTYPES[info.dtype])
    memory: mmap.mmap | bytearray = mapped.memory
    offset = mapped.offset
    if info.begin % dtype.itemsize:
        memory, offset = bytearray(memoryview(memory)[offset:]), 0
    return torch.frombuffer(memory, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=offset).view(info.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    for name, candidate in _DTYPES.items():
        if candidate == short:
            return name
    raise SafeLoraError(f"tensors of dtype {short} cannot be written to safetensors.")


class ReadAhead:
    """Maps batches of tensors in order, in a thread, at most `budget` bytes ahead (one batch is always allowed).

    Iterate to get each batch's mappings; a batch counts against the budget, and its list is cleared, when the next one
    is asked for. Use as a context manager: leaving it stops the thread.
    """

    def __init__(self, batches: Sequence[Sequence[TensorInfo]], budget: int) -> None:
        self._batches = batches
        self._budget = budget
        self._ready: deque[list[MappedRange] | BaseException] = deque()
        self._held = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="safelora-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[list[MappedRange]]:
        for batch in self._batches:
            with self._changed:
                self._changed.wait_for(lambda: self._ready)
                item = self._ready.popleft()
            if isinstance(item, BaseException):
                raise item
            yield item
            item.clear()
            del item
            with self._changed:
                self._held -= sum(info.nbytes for info in batch)
                self._changed.notify_all()

    def _read(self) -> None:
        try:
            for batch in self._batches:
                size = sum(info.nbytes for info in batch)
                with self._changed:
                    while not self._stopped and self._held and self._held + size > self._budget:
                        self._changed.wait()
                    self._held += size
                if self._stopped:
                    return
                self._put([map_range(info) for info in batch])  # no name for it: the thread must not keep it alive
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _put(self, item: list[MappedRange] | BaseException) -> None:
        with self._changed:
            self._ready.append(item)
            self._changed.notify_all()
