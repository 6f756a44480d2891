"""The key that seals what is in the file: random, kept in it, wrapped once for each issuer key.

Whoever has one of the issuer's keys can open the file, so there is no further secret to make; when
keys rotate, it is wrapped anew, and nothing else is written.  Which key a wrapping is for is seen
by its key id (`broker.sealing.Box`), and tells nothing of the key.
"""

from collections.abc import Iterable, Sequence
from secrets import token_hex

from broker.model import Secret
from broker.sealing import Box

PURPOSE = "data key of a state file"
_BOUND_TO = "data key"
_BYTES = 32


def new_key() -> Secret:
    """Draw a key."""
    return Secret(token_hex(_BYTES))


def wrapped(data_key: Secret, keys: Iterable[Secret]) -> list[bytes]:
    """Wrap it for each of the keys."""
    plain = data_key.reveal().encode()
    return [Box(key, PURPOSE).close(_BOUND_TO, plain) for key in dict.fromkeys(keys)]


def unwrapped(wrappings: Sequence[bytes], keys: Iterable[Secret]) -> Secret | None:
    """Return the key, None if it is wrapped for none of these."""
    for key in keys:
        box = Box(key, PURPOSE)
        for wrapping in wrappings:
            plain = box.open(_BOUND_TO, wrapping)
            if plain is not None:
                return Secret(plain.decode("ascii"))
    return None
