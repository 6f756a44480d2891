"""The vendor as it is meant to work: keys, limits, agents, tokens.

Calls in, answers out; no socket, no waiting.  Times are seconds.  The token buckets here share no
code with the broker's own: the two are held against each other in tests.
"""

import hashlib
import math
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from random import Random

import jwt
import msgspec
from typing_extensions import override

from broker.model import Secret
from broker.testing.vendor.faults import HEALTHY, Fault
from broker.testing.vendor.journal import Call
from broker.testing.vendor.replies import (
    Answer,
    Headers,
    Refusal,
    json_answer,
    refusal,
    token_answer,
)
from broker.testing.vendor.settings import Allowance, Clocks, VendorSettings

MAX_FIELD = 512
"""Characters: what the fake vendor takes as an agent, a fingerprint or a model."""

REMEMBERED = 100_000
"""Visitors whose last token is kept for `faults.same_token`; those unseen longest go first."""

ONE = 1 - 1e-9
"""A whole token of a bucket, as far as floating point can tell."""


class Bucket:
    """One token bucket, full when it is made."""

    __slots__ = ("_level", "_seen")

    def __init__(self) -> None:
        self._level = math.inf
        self._seen = -math.inf

    def level(self, allowance: Allowance, now: float) -> float:
        """Return how many tokens are in it."""
        gained = (now - self._seen) * allowance.count / allowance.per
        return min(allowance.count, self._level + gained)

    def take(self, allowance: Allowance, now: float) -> float:
        """Take a token; return 0, or the seconds until there is one to be taken."""
        self._level, self._seen = self.level(allowance, now), now
        if self._level < ONE:
            return (1 - self._level) * allowance.per / allowance.count
        self._level -= 1
        return 0.0


class Mint:
    """Answers calls.  `settings` may be replaced at any time; buckets keep their level."""

    def __init__(self, settings: VendorSettings, random: Random, clocks: Clocks) -> None:
        self.settings = settings
        self.run = f"{random.getrandbits(32):08x}"
        self._clocks = clocks
        self._signing_key = secrets.token_bytes(32)
        self._secrets: dict[str, Refusal | None] = {}
        self._by_ip: dict[str, Bucket] = {}
        self._failures: dict[str, Bucket] = {}
        self._account = Bucket()
        self._last: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._minted = 0

    def know(self, secret: Secret, says: Refusal | None) -> None:
        """Accept this secret (None), or refuse it in this way."""
        self._secrets[secret.digest().hex()] = says

    def forget(self, secret: Secret) -> None:
        """Treat this secret as one that never was."""
        self._secrets.pop(secret.digest().hex(), None)

    def now(self) -> float:
        """Return the vendor's own time: Unix seconds, skewed."""
        return self._clocks.wall() + self.settings.skew

    def validate(self, call: Call) -> Answer:
        """Say whether the call's secret is accepted."""
        return json_answer({"valid": self._refuse_secret(call) is None})

    def mint(self, call: Call, fault: Fault = HEALTHY) -> Answer:
        """Answer a mint: charge it, then refuse it or make a token."""
        wait, headers = self._charge(call.remote)
        if fault.answer is not None:
            return fault.answer
        if wait:
            return _rate_limited(wait).plus(headers)
        refused = self.authenticate(call) or self._check(call)
        return (refused or self._token(call, fault)).plus(headers)

    def claims_of(self, token: str) -> dict[str, object]:
        """Return the claims of a token of ours, expired or not.

        Raises `jwt.InvalidTokenError` for any other.
        """
        options: jwt.types.Options = {"verify_exp": False, "verify_iat": False}
        return jwt.decode(token, self._signing_key, ["HS256"], options=options)

    def _charge(self, ip: str) -> tuple[float, Headers]:
        """Take from the limits; return the seconds to wait (0: none) and the rate headers."""
        settings, now = self.settings, self._clocks.monotonic()
        limits = []
        if settings.ip is not None:
            limits.append((self._by_ip.setdefault(ip, Bucket()), settings.ip))
        if settings.account is not None:
            limits.append((self._account, settings.account))
        wait = 0.0
        for bucket, allowance in limits:
            wait = wait or bucket.take(allowance, now)
        if not limits or not settings.rate_headers:
            return wait, ()
        levels = [(bucket.level(allowance, now), allowance) for bucket, allowance in limits]
        return wait, self._rate_headers(*min(levels, key=lambda pair: pair[0]))

    def _rate_headers(self, level: float, allowance: Allowance) -> Headers:
        """Return the headers of the tighter limit; Reset is when its bucket is full again."""
        full_in = (allowance.count - level) * allowance.per / allowance.count
        return (
            ("X-RateLimit-Limit", str(int(allowance.count))),
            ("X-RateLimit-Remaining", str(int(level))),
            ("X-RateLimit-Reset", str(math.ceil(self.now() + full_in))),
        )

    def authenticate(self, call: Call) -> Answer | None:
        """Return the refusal of the call's secret, or None for a good one."""
        allowance, now = self.settings.failures, self._clocks.monotonic()
        bucket = self._failures.setdefault(call.remote, Bucket())
        refused = self._refuse_secret(call)
        if refused is None:
            locked = self.settings.lockout and bucket.level(allowance, now) < ONE
            return _rate_limited(allowance.per / allowance.count) if locked else None
        wait = bucket.take(allowance, now)
        return _rate_limited(wait) if wait else refusal(refused)

    def _refuse_secret(self, call: Call) -> Refusal | None:
        if call.secret is None:
            return Refusal.MISSING_AUTH
        return self._secrets.get(call.secret, Refusal.UNAUTHORIZED)

    def _check(self, call: Call) -> Answer | None:
        """Return the refusal of what the call asks for, or None."""
        settings = self.settings
        if call.problem is not None:
            return refusal(Refusal.VALIDATION_ERROR, call.problem)
        if call.agent in settings.unknown_agents:
            return refusal(Refusal.NOT_FOUND)
        if call.model is None:
            return None
        if settings.models and call.model not in settings.models:
            return refusal(Refusal.VALIDATION_ERROR, "unknown model")
        error = settings.model_errors.get((call.agent or "", call.model))
        return None if error is None else refusal(error)

    def _token(self, call: Call, fault: Fault) -> Answer:
        mark = visitor_mark(call.agent, call.fingerprint, call.model)
        last = self._last.get(mark) if fault.repeat else None
        token, session = last or self._fresh(mark, call, fault)
        self._last[mark] = token, session
        self._last.move_to_end(mark)
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return token_answer(self.settings.shape, token, session, call.model, self.settings.models)

    def _fresh(self, mark: str, call: Call, fault: Fault) -> tuple[str, str]:
        self._minted += 1
        session = f"{mark}-{self.run}-{self._minted:06d}"
        issued = int(self.now())
        claims: dict[str, object] = {
            "sid": session,
            "agent_id": call.agent,
            "iat": issued,
            "exp": issued + self.settings.lifetime,
        }
        if call.model is not None:
            claims["model"] = call.model
        if fault.claims is not None:
            claims = fault.claims(claims)
        return jwt.encode(claims, self._signing_key, "HS256"), session

    @override
    def __repr__(self) -> str:
        return f"Mint(minted={self._minted}, secrets={len(self._secrets)})"


def visitor_mark(agent: str | None, fingerprint: str | None, model: str | None = None) -> str:
    """Return how session ids begin that were made for this agent, visitor and model.

    So a token that reached somebody else can be recognised.  No two different triples share a
    mark: they are hashed as JSON, where the parts cannot run into each other.
    """
    return hashlib.sha256(msgspec.json.encode([agent, fingerprint, model])).hexdigest()[:16]


def read_token_request(body: bytes, call: Call) -> None:
    """Fill in what a mint's body asks for; what is wrong with it goes into `call.problem`."""
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        call.problem = "the body is not JSON"
        return
    if not isinstance(request, dict):
        call.problem = "the body is not a JSON object"
        return
    problems = list(_fields(request, call))
    call.problem = problems[0] if problems else None


def _fields(request: Mapping[object, object], call: Call) -> Iterable[str]:
    """Fill in each field that is good, and yield what is wrong with each other."""
    for source, target in (("agent_id", "agent"), ("fingerprint", "fingerprint")):
        value = request.get(source)
        if isinstance(value, str) and 0 < len(value) <= MAX_FIELD:
            setattr(call, target, value)
        else:
            yield f"{source} must be a string of 1 to {MAX_FIELD} characters"
    model = request.get("model")
    if isinstance(model, str) and 0 < len(model) <= MAX_FIELD:
        call.model = model
    elif model is not None:
        yield f"model must be a string of 1 to {MAX_FIELD} characters"


def _rate_limited(wait: float) -> Answer:
    return refusal(Refusal.RATE_LIMITED).plus((("Retry-After", str(math.ceil(wait))),))
