"""Whether this instance should get traffic."""

from collections.abc import Callable
from typing import Literal

HealthState = Literal["ok", "degraded", "worker_hung", "draining", "no_worker", "no_store"]
"""Fine, on its own while the shared store is away, with a worker that gives no sign of life beside
others that do, asked to stop, without anybody who takes requests, or told to refuse them without
the store."""


class Readiness:
    """`draining` is set once, when the process has been asked to stop.

    `serves` tells whether somebody takes requests: a supervisor does not do it itself.
    `degraded` is set while the shared store is away, `refuses` if nothing is answered without it,
    `hung` while a worker is silent that should take requests.
    """

    def __init__(self, serves: Callable[[], bool] = lambda: True) -> None:
        self.draining = False
        self.degraded = False
        self.hung = False
        self.refuses = False
        self._serves = serves

    @property
    def state(self) -> HealthState:
        """How it is."""
        if self.draining:
            return "draining"
        if not self._serves():
            return "no_worker"
        if self.refuses:
            return "no_store"
        if self.degraded:
            return "degraded"
        return "worker_hung" if self.hung else "ok"

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return self.state in ("ok", "degraded", "worker_hung")
