"""Which call meets which fault.

Faults wait in the order in which they were set, and a call meets the first one that is meant for
it: two that are set for one call each meet two calls, in that order.

A fault for every call of a path, and for good, is what stands until another word: it is met where
no other is, and of several the latest, or nothing that is set after it could ever be met.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from typing_extensions import override

from broker.testing.vendor.faults import HEALTHY, Fault
from broker.testing.vendor.journal import MINT_PATH, Call

Predicate = Callable[[Call], bool]


class Aim:
    """The calls that a fault is meant for; what is None does not matter."""

    __slots__ = ("agent", "fingerprint", "model", "path", "where")

    def __init__(
        self,
        *,
        agent: str | None = None,
        fingerprint: str | None = None,
        model: str | None = None,
        path: str | None = MINT_PATH,
        where: Predicate | None = None,
    ) -> None:
        self.agent = agent
        self.fingerprint = fingerprint
        self.model = model
        self.path = path
        self.where = where

    @property
    def is_open(self) -> bool:
        """Whether it is meant for whatever comes, on its path."""
        conditions = (self.agent, self.fingerprint, self.model, self.where)
        return all(condition is None for condition in conditions)

    def hits(self, call: Call) -> bool:
        """Whether this call is meant."""
        return (
            self.path in (None, call.path)
            and self.agent in (None, call.agent)
            and self.fingerprint in (None, call.fingerprint)
            and self.model in (None, call.model)
            and (self.where is None or self.where(call))
        )


class Planned:
    """A fault that is set; as a context manager it ends with the block.

    `left` is how many calls it will still meet (None: all), `met` how many it has met.
    """

    def __init__(self, fault: Fault, aim: Aim, times: int | None) -> None:
        self.fault = fault
        self.stands = times is None and aim.is_open
        self.left = times
        self.met = 0
        self._aim = aim

    def stop(self) -> None:
        """Meet no further calls; those that already hang go on hanging."""
        self.left = 0

    def meet(self, call: Call) -> bool:
        """Take this call, if it is meant and there is one left."""
        if self.left == 0 or not self._aim.hits(call):
            return False
        if self.left is not None:
            self.left -= 1
        self.met += 1
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @override
    def __repr__(self) -> str:
        return f"Planned({self.fault!r}, left={self.left}, met={self.met})"


class Plan:
    """The faults that are set, in the order in which they are tried."""

    def __init__(self) -> None:
        self._planned: list[Planned] = []

    def add(self, fault: Fault, aim: Aim, times: int | None) -> Planned:
        """Set a fault for these calls; `times` None: for all of them."""
        planned = Planned(fault, aim, times)
        waiting = sum(not each.stands for each in self._planned)
        self._planned.insert(waiting, planned)  # at their end, or as the first of those that stand
        return planned

    def meet(self, call: Call) -> Fault:
        """Return the fault that this call meets, which may be none."""
        for planned in self._planned:
            if planned.meet(call):
                if planned.left == 0:
                    self._planned.remove(planned)
                return planned.fault
        return HEALTHY

    def told(self) -> list[dict[str, object]]:
        """Return what is set, as JSON has it."""
        return [
            {"fault": planned.fault.name, "left": planned.left, "met": planned.met}
            for planned in self._planned
        ]

    def clear(self) -> None:
        """Take all faults back."""
        for planned in self._planned:
            planned.stop()
        self._planned.clear()

    @override
    def __repr__(self) -> str:
        return f"Plan({self._planned!r})"
