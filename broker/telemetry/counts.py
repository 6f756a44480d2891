"""What parts of the broker count, as the counters that they are given."""

from msgspec import Struct, field

from broker.rules.bucket import Verdict
from broker.telemetry.cells import Counter


class BucketCounts(Struct):
    """Decisions on one limit that were something special.

    `near`: admitted with less than a fifth of the burst left; `dry_run_denied`: would have been
    refused, but for `dry_run`; `overflowed`: decided by a shared bucket.
    """

    near: Counter = field(default_factory=Counter)
    dry_run_denied: Counter = field(default_factory=Counter)
    overflowed: Counter = field(default_factory=Counter)

    def note(self, verdict: Verdict, *, dry_run: bool) -> None:
        """Count a decision, wherever it was made."""
        if verdict.allowed:
            if verdict.remaining * 5 < verdict.limit.burst:
                self.near.inc()
        elif dry_run:
            self.dry_run_denied.inc()


class TokenCounts(Struct):
    """Tokens that left: `evicted` ones alive, to make room; `expired` ones died here."""

    evicted: Counter = field(default_factory=Counter)
    expired: Counter = field(default_factory=Counter)
