"""A vendor of our own: a real HTTP server that mints like the real one and fails on demand.

    async with FakeVendor(VendorSettings(lifetime=60), seed=1) as vendor:
        vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="7"), times=2)
        ...  # a client of `vendor.url` with the api-secret `vendor.secret.reveal()`
        assert vendor.journal.in_window(60) <= 120

Puts the parts together and knows none of their business: what is said is decided in `mint`,
`plan` and `faults`, HTTP is in `server`, sockets are in `listener`.  It never logs or shows a
secret, a token or a fingerprint.  Everything that it opens and starts ends with `close`, at once,
whatever hangs.
"""

import asyncio
import secrets as random_source
import ssl
import time
from collections.abc import Callable, Iterable
from random import Random
from types import TracebackType
from typing import Self

from typing_extensions import override

from broker.model import Secret
from broker.testing.vendor.control import Control
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.journal import MINT_PATH, Call, Journal
from broker.testing.vendor.listener import Listener
from broker.testing.vendor.mint import Mint
from broker.testing.vendor.plan import Aim, Plan, Planned, Predicate
from broker.testing.vendor.replies import Refusal
from broker.testing.vendor.server import Server
from broker.testing.vendor.settings import Clocks, VendorSettings


class FakeVendor:
    """The vendor's API on one address of this machine.

    `secrets` are the api-secrets accepted from the start (none given: one that is generated);
    `port` 0 means any free one.  `seed` decides latencies and session ids.  `monotonic` gives
    seconds for limits and journal; `wall` gives Unix seconds, and unless it is given the date
    moves along with `monotonic` from the present on.  With `tls` the server speaks HTTPS.
    """

    def __init__(
        self,
        settings: VendorSettings | None = None,
        *,
        secrets: Iterable[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        offset = time.time() - monotonic()
        self._clocks = Clocks(monotonic, wall or (lambda: monotonic() + offset))
        self._random = Random(seed)  # noqa: S311 - repeatable on purpose; keys come from `secrets`
        self._mint = Mint(settings or VendorSettings(), self._random, self._clocks)
        self._plan = Plan()
        self._scheme = "http" if tls is None else "https"
        self._listener = Listener(host, port, self._connection, tls)
        self._server: Server | None = None
        self._told: Callable[[Call, float], object] | None = None
        self._is_controlled = False
        self.journal = Journal()
        known = [self.add_secret(value) for value in secrets]
        self.secret = known[0] if known else self.add_secret()

    async def start(self) -> None:
        """Listen and answer.  Raises OSError if the address cannot be had."""
        if self._server is None:
            self._server = Server(self._mint, self._plan, self.journal, self._random, self._clocks)
            self._server.tell(self._told)
            if self._is_controlled:
                self._server.open_control(Control(self._plan))
        await self._listener.accept()

    async def close(self) -> None:
        """Stop at once: connections are aborted, handlers cancelled and awaited.

        May be started again, on the same port; keys, limits, faults and journal stay.
        """
        await self._listener.close()
        await self._drop()
        self._server = None

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end; the port is known once it was started."""
        host = f"[{self._listener.host}]" if ":" in self._listener.host else self._listener.host
        return f"{self._scheme}://{host}:{self._listener.port}"

    @property
    def settings(self) -> VendorSettings:
        """How the vendor behaves; a value assigned at run time holds from the next call on."""
        return self._mint.settings

    @settings.setter
    def settings(self, settings: VendorSettings) -> None:
        self._mint.settings = settings

    def add_secret(self, value: str | None = None) -> Secret:
        """Accept one more api-secret, generated unless given; also brings a revoked one back."""
        secret = Secret(value or random_source.token_urlsafe(32))
        self._mint.know(secret, None)
        return secret

    def revoke_secret(
        self, secret: Secret | str, says: Refusal | None = Refusal.RUNTIME_SUSPENDED
    ) -> None:
        """Accept this secret no longer: refuse it this way, or (None) as one that never was."""
        secret = secret if isinstance(secret, Secret) else Secret(secret)
        if says is None:
            self._mint.forget(secret)
        else:
            self._mint.know(secret, says)

    def fail(
        self,
        fault: Fault,
        *,
        times: int | None = None,
        agent: str | None = None,
        fingerprint: str | None = None,
        model: str | None = None,
        path: str | None = MINT_PATH,
        where: Predicate | None = None,
    ) -> Planned:
        """Let the next `times` calls (None: all) that fit every condition meet this fault.

        Ends by itself, by `stop()`, at the end of a `with` block, or by `heal`.  Of several
        faults for one call the one that was set first is met; one without `times` and conditions
        only where there is no other, and of those the latest.
        """
        aim = Aim(agent=agent, fingerprint=fingerprint, model=model, path=path, where=where)
        return self._plan.add(fault, aim, times)

    def tell(self, told: Callable[[Call, float], object]) -> None:
        """Call this at the end of each request, with the seconds it took; before the start."""
        self._told = told

    def open_control(self) -> None:
        """Let requests set faults (`control`), too; before the start."""
        self._is_controlled = True

    def heal(self) -> None:
        """Take all faults back.  Calls that already hang go on hanging."""
        self._plan.clear()

    async def refuse_connections(self) -> None:
        """Drop all connections; refuse new ones until `accept_connections`."""
        await self._listener.refuse()
        await self._drop()

    async def ignore_connections(self) -> None:
        """Drop all connections; leave new ones waiting unaccepted until `accept_connections`."""
        await self._listener.ignore()
        await self._drop()

    async def accept_connections(self) -> None:
        """Answer again, on the same port."""
        await self._listener.accept()

    def claims_of(self, token: str) -> dict[str, object]:
        """Return the claims of a token of this vendor, expired or not.

        Raises `jwt.InvalidTokenError` for any other.
        """
        return self._mint.claims_of(token)

    def _connection(self) -> asyncio.BaseProtocol:
        if self._server is None:
            raise RuntimeError("not started")
        return self._server.protocol()

    async def _drop(self) -> None:
        if self._server is not None:
            await self._server.hang_up()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @override
    def __repr__(self) -> str:
        return f"FakeVendor({self.url!r}, {self.journal!r}, {self._plan!r})"


async def serve_forever(
    host: str,
    port: int,
    *,
    started: Callable[[FakeVendor], object],
    settings: VendorSettings | None = None,
    secrets: Iterable[str] = (),
    seed: int | None = None,
    told: Callable[[Call, float], object] = lambda _call, _seconds: None,
) -> None:
    """Run a fake vendor until cancelled; `started` is called with it once it answers.

    `told` is called at the end of each request; requests to `/_control/fault` set faults.  Prints
    nothing: telling people the URL and the secret is up to `started`.  Raises OSError if the
    address cannot be had.
    """
    vendor = FakeVendor(settings, secrets=secrets, host=host, port=port, seed=seed)
    vendor.tell(told)
    vendor.open_control()
    async with vendor:
        started(vendor)
        await asyncio.get_running_loop().create_future()
