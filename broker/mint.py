"""One token from the command line: signed here, or asked of a running broker."""

import asyncio
import html
from urllib.parse import quote

import aiohttp

from broker import parts
from broker.clock import SystemClock
from broker.issuers.local import LocalIssuer
from broker.model import Ask
from broker.settings import Settings

EMBED_ORIGIN = "https://www.bithuman.ai"
"""Where the vendor serves the viewer; it redirects to its present host by itself."""

TIMEOUT = 15.0
"""Seconds; longer than the broker's own deadline, so that its answer is seen."""


class CannotMint(Exception):  # noqa: N818 - reads as what it is
    """No token was made; the message says why and what to do."""


def sign(settings: Settings, agent: str, fingerprint: str) -> str:
    """Return a token signed with the configured keys."""
    local = settings.issuer.local
    issuer = LocalIssuer(parts.keyring(settings), local.issuer, local.audience, SystemClock())

    async def at_once() -> None:
        """The command line has no budget: a person mints one token."""

    return asyncio.run(issuer.mint(Ask("cli", agent, fingerprint), at_once)).token


def ask(url: str, secret: str, agent: str, fingerprint: str) -> str:
    """Return a token from the broker at `url`; raises CannotMint."""
    if not secret:
        raise CannotMint("BROKER_API_SECRET is not set: it must hold the client secret")
    return asyncio.run(_ask(url, secret, {"agent_id": agent, "fingerprint": fingerprint}))


async def _ask(url: str, secret: str, body: dict[str, str]) -> str:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                f"{url.rstrip('/')}/v1/embed-tokens/request",
                json=body,
                headers={"api-secret": secret},
                allow_redirects=False,
            ) as response,
        ):
            answer = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise CannotMint(f"no answer from {url}: {type(error).__name__}") from error
    if not isinstance(answer, dict) or not answer.get("success"):
        detail = answer.get("error") if isinstance(answer, dict) else None
        raise CannotMint(
            f"{url} refused: {detail.get('message') if isinstance(detail, dict) else response.status}"
        )
    return str(answer["data"]["token"])


def iframe(agent: str, token: str) -> str:
    """Return the HTML that shows the avatar.

    The stars in `allow` are needed: the viewer is reached through redirects to other origins, and
    without them the microphone stays silent.
    """
    source = f"{EMBED_ORIGIN}/embed/{quote(agent, safe='')}?token={quote(token, safe='')}"
    return (
        f'<iframe src="{html.escape(source)}" title="Talking avatar"'
        ' allow="microphone *; camera *; autoplay *" referrerpolicy="no-referrer"'
        ' style="border: 0; width: 100%; height: 600px"></iframe>'
    )
