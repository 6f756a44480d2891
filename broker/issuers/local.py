"""Tokens signed here, for those who host the viewer themselves.

Knows keys and claims.  Does not know who asks for a token or how often.
"""

import secrets

from typing_extensions import override

from broker.issuers.base import Issuer, Turn
from broker.issuers.keyring import Keyring
from broker.model import Ask, Clock, Minted
from broker.rules.reuse import SECOND

LIFETIME_SECONDS = 3600
"""The same hour as the vendor's tokens have, so a site can move between the issuers."""

BACKDATED_SECONDS = 5
"""`iat` and `nbf` lie this far in the past: a verifier whose clock is a little behind must not
refuse a token that was made a moment ago."""


class LocalIssuer(Issuer):
    """Signs HS256 tokens; `issuer` and `audience` become the claims `iss` and `aud`."""

    name = "local"

    def __init__(self, keyring: Keyring, issuer: str, audience: str, clock: Clock) -> None:
        self.keyring = keyring
        self._issuer = issuer
        self._audience = audience
        self._clock = clock

    def use_keyring(self, keyring: Keyring) -> None:
        """Sign and verify with other keys from now on."""
        self.keyring = keyring

    @property
    @override
    def origin(self) -> str:
        return self._origin_of(self.keyring.signing)

    @property
    @override
    def origins(self) -> frozenset[str]:
        return frozenset(self._origin_of(kid) for kid in self.keyring.kids)

    def _origin_of(self, kid: str) -> str:
        return f"local {self._issuer} {self._audience} {self.keyring.name_of(kid)}"

    @override
    async def check(self, ask: Ask) -> None:
        """Nothing stops a signature."""

    @override
    async def mint(self, ask: Ask, turn: Turn) -> Minted:
        """Sign a token; never fails, and waits for nothing but its turn."""
        await turn()
        issued = self._clock.wall() // SECOND - BACKDATED_SECONDS
        expires = issued + LIFETIME_SECONDS
        session = secrets.token_hex(16)
        claims: dict[str, object] = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": ask.agent,
            "agent_id": ask.agent,
            "fingerprint": ask.fingerprint,
            "sid": session,
            "jti": session,
            "iat": issued,
            "nbf": issued,
            "exp": expires,
        }
        if ask.model is not None:
            claims["model"] = ask.model
        return Minted(
            token=self.keyring.sign(claims),
            session_id=session,
            expires_at=expires,
            lifetime=(LIFETIME_SECONDS - BACKDATED_SECONDS) * SECOND,
            extra={} if ask.model is None else {"model": ask.model},
        )

    def verify(self, token: str) -> dict[str, object]:
        """Return the claims of a token that this broker signed; raises `keyring.BadToken`."""
        return self.keyring.verify(token, self._issuer, self._audience)
