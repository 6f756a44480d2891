"""Signing keys as a table: which one signs, and until when others verify."""

from collections.abc import Iterator
from time import gmtime, strftime

from broker.issuers.keyring import NEVER, Key, Keyring
from broker.units import SECOND


def rows(ring: Keyring, now: int) -> Iterator[str]:
    """Yield a line for each key, as it is at `now` (Unix seconds)."""
    signing = ring.signing(now * SECOND)
    for key in ring.keys:
        yield f"{key.kid:24}{_state(key, signing, now)}"


def _state(key: Key, signing: str, now: int) -> str:
    if key.kid == signing:
        return "signs" if key.verifies_until == NEVER else f"signs; {_until(key)}"
    if now * SECOND < key.signs_from < NEVER:
        return f"verifies; signs from {_date(key.signs_from)}"
    if now * SECOND >= key.verifies_until:
        return f"ended {_date(key.verifies_until)}"
    return "verifies" if key.verifies_until == NEVER else _until(key)


def _until(key: Key) -> str:
    return f"verifies until {_date(key.verifies_until)}"


def _date(us: int) -> str:
    return strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(us // SECOND))
