"""For us and for users: clocks that obey, an issuer and a vendor that fail on request."""

from broker.testing import faults
from broker.testing.clock import FakeClock, VirtualLoop, run_virtual
from broker.testing.issuer import FakeIssuer
from broker.testing.replies import Refusal, Shape
from broker.testing.settings import Allowance, VendorSettings
from broker.testing.vendor import FakeVendor, serve_forever

__all__ = [
    "Allowance",
    "FakeClock",
    "FakeIssuer",
    "FakeVendor",
    "Refusal",
    "Shape",
    "VendorSettings",
    "VirtualLoop",
    "faults",
    "run_virtual",
    "serve_forever",
]
