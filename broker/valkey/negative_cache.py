"""Refusals that all replicas remember: what one was told, no other needs to ask.

The server's word counts, so that a success anywhere puts it right everywhere at once.  What is said
of an account holds for those who have its keys: brokers of several accounts may have one address,
and so one budget and one server.  While the server is away each replica goes by what it was told.
"""

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.issuers.negative_cache import (
    ACCOUNT_MEMORY,
    AGENT_MEMORY,
    LocalNegativeCache,
    NegativeCache,
)
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import Secret, TokenRequest
from broker.valkey import mint_errors
from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.scripts import command
from broker.valkey.client.shapes import COUNTED, GET, SET
from broker.valkey.key_names import Names


class _Said(Struct, frozen=True, array_like=True):
    status: mint_errors.Status
    code: mint_errors.Code
    message: mint_errors.Message
    scope: Scope


_decoder = msgspec.json.Decoder(_Said)


class SharedNegativeCache(NegativeCache):
    """A memory on the server, beside the process' own."""

    def __init__(self, server: StoreClient, names: Names, local: LocalNegativeCache) -> None:
        self._server = server
        self._names = names
        self._local = local
        self._account = names.account(())

    @override
    async def find(self, request: TokenRequest) -> Refused | None:
        try:
            account, agent = await asyncio.gather(
                self._said(self._account), self._said(self._names.refused(request))
            )
        except StoreFailed:
            return self._local.here(request)
        return account or agent

    @override
    def remember(self, request: TokenRequest, refused: Refused) -> None:
        self._local.remember(request, refused)
        said = _Said(refused.status, refused.code, refused.message, refused.scope)  # type: ignore[arg-type]  # the vendor's passed its own table
        match refused.scope:
            case Scope.ACCOUNT:
                self._tell(self._account, said, ACCOUNT_MEMORY)
            case Scope.AGENT_MODEL:
                self._tell(self._names.refused(request), said, AGENT_MEMORY)
            case Scope.NEVER:
                pass

    @override
    def forget(self, request: TokenRequest) -> None:
        self._local.forget(request)
        for key in (self._account, self._names.refused(request)):
            self._server.tell(Operation.REFUSAL, key, command(b"DEL", key), COUNTED)

    @override
    def use_keys(self, keys: Sequence[Secret]) -> None:
        """What was said of another account stays, for replicas that have its keys still."""
        self._local.use_keys(keys)
        self._account = self._names.account(keys)

    async def _said(self, key: bytes) -> Refused | None:
        reply = await self._server.command(Operation.REFUSAL, key, command(b"GET", key), GET)
        if not isinstance(reply, bytes):
            return None
        try:
            said = _decoder.decode(reply)
            message = mint_errors.printable(said.message)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None  # of another version, or not a broker's
        return Refused(said.status, said.code, message, said.scope)

    def _tell(self, key: bytes, said: _Said, seconds: int) -> None:
        packed = command(b"SET", key, msgspec.json.encode(said), b"PX", b"%d" % (seconds * 1000))
        self._server.tell(Operation.REFUSAL, key, packed, SET)
