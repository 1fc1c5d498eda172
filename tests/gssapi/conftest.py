"""Servers that ask for Kerberos, and clients that have a ticket."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Callable, Iterator, Type

import pytest

from ..kerberos import Realm


@pytest.fixture
def new_server(kerberos: Realm, start_server: Any) -> Callable[..., Any]:
    """A server that asks for Kerberos: ``new_server(levels=, nec=, allow=, handler=, **settings)``."""
    from socks5srv.gssapi.handler import Gssapi, GssapiHandler

    def make(levels: Any = (1, 2), nec: bool = False, allow: Any = (), handler: Type[Any] = GssapiHandler, **settings: Any) -> Any:
        gssapi = Gssapi(str(kerberos.keytab), levels=levels, nec=nec, allow=allow)
        return start_server(handler, gssapi=gssapi, **settings)

    return make


@pytest.fixture
def new_kerberos(kerberos: Realm) -> Iterator[Callable[..., Any]]:  # noqa: ARG001
    """A `KerberosClient` that is connected: ``new_kerberos(server, initiator)``."""
    from .harness import KerberosClient

    with ExitStack() as stack:
        yield lambda to, *arguments: stack.enter_context(KerberosClient(getattr(to, "server_address", to), *arguments))
