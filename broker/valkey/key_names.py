"""Names of keys in a shared store.

What belongs together lies in one slot of a cluster: everything of one visitor, everything of one
agent, what the whole fleet shares.  A name tells a reader of the store nothing: visitors, agents,
clients, models and the account go into it as HMAC-SHA256, under a key of its own that is derived
from the configured one.  Budget, lines, calls, members and news do not depend on that key: they are
the vendor's, and replicas whose keys differ in the middle of a change still share them.  Every name
depends on the vendor: what one said of an agent is not another's word, and brokers before two of
them may use one server.
"""

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable

from msgspec import Struct

from broker.limits.policy import LimitRule
from broker.model import SEPARATOR, Secret, TokenRequest
from broker.tables import Recent

PREFIX = "etb:"
"""What every key and channel begins with; the ACL of the broker's user allows nothing else."""


_EPOCH = b"}:epoch"

NAMES_KNOWN = 50_000
"""Visitors and tokens whose names are held, about 700 bytes each, and half as many at least: making
them takes 8 us."""


class ReadyCall(Struct, frozen=True, gc=False):
    """A visit in the protocol's form, and what it was made of: the same again is the same call."""

    key: str
    rule: LimitRule
    version: int
    epoch: int
    packed: bytes


class VisitorKeys(Struct, gc=False):
    """Names of one visitor's keys, all in one slot: `slot` begins all but that of the `epoch`.

    `hash_agent` says what stands for an agent in a name; `last_call` is the visitor's last visit.
    Those of tens of thousands are held, so the collector must have nothing to visit.
    """

    slot: bytes
    epoch: bytes
    hash_agent: Callable[[str], str]
    last_call: ReadyCall | None = None

    def bucket(self, limit: str, agent: str = "") -> bytes:
        """The bucket of a limit; `agent` where it has one of its own there."""
        return self.slot + (f"{limit}:{self.hash_agent(agent)}" if agent else limit).encode()

    def token(self, name: bytes) -> bytes:
        """A token."""
        return self.slot + b"token:" + name

    def lease(self, name: bytes) -> bytes:
        """Who mints it."""
        return self.slot + b"lease:" + name


class Names:
    """Makes names; `key` is 32 bytes for nothing but this, `fleet` names the vendor or issuer."""

    def __init__(self, key: bytes, fleet: str) -> None:
        self._key = key
        self._fleet = hashlib.sha256(fleet.encode()).hexdigest()[:16]
        slot = f"{PREFIX}{{{self._fleet}}}:"
        self.budget = f"{slot}budget".encode()
        self.queues = f"{slot}queues".encode()
        self.calls = f"{slot}calls".encode()
        self.members = f"{slot}members".encode()
        self.channel = f"{slot}news".encode()
        self.visitor = Recent(self._visitor, NAMES_KNOWN)
        self._agent = Recent(lambda agent: self._hash("agent", agent), NAMES_KNOWN)
        self.token_name = Recent(self._token_name, NAMES_KNOWN)

    def _visitor(self, visitor: str) -> VisitorKeys:
        """Names in the slot of a visitor."""
        slot = f"{PREFIX}{{{self._hash('visitor', visitor)}}}:".encode()
        return VisitorKeys(slot, slot.removesuffix(b"}:") + _EPOCH, self._agent)

    def _token_name(self, key: str) -> bytes:
        """What tells a key's token from the visitor's others: it hashes the whole key."""
        return self._hash("token", key).encode()

    def agent(self, agent: str) -> bytes:
        """The bucket of an agent's mints."""
        return self._of_agent(agent) + b"bucket"

    def refused(self, request: TokenRequest) -> bytes:
        """What the vendor said of an agent and model."""
        model = "-" if request.model is None else self._hash("model", request.model)
        return self._of_agent(request.agent) + f"refused:{model}".encode()

    def account(self, keys: Iterable[Secret]) -> bytes:
        """What the vendor said of the account that these keys are of."""
        digests = "".join(key.digest().hex() for key in keys)
        return f"{PREFIX}{{account:{self._hash('account', digests)}}}:refused".encode()

    def client(self, client: str) -> bytes:
        """The bucket of a client's requests."""
        return f"{PREFIX}{{client:{self._hash('client', client)}}}:bucket".encode()

    def session(self, session_id: str) -> bytes:
        """What is known of a session."""
        return f"{PREFIX}{{session:{self._hash('session', session_id)}}}:record".encode()

    def ended(self, session_id: str) -> bytes:
        """That it was ended."""
        return f"{PREFIX}{{session:{self._hash('session', session_id)}}}:ended".encode()

    def handed_out(self, digest: bytes) -> bytes:
        """The same session by the SHA-256 of its token."""
        return f"{PREFIX}{{handed:{self._hash('handed out', digest.hex())}}}:record".encode()

    def disowned(self, client: str, digest: bytes) -> bytes:
        """That a client wanted this token ended before there was a record of it."""
        return self._disowned(client) + f"mark:{self._hash('disowned', digest.hex())}".encode()

    def all_disowned(self, client: str) -> bytes:
        """The names of all such marks of a client."""
        return self._disowned(client) + b"all"

    def of_agent(self, agent: str) -> bytes:
        """The list of an agent's sessions."""
        return self._of_agent(agent) + b"sessions"

    def of_visitor(self, fingerprint: str) -> bytes:
        """The list of a visitor's sessions, of all clients."""
        return f"{PREFIX}{{of:{self._hash('sessions of', fingerprint)}}}:sessions".encode()

    def wake(self, replica: bytes) -> bytes:
        """The channel on which a replica is woken."""
        return PREFIX.encode() + b"wake:" + replica

    def _of_agent(self, agent: str) -> bytes:
        """Return the slot of an agent."""
        return f"{PREFIX}{{agent:{self._agent(agent)}}}:".encode()

    def _disowned(self, client: str) -> bytes:
        """Return the slot of what a client disowned: its marks are counted when one is set."""
        return f"{PREFIX}{{disowned:{self._hash('disowned by', client)}}}:".encode()

    def _hash(self, kind: str, text: str) -> str:
        data = f"{self._fleet}{kind}{SEPARATOR}{text}".encode("utf-8", "surrogatepass")
        digest = hmac.digest(self._key, data, "sha256")
        return urlsafe_b64encode(digest[:18]).decode()


def is_epoch(name: bytes) -> bool:
    """Whether this is the name of a visitor's epoch, as far as its form tells."""
    return name.startswith(PREFIX.encode()) and name.endswith(_EPOCH)
