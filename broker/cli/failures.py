"""What became of a question to a broker, in words: what failed, and what to do about it.

Knows the exceptions of Python only, so that a probe loads no HTTP library: whoever uses one gives
those that mean the same.
"""

import errno
import socket
import ssl
from http.client import HTTPException, InvalidURL

from broker.config.settings import Duration
from broker.units import SECOND

_REFUSED = {
    errno.ECONNREFUSED: "nobody listens at {url}: is the broker running{and_where}?",
    errno.ENOENT: "nobody listens at {url}: there is no such socket; is the broker running"
    "{and_where}?",
    errno.EACCES: "no permission to use {url}: the socket is for its owner and group (mode 0660)",
}
"""By what the system says of a connection."""

_NO_TLS = "WRONG_VERSION_NUMBER"
"""What OpenSSL calls an answer that is not TLS."""


def explained(url: str, error: Exception, timeout: float, *, where: str = "") -> str:
    """Say why there is no answer from `url`; `timeout` (seconds) is how long it was waited for.

    `where` is the setting that holds the address, if one does.
    """
    is_it = f"is this its {where}?" if where else "is it the broker's address?"
    match error:
        case TimeoutError():
            span = Duration(round(timeout * SECOND))
            told = f"no answer from {url} within {span}: {is_it}"
        case UnicodeDecodeError():
            told = f"{url} answers, but not in JSON: {is_it}"
        case socket.gaierror() | UnicodeError():
            told = f"the name in {url} is not known (DNS): check its spelling and the resolver"
        case ssl.SSLError():
            told = _tls(url, error)
        case InvalidURL():
            told = f"{url} is no address of a broker: write http://HOST:PORT or unix:/path"
        case ConnectionResetError() | BrokenPipeError():
            told = f"{url} closed the connection before its answer was whole: look at its log"
        case HTTPException():
            told = f"{url} answers, but not in HTTP: {is_it}"
        case OSError():
            text = _REFUSED.get(error.errno or 0, "no way to {url}: {reason}")
            reason = error.strerror or type(error).__name__
            and_where = f", and {is_it.removesuffix('?')}" if where else ""
            told = text.format(url=url, reason=reason, and_where=and_where)
        case ValueError():
            told = f"{url} answers, but not in JSON: {is_it}"
        case _:
            told = f"no answer from {url}: {type(error).__name__}"
    return told


def _tls(url: str, error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"TLS: the certificate of {url} is not trusted ({error.verify_message}): use the name"
            " that is in it, or set SSL_CERT_FILE to its authority"
        )
    if _NO_TLS in str(error):
        return f"TLS: {url} does not speak it: write http://, or the address of the proxy that does"
    return f"TLS: {url} and this program do not agree: {error.reason or 'error'}"
