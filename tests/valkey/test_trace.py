"""S6: scripts and rules decide alike; `tests/load/store_trace.py` does it a million times."""

import secrets

import pytest
from servers import StoreServer
from store_trace import LIMITS, at_given_time, compare, compare_by_server_clock

from broker.rules.bucket import MAX_BURST
from broker.valkey.client.scripts import Script

pytestmark = pytest.mark.parts

STEPS = 20_000

KINDS = {
    *("visit allowed 1", "visit allowed 3", "visit allowed 4", "visit denied 0", "visit denied 1"),
    *("spend allowed 0", "spend denied 0"),
    *("lead lead", "lead token", "lead wait", "lead failed", "lead denied"),
    *("keep kept", "keep superseded", "keep ended"),
    *("renew done", "renew nothing", "abandon done", "abandon nothing", "revoke done"),
    "spoiled",
}
"""What must have been met on the way, or the trace proves less than it says."""


@pytest.mark.parametrize("engine", ["valkey", "redis7"])
def test_S6_a_random_trace_is_decided_alike(engine: str, request: pytest.FixtureRequest) -> None:
    """Every reply of every script of visitors, leases and agents, number for number.

    N26: also after somebody has written what is no number over one of theirs.
    """
    server: StoreServer = request.getfixturevalue(engine)
    server.flush()
    seed = secrets.randbits(32)
    kinds = compare(server, STEPS, seed)
    assert KINDS - kinds.keys() == set(), f"seed {seed}"
    assert kinds.total() == STEPS


@pytest.mark.parametrize("engine", ["valkey", "redis7"])
def test_S6_by_the_servers_clock(engine: str, request: pytest.FixtureRequest) -> None:
    """L3: keys end in real time, and one that has ended decides as one that was never there."""
    server: StoreServer = request.getfixturevalue(engine)
    server.flush()
    kinds = compare_by_server_clock(server, 20_000, secrets.randbits(32))
    assert min(kinds["allowed"], kinds["denied"]) > 100


def test_the_scripts_of_the_trace_are_those_that_ship() -> None:
    """All but two functions of the prelude, line for line."""
    for script in Script:
        shipped, told = (
            [line for line in text.splitlines() if line.strip()]
            for text in (script.source, at_given_time(script.source))
        )
        changed = [line for line in shipped if line not in told]
        assert len(changed) <= 3, changed
        assert [line for line in changed if "TIME" not in line and "time[" not in line] == [
            "  return text(math.max(math.ceil(us / 1000), 1))"
        ]
    assert max(limit.burst for limit in LIMITS) == MAX_BURST
