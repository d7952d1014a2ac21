"""Sharing a projection over the processes of a job: who does what, and how all of them learn the outcome."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from .errors import SafeLoraError

if TYPE_CHECKING:
    import torch

    from .adapter import LoraModule
    from .full import FullTensor
    from .mapping import PlannedModule
    from .measure import Measured, Pair, Source, Target

_T = TypeVar("_T")
_P = ParamSpec("_P")
TIMEOUT = timedelta(hours=2)  # the longest that ranks may drift apart; a rank that dies is noticed at once


class RankDiedError(RuntimeError):
    """Another rank has gone without a word, or was not heard of for too long."""


class PeerError(SafeLoraError):
    """Another rank refused its input; the message names the rank and repeats what it said."""


def collective(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make `function` succeed or fail on all ranks of its keyword argument `ranks` together."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        ranks: Any = kwargs.get("ranks") or Ranks()
        with ranks.together():
            return function(*args, **kwargs)

    return wrapper


def assign(costs: Sequence[int], size: int) -> list[int]:
    """The rank that owns each item: longest first, each to the least loaded rank, ties to the lowest index and rank.

    Depends on the costs alone, so that every rank comes to the same answer. No rank exceeds 4/3 − 1/(3·size) of the
    best possible load (Graham 1969).
    """
    loads = [0] * size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += costs[index]
    return owners


class _Failed(NamedTuple):
    """What a rank passes instead of a value once it has failed."""

    told: str


@dataclass(frozen=True)
class Ranks:
    """The processes of one job. The default is a process on its own, which exchanges nothing.

    All ranks enter :meth:`together` and make the same calls inside it. A rank that fails answers the next of these with
    its failure, so that the others leave as well instead of waiting for it.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Get through the block on all ranks or on none.

        Raises, where the block raises on any rank: on the first such rank its own exception, on all others PeerError.
        RuntimeError when a rank has died.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if self.size > 1 and not isinstance(error, RankDiedError):
                told = str(error) if isinstance(error, SafeLoraError) else f"{type(error).__name__}: {error}"
                try:
                    self._raise_of_others(self._exchange(_Failed(told)), before=self.rank)
                except PeerError as other:
                    raise other from error
            raise
        if self.size > 1:
            self.gather(None)

    def gather(self, value: _T) -> list[_T]:
        """What each rank passes, by rank. Raises PeerError where one has failed."""
        if self.size == 1:
            return [value]
        values = self._exchange(value)
        self._raise_of_others(values, before=self.size)
        return values

    def same(self, value: Any, what: str) -> None:
        """Raise SafeLoraError unless all ranks pass an equal value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise SafeLoraError(f"rank {rank} and rank 0 do not agree on {what}; all must see the same input.")

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Overwrite `tensor` (contiguous, on the CPU) with that of rank `owner`; a collective call."""
        self._collective("broadcast", _bytes(tensor), self._global(owner))

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a contiguous CPU tensor to rank `to`, which receives it."""
        self._collective("send", _bytes(tensor), self._global(to))

    def receive(self, tensor: torch.Tensor, sender: int) -> None:
        """Overwrite `tensor` (contiguous, on the CPU) with what rank `sender` sends."""
        self._collective("recv", _bytes(tensor), self._global(sender))

    def close(self) -> None:
        """Give back a group that :func:`process_group` made."""
        if self.group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self.group)

    def _global(self, rank: int) -> int:
        import torch.distributed as dist

        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._collective("all_gather_object", values, value)
        return values

    def _raise_of_others(self, values: list[Any], before: int) -> None:
        for rank, value in enumerate(values[:before]):
            if isinstance(value, _Failed):
                raise PeerError(f"rank {rank} of {self.size}: {value.told}")

    def _collective(self, name: str, *arguments: Any) -> None:
        import torch.distributed as dist

        try:
            getattr(dist, name)(*arguments, group=self.group)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise RankDiedError(f"another process of the job ended before the work was done ({reason}).") from error


def share(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """The weight pairs of each rank, in the order given.

    Pairs that write to one tensor (the experts of a mixture) stay on one rank, so that a tensor has one owner.
    """
    leader = list(range(len(pairs)))

    def lead(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    writers: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        for module in modules_of([pair]):
            leader[lead(index)] = lead(writers.setdefault(module.output.name, index))
    units: dict[int, list[int]] = {}
    for index in range(len(pairs)):
        units.setdefault(lead(index), []).append(index)
    owners = assign([sum(pairs[index].nbytes for index in unit) for unit in units.values()], size)
    shares: list[list[int]] = [[] for _ in range(size)]
    for unit, owner in zip(units.values(), owners, strict=True):
        shares[owner] += unit
    return [[pairs[index] for index in sorted(indices)] for indices in shares]


class Kept:
    """Projected tensors in memory, until it is known which are wanted and who writes them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tensors: dict[str, torch.Tensor] = {}

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor."""
        self._tensors[name] = tensor

    def written(self, name: str) -> torch.Tensor:
        """A tensor as it was last written."""
        return self._tensors.get(name, self._source.read(name))


class Spilled:
    """Projected tensors in a temporary file (binary, unbuffered), where they would not fit into memory together."""

    def __init__(self, source: Source, file: Any) -> None:
        self._source = source
        self._file = file
        self._places: dict[str, int] = {}
        self._end = 0

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor; its size is that of the source's."""
        from .adapter import tensor_bytes
        from .output import write_all

        data = tensor_bytes(tensor)
        if name not in self._places:
            self._places[name] = self._end
            self._end += len(data)
        self._file.seek(self._places[name])
        write_all(self._file, data)

    def written(self, name: str) -> torch.Tensor:
        """A tensor as it was last written."""
        import torch

        from .adapter import tensor_bytes

        original = self._source.read(name)
        if name not in self._places:
            return original
        tensor = torch.empty_like(original, memory_format=torch.contiguous_format)
        self._file.seek(self._places[name])
        room = tensor_bytes(tensor)
        while room and (count := self._file.readinto(room)):
            room = room[count:]
        return tensor


def together(ranks: Ranks, plan: Sequence[PlannedModule], mine: dict[str, Measured]) -> dict[str, Measured]:
    """What all ranks have measured, in the order of the plan; a collective call."""
    found = {name: result for part in ranks.gather(mine) for name, result in part.items()}
    return {entry.module.name: found[entry.module.name] for entry in plan if entry.module.name in found}


def collect(ranks: Ranks, shares: Sequence[Sequence[Pair]], selected: set[str], source: Source, target: Target) -> None:
    """Bring the tensors with selected modules from the ranks that have projected them to rank 0's `target`.

    One tensor travels at a time. Every rank passes its own `target`, in which its tensors are.
    """
    import torch

    ranks.gather(None)
    failure: Exception | None = None
    for owner, pairs in enumerate(shares):
        if owner == 0 or ranks.rank not in (0, owner):
            continue
        for name in dict.fromkeys(module.output.name for module in modules_of(pairs) if module.name in selected):
            if ranks.rank == owner:
                ranks.send(target.written(name).contiguous(), 0)
                continue
            tensor = torch.empty_like(source.read(name), memory_format=torch.contiguous_format)
            ranks.receive(tensor, owner)
            try:
                if failure is None:
                    target.replace(name, tensor)
            except OSError as error:  # raised once no rank waits to send any more
                failure = error
    if failure is not None:
        raise failure


def modules_of(pairs: Sequence[Pair]) -> list[LoraModule | FullTensor]:
    """Every module that uses one of the weight pairs."""
    modules: list[LoraModule | FullTensor] = []
    for pair in pairs:
        modules += pair.modules
        modules += pair.full
    return modules


def process_group() -> Ranks:
    """All ranks of torch's default process group, with a group that takes CPU tensors; a collective call.

    Raises SafeLoraError when there is no process group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise SafeLoraError("there is no process group: call torch.distributed.init_process_group first.")
    group = None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that a launcher such as torchrun has started (by WORLD_SIZE and RANK), else this process alone.

    A rank other than 0 leaves the context quietly, with exit status 2, where another has said what went wrong.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size)
    except PeerError:
        if dist.get_rank() == 0:
            raise
        raise SystemExit(2) from None
    finally:
        dist.destroy_process_group()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)
