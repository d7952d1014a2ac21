"""`torchrun … -m safelora project …` on paper: what every rank reads, computes on and sends, and the time it takes.

The division is the package's own (`safelora.distributed.assign`); the bytes are counted from the shapes of the model;
the rates are assumptions, to be replaced by those of a machine (`Rates`). docs/scaling.md explains the terms.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

BYTES = 2  # of a bf16 weight or factor
FACTOR_BYTES = 4  # adapters are usually kept in fp32


@dataclass(frozen=True)
class Model:
    """A Llama-like model: its linear modules are what an adapter on "all-linear" changes."""

    name: str
    layers: int
    hidden: int
    kv: int
    ffn: int

    def shapes(self) -> list[tuple[int, int]]:
        """(d_out, d_in) of every linear module."""
        d, kv, ffn = self.hidden, self.kv, self.ffn
        return [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)] * self.layers


LLAMA_70B = Model("70 B", 80, 8192, 1024, 28672)
LLAMA_405B = Model("405 B", 126, 16384, 1024, 53248)


@dataclass(frozen=True)
class Rates:
    """What a machine does per second (bytes, but for `latency`)."""

    storage: float = 10e9  # a node reads from a parallel file system; shared by its ranks
    compute: float = 0.88e9  # one rank of one thread projects, weights of both models counted, r = 16
    network: float = 12.5e9  # into rank 0 (100 Gbit/s)
    disk: float = 1e9  # rank 0 reads or writes the adapter
    latency: float = 50e-6  # seconds per message


@dataclass(frozen=True)
class Estimate:
    """One job. Bytes of the busiest rank are what its time follows from."""

    ranks: int
    modules: int
    total: int
    busiest: int
    sent: int
    gathered: int
    adapter: int
    reading: float
    computing: float
    copying: float
    serial: float
    seconds: float

    @property
    def imbalance(self) -> float:
        """The busiest rank's bytes over an even share."""
        return self.busiest * self.ranks / self.total


def estimate(
    model: Model, nodes: int, per_node: int, *, rank: int = 16, projected: float = 1.0, rates: Rates | None = None
) -> Estimate:
    """The bytes and seconds of a job of nodes × per_node ranks.

    Args:
        model: the shapes.
        rank: of the LoRA.
        projected: part of the modules whose lora_B travels to rank 0; 1 is the worst case.
        rates: of the machine.

    Reading and computing overlap (a thread reads ahead), and so does rank 0's copy of the adapter (another thread). The
    exchange does not, nor the writing of what rank 0 receives: they are the serial part.
    """
    from safelora.distributed import assign
    from safelora.measure import Measured

    rates = rates or Rates()
    size = nodes * per_node
    shapes = model.shapes()
    costs = [2 * BYTES * rows * columns for rows, columns in shapes]
    loads = [0] * size
    factors = [0] * size
    for (rows, _), cost, owner in zip(shapes, costs, assign(costs, size), strict=True):
        loads[owner] += cost
        factors[owner] += FACTOR_BYTES * rows * rank
    sent = round(projected * sum(factors[1:]))
    number = {"model.layers.100.self_attn.q_proj": Measured(0.5, 1.5, 0.01, 0.5, False)}
    gathered = len(shapes) * len(pickle.dumps(number)) * size
    adapter = FACTOR_BYTES * rank * sum(rows + columns for rows, columns in shapes)
    by_node = [sum(loads[first : first + per_node]) for first in range(0, size, per_node)]
    reading = max(by_node) / rates.storage
    computing = max(loads) / rates.compute
    copying = 2 * adapter / rates.disk
    if size == 1:
        sent = gathered = 0
    messages = projected * (len(shapes) if size > 1 else 0)
    serial = (sent + gathered) / rates.network + messages * rates.latency + sent / rates.disk
    return Estimate(
        size, len(shapes), sum(costs), max(loads), sent, gathered, adapter, reading, computing, copying, serial,
        max(reading, computing, copying) + serial,
    )  # fmt: skip


def table() -> list[str]:
    """The rows of docs/scaling.md."""
    rows = []
    for model in (LLAMA_70B, LLAMA_405B):
        alone = estimate(model, 1, 1)
        for nodes, per_node in ((1, 1), (1, 8), (8, 1), (8, 8)):
            job = estimate(model, nodes, per_node)
            cells = (
                model.name, f"{nodes} × {per_node}", f"{job.total / 1e9:.0f}", f"{job.busiest / 1e9:.2f}",
                f"{job.imbalance:.3f}", f"{job.sent / 1e6:.0f}", f"{job.gathered / 1e6:.1f}",
                f"{job.reading:.1f}", f"{job.computing:.1f}", f"{job.serial:.2f}", f"{job.seconds:.1f}",
                f"{alone.seconds / job.seconds:.1f}", f"{alone.seconds / job.seconds / job.ranks:.0%}",
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> int:
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
