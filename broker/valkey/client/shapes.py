"""What the reply to each command looks like, checked before anything is made of it.

A reply of another shape is not the server's answer to this command: something between has put a
word in, or left one out, and what follows on the same connection answers others' questions.  So it
is a failure of the connection.  What a text or a number says is for its reader to judge: others may
write into the store, and one key that they spoiled is no reason to leave it.
"""

from typing import Final

from typing_extensions import override

from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed
from broker.valkey.client.resp import Reply

_NONE: Final = type(None)

Kinds = tuple[type, ...]
"""Types of the elements of an array, each of them exactly."""


class Shape:
    """The replies to `command`: a `word`, a value of one of `kinds`, or an array.

    An array has the types of one of `forms`; where there is a `tail`, followed by that any number
    of times.  `errors` are those that mean something to who asked, beside StoreFailed.
    """

    def __init__(
        self,
        command: str,
        *forms: Kinds,
        kinds: Kinds = (),
        word: bytes = b"",
        tail: Kinds = (),
        errors: tuple[type[Exception], ...] = (Redirect,),
    ) -> None:
        self._command = command
        self._forms = frozenset(forms)
        self._kinds = kinds
        self.takes_numbers = int in kinds  # asked for each visit
        self._word = word
        self._tail = tail
        self._errors: tuple[type[Exception], ...] = (StoreFailed, *errors)

    def fits(self, reply: Reply) -> bool:
        """Whether this may be the reply."""
        if isinstance(reply, list):
            kinds = tuple(map(type, reply))
            return kinds in self._forms or bool(self._tail and self._continues(kinds))
        return type(reply) in self._kinds or bool(self._word and reply == self._word)

    def failure(self) -> StoreFailed:
        """Return what a reply is that does not fit; it is not quoted."""
        return StoreFailed(Reason.OTHER, f"another reply than {self!r}")

    def error(self, error: Exception) -> Exception:
        """Return what an error reply is to who asked for this."""
        return error if isinstance(error, self._errors) else self.failure()

    def _continues(self, kinds: Kinds) -> bool:
        tail = self._tail
        for form in self._forms:
            if kinds[: len(form)] == form:
                rest = kinds[len(form) :]
                if rest == tail * (len(rest) // len(tail)):
                    return True
        return False

    @override
    def __repr__(self) -> str:
        shown = [f"[{_shown(form, self._tail)}]" for form in sorted(self._forms, key=str)]
        shown += [_shown((kind,)) for kind in self._kinds]
        shown += [self._word.decode()] if self._word else []
        return f"{self._command}: {' or '.join(shown)}"


class _Anything(Shape):
    def __init__(self) -> None:
        super().__init__("any", kinds=(int,), errors=(Redirect, NoScript))

    @override
    def fits(self, reply: Reply) -> bool:
        return True


def _script(name: str, *forms: Kinds, kinds: Kinds = (), tail: Kinds = ()) -> Shape:
    return Shape(name, *forms, kinds=kinds, tail=tail, errors=(Redirect, NoScript))


def _shown(kinds: Kinds, tail: Kinds = ()) -> str:
    names = [_NAMES[kind] for kind in kinds]
    return ", ".join([*names, *([f"({_shown(tail)})..."] if tail else [])])


_NAMES = {int: "number", bytes: "text", list: "array", _NONE: "nothing"}

ANYTHING = _Anything()
"""For commands that a broker does not send: those of a diagnosis."""

GET = Shape("GET", kinds=(bytes, _NONE))
SET = Shape("SET", word=b"OK")
SET_IF_NEW = Shape("SET NX GET", kinds=(bytes, _NONE))
COUNTED = Shape("DEL, HDEL, PUBLISH", kinds=(int,))
ACCEPTED = Shape("AUTH, SELECT, ASKING", word=b"OK", errors=())
SUBSCRIBE = Shape("SUBSCRIBE", (bytes, bytes, int), errors=())
SLOTS = Shape("CLUSTER SLOTS", (), tail=(list,))

VISIT = _script(
    "visit",
    (int, int),
    (int, int, bytes),
    (int, int, bytes, bytes, int),
    (int, int, bytes, bytes, int, bytes),
    (int, int, bytes, bytes, int, _NONE),
    kinds=(int,),
)
SPEND = _script("spend", (int, int))
LEAD = _script(
    "lead",
    (bytes, bytes, int, bytes, bytes),
    (bytes, bytes, int, bytes, _NONE),
    (bytes, bytes, int),
    (bytes, bytes),
    (bytes, int),
    (bytes, bytes, bytes, int, int),
)
KEEP = _script("keep", (bytes,), tail=(bytes,))
ABANDON = _script("abandon", (), tail=(bytes,))
RENEW = _script("renew", kinds=(int,))
REVOKE = _script("revoke", kinds=(bytes,))
HEARTBEAT = _script("heartbeat", (int,), (int, int, int, bytes, int), tail=(bytes, int))
BUDGET = _script("budget", (int, int, int, int, bytes, int, int, int), tail=(int,))
HOLD = _script("hold", kinds=(int,))
DISOWN = _script("disown", kinds=(int,))
LIST = _script("list", kinds=(int,))
PAGE = _script("page", (), tail=(bytes, bytes))
