"""Faults set from outside, while the vendor runs: `/_control/fault`, which the real one has not.

    GET     what is set, and what there is
    POST    {"fault": "slow=2s", "times": 3, "path": "/v1/agents"}: the last two may be left out
    DELETE  nothing any more

Open where `Server.open_control` was called, which `broker fake-vendor` does.  It asks for no
secret: all who reach the vendor may set faults, by default those on this machine.  A page may not:
a request with an `Origin` is refused.
"""

from collections.abc import Callable

import msgspec
from aiohttp import web
from aiohttp.hdrs import ORIGIN
from msgspec import Struct

from broker.testing.vendor.journal import MINT_PATH
from broker.testing.vendor.named import NAMED, BadFault, fault_named
from broker.testing.vendor.plan import Aim, Plan

CONTROL_PATH = "/_control/fault"

EVERY_PATH = "*"
"""What `path` says for all routes."""


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """A fault to be set; `times` None is for good."""

    fault: str
    times: int | None = None
    path: str = MINT_PATH


class Control:
    """Sets faults of a plan by requests."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def is_asked(self, request: web.BaseRequest) -> bool:
        """Whether a request is for this."""
        return request.path == CONTROL_PATH

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Do what is asked, and tell what is set then."""
        if ORIGIN in request.headers:
            return _json(403, {"error": "no page may set faults"})
        do: dict[str, Callable[[bytes], None]] = {
            "GET": lambda _body: None,
            "POST": self._set,
            "DELETE": lambda _body: self._plan.clear(),
        }
        if request.method not in do:
            return _json(405, {"error": "GET, POST or DELETE"})
        try:
            do[request.method](await request.read())
        except (msgspec.DecodeError, BadFault) as error:
            return _json(400, {"error": str(error)})
        known = {f"{name}{form}": text for name, (form, text, _) in NAMED.items()}
        return _json(200, {"set": self._plan.told(), "known": known})

    def _set(self, body: bytes) -> None:
        order = msgspec.json.decode(body, type=Order)
        path = None if order.path == EVERY_PATH else order.path
        self._plan.add(fault_named(order.fault), Aim(path=path), order.times)


def _json(status: int, content: object) -> web.Response:
    body = msgspec.json.encode(content)
    return web.Response(status=status, body=body, content_type="application/json")
