"""embed.js as it is served: small, compressed, pinned; the only thing that any origin may load."""

import base64
import gzip
import hashlib
import json
import re

import pytest
from edge import Edge, Reply, request

from broker.cli import mint
from broker.web.pages.embed_script import FOLDER

SCRIPT = (FOLDER / "embed.js").read_bytes()


async def asked(edge: Edge, path: str, encoding: str = "", method: str = "GET") -> Reply:
    """Ask for a file, as somebody who takes these content codings."""
    headers = [("Accept-Encoding", encoding)] if encoding else []
    return await edge.raw(request(method, path, headers), bodyless=method == "HEAD")


def test_it_is_five_kilobytes_at_most() -> None:
    """5 KiB as any server compresses it, comments included."""
    assert len(gzip.compress(SCRIPT, 9, mtime=0)) <= 5 * 1024


def test_it_opens_the_frames_that_the_command_line_prints() -> None:
    """The same viewer, the same permissions."""
    text = SCRIPT.decode()
    assert f'"{mint.EMBED_ORIGIN}"' in text
    allow = re.search(r'const ALLOW = "([^"]+)"', text)
    assert allow is not None
    assert f'allow="{allow[1]}"' in mint.iframe("A1", "T")


def test_it_makes_nothing_from_text() -> None:
    """No sink of Trusted Types, and no style element: a policy need not allow any."""
    sinks = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "srcdoc")
    sinks += ("Function(", "setAttribute", "createContextualFragment", "javascript:", '"style"')
    text = SCRIPT.decode()
    assert [sink for sink in sinks if sink in text] == []


async def test_it_is_served_to_pages_of_any_origin_and_kept_for_five_minutes(edge: Edge) -> None:
    """Every header: public, nothing of anybody, so it may be cached and shared."""
    reply = await asked(edge, "/embed.js")
    assert reply.body == SCRIPT
    assert [name for name, _ in reply.headers] == [
        "Content-Type",
        "Content-Length",
        "Cache-Control",
        "X-Content-Type-Options",
        "Date",
        "X-Request-Id",
        "Access-Control-Allow-Origin",
        "Cross-Origin-Resource-Policy",
        "Vary",
    ]
    assert reply.header("Content-Type") == "text/javascript; charset=utf-8"
    assert reply.header("Cache-Control") == "public, max-age=300"
    assert reply.header("Access-Control-Allow-Origin") == "*"
    assert reply.header("Cross-Origin-Resource-Policy") == "cross-origin"
    assert reply.header("Vary") == "Accept-Encoding"


async def test_what_embed_json_names_is_this_script_for_ever(edge: Edge) -> None:
    """The address holds the digest of its content, and `integrity` is what a browser computes."""
    pinned = (await asked(edge, "/embed.json")).json
    assert set(pinned) == {"version", "src", "integrity"}
    reply = await asked(edge, pinned["src"])
    assert reply.body == SCRIPT
    assert reply.header("Cache-Control") == "public, max-age=31536000, immutable"
    assert reply.header("Access-Control-Allow-Origin") == "*"
    digest = base64.b64encode(hashlib.sha384(reply.body).digest()).decode()
    assert pinned["integrity"] == f"sha384-{digest}"
    assert hashlib.sha256(SCRIPT).hexdigest()[:16] in pinned["src"]


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("", False),
        ("gzip", True),
        ("br, gzip;q=0.8", True),
        ("gzip, deflate, br, zstd", True),
        ("br", False),
        ("gzip;q=0", False),
        ("gzip;q=0.0, br", False),
        ("x-gzipped", False),
    ],
)
async def test_it_is_compressed_for_those_who_take_it(
    edge: Edge, encoding: str, packed: bool
) -> None:
    """RFC 9110 section 12.5.3."""
    reply = await asked(edge, "/embed.js", encoding)
    assert reply.header("Content-Encoding") == ("gzip" if packed else None)
    assert (gzip.decompress(reply.body) if packed else reply.body) == SCRIPT


async def test_heads_and_queries_are_answered(edge: Edge) -> None:
    """A cache asks with HEAD, a page adds `?v=2`."""
    head = await asked(edge, "/embed.js", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert (await asked(edge, "/embed.js?v=2")).body == SCRIPT
    assert (await asked(edge, "/embed.js", method="POST")).status == 405


async def test_its_types_are_beside_it(edge: Edge) -> None:
    """As text: an editor's matter, not a browser's."""
    reply = await asked(edge, "/embed.d.ts")
    assert reply.body == (FOLDER / "embed.d.ts").read_bytes()
    assert reply.header("Content-Type") == "text/plain; charset=utf-8"


async def test_nothing_else_may_be_cached_or_used_by_another_origin(edge: Edge) -> None:
    """The exception is for files that are the same for everybody, and for no other answer."""
    others = [
        await asked(edge, "/embed.json"),
        await asked(edge, "/livez"),
        await asked(edge, "/embed.0000000000000000.js"),
        await edge.request_token("beefbeef"),
        await edge.raw(request("OPTIONS", "/v1/embed-tokens/request", [("Origin", "http://x")])),
    ]
    for reply in others:
        assert reply.header("Cache-Control") == "no-store"
        assert not [name for name, _ in reply.headers if name.startswith("Access-Control")]
    assert json.loads(others[3].body)["success"] is True
