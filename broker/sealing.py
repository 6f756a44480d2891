"""Tokens at rest: encrypted, authenticated, and bound to their key.

ChaCha20-Poly1305 (RFC 8439) with a random nonce: after 2^32 tokens under one key the odds of a
repeated one are one in 2^33, and at the default budget that takes 77 years.  Keys are
derived from the configured one by HKDF-SHA256 (RFC 5869), one a purpose.  The full key of the token
(client, agent, fingerprint, model) is associated data, so a sealed token that was copied under
another visitor's name does not open.

    sealed = key id (4 bytes) | nonce (12) | ciphertext and tag
"""

from secrets import token_bytes

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Struct
from typing_extensions import override

from broker.model import Secret

KEY_ID, NONCE = 4, 12


class Sealed(Struct, frozen=True, array_like=True, gc=False):
    """What is inside: the answer, and what only its readers judge.

    `dies_wall` is Unix microseconds by the clock of the replica that minted it: a second opinion,
    beside the store's clock.  `origin` names the issuer and key that made it; `version` and `epoch`
    are its own, whatever stands beside it.
    """

    body: bytes
    dies_wall: int
    lifetime: int
    mark: int
    origin: str
    version: int
    epoch: int

    @override
    def __repr__(self) -> str:
        return f"Sealed(dies_wall={self.dies_wall}, lifetime={self.lifetime})"


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sealed).decode


class Box:
    """Seals and opens bytes, for one purpose."""

    def __init__(self, key: Secret, purpose: str) -> None:
        self._cipher = ChaCha20Poly1305(derive(key, purpose))
        self._key_id = derive(key, "key id")[:KEY_ID]

    def close(self, key: str, plain: bytes) -> bytes:
        """Return the sealed form of what is held under `key`."""
        nonce = token_bytes(NONCE)
        return self._key_id + nonce + self._cipher.encrypt(nonce, plain, _associated(key))

    def open(self, key: str, sealed: bytes) -> bytes | None:
        """Return the content, None for what is damaged, or sealed with or for another key."""
        if not sealed.startswith(self._key_id):
            return None
        nonce, ciphertext = sealed[KEY_ID : KEY_ID + NONCE], sealed[KEY_ID + NONCE :]
        try:
            return self._cipher.decrypt(nonce, ciphertext, _associated(key))
        except (InvalidTag, ValueError):
            return None


class Seal:
    """Seals and opens tokens."""

    def __init__(self, key: Secret) -> None:
        self._box = Box(key, "tokens in a shared store")

    def close(self, key: str, content: Sealed) -> bytes:
        """Return the sealed form of what is held under `key`."""
        return self._box.close(key, _encode(content))

    def open(self, key: str, sealed: bytes) -> Sealed | None:
        """Return the content, None for what is damaged, or sealed with or for another key."""
        plain = self._box.open(key, sealed)
        try:
            return None if plain is None else _decode(plain)
        except (ValueError, msgspec.DecodeError):
            return None


def derive(key: Secret, purpose: str) -> bytes:
    """Return 32 bytes for one purpose."""
    info = f"embed-token-broker {purpose}".encode()
    return HKDF(SHA256(), 32, salt=None, info=info).derive(key.reveal().encode())


def _associated(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")
