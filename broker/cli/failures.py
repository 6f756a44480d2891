"""What became of a question to a broker, in words: what failed, and what to do about it."""

import errno
import ssl

import aiohttp

from broker.config.settings import Duration
from broker.units import SECOND

_REFUSED = {
    errno.ECONNREFUSED: "nobody listens at {url}: is the broker running?",
    errno.ENOENT: "nobody listens at {url}: there is no such socket; is the broker running?",
    errno.EACCES: "no permission to use {url}: the socket is for its owner and group (mode 0660)",
}
"""By what the system says of a connection."""

_NO_TLS = "WRONG_VERSION_NUMBER"
"""What OpenSSL calls an answer that is not TLS."""


def explained(url: str, error: Exception, timeout: float) -> str:
    """Say why there is no answer from `url`; `timeout` (seconds) is how long it was waited for."""
    match error:
        case TimeoutError():
            span = Duration(round(timeout * SECOND))
            told = f"no answer from {url} within {span}: is it the broker's address?"
        case aiohttp.ClientConnectorDNSError():
            told = f"the name in {url} is not known (DNS): check its spelling and the resolver"
        case aiohttp.ClientSSLError() | aiohttp.ClientConnectorCertificateError():
            told = _tls(url, error)
        case aiohttp.ClientConnectorError():
            text = _REFUSED.get(error.os_error.errno or 0, "no way to {url}: {reason}")
            told = text.format(url=url, reason=error.os_error.strerror)
        case aiohttp.InvalidURL():
            told = f"{url} is no address of a broker: write http://HOST:PORT or unix:/path"
        case aiohttp.ClientResponseError():
            told = f"{url} answers, but not in HTTP: is it the broker's address?"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | OSError():
            told = f"{url} closed the connection before its answer was whole: look at its log"
        case ValueError():
            told = f"{url} answers, but not in JSON: is it the broker's address?"
        case _:
            told = f"no answer from {url}: {type(error).__name__}"
    return told


def _tls(url: str, error: Exception) -> str:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"TLS: the certificate of {url} is not trusted ({cause.verify_message}): use the name"
            " that is in it, or set SSL_CERT_FILE to its authority"
        )
    if _NO_TLS in str(cause):
        return f"TLS: {url} does not speak it: write http://, or the address of the proxy that does"
    return f"TLS: {url} and this program do not agree: {getattr(cause, 'reason', None) or 'error'}"
