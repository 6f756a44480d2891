"""S5: one replica's part of each limit; together they admit no more than the whole."""

from hypothesis import given
from hypothesis import strategies as st

from broker.limits.policy import LimitPolicy, LimitRule, Limits, share_of
from broker.model import LimitName
from broker.rules.bucket import Limit

rules = st.builds(
    LimitRule,
    st.builds(Limit, burst=st.integers(1, 10_000), interval=st.integers(1, 10**9)),
    st.booleans(),
)


def sets(name: LimitName) -> st.SearchStrategy[LimitPolicy]:
    """Draw a limit with exceptions."""
    overrides = st.dictionaries(st.sampled_from(["A", "B"]), rules, max_size=2)
    return st.builds(LimitPolicy, st.just(name), rules, overrides)


limits = st.builds(
    Limits,
    fingerprint=sets(LimitName.FINGERPRINT),
    fingerprint_mints=sets(LimitName.FINGERPRINT_MINTS),
    agent=sets(LimitName.AGENT),
    client=st.none() | sets(LimitName.CLIENT),
    max_tracked=st.integers(1000, 10**6),
)


def all_rules(limits: Limits) -> list[LimitRule]:
    """Return every rule, in one order."""
    return [
        rule
        for each in (limits.fingerprint, limits.fingerprint_mints, limits.agent, limits.client)
        if each is not None
        for rule in (each.rule, *each.overrides.values())
    ]


@given(whole=limits, replicas=st.integers(1, 500), window=st.integers(0, 10**12))
def test_S5_shares_of_limits_fit_the_whole_in_every_window(
    whole: Limits, replicas: int, window: int
) -> None:
    """All replicas at full demand, each from a full bucket, for any time.

    With more replicas than burst each has one token at once: that many more, and no more.
    """
    share = share_of(whole, replicas)
    assert share.max_tracked == whole.max_tracked
    assert (share.client is None) == (whole.client is None)
    for part, rule in zip(all_rules(share), all_rules(whole), strict=True):
        together = replicas * (part.limit.burst + window // part.limit.interval)
        excess = max(replicas - rule.limit.burst, 0)
        assert together <= rule.limit.burst + window // rule.limit.interval + excess
        assert part.limit.burst >= 1
        assert part.dry_run == rule.dry_run


@given(whole=limits)
def test_one_replica_has_everything(whole: Limits) -> None:
    """Untouched."""
    assert share_of(whole, 1) is whole
