"""The scripts that run in a shared store, and what the broker's user must be allowed there."""

import hashlib
import re
from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path

from broker.valkey.client import shapes
from broker.valkey.client.packing import Packed, pack
from broker.valkey.client.shapes import Shape
from broker.valkey.key_names import PREFIX

_FOLDER = Path(__file__).parents[1] / "lua"

_CALL = re.compile(r"redis\.call\('([A-Z]+)'")

_BESIDE_SCRIPTS = ("EVALSHA", "EVAL", "GET", "SET", "DEL", "HDEL", "PUBLISH", "SUBSCRIBE")
"""What replicas send themselves: scripts, refusals, and news for each other."""

_ON_A_CLUSTER = ("CLUSTER|SLOTS", "ASKING")


ScriptKeys = Sequence[bytes]
"""The keys of a script; its server is that of the first."""


class Script(Enum):
    """One file a script; its head lists keys, arguments and reply."""

    VISIT = "visit"
    SPEND = "spend"
    LEAD = "lead"
    RENEW = "renew"
    KEEP = "keep"
    ABANDON = "abandon"
    REVOKE = "revoke"
    HEARTBEAT = "heartbeat"
    BUDGET = "budget"
    HOLD = "hold"
    LIST = "list"
    PAGE = "page"
    DISOWN = "disown"

    __hash__ = object.__hash__  # Enum's own is Python code

    @cached_property
    def shape(self) -> Shape:
        """What its reply looks like."""
        shape: Shape = getattr(shapes, self.name)
        return shape

    @cached_property
    def source(self) -> str:
        """The text that the server gets: what all scripts share, and the script."""
        return _read("prelude") + _read(self.value)

    @cached_property
    def _sha(self) -> bytes:
        # How the server names a script; nothing is secured by it.
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest().encode()

    @cached_property
    def _named(self) -> Packed:
        return pack(b"EVALSHA", self._sha)

    def by_name(self, keys: ScriptKeys, arguments: Sequence[bytes | Packed]) -> bytes:
        """Return the call of a script that the server has."""
        return command(self._named, b"%d" % len(keys), *keys, *arguments)

    def in_full(self, keys: ScriptKeys, arguments: Sequence[bytes | Packed]) -> bytes:
        """Return the call of a script that it has not, or no longer."""
        return command(b"EVAL", self.source.encode(), b"%d" % len(keys), *keys, *arguments)


def command(*parts: bytes | Packed) -> bytes:
    """Return a command in the protocol's form (RESP): one array of bulk strings.

    A third of the time of the client library's, which accepts every type.
    """
    count = len(parts)
    pieces = [b""]
    for part in parts:
        if isinstance(part, Packed):
            count += part.parts - 1
            pieces.append(part.data)
        else:
            pieces.append(b"$%d\r\n%b\r\n" % (len(part), part))
    pieces[0] = b"*%d\r\n" % count
    return b"".join(pieces)


def acl_line(user: str, password: str, *, cluster: bool = False, database: bool = False) -> str:
    """Return the rule for the server's ACL file: enough for a broker, and no more.

    `password` as the server writes it: ">" and the password, or "#" and its SHA-256; `database`
    for another one than 0.
    """
    commands = {name for script in Script for name in _CALL.findall(script.source)}
    commands |= set(_BESIDE_SCRIPTS) | (set(_ON_A_CLUSTER) if cluster else set())
    commands |= {"SELECT"} if database else set()
    allowed = " ".join(f"+{name.lower()}" for name in sorted(commands))
    return (
        f"user {user} on {password} resetkeys ~{PREFIX}* resetchannels &{PREFIX}* -@all {allowed}"
    )


def _read(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
