"""The vendor's other routes, put together from the settings."""

from collections.abc import Mapping

from broker.app import credentials
from broker.config.settings import Settings
from broker.issuers.local import LocalIssuer
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.passing import PassThroughClient
from broker.model import Clock
from broker.telemetry.pass_through_metrics import PassThroughMetrics
from broker.web.auth import ClientAuthenticator
from broker.web.pass_through import Access, PassThrough
from broker.web.router import Routes


def add(
    settings: Settings,
    environ: Mapping[str, str],
    routes: Routes,
    authenticator: ClientAuthenticator,
    issuer: LocalIssuer | UpstreamIssuer,
    metrics: PassThroughMetrics,
    clock: Clock,
) -> PassThroughClient | None:
    """Have those routes passed on that the settings name; returns what does it, to be closed.

    Raises ConfigError.
    """
    upstream = settings.issuer.upstream
    if not upstream.pass_through or not isinstance(issuer, UpstreamIssuer):
        return None
    client = PassThroughClient(upstream.base_url, credentials.vendor_proxy(settings, environ))
    access = Access(upstream.pass_through, needs_switch=bool(settings.clients))
    routes.use_elsewhere(PassThrough(routes, access, authenticator, client, issuer, metrics, clock))
    return client
