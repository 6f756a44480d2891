"""The limits as configured: which bucket a request meets, how large, and whether it bites."""

from collections.abc import Mapping

from msgspec import Struct

from broker.model import SEPARATOR, LimitName, TokenRequest
from broker.rules.bucket import Limit


class LimitRule(Struct, frozen=True, gc=False):
    """One limit, and whether it is a dry run: decides and counts, never denies."""

    limit: Limit
    dry_run: bool = False


class LimitPolicy(Struct, frozen=True):
    """One kind of limit with its exceptions by agent."""

    name: LimitName
    rule: LimitRule
    overrides: Mapping[str, LimitRule]

    def for_agent(self, agent: str) -> LimitRule:
        """Return the rule that holds for this agent."""
        if not self.overrides:
            return self.rule
        return self.overrides.get(agent, self.rule)

    def own_bucket(self, agent: str) -> str:
        """Return the agent if a visitor has a bucket of their own on it, which an override makes.

        Limits of two depths on one bucket would undo each other, because the shallow one cuts what
        the deep one has exhausted.
        """
        return agent if self.overrides and agent in self.overrides else ""

    def visitor_key(self, request: TokenRequest) -> str:
        """Return whose bucket this request meets: its visitor's, or theirs on this agent."""
        return self.met_by(request)[1]

    def met_by(self, request: TokenRequest) -> tuple[LimitRule, str]:
        """Return the rule of this request, and whose bucket it meets: see `own_bucket`."""
        rule = self.overrides.get(request.agent)
        if rule is None:
            return self.rule, request.visitor
        return rule, f"{request.visitor}{SEPARATOR}{request.agent}"

    @property
    def horizon(self) -> int:
        """Microseconds after which every bucket of this kind is full again, untouched."""
        rules = (self.rule, *self.overrides.values())
        return max(rule.limit.depth for rule in rules)


class Limits(Struct, frozen=True):
    """Every limit in force; `client` is off unless configured."""

    fingerprint: LimitPolicy
    fingerprint_mints: LimitPolicy
    agent: LimitPolicy
    client: LimitPolicy | None
    max_tracked: int


def share_of(limits: Limits, replicas: int) -> Limits:
    """Return one replica's part of all limits.

    Together the parts admit no more in the long run than these; nor at once, unless a burst is
    smaller than the number of replicas.
    """
    if replicas == 1:
        return limits

    def divide(limit_set: LimitPolicy) -> LimitPolicy:
        return LimitPolicy(
            limit_set.name,
            _divide(limit_set.rule, replicas),
            {agent: _divide(rule, replicas) for agent, rule in limit_set.overrides.items()},
        )

    return Limits(
        fingerprint=divide(limits.fingerprint),
        fingerprint_mints=divide(limits.fingerprint_mints),
        agent=divide(limits.agent),
        client=None if limits.client is None else divide(limits.client),
        max_tracked=limits.max_tracked,
    )


def _divide(rule: LimitRule, replicas: int) -> LimitRule:
    """Divide rate and burst; a burst under one is one.

    With more replicas than burst each has one token at once, more in all than the limit's burst.
    """
    limit = rule.limit
    return LimitRule(
        Limit(max(limit.burst // replicas, 1), limit.interval * replicas), rule.dry_run
    )
