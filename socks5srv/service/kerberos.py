"""
What ``--gssapi`` needs, and nobody else: this is imported for it alone, and with it the package ``gssapi``.
"""

from __future__ import annotations

from typing import Type

from ..gssapi.handler import Gssapi, GssapiHandler
from ..upstream import UpstreamHandler
from .settings import Settings


class GssapiUpstreamHandler(GssapiHandler, UpstreamHandler):
    """Clients log in by Kerberos, and everything goes through another proxy: what the two are, each by itself."""


def handler_class(settings: Settings) -> Type[GssapiHandler]:
    return GssapiHandler if settings.upstream is None else GssapiUpstreamHandler


def gssapi(settings: Settings) -> Gssapi:
    """What they ask for.  GssapiError if the keytab has no keys."""
    return Gssapi(settings.keytab, levels=settings.gssapi_levels, nec=settings.gssapi_nec, allow=settings.gssapi_allow)
