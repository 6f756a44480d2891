"""Values of metric labels that code elsewhere names, too."""

from enum import Enum


class BackgroundTask(Enum):
    """What runs beside the requests: label of `broker_background_restarts_total`."""

    __hash__ = object.__hash__  # Enum's own is Python code

    HOUSEKEEPING = "housekeeping"
    """Expiry and gauges; the supervisor's, too."""
    BEAT = "beat"
    """A worker's sign of life to its supervisor."""
    PACING = "pacing"
    """The queue for the vendor's budget."""
    SHARE = "share"
    """The look-out for when this process' own share of the vendor's budget begins and ends."""
    HEARTBEATS = "heartbeats"
    """The sign of life to the other members of a fleet."""
    LEASES = "leases"
    """The renewal of leases for mints that take long."""
    RECORDS = "records"
    """The writing of sessions that the store could not take."""
    SUBSCRIPTION = "subscription"
    """What other members of a fleet publish."""
    WATCHED_FILES = "watched_files"
    """The look at files whose change means a reload."""
    RELOADS = "reloads"
    """The supervisor's reloads, one worker after the other."""
    WORKERS = "workers"
    """The replacement of workers that end."""
    WORKER_WATCH = "worker_watch"
    """The look at workers' signs of life."""
    ORDERS = "orders"
    """What a supervisor says to its worker."""


class Reason(Enum):
    """What went wrong between us and the vendor; the label of `broker_upstream_errors_total`.

    Down to EXPIRED it is read from an answer; TIMEOUT to PROXY_REFUSED are the client's to report,
    because there was no answer; the last three are verdicts, counted here beside the accidents.
    """

    STATUS_5XX = "status_5xx"
    """The vendor, or the edge in front of it, is unwell."""
    UNEXPECTED_STATUS = "unexpected_status"
    """A status that no mint call has, or a 4xx whose meaning nobody knows."""
    REDIRECT = "redirect"
    """3xx: never followed, because the key would go along."""
    EDGE_403 = "edge_403"
    """A 403 without the vendor's envelope: its edge did not like us."""
    NOT_JSON = "not_json"
    """HTML, text, nothing, or JSON that breaks off."""
    NO_TOKEN = "no_token"  # noqa: S105 - a label
    """A 200 without a usable token and without a failure that we know."""
    TOO_LARGE = "too_large"
    """A body beyond the bound, or an answer that is mostly frame."""
    HEADERS_TOO_LARGE = "headers_too_large"
    """A header, the headers in all, or interim answers before them, beyond the bound."""
    ENCODED = "encoded"
    """A compressed body, which we did not ask for and do not unpack."""
    EXPIRED = "expired"
    """A token with no life left on arrival."""
    TIMEOUT = "timeout"
    """No complete answer in time."""
    CONNECT = "connect"
    """No connection."""
    DNS = "dns"
    """No address for the vendor's name."""
    TLS = "tls"
    """No trust: the handshake or the certificate failed."""
    RESET = "reset"
    """The connection broke before the answer was complete."""
    PROXY_CONNECT = "proxy_connect"
    """No connection to the egress proxy, or no address for its name."""
    PROXY_AUTH = "proxy_auth"
    """The egress proxy wants to know who we are, or does not believe it: its 407."""
    PROXY_REFUSED = "proxy_refused"
    """The egress proxy opened no tunnel: its 502, or any other answer."""
    RATE_LIMITED = "rate_limited"
    """Too many calls."""
    BAD_KEY = "bad_key"
    """The key is not a good one, or no longer."""
    REFUSED = "refused"
    """The vendor's verdict on account, agent, model or request."""


class PassedOutcome(Enum):
    """How a request for another route of the vendor ended: label of `broker_pass_through_...`."""

    __hash__ = object.__hash__

    OK = "2xx"
    """The vendor's answer, by the class of its status, like the next three."""
    REDIRECT = "3xx"
    CALLER_ERROR = "4xx"
    SERVER_ERROR = "5xx"
    REFUSED = "refused"
    """By the broker: nothing reached the vendor, or not all of it."""
    FAILED = "failed"
    """The vendor gave no answer."""
    BROKEN = "broken"
    """Its answer ended before its end; the caller's connection was cut."""
    LEFT = "left"
    """The caller went away."""


class FileError(Enum):
    """How a state file fails; the label of `broker_state_file_errors_total`."""

    __hash__ = object.__hash__

    FULL = "full"
    """No room on the disk."""
    READONLY = "readonly"
    """Nothing can be written."""
    IO = "io"
    """The disk, or what is between, failed."""
    CORRUPT = "corrupt"
    """What is in the file is not what was written."""
    OTHER = "other"
    """Anything else, such as another program that locks it, or no memory to read it."""
