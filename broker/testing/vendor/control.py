"""Faults set from outside, while the vendor runs: `/_control/fault`, which the real one has not.

    GET     what is set, and what there is
    POST    {"fault": "slow=2s", "times": 3, "path": "/v1/agents"}: the last two may be left out
    DELETE  nothing any more

Which of several is met, says `plan`.  What is refused is told in the vendor's envelope.
Open where `Server.open_control` was called, which `broker fake-vendor` does.  Without a secret, so
over loopback only, wherever the vendor listens, and never for a page: a request with an `Origin` is
refused.
"""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Annotated

import msgspec
from aiohttp import web
from aiohttp.hdrs import ALLOW, ORIGIN
from msgspec import Meta, Struct

from broker.testing.vendor.journal import MINT_PATH
from broker.testing.vendor.named import NAMED, BadFault, fault_named
from broker.testing.vendor.plan import Aim, Plan
from broker.testing.vendor.replies import refusal

ROOT = "/_control"
"""Below this nothing is the vendor's."""

CONTROL_PATH = f"{ROOT}/fault"

METHODS = ("GET", "POST", "DELETE")

EVERY_PATH = "*"
"""What `path` says for all routes."""


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """A fault to be set; `times` None is for good."""

    fault: str
    times: Annotated[int, Meta(ge=1)] | None = None
    path: str = MINT_PATH


class Control:
    """Sets faults of a plan by requests."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def is_asked(self, request: web.BaseRequest) -> bool:
        """Whether a request is for this."""
        return request.path == ROOT or request.path.startswith(f"{ROOT}/")

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Do what is asked, and tell what is set then."""
        if (refused := _refused_at_sight(request)) is not None:
            return refused
        do: dict[str, Callable[[bytes], None]] = {
            "GET": lambda _body: None,
            "POST": self._set,
            "DELETE": lambda _body: self._plan.clear(),
        }
        try:
            do[request.method](await request.read())
        except web.HTTPRequestEntityTooLarge:
            told = f"body: more than {request.client_max_size} bytes; a fault takes a hundred"
            return _refused(413, "PAYLOAD_TOO_LARGE", told)
        except (msgspec.DecodeError, BadFault) as error:
            return _refused(400, "VALIDATION_ERROR", str(error))
        known = {f"{name}{form}": text for name, (form, text, _) in NAMED.items()}
        return _json(200, {"set": self._plan.told(), "known": known})

    def _set(self, body: bytes) -> None:
        order = msgspec.json.decode(body, type=Order)
        path = None if order.path == EVERY_PATH else order.path
        self._plan.add(fault_named(order.fault), Aim(path=path), order.times)


def _is_here(peer: str | None) -> bool:
    """Whether an address is of loopback, also where a socket of both families writes IPv4."""
    return peer is not None and ip_address(peer.removeprefix("::ffff:")).is_loopback


def _refused_at_sight(request: web.BaseRequest) -> web.Response | None:
    """Refuse what needs no look at the body."""
    if ORIGIN in request.headers:
        return _refused(403, "FORBIDDEN", "no page may set faults")
    if not _is_here(request.remote):
        return _refused(403, "FORBIDDEN", "faults are set over loopback only")
    if request.path != CONTROL_PATH:
        told = f"faults are set and shown at {CONTROL_PATH}; there is nothing else below {ROOT}"
        return _refused(404, "NOT_FOUND", told)
    if request.method not in METHODS:
        told = f"{CONTROL_PATH} takes {', '.join(METHODS)}: show, set, take back"
        response = _refused(405, "METHOD_NOT_ALLOWED", told)
        response.headers[ALLOW] = ", ".join(METHODS)
        return response
    return None


def _refused(status: int, code: str, message: str) -> web.Response:
    answer = refusal((status, code), message)
    return web.Response(status=status, body=answer.body, content_type="application/json")


def _json(status: int, content: object) -> web.Response:
    body = msgspec.json.encode(content)
    return web.Response(status=status, body=body, content_type="application/json")
