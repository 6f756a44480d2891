"""Faults by name, for a command line and for requests: `NAME` or `NAME=ARG`."""

from collections.abc import Callable, Mapping

from broker.config.schema import duration
from broker.testing.vendor import faults
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.replies import Refusal


class BadFault(ValueError):
    """No fault has this name, or not this argument; the message says what there is."""


def _refused(code: str) -> Fault:
    """Refuse with this code, or with this status of the vendor's."""
    for refusal in Refusal:
        status, name = refusal.value
        if code.upper() == name or code == str(status):
            return faults.error(refusal)
    raise ValueError(code)


def _rate_limited(span: str = "") -> Fault:
    return faults.error(Refusal.RATE_LIMITED, retry_after=f"{_seconds(span):g}" if span else ())


def _seconds(span: str) -> float:
    return duration(span).seconds


NAMED: Mapping[str, tuple[str, str, Callable[..., Fault]]] = {
    "cut": ("=BYTES", "close after so much of the body", lambda n: faults.cut(int(n))),
    "drip": ("[=SPAN]", "a byte every so often", lambda s="1s": faults.drip(_seconds(s))),
    "edge-denied": ("", "403 of the edge, as text", faults.edge_denied),
    "empty": ("", "the answer without its body", faults.empty),
    "gzip-bomb": ("", "a kilobyte that unfolds to a million times that", faults.gzip_bomb),
    "hang": ("", "never an answer", faults.hang),
    "html": ("[=STATUS]", "a page of the edge", lambda status=502: faults.html(int(status))),
    "huge": (
        "[=BYTES]",
        "so much white space before the body",
        lambda n=10**7: faults.huge(int(n)),
    ),
    "large": ("[=BYTES]", "so many bytes, streamed", lambda n=10**8: faults.large(int(n))),
    "lifetime": ("=SPAN", "tokens that live so long", lambda s: faults.lifetime(_seconds(s))),
    "overlong": ("[=BYTES]", "promise so much more", lambda n=100: faults.overlong(int(n))),
    "rate-limited": ("[=SPAN]", "429 RATE_LIMITED, with Retry-After", _rate_limited),
    "redirect": ("=URL", "302", faults.redirect),
    "refuse": ("=CODE", "refuse with this code or status", _refused),
    "reset": ("[=BYTES]", "RST, after so much", lambda n=None: faults.reset(n and int(n))),
    "same-token": ("", "the token that the visitor has already", faults.same_token),
    "slow": ("=SPAN", "answer so much later", lambda s: faults.slow(_seconds(s))),
    "truncated": ("", "half the body as if it were all", faults.truncated),
}
"""The argument's form, what it does, and what makes it."""


_EXAMPLES = {
    "BYTES": "100",
    "CODE": "RATE_LIMITED",
    "SPAN": "2s",
    "STATUS": "502",
    "URL": "http://127.0.0.1:8092/",
}
"""An argument of each form."""


def fault_named(text: str) -> Fault:
    """Return the fault that this means; raises BadFault."""
    name, has_argument, argument = text.partition("=")
    if name not in NAMED:
        raise BadFault(f"no fault is called {name!r}; there are {', '.join(NAMED)}")
    form, _, make = NAMED[name]
    is_needed, is_possible = form.startswith("="), bool(form)
    if (is_needed and not argument) or (has_argument and not is_possible):
        raise BadFault(_form(name, form))
    try:
        return make(argument) if argument else make()
    except (ValueError, OverflowError):
        raise BadFault(f"{name}: {argument!r} does not fit; {_form(name, form)}") from None


def _form(name: str, form: str) -> str:
    """Say how a fault is written, with an example of what its argument may be."""
    kind = form.strip("[]=")
    example = f", such as {name}={_EXAMPLES[kind]}" if kind else ""
    return f"write {name}{form}{example}"
