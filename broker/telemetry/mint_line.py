"""The line of a minted token: the one that a broker writes for each of many requests.

It is written to the letter as structlog's chain and `logs` would write it, which a test holds the
two to, in a third of the time: its keys, their order and the types of its values never change, and
most values need no escape.  Whatever is not so goes the ordinary way, as does every line where the
log is not JSON, or is read by somebody else (a test's capture).
"""

from functools import lru_cache

import msgspec
import structlog

from broker.telemetry.logs import Stamp, json_lines

_text_of = lru_cache(maxsize=1024)(repr)
"""Of a duration, in whole microseconds: under load there are some hundred, at 1.5 us each."""

_encode = msgspec.json.Encoder().encode

_DELETE = "\x7f"
"""The only sign of ASCII that msgspec writes as it is and `logs` does not."""


class MintLine:
    """Writes the event `broker.embed_token` at level info."""

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind()
        self._stamp = Stamp()
        self._lines = json_lines()

    def write(
        self,
        outcome: str,
        *,
        request_id: str,
        client: str,
        agent: str,
        visitor: str,
        session: str,
        token: str,
        left_s: int,
        duration_ms: float,
    ) -> None:
        """Write it; the values are those of the line."""
        lines = self._lines
        texts = f"{outcome}{request_id}{client}{agent}{visitor}{session}{token}"
        if lines is None or not lines.is_in_use or not _is_plain(texts):
            self._log.info(
                "broker.embed_token",
                outcome=outcome,
                request_id=request_id,
                client=client,
                agent=agent,
                visitor=visitor,
                session=session,
                token=token,
                left_s=left_s,
                duration_ms=duration_ms,
            )
        elif lines.tells_info:
            lines.write(
                f'{{"event": "broker.embed_token", "outcome": "{outcome}",'
                f' "request_id": "{request_id}", "client": "{client}", "agent": "{agent}",'
                f' "visitor": "{visitor}", "session": "{session}", "token": "{token}",'
                f' "left_s": {left_s}, "duration_ms": {_text_of(duration_ms)}, "level": "info",'
                f' "timestamp": "{self._stamp.now()}"}}\n'
            )


def _is_plain(text: str) -> bool:
    """Whether JSON writes this as it is: in ASCII, and no longer than it is."""
    return text.isascii() and len(_encode(text)) == len(text) + 2 and _DELETE not in text
