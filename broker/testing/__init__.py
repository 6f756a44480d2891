"""For us and for users: clocks that obey, an issuer and a vendor that fail on request."""

from broker.testing.clock import FakeClock, VirtualLoop, run_virtual
from broker.testing.issuer import FakeIssuer, visitor_mark

__all__ = ["FakeClock", "FakeIssuer", "VirtualLoop", "run_virtual", "visitor_mark"]
