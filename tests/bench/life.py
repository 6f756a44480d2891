"""What the life of a token costs: refusing a hostile one, ending 100,000 sessions.

    python tests/bench/life.py [--rejections 2000] [--ends 100000]

Prints microseconds for each kind of token that is refused, beside a good one, and the memory that
sessions take while they are filled far beyond their bounds.  In process, no network.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from broker.clock import SystemClock
from broker.issuers.keyring import BadToken, Keyring
from broker.issuers.local import LocalIssuer
from broker.model import Session
from broker.sessions.memory import MemorySessions

ROUNDS = 5
"""Of each measurement; the quickest counts, the others were disturbed."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rejections", type=int, default=2000, help="of each kind")
    parser.add_argument("--ends", type=int, default=100_000, help="sessions that are ended")
    options = parser.parse_args()
    measure_rejections(options.rejections)
    asyncio.run(measure_ends(options.ends))


def encoded(part: object) -> str:
    """Encode a part of a JWS."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def sealed(header: object, claims: object, key: bytes) -> str:
    """Make a token that is signed with this key, whatever is in it."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def corpus(key: bytes) -> dict[str, str]:
    """Return a token of each kind; the first is good."""
    now = int(time.time())
    claims = {
        "iss": "broker",
        "aud": "embed",
        "sub": "A1",
        "agent_id": "A1",
        "sid": "s",
        "fingerprint": "9f86d081884c7d65",
        "client_id": "web",
        "iat": now,
        "nbf": now,
        "exp": now + 3600,
    }
    header = {"alg": "HS256", "typ": "JWT"}
    good = sealed(header, claims, key)

    def bent(**more: object) -> str:
        return sealed({**header, **more}, claims, key)

    def changed(**more: object) -> str:
        return sealed(header, {**claims, **more}, key)

    deep = b"[" * 900 + b"]" * 900
    return {
        "good": good,
        "signature of another key": sealed(header, claims, secrets.token_bytes(32)),
        "last character changed": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "alg none": f"{encoded({'alg': 'none'})}.{encoded(claims)}.",
        "alg none, with a signature": bent(alg="none"),
        "alg RS256": bent(alg="RS256"),
        "alg HS512": bent(alg="HS512"),
        "embedded jwk": bent(jwk={"kty": "oct", "k": encoded(key)}),
        "jku": bent(jku="https://attacker.example/keys.json"),
        "x5u": bent(x5u="https://attacker.example/cert.pem"),
        "unknown crit": bent(crit=["x"]),
        "kid that is a path": bent(kid="../../dev/null"),
        "kid with NUL": bent(kid="a\x00b"),
        "kid of 2 KiB": bent(kid="x" * 2000),
        "header nested 900 deep": f"{encoded(deep)}.{encoded(claims)}.{'A' * 43}",
        "claims nested 900 deep": sealed(header, deep, key),
        "expired": changed(exp=now - 61),
        "not valid yet": changed(nbf=now + 3600),
        "other audience": changed(aud="other"),
        "no session": changed(sid=None),
        "4 KiB of nothing": "a" * 4096,
        "10 MB": "a" * 10_000_000,
        "not JSON": f"{encoded(b'x')}.{encoded(b'y')}.{'A' * 43}",
        "empty": "",
    }


def measure_rejections(count: int) -> None:
    """Print what each kind costs."""
    key = secrets.token_bytes(32)
    issuer = LocalIssuer(Keyring.of({"one": key}, "one"), "broker", "embed", SystemClock())
    print("microseconds to refuse a token")
    for name, token in corpus(key).items():
        text = token[:0] + token  # as it would come from the wire: another object each time
        took = min(timed(issuer, text, count, good=name == "good") for _ in range(ROUNDS))
        print(f"  {name:28}{took:8.2f}")


def timed(issuer: LocalIssuer, token: str, count: int, *, good: bool) -> float:
    """Return microseconds a token, verified anew each time."""
    began = time.perf_counter()
    for _ in range(count):
        issuer.use_keyring(issuer.keyring)  # forgets what was proven
        try:
            issuer.prove(token)
            accepted = True
        except BadToken:
            accepted = False
        if accepted != good:
            sys.exit(f"a token was {'accepted' if accepted else 'refused'}: {token[:60]}")
    return (time.perf_counter() - began) / count * 1e6


async def measure_ends(count: int) -> None:
    """Fill a session store far beyond its bounds, and end sessions."""
    clock = SystemClock()
    most = 200_000
    session_store = MemorySessions(most, clock)
    before = resident()
    await fill(session_store, most, clock)
    full = resident()
    print(f"\n{most:,} sessions recorded: {(full - before) / most:.0f} bytes each")
    await fill(session_store, 3 * most, clock)
    over = resident()
    print(f"{3 * most:,} more: {len(session_store):,} held, {(over - full) >> 20:+d} MiB")
    began = time.perf_counter()
    for number, session in enumerate(sessions(count, clock)):
        await session_store.record(session)
        await session_store.mark(session, by_client=False)
        await session_store.forget(session)
        if number == count // 2:
            half = resident()
    took = (time.perf_counter() - began) / count * 1e6
    ended = resident()
    marks: Mapping[str, int] = {"held": len(session_store), "remembered": session_store.ended_count}
    print(f"{count:,} sessions recorded and ended: {took:.1f} us each, {marks}")
    print(f"  {(ended - half) / (count - count // 2):.0f} bytes each for the second half")


async def fill(session_store: MemorySessions, count: int, clock: SystemClock) -> None:
    """Record new sessions."""
    for session in sessions(count, clock):
        await session_store.record(session)


def sessions(count: int, clock: SystemClock) -> list[Session]:
    """Make sessions as a relay records them: nothing of one is shared with another."""
    now = clock.wall() // 1_000_000
    return [
        Session(
            secrets.token_hex(16),
            "web",
            f"A{number % 50:02}XYZ0001",
            secrets.token_hex(16),
            "",
            now,
            now + 3600,
            secrets.token_bytes(32),
        )
        for number in range(count)
    ]


def resident() -> int:
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
