"""`explained()` under its former name, for one release: ``server.observers += (Tracer(server),)`` does the same."""

from ..explain.tracer import explained

__all__ = ["explained"]
