"""Whether this instance should get traffic."""

from collections.abc import Callable
from typing import Literal

HealthState = Literal["ok", "draining", "no_worker"]
"""Fine, asked to stop, or without anybody who takes requests."""


class Health:
    """`draining` is set once, when the process has been asked to stop.

    `serves` tells whether somebody takes requests: a supervisor does not do it itself.
    """

    def __init__(self, serves: Callable[[], bool] = lambda: True) -> None:
        self.draining = False
        self._serves = serves

    @property
    def state(self) -> HealthState:
        """How it is."""
        if self.draining:
            return "draining"
        return "ok" if self._serves() else "no_worker"

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return self.state == "ok"
