"""
What the two classes show to those who call and override them: the settings by name, no open proxy by accident, and
what help() tells.
"""

from __future__ import annotations

import inspect
import pydoc
import re
import socketserver
from typing import Any, Dict, Set, Type

import pytest

from socks5srv import Socks5Handler, Socks5Server
from socks5srv.observer import Observer
from socks5srv.rules import Rules
from socks5srv.server import is_setting, listening_socket
from socks5srv.users import Users
from tests.conftest import LOCALHOST, eventually, handler_with, needs_ipv6

# --- the settings ---

def test_settings_are_passed_by_name_or_are_attributes_of_a_subclass() -> None:
    attributes = {"users": {"anna": "sesame"}, "rules": ["deny :25"], "allow_from": ["10.0.0.0/8"], "motto": "of the subclass"}
    Guarded: Any = type("Guarded", (Socks5Server,), attributes)
    observer = Observer()
    with Guarded((LOCALHOST, 0), idle_timeout=3, motto="by name", observers=[observer]) as server:
        assert (server.idle_timeout, server.connect_timeout, server.motto, server.observers) == (3, 10, "by name", (observer,))
        assert (server.users.check("anna", "sesame"), server.rules[0].text, str(server.allow_from[0])) == (True, "deny :25", "10.0.0.0/8")
    with Guarded((LOCALHOST, 0), users={"ben": "open"}, rules=["allow *"]) as server:
        assert (server.users.check("anna", "sesame"), server.rules[0].text) == (False, "allow *")


def test_those_that_are_set_before_it_serves_may_be_text_as_well(start_server: Any) -> None:
    class Late(Socks5Server):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.users, self.rules = {"anna": "sesame"}, ["deny *"]
            super().serve_forever(poll_interval)

    server = start_server(server_class=Late)
    assert (type(server.users), type(server.rules)) == (Users, Rules)


@pytest.mark.parametrize(("name", "hint"), [
    ("idel_timeout", "did you mean 'idle_timeout'?"), ("user", "did you mean 'users'?"), ("open_proxy", "did you mean 'allow_open_proxy'?"),
    ("port", "help(Socks5Server) lists the settings"),
    # What is there, and is no setting:
    ("sessions", "help"), ("serve_forever", ""), ("_lock", ""), ("request_queue_size", ""), ("registry", ""),
])
def test_a_setting_that_there_is_not_is_refused_with_what_may_have_been_meant(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'Socks5Server() got an unexpected keyword {name!r}; {hint}')}"):
        Socks5Server((LOCALHOST, 0), **{name: 3})


@pytest.mark.parametrize(("settings", "what"), [({"allow_from": ["10.0.0.1/8"]}, "host bits"), ({"rules": ["refuse x"]}, "refuse x")])
def test_so_is_a_setting_that_cannot_be_read(settings: Dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Socks5Server((LOCALHOST, 0), **settings)


# --- no open proxy ---

EVERYWHERE = ["0.0.0.0", "", pytest.param("::", marks=needs_ipv6)]


@pytest.mark.parametrize("host", [*EVERYWHERE, "192.0.2.1", "198.51.100.7", "2001:db8::1", "0"])
def test_what_would_be_an_open_proxy_is_refused_before_anything_is_bound(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Socks5Server((LOCALHOST, 0)) as inner:
        monkeypatch.setattr(socketserver.TCPServer, "server_bind", None)
        monkeypatch.setattr("socks5srv.server.listening_socket", None)
        with pytest.raises(ValueError, match=f"on {host or 'all addresses'} this would be an open proxy"):
            Socks5Server((host, 0))
        with Socks5Server((host, 0), bind_and_activate=False) as later, pytest.raises(ValueError, match="allow_open_proxy=True"):
            later.server_bind()
        with pytest.raises(ValueError, match="allow_open_proxy=True"):
            inner.add_listener((host, 0))
        assert len(inner.listeners) == 1


@pytest.mark.parametrize("host", EVERYWHERE)
def test_so_is_one_of_sockets_that_listen_already(host: str) -> None:
    with listening_socket((LOCALHOST, 0)) as here, listening_socket((host, 0)) as everywhere:
        with pytest.raises(ValueError, match="open proxy"):
            Socks5Server(sockets=[here, everywhere])
        assert everywhere.fileno() >= 0
        with Socks5Server(sockets=[here, everywhere], users={}) as server:
            assert len(server.listeners) == 2


@pytest.mark.parametrize("settings", [
    {"users": {"anna": "sesame"}}, {"users": {}}, {"allow_from": ["10.0.0.0/8"]}, {"allow_open_proxy": True},
], ids=str)
@pytest.mark.parametrize("inherited", [False, True], ids=["by name", "of a subclass"])
def test_a_setting_that_says_who_may_use_it_lets_it_listen_everywhere(settings: Dict[str, Any], inherited: bool) -> None:
    server_class: Type[Socks5Server] = type("Subclass", (Socks5Server,), settings) if inherited else Socks5Server
    with server_class(("0.0.0.0", 0), **({} if inherited else settings)) as server:
        server.add_listener(("0.0.0.0", 0))


def test_so_does_an_authenticate_of_ones_own() -> None:
    handler = handler_with(authenticate=lambda _self, _username, _password: False)
    with Socks5Server(("0.0.0.0", 0), handler), pytest.raises(ValueError, match="open proxy"):
        Socks5Server(("0.0.0.0", 0), handler_with(allow=lambda _self, _command, _address: False))


@pytest.mark.parametrize("host", [LOCALHOST, "127.0.0.2", "localhost", "127.1", pytest.param("::1", marks=needs_ipv6)])
def test_on_loopback_nothing_need_be_said(host: str) -> None:
    try:
        server = Socks5Server((host, 0))
    except OSError:                 # not every system has 127.0.0.2
        assert host == "127.0.0.2"
    else:
        server.server_close()


# --- what help() shows ---

API: Dict[type, Dict[str, str]] = {
    Socks5Server: {
        "for callers": "serve_forever drain shutdown server_close add_listener call sessions observers server_address",
        "for overriding": "service_actions verify_request",
        "for the other modules":
            "relay_thread warn_once draining hooks listeners policy rate_limit registry relays serving_thread stopped stopping",
        "settings": """
            users rules allow_from allow_open_proxy allow_local_targets proxy_protocol commands gssapi upstream route max_clients max_per_client
            max_handshakes max_logins handshake_timeout connect_timeout bind_timeout idle_timeout drain_grace drain_timeout relay_threads reassemble
        """,
    },
    Socks5Handler: {
        "for overriding": "authenticate allow resolve connect relay session_ended select_method perform",
        "for those": "receive send succeed open_tunnel session server client_address connection stream",
        "for the other modules": "asks_for_login close hang_up here judge linger look_up_of resolved hooks reported",
    },
}
BY_PATTERN = {"do_CONNECT", "do_BIND", "do_UDP_ASSOCIATE", "auth_NO_AUTHENTICATION_REQUIRED", "auth_USERNAME_PASSWORD"}


def public(*names: str) -> Set[str]:
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("documented", API, ids=lambda each: each.__name__)
def test_all_that_is_public_is_documented_and_nothing_else_is_public(documented: type, start_server: Any, new_client: Any) -> None:
    server = start_server()
    client = new_client(server)
    client.greet()
    [handler] = eventually(server.registry.serving)
    known = {name for names in API[documented].values() for name in names.split()}
    if documented is Socks5Server:
        with Socks5Server((LOCALHOST, 0)) as instance, socketserver.ThreadingTCPServer((LOCALHOST, 0), Socks5Handler) as base:
            found, bases = public(*dir(instance)), public(*dir(base))
    else:
        found, bases = public(*dir(handler)) - BY_PATTERN, {*public(*dir(socketserver.StreamRequestHandler)), "request"}
    assert known - bases == found - bases
    text = documented.__doc__ or ""
    assert {name for name in known if not re.search(rf"\b{name}\b", text)} == set()
    methods = [name for name in public(*vars(documented)) - bases if callable(getattr(documented, name))]
    assert [name for name in methods if not getattr(documented, name).__doc__] == []


def test_each_setting_is_told_with_its_default() -> None:
    listed = dict(re.findall(r"^    (\w+): .*\((.*)\)$", inspect.getdoc(Socks5Server) or "", re.M))
    assert set(listed) - {"observers"} == set(API[Socks5Server]["settings"].split()) == {
        name for name in dir(Socks5Server) if is_setting(Socks5Server, name)} - {"observers"}
    for name, told in listed.items():
        default = getattr(Socks5Server, name)
        if default is None or isinstance(default, (bool, int, float)):
            assert told.startswith(str(default)) or name == "relay_threads"


def test_the_help_of_the_server_fits_on_three_screens() -> None:
    text = pydoc.plain(pydoc.render_doc(Socks5Server))
    assert text.index("inherited from") > 0
    assert text[:text.index("inherited from")].count("\n") <= 3 * 50
