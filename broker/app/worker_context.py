"""A worker's place among its siblings: what its supervisor gave it, and who has more to do.

Rows of the shared cells are all that workers know of each other.
"""

import socket
import time
from collections.abc import Sequence

from msgspec import Struct

from broker.telemetry.cells import Gauge, SharedCells
from broker.telemetry.metrics import Metrics

ALIVE = 2.0
"""Seconds since its last sign of life after which a worker is taken to be hung."""


class PeerLoad(Struct, frozen=True):
    """What a worker sees of another one."""

    beat: Gauge
    connections: Gauge

    @property
    def is_alive(self) -> bool:
        """Whether it would take a connection."""
        return time.monotonic() - self.beat.value < ALIVE


class WorkerContext(Struct, frozen=True):
    """A worker's place: where it is reached and where it counts, as its supervisor gave it."""

    worker: int
    sockets: Sequence[socket.socket]
    url: str
    admin_url: str
    shared_cells: SharedCells
    metrics: Metrics
    siblings: Sequence[PeerLoad]

    def ahead(self) -> float:
        """How many connections this worker has more than the one with the fewest."""
        mine = self.metrics.process.connections.value
        return mine - min((s.connections.value for s in self.siblings if s.is_alive), default=mine)
