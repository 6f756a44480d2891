"""For us and for users: clocks that obey, an issuer and a vendor that fail on request."""

from broker.testing.clock import FakeClock, VirtualLoop, run_virtual
from broker.testing.issuer import FakeIssuer
from broker.testing.vendor import faults
from broker.testing.vendor.replies import Refusal, Shape
from broker.testing.vendor.settings import Allowance, VendorSettings
from broker.testing.vendor.vendor import FakeVendor, serve_forever

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
