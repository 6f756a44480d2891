"""embed-token-broker: mints, reuses and rate-limits embed tokens in front of a vendor's budget."""

from broker.version import VERSION

__all__ = ["VERSION"]
