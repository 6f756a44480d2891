"""Requests and limits that suites of the shared store have in common."""

import secrets

from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import LimitName, TokenRequest
from broker.rules.bucket import Limit

WIDE = Limit(burst=100_000, interval=1)
"""A limit that no test meets."""

AGENT = "A78WKV4515"


def limits_of(
    fingerprint: Limit = WIDE,
    mints: Limit = WIDE,
    agent: Limit = WIDE,
    client: Limit | None = None,
) -> Limits:
    """Make limits of which only those given can be met."""
    return Limits(
        fingerprint=LimitPolicy(LimitName.FINGERPRINT, LimitRule(fingerprint), {}),
        fingerprint_mints=LimitPolicy(LimitName.FINGERPRINT_MINTS, LimitRule(mints), {}),
        agent=LimitPolicy(LimitName.AGENT, LimitRule(agent), {}),
        client=None if client is None else LimitPolicy(LimitName.CLIENT, LimitRule(client), {}),
        max_tracked=1_000_000,
    )


def request_of(fingerprint: str = "") -> TokenRequest:
    """Make a request, of a visitor never seen before unless one is named."""
    return TokenRequest("web", AGENT, fingerprint or secrets.token_hex(16))
