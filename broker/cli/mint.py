"""`broker mint`: one token from the command line, signed here or asked of a running broker."""

import argparse
import os
from typing import TYPE_CHECKING

from broker.cli.base import NOTHING_CONFIGURED, Commands, signing_settings_of
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_NO, EX_OK, EX_UNAVAILABLE, EX_USAGE
from broker.model import TokenRequest
from broker.telemetry.streams import complain, tell

if TYPE_CHECKING:
    from broker.pacing.slots import Slot

EMBED_ORIGIN = "https://www.bithuman.ai"
"""Where the vendor serves the viewer; it redirects to its present host by itself."""

TIMEOUT = 15.0
"""Seconds; longer than the broker's own deadline, so that its answer is seen."""


class CannotMint(Exception):
    """No token was made; the message says why and what to do."""


class Misused(CannotMint):
    """What was asked for cannot be."""


class Refused(CannotMint):
    """The broker at `--url` will not give it."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "mint",
        "make one token, signed here or asked of a broker",
        run,
        example="A78WKV4515 --fingerprint 9f86d081884c7d65 --url http://127.0.0.1:8080",
        codes={
            EX_NO: "the broker refused",
            EX_USAGE: "wrong usage; an agent, fingerprint or URL that cannot be",
            EX_UNAVAILABLE: "no answer that can be used, or a 5xx",
        },
    )
    parser.add_argument("agent", metavar="AGENT", help="the avatar, such as A78WKV4515")
    parser.add_argument(
        "--fingerprint", required=True, metavar="F", help="hex string of the visitor's device"
    )
    parser.add_argument(
        "--url",
        metavar="U",
        help="ask this broker, http(s)://HOST:PORT or unix:/path; the client secret is read from"
        " BROKER_API_SECRET",
    )
    parser.add_argument(
        "--iframe", action="store_true", help="print the iframe instead of the token"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a token, or the HTML that shows the avatar."""
    try:
        if arguments.url:
            secret = os.environ.get("BROKER_API_SECRET", "")
            token = request_token(arguments.url, secret, arguments.agent, arguments.fingerprint)
        else:
            token = sign(_settings(arguments), arguments.agent, arguments.fingerprint)
    except CannotMint as error:
        complain(f"broker: {error}")
        match error:
            case Misused():
                return EX_USAGE
            case Refused():
                return EX_NO
            case _:
                return EX_UNAVAILABLE
    tell(iframe(arguments.agent, token) if arguments.iframe else token)
    return EX_OK


def _settings(arguments: argparse.Namespace) -> Settings:
    try:
        return signing_settings_of(arguments, "ask the running broker with --url")
    except ConfigError as error:
        if str(error) != NOTHING_CONFIGURED:
            raise
        raise ConfigError(f"{error}; with --url a running broker is asked") from None


def sign(settings: Settings, agent: str, fingerprint: str) -> str:
    """Return a token signed with the configured keys."""
    import asyncio

    from broker.app import credentials
    from broker.clock import SystemClock
    from broker.issuers.local import LocalIssuer
    from broker.pacing.slots import UNCOUNTED

    local = settings.issuer.local
    issuer = LocalIssuer(credentials.keyring(settings), local.issuer, local.audience, SystemClock())

    async def at_once() -> "Slot":
        """The command line has no budget: a person mints one token."""
        return UNCOUNTED

    return asyncio.run(issuer.mint(_checked(settings, agent, fingerprint), at_once)).token


def _checked(settings: Settings, agent: str, fingerprint: str) -> TokenRequest:
    """Hold the command line to the rules of the wire."""
    import json

    from broker.errors import BrokerError
    from broker.wire import request as wire

    body = json.dumps({"agent_id": agent, "fingerprint": fingerprint}).encode()
    any_fingerprint = settings.limits.fingerprint_format == "any"
    try:
        return wire.parse(body, "cli", any_fingerprint=any_fingerprint)
    except BrokerError as error:
        raise Misused(error.message) from None


def request_token(url: str, secret: str, agent: str, fingerprint: str) -> str:
    """Return a token from the broker at `url`; raises CannotMint, ConfigError without a secret."""
    import asyncio

    if not url.startswith(("http://", "https://", "unix:/")):
        raise Misused("--url must start with http:// or https://, or be unix:/path/of/a/socket")
    if not secret:
        raise ConfigError("BROKER_API_SECRET is not set: it must hold the client secret")
    return asyncio.run(_request_token(url, secret, {"agent_id": agent, "fingerprint": fingerprint}))


def _plain(error: Exception) -> Exception:
    """Return Python's own exception for one of aiohttp's."""
    import socket
    from http.client import HTTPException, InvalidURL

    import aiohttp

    same = error
    match error:
        case TimeoutError():
            pass
        case aiohttp.ClientConnectorDNSError():
            same = socket.gaierror()
        case aiohttp.ClientConnectorCertificateError():
            same = error.certificate_error
        case aiohttp.ClientConnectorError():
            same = error.os_error
        case aiohttp.InvalidURL():
            same = InvalidURL()
        case aiohttp.ClientResponseError():
            same = HTTPException()
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            same = ConnectionResetError()
        case aiohttp.ClientOSError():
            same = OSError(*error.args)  # which Python makes the one of its number
        case _:
            pass
    return same


async def _request_token(url: str, secret: str, body: dict[str, str]) -> str:
    from http import HTTPStatus

    import aiohttp

    from broker.cli.failures import explained
    from broker.issuers.vendor.token import is_token

    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    path = url.removeprefix("unix:") if url.startswith("unix:") else None
    base = "http://broker" if path else url.rstrip("/")
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, connector=aiohttp.UnixConnector(path) if path else None
            ) as session,
            session.post(
                f"{base}/v1/embed-tokens/request",
                json=body,
                headers={"api-secret": secret},
                allow_redirects=False,
            ) as response,
        ):
            answer = await response.json(content_type=None)
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a time-out is an OSError, too
        raise CannotMint(explained(url, _plain(error), TIMEOUT)) from error
    answer = answer if isinstance(answer, dict) else {}
    data = answer.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("token"), str):
        detail = answer.get("error")
        reason = str(detail.get("message") if isinstance(detail, dict) else response.status)
        kind = Refused if response.status < HTTPStatus.INTERNAL_SERVER_ERROR else CannotMint
        raise kind(f"{url} refused: {reason}")
    if not is_token(data["token"]):
        raise CannotMint(f"{url} answered something else than a token")
    return str(data["token"])


def iframe(agent: str, token: str) -> str:
    """Return the HTML that shows the avatar.

    The stars in `allow` are needed: the viewer is reached through redirects to other origins, and
    without them the microphone stays silent.
    """
    import html
    from urllib.parse import quote

    source = f"{EMBED_ORIGIN}/embed/{quote(agent, safe='')}?token={quote(token, safe='')}"
    return (
        f'<iframe src="{html.escape(source)}" title="Talking avatar"'
        ' allow="microphone *; camera *; autoplay *" referrerpolicy="no-referrer"'
        ' style="border: 0; width: 100%; height: 600px"></iframe>'
    )
