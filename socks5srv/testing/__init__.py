"""
For test suites: a SOCKS5 server in the background that says what it was used for, and goes wrong on demand.

    import socks5srv.testing

    with socks5srv.testing.start(hosts={"api.example.com": "127.0.0.1"}) as proxy:
        requests.get("http://api.example.com:8000/", proxies=proxy.proxies)
        proxy.assert_used(host="api.example.com", times=1)

proxy.py has `start()` and `Proxy`; faults.py what can go wrong; targets.py servers to talk to behind
the proxy; pytest_plugin.py the fixtures.  Nothing but the standard library is needed, pytest only
for the last one.  The rest of the package knows nothing of this room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .proxy import Proxy, start

__all__ = ["Proxy", "start"]


def __getattr__(name: str) -> Any:
    # Imported when first used: pytest loads this package, for its plugin, in every run.
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(".proxy", __name__), name)
    if name in ("faults", "targets"):
        return import_module("." + name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
