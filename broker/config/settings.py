"""The settings tree: what can be configured, its default, and why that is the default.

Values only.  Where they come from (file, environment, flags) and how errors read is `config`'s
affair; `[section] key` in the file is the attribute of the same name here.  Unknown keys are
errors, because a misspelt limit would otherwise be no limit.

Secrets are given inline or, better, as `..._file`; files are read again when they change.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct, field
from typing_extensions import override

from broker.model import Secret

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Duration:
    """A span of time, written "500ms", "12s", "5m" or "1h"; held in microseconds."""

    __slots__ = ("us",)

    def __init__(self, us: int) -> None:
        self.us = us

    @property
    def seconds(self) -> float:
        """The span in seconds."""
        return self.us / 1_000_000

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and other.us == self.us

    @override
    def __hash__(self) -> int:
        return hash(self.us)

    @override
    def __repr__(self) -> str:
        return str(self)

    @override
    def __str__(self) -> str:
        for unit, size in (("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000)):
            if self.us and self.us % size == 0:
                return f"{self.us // size}{unit}"
        return f"{self.us}us" if self.us % 1000 else f"{self.us // 1000}ms"


def _seconds(count: int) -> Duration:
    return Duration(count * 1_000_000)


class _Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration file."""


class ServerSettings(_Section, frozen=True):
    """The data listener."""

    listen: str = "127.0.0.1:8080"
    """`HOST:PORT` or `unix:/path`; `[::]:PORT` is every address, of IPv4 and IPv6.  Loopback: a
    sidecar is reached by its own host only."""
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    """Processes that answer requests.  One: it serves some thousand visitors a second, and needs no
    store that is shared."""
    deadline: Duration = _seconds(12)
    """One request, start to answer: the longest wait for the budget (8 s) and a usual mint, but
    shorter than the 15 s at which common HTTP clients and proxies give up."""
    drain: Duration = _seconds(15)
    """Time from the signal to the end: half of the 30 s that Kubernetes grants by default."""
    drain_lead: Duration = _seconds(3)
    """Part of `drain` in which /readyz already says 503 and requests are still taken, so that a
    balancer notices first; probes commonly run every second or two."""
    keep_alive: Duration = _seconds(75)
    """Time that a connection may be idle, on both listeners.  Longer than the 60 s after which
    common balancers (nginx, AWS) give an idle connection up, so that they close it, and never the
    broker under a request that is on its way.  Some keep it longer: Google's for 600 s."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks whose word on their client counts: `X-Forwarded-For`, `Forwarded`, the
    URI that it asked for.  None: a header that anybody can send must not choose whose failed logins
    are throttled."""
    private_network: bool = False
    """Nobody else is on the network of listeners and store, or it encrypts (a mesh).  Off: `check`
    notes secrets that cross it in clear text, because the broker speaks no TLS to its callers."""
    docs: bool = False
    """Serve /openapi.json and /docs.  Off: a sidecar in production needs none; `--dev` has it."""


class AdminSettings(_Section, frozen=True):
    """The admin listener: metrics and probes."""

    listen: str = "127.0.0.1:9464"
    """`HOST:PORT` or `unix:/path`.  Loopback: metrics tell a competitor more than one thinks."""
    secret: Secret | None = None
    """Opens /v1/sessions, at least 16 characters; prefer `secret_file`.  None: those routes, which
    show fingerprints and end sessions, do not exist."""
    secret_file: str | None = None
    """File with that secret; `broker keys generate` makes one."""


class ClientSettings(_Section, frozen=True):
    """Somebody who may ask for tokens."""

    secret: Secret | None = None
    """The client secret, at least 16 characters; prefer `secret_file`."""
    secret_file: str | None = None
    """File with the client secret (one trailing newline is dropped)."""
    next_secret: Secret | None = None
    """A second secret that is as good, while the client is being given it; prefer
    `next_secret_file`.  None: two at once are for the length of a rotation."""
    next_secret_file: str | None = None
    """File with that secret: set it, change the client, then let `secret_file` name it alone."""
    agents: tuple[str, ...] = ()
    """Agents this client may use; `["*"]` for all.  Empty allows none: access is granted."""
    pass_through: bool = False
    """Whether this client may use the routes of `[issuer.upstream] pass_through`, with a key of the
    vendor of its own.  Off: its secret is for tokens."""
    allow_origin_header: bool = False
    """Accept this client's secret together with an `Origin` header, for a proxy that adds the
    secret to browsers' requests.  Off: that pair normally means the secret leaked into a page."""


class KeySettings(_Section, frozen=True):
    """A signing or verifying key."""

    secret: Secret | None = None
    """The key, at least 32 random bytes as text; prefer `secret_file`."""
    secret_file: str | None = None
    """File with the key; `broker keys generate` makes one."""


class LocalIssuerSettings(_Section, frozen=True):
    """Tokens signed here."""

    issuer: str = "embed-token-broker"
    """The claim `iss`."""
    audience: str = "embed"
    """The claim `aud`; a verifier that expects another one refuses the token."""
    keys: Mapping[_Name, KeySettings] = {}
    """Keys by `kid`: one signs, all verify."""
    keys_file: str | None = None
    """Instead of `keys`: a file that `broker keys rotate` writes, with the moment from which each
    key signs.  Not set by default: a key of your own needs no command."""
    signing_key: str = ""
    """The `kid` that signs; may be left out while there is only one key."""


class UpstreamSettings(_Section, frozen=True):
    """Tokens relayed from the vendor, or from anything that speaks its API."""

    base_url: str = "https://api.bithuman.ai"
    """Where the vendor answers; the paths of its calls are added, and taken off where they were
    written.  HTTPS, except on loopback; without user, query or fragment."""
    api_secret: Secret | None = None
    """The vendor key; prefer `api_secret_files`.  The variable BITHUMAN_API_SECRET (or its old name
    BITHUMAN_API_KEY) is used when neither is set."""
    api_secret_files: tuple[str, ...] = ()
    """Files with vendor keys, up to 4.  The first good one is used: to rotate without a gap, put
    the new key in front, then revoke the old one."""
    proxy: Secret | None = None
    """`http://HOST:PORT` or `https://HOST:PORT` of a proxy that calls go through, with user and
    password in front of the host where it asks for them; `direct` goes without one.  Left out, the
    environment's HTTPS_PROXY and NO_PROXY decide, as for other programs.  Shown nowhere."""
    proxy_file: str | None = None
    """File with that address: for one with a password in it."""
    timeout: Duration = _seconds(10)
    """One call, connecting included: within the 12 s of a request, with room for a retry of what
    fails fast."""
    pass_through: tuple[str, ...] = ()
    """Other routes of the vendor, passed on with the caller's key: paths, or `/v1/agent/*` for all
    below one.  None: the broker is there for tokens.  A relay without a configuration has
    `/v1/*` and `/v2/*`: its callers have the vendor's key, and one base URL for all they call."""


class BudgetSettings(_Section, frozen=True):
    """How many mints the vendor is sent: `rate` per `per`, `burst` at once."""

    rate: float = 106
    """Below the vendor's 120: in the worst window the burst comes on top, and two calls for each
    time that this was started again while the vendor stood still (106 + 8 + 3 x 2 = 120)."""
    per: Duration = _seconds(60)
    """The window of `rate`."""
    burst: int = 8
    """Enough for a page with a few visitors in the same second; each one is taken off the rate."""
    window: Annotated[int, Meta(ge=1)] = 120
    """Calls that the vendor takes from one address in a minute: a burst and what refills in it must
    fit, or a relay does not start.  120 is what the vendor documents; another plan or vendor may
    take more.  Nobody counts the tokens of `local`."""
    max_wait: Duration = _seconds(8)
    """Who would wait longer is told so at once: a visitor rather retries than stares."""


class IssuerSettings(_Section, frozen=True):
    """Where tokens come from."""

    kind: Literal["local", "upstream"] = "local"
    """`local` signs here; `upstream` relays from the vendor."""
    local: LocalIssuerSettings = field(default_factory=LocalIssuerSettings)
    """Settings of the local issuer."""
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    """Settings of the relay."""
    budget: BudgetSettings | None = None
    """Pace of mints.  Absent for `local`: a signature costs nobody anything.  `upstream` always has
    one; left out, its defaults hold."""


class ReuseSettings(_Section, frozen=True):
    """How long a token is handed out again."""

    enabled: bool = True
    """Off mints for every request (a vendor would refuse a busy site within a second)."""
    floor: Duration = _seconds(300)
    """No token is handed out with less life left: a call should not end in mid-sentence."""
    floor_in_outage: Duration = _seconds(60)
    """The floor while no new token can be had: a short call is better than none."""
    refresh_ahead: Duration = _seconds(900)
    """From here to expiry the next request renews in the background; renewal costs capacity, so
    this is a quarter of a life and not half."""
    max_tokens: Annotated[int, Meta(ge=1)] = 200_000
    """Tokens held, about 1.5 KB each; beyond it the least recently used one goes."""


class SessionSettings(_Section, frozen=True):
    """What is remembered of tokens that were handed out."""

    max_recorded: Annotated[int, Meta(ge=1)] = 200_000
    """Sessions recorded until they expire, about 0.5 KB each; beyond it the oldest record goes.  As
    many as `[reuse] max_tokens`: what can be handed out again can be found and ended."""


class LimitSettings(_Section, frozen=True):
    """`rate` requests per `per`, up to `burst` at once; refilled continuously."""

    rate: float
    """Tokens per `per`, more than 0; leave a limit out to have none."""
    burst: int
    """At least 1."""
    per: Duration = _seconds(60)
    """The window of `rate`."""
    dry_run: bool = False
    """Decide and count, but never deny: to try a limit on live traffic."""


class AgentOverrideSettings(_Section, frozen=True):
    """What differs for one agent; fields left out are inherited."""

    rate: float | None = None
    """Instead of the limit's rate."""
    per: Duration | None = None
    """Instead of the limit's per."""
    burst: int | None = None
    """Instead of the limit's burst."""
    dry_run: bool | None = None
    """Instead of the limit's dry_run."""


class FingerprintLimitSettings(_Section, frozen=True):
    """Every request of a visitor (client and fingerprint)."""

    rate: float = 60
    """Tokens per `per`: a page that reloads once a second is still served."""
    burst: int = 20
    """A few tabs at once; a script that loops is stopped within its first second."""
    per: Duration = _seconds(60)
    """The window of `rate`."""
    dry_run: bool = False
    """Decide and count, but never deny."""
    overrides: Mapping[str, AgentOverrideSettings] = {}
    """Exceptions by agent id."""


class FingerprintMintsLimitSettings(_Section, frozen=True):
    """Mints started for a visitor: joiners and reuse are free."""

    rate: float = 6
    """Tokens per `per`: a visitor needs one an hour; the rest is for several agents and models."""
    burst: int = 6
    """A page with several avatars; not a generator of tokens."""
    per: Duration = _seconds(60)
    """The window of `rate`."""
    dry_run: bool = False
    """Decide and count, but never deny."""
    overrides: Mapping[str, AgentOverrideSettings] = {}
    """Exceptions by agent id."""


class AgentLimitSettings(_Section, frozen=True):
    """Mints on an agent, over all clients."""

    rate: float = 6000
    """Tokens per `per`: far above a vendor's budget, so that it only stops a runaway agent."""
    burst: int = 1000
    """A launch announcement's first second."""
    per: Duration = _seconds(60)
    """The window of `rate`."""
    dry_run: bool = False
    """Decide and count, but never deny."""
    overrides: Mapping[str, AgentOverrideSettings] = {}
    """Exceptions by agent id."""


class LimitsSettings(_Section, frozen=True):
    """Inbound limits."""

    fingerprint_format: Literal["hex", "any"] = "hex"
    """`hex`: 4 to 128 hex digits, as the vendor documents; constants such as "anonymous", which
    make strangers share a memory, are caught.  `any`: 1 to 256 printable characters."""
    max_tracked: Annotated[int, Meta(ge=1000)] = 1_000_000
    """Buckets kept per limit, about 200 bytes each; beyond it newcomers share overflow buckets."""
    fingerprint: FingerprintLimitSettings = field(default_factory=FingerprintLimitSettings)
    """Every request of a visitor."""
    fingerprint_mints: FingerprintMintsLimitSettings = field(
        default_factory=FingerprintMintsLimitSettings
    )
    """Mints started for a visitor."""
    agent: AgentLimitSettings = field(default_factory=AgentLimitSettings)
    """Mints on an agent."""
    client: LimitSettings | None = None
    """All requests of one client.  Off: a busy backend is one client."""


class StoreSettings(_Section, frozen=True):
    """What requests share, and what survives a restart."""

    url: str = "memory://"
    """`memory://`; `sqlite:///PATH`, a file in which one process keeps its state as it changes; or
    a server that speaks the Redis protocol, version 7 or later: `valkey://HOST:PORT/DB`,
    `valkeys://` (TLS), `unix:///PATH?db=N`, `valkey+cluster://H:P,H:P`; `redis` and `rediss` are
    the same.  Memory: no file appears that nobody asked for; a crash mints anew for every visitor,
    so a relay without a configuration keeps a file."""
    username: str = ""
    """The server's ACL user; empty for its default user."""
    password: Secret | None = None
    """The server's password; prefer `password_file`.  Not in the URL: URLs are shown."""
    password_file: str | None = None
    """File with that password."""
    tls_ca_file: str | None = None
    """Certificates that a TLS server may be signed with.  Left out, the system's."""
    tls_cert_file: str | None = None
    """This broker's own certificate, for a server that asks for one.  Off: servers that know users
    by password need none."""
    tls_key_file: str | None = None
    """Its key, without a passphrase; left out if it is in the same file."""
    timeout: Duration = Duration(50_000)
    """What a request waits for the server; then it goes on as `on_error` says.  50 ms: a server
    nearby takes a hundredth of it, and a visitor does not notice it."""
    on_error: Literal["local", "closed"] = "local"
    """While the server is away: `local` goes on with this process' share of every limit and of the
    budget, `closed` refuses with 503.  Local: the site stays up, and in the long run no limit is
    exceeded; at the moment of the loss a visitor may have up to one burst more."""
    replicas: Literal["auto"] | Annotated[int, Meta(ge=1)] = "auto"
    """By how many the share is divided; `auto`: how many were seen at the server last.  An instance
    that has not seen it yet takes a part in 32 of the budget, because it cannot know of others; one
    process more than a number that is set here has no share."""
    encryption_key: Secret | None = None
    """Seals what is stored, at least 32 random bytes as text; prefer `encryption_key_file`."""
    encryption_key_file: str | None = None
    """File with that key; required with a shared store.  A state file needs none: each of the
    issuer's keys opens it; where this is set, this alone does."""


class LogSettings(_Section, frozen=True):
    """What is written to standard error."""

    format: Literal["auto", "json", "console"] = "auto"
    """`json` for machines, `console` for people; `auto` is `console` where standard error is a
    terminal, because somebody reads it there, and `json` everywhere else."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` writes mints and failures; reuse, which is most of the traffic, needs `debug`."""


class Settings(_Section, frozen=True):
    """The whole tree."""

    server: ServerSettings = field(default_factory=ServerSettings)
    """The data listener."""
    admin: AdminSettings = field(default_factory=AdminSettings)
    """The admin listener."""
    clients: Mapping[_Name, ClientSettings] = {}
    """Who may ask, by name; the name appears in logs."""
    issuer: IssuerSettings = field(default_factory=IssuerSettings)
    """Where tokens come from."""
    reuse: ReuseSettings = field(default_factory=ReuseSettings)
    """How long a token is handed out again."""
    sessions: SessionSettings = field(default_factory=SessionSettings)
    """What is remembered of tokens that were handed out."""
    limits: LimitsSettings = field(default_factory=LimitsSettings)
    """Inbound limits."""
    store: StoreSettings = field(default_factory=StoreSettings)
    """What requests share."""
    log: LogSettings = field(default_factory=LogSettings)
    """What is written."""
