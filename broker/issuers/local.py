"""Tokens signed here, for those who host the viewer themselves.

Knows keys and claims.  Does not know who asks for a token, how often, or what was revoked.
"""

import os
import sys
from collections.abc import Mapping

from msgspec import Struct
from typing_extensions import override

from broker.issuers.base import Issuer, Turn
from broker.issuers.keyring import LIFETIME_SECONDS, BadToken, Keyring
from broker.issuers.template import Template
from broker.model import AGENT_ID, Clock, Minted, Session, TokenRequest
from broker.tables import Generations
from broker.units import SECOND
from broker.wire.responses import AnswerTemplate

MOST_PROVEN = 4096
"""Tokens in a generation, about 1.5 KB each: the visitors of some minutes."""

BACKDATED_SECONDS = 5
"""`iat` and `nbf` lie this far in the past: a verifier whose clock is a little behind must not
refuse a token that was made a moment ago."""

LIFETIME = (LIFETIME_SECONDS - BACKDATED_SECONDS) * SECOND
"""Microseconds that a token has left when it is made."""

SESSION_BYTES = 16
"""Of a session's id, at random: no two are equal, and none is guessed."""

DRAWN = 64
"""Session ids that are drawn together."""

MOST_ALIKE = 1024
"""Beginnings of tokens that are kept, by client, agent and model, about 1.5 KB each.  Visitors may
make up models: a beginning that was dropped is made again in 20 us."""


class LocalIssuer(Issuer):
    """Signs HS256 tokens; `issuer` and `audience` become the claims `iss` and `aud`."""

    name = "local"
    proves = True

    def __init__(self, keyring: Keyring, issuer: str, audience: str, clock: Clock) -> None:
        self._issuer = issuer
        self._audience = audience
        self._clock = clock
        self._drawn: list[str] = []
        self.use_keyring(keyring)

    def use_keyring(self, keyring: Keyring) -> None:
        """Sign and verify with other keys from now on."""
        self.keyring = keyring
        self._signer_ids = {
            key.kid: sys.intern(self._signer_id_of(key.kid)) for key in keyring.keys
        }
        self._alike: dict[tuple[str, str, str | None], _Alike] = {}
        self._proven: Generations[str, _Known] = Generations(MOST_PROVEN)

    @property
    @override
    def signer_id(self) -> str:
        return self._signer_ids[self.keyring.signing(self._clock.wall())]

    @property
    @override
    def signer_ids(self) -> frozenset[str]:
        now = self._clock.wall()
        good = (key.kid for key in self.keyring.keys if now < key.verifies_until)
        return frozenset(self._signer_ids[kid] for kid in good)

    def _signer_id_of(self, kid: str) -> str:
        return f"local {self._issuer} {self._audience} {self.keyring.name_of(kid)}"

    @override
    async def check(self, request: TokenRequest) -> None:
        """Nothing stops a signature."""

    @override
    async def mint(self, request: TokenRequest, turn: Turn) -> Minted:
        """Sign a token; never fails, and waits for nothing but its turn."""
        await turn()
        return self.sign(request, self._clock.wall())

    def sign(self, request: TokenRequest, now: int) -> Minted:
        """Sign a token at this moment (Unix us), without a turn: a signature costs nobody."""
        alike = self._alike.get((request.client, request.agent, request.model))
        if alike is None or not alike.since <= now < alike.until:
            alike = self._begin(request, now)
        session = (self._drawn or self._draw()).pop()
        token = alike.template.sign(_Claims(request.fingerprint, session, session))
        return Minted(
            token=token.decode(),
            session_id=session,
            expires_at=alike.expires_at,
            lifetime=LIFETIME,
            extra=alike.extra,
            origin=alike.origin,
            body=alike.answer.body(token, session),
        )

    def _draw(self) -> list[str]:
        """Draw session ids ahead: to ask the system for each takes a hundredth of a mint."""
        digits = os.urandom(DRAWN * SESSION_BYTES).hex()
        size = 2 * SESSION_BYTES
        self._drawn = [digits[at : at + size] for at in range(0, len(digits), size)]
        return self._drawn

    def _begin(self, request: TokenRequest, now: int) -> "_Alike":
        """Make what this second's tokens of an agent have in common, for one client and model."""
        key, until = self.keyring.signer(now)
        second = now // SECOND
        issued = second - BACKDATED_SECONDS
        expires = issued + LIFETIME_SECONDS
        extra = {} if request.model is None else {"model": request.model}
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": request.agent,
            "agent_id": request.agent,
            "client_id": request.client,  # may introspect and revoke it (RFC 8693 section 4.3)
            "iat": issued,
            "nbf": issued,
            "exp": expires,
            **extra,
        }
        if len(self._alike) >= MOST_ALIKE:
            self._alike.clear()
        alike = self._alike[request.client, request.agent, request.model] = _Alike(
            since=now,
            until=min((second + 1) * SECOND, until),
            expires_at=expires,
            extra=extra,
            origin=self._signer_ids[key.kid],
            template=Template(key, self.keyring.header_of(key), claims),
            answer=AnswerTemplate(expires, extra),
        )
        return alike

    @override
    def prove(self, token: str) -> Session:
        """Return the session of a token that was signed here and is good now.

        A token without a session could not be revoked, so it is refused.  One without
        `client_id`, as other makers who have the key may write it, belongs to no client.
        """
        now = self._clock.wall()
        known = self._proven.find(token)
        if known is not None and known.begins <= now < known.ends:
            return known.session
        proof = self.keyring.verify(token, self._issuer, self._audience, now)
        claims = proof.claims
        agent = _text(claims, "sub")
        if AGENT_ID.fullmatch(agent) is None or claims.get("agent_id", agent) != agent:
            raise BadToken("of no agent that can be")  # it goes into a header as it is
        session = Session(
            session_id=_text(claims, "sid"),
            client=_text(claims, "client_id", ""),
            agent=agent,
            fingerprint=_text(claims, "fingerprint"),
            model=_text(claims, "model", ""),
            issued=_number(claims, "iat"),
            expires=_number(claims, "exp"),
        )
        self._proven[token] = _Known(session, proof.begins, proof.ends)
        return session


class _Alike(Struct, frozen=True):
    """What tokens have in common that one client gets for one agent and model, and its answers.

    It holds from one microsecond (Unix) until another, which are of one second and of one key.
    """

    since: int
    until: int
    expires_at: int
    extra: Mapping[str, object]
    origin: str
    template: Template
    answer: AnswerTemplate


class _Claims(Struct, frozen=True, gc=False):
    """What differs from token to token."""

    fingerprint: str
    sid: str
    jti: str

    @override
    def __repr__(self) -> str:
        return "_Claims()"


class _Known(Struct, frozen=True, gc=False):
    """What a token stood for when it was verified, and from when until when it is good.

    A viewer shows its token with each of its requests, so a proxy asks about few tokens many times;
    a signature takes eight times as long as a look here.  Only good ones are kept, and with other
    keys none.
    """

    session: Session
    begins: int
    ends: int


def _text(claims: Mapping[str, object], name: str, default: object = None) -> str:
    value = claims.get(name, default)
    if not isinstance(value, str):
        raise BadToken("a required claim is missing")
    return value


def _number(claims: Mapping[str, object], name: str) -> int:
    value = claims.get(name)
    if not isinstance(value, int):
        raise BadToken("a required claim is missing")
    return value
