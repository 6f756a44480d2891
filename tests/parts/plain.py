"""httpx for servers that have no certificate: its calls make a context for TLS each, 12 ms of CPU.

Each call is a connection of its own all the same.
"""

from functools import partial

import httpx

_NO_TLS = httpx.create_ssl_context(verify=False)

get = partial(httpx.get, verify=_NO_TLS)
head = partial(httpx.head, verify=_NO_TLS)
post = partial(httpx.post, verify=_NO_TLS)
request = partial(httpx.request, verify=_NO_TLS)
