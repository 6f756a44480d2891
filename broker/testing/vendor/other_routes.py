"""The vendor's routes that do not mint, with an answer each that has the shape of the real one.

For clients that are to be tested against the fake vendor, and for brokers that pass such requests
on.  Each wants a good key; none has a limit, and none changes anything.
"""

import re
from collections.abc import Callable, Mapping

from broker.testing.vendor.journal import Call
from broker.testing.vendor.replies import Answer, json_answer

_CODE = r"[A-Za-z0-9_-]+"

_SILENCE = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\xbb\0\0\0\x77\1\0\2\0\x10\0data\0\0\0\0"
"""A WAV file without a sample."""


def _success(**fields: object) -> Answer:
    return json_answer({"success": True, **fields})


def _page(**_found: str) -> Answer:
    page = {"limit": 20, "offset": 0, "total": 0, "has_more": False}
    return _success(data=[], pagination=page)


def _agent(code: str) -> Answer:
    return _success(data={"agent_id": code, "status": "ready", "name": "a fake agent"})


def _speech() -> Answer:
    return Answer(200, _SILENCE, (("Content-Type", "audio/wav"),))


_ROUTES: Mapping[str, Callable[..., Answer]] = {
    "GET /v1/agents": _page,
    "GET /v1/usage": _page,
    "GET /v1/voices": lambda: _success(data=[{"id": "M1"}, {"id": "F1"}]),
    "GET /v1/webhooks": lambda: _success(data=[]),
    "GET /v2/credit-summaries": lambda: _success(data={"balance": 1000, "plan": "fake"}),
    "POST /v1/tts": _speech,
    "POST /v1/agent/generate": lambda: _success(agent_id="A00FAK0000", status="processing"),
    f"GET /v1/agent/status/(?P<code>{_CODE})": _agent,
    f"GET /v1/agent/(?P<code>{_CODE})": _agent,
    f"POST /v1/agent/(?P<code>{_CODE})": _agent,
    f"DELETE /v1/agent/(?P<code>{_CODE})": _agent,
    f"POST /v1/agent/{_CODE}/(speak|add-context)": lambda: _success(data={"delivered_to_rooms": 0}),
    f"GET /v1/dynamics/{_CODE}": lambda: _success(data={"status": "ready", "gestures": {}}),
    "POST /v1/dynamics/generate": lambda: _success(status="processing"),
    "POST /v1/files/upload": lambda: _success(data={"file_url": "https://files.example/fake"}),
    "POST /v1/webhooks": lambda: _success(data={"id": "w1", "secret": "a fake one"}),
    f"DELETE /v1/webhooks/{_CODE}": _success,
    f"POST /v1/webhooks/{_CODE}/test": lambda: _success(data={"delivered": True}),
}
"""What answers a method and a path; the first one that fits."""

_COMPILED = [(re.compile(route), answer) for route, answer in _ROUTES.items()]


def answer_to(call: Call) -> Answer | None:
    """Return the answer to a call with a good key, None where there is no such route."""
    for route, answer in _COMPILED:
        found = route.fullmatch(f"{call.method} {call.path}")
        if found is not None:
            return answer(**found.groupdict())
    return None
