"""A program that asks for Kerberos: what must be right before it serves, and that it does, alone and by several processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, List

import pytest
from tests.conftest import LOCALHOST, exchange, handler_with, in_thread, needs_ipv6
from tests.kerberos import CLIENTS, REALM, Realm, credentials_of
from tests.program import Run, Start, processes_too

pytest.importorskip("gssapi")

from socks5srv.cli.options import parse
from socks5srv.client import connect
from socks5srv.gssapi.handler import GssapiHandler
from socks5srv.gssapi.context import Initiator
from socks5srv.gssapi.messages import Abort, ContextToken, Level
from socks5srv.protocol import Command, Method, MethodSelection, ReplyCode
from socks5srv.service.build import Single, handler_class, listening_sockets
from socks5srv.service.kerberos import GssapiUpstreamHandler
from tests.gssapi.harness import KerberosClient

ALICE = f"alice@{REALM}"


def options(kerberos: Realm, *more: str) -> List[str]:
    return ["--gssapi", "--keytab", str(kerberos.keytab), *more]


def test_the_options_become_settings_and_those_a_server(kerberos: Realm) -> None:
    settings = parse(options(kerberos, "--gssapi-levels", "2,0,2", "--gssapi-nec", "--gssapi-allow", "*@A", "--gssapi-allow", "b@B", "0"))
    node = Single(settings, listening_sockets([LOCALHOST], 0))
    gssapi = node.server.gssapi
    assert (gssapi.levels, gssapi.nec, gssapi.allow) == ({Level.NONE, Level.CONFIDENTIALITY}, True, ("*@A", "b@B"))
    assert gssapi.keytab == str(kerberos.keytab)
    node.close()
    assert handler_class(settings) is GssapiHandler
    assert handler_class(parse(options(kerberos, "--upstream", "socks5h://192.0.2.1"))) is GssapiUpstreamHandler


def test_with_it_the_program_may_serve_other_computers(kerberos: Realm, start: Start) -> None:
    service = start("-b", "0.0.0.0", *options(kerberos))
    for methods in ([0], [2], [0, 2]):
        assert service.client().greet(*methods) == MethodSelection(Method.NO_ACCEPTABLE_METHODS)
    assert "auth=gssapi " in service.stderr


def entered(service: Any, realm: Realm, name: str, number: int) -> KerberosClient:
    initiator = Initiator("localhost", credentials=credentials_of(realm, name, cache=f"-{number}"))
    client = service.clients.enter_context(KerberosClient(service.server_address, initiator))
    client.enter()
    return client


@processes_too
def test_who_has_a_ticket_is_served_and_logged_by_name(kerberos: Realm, start: Start, echo: Any, words: Any) -> None:
    service = start(*options(kerberos, *words))
    names = [CLIENTS[number % 3] for number in range(20)]
    for waiting in [in_thread(entered, service, kerberos, name, number) for number, name in enumerate(names)]:
        client = waiting()
        client.connect(echo)
        client.exchange()
        client.close()
    service.wait_until(lambda: service.stderr.count(" ok, ") == 20, "twenty lines")
    for name in CLIENTS:
        assert service.stderr.count(f"user {name}@{REALM} CONNECT") == names.count(name)


def test_who_may_not_come_in_is_named_and_told_why(kerberos: Realm, start: Start) -> None:
    service = start(*options(kerberos, "--gssapi-allow", f"bob@{REALM}"))
    client = KerberosClient(service.server_address)
    with client:
        client.greet(Method.GSSAPI)
        client.send(ContextToken(client.initiator.step()))
        assert client.exactly(2) == bytes(Abort())
    line = service.wait_for("login failed")
    assert line.endswith(f"user {ALICE} login failed: GSSAPI: no pattern of --gssapi-allow is '{ALICE}'")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the other tests have: a recording is of one."""
    monkeypatch.delenv("SOCKS5SRV_TEST_WORKERS", raising=False)


@needs_ipv6
@pytest.mark.usefixtures("one_process")
def test_it_serves_at_ipv6_and_explains_itself_and_records_what_is_on_the_wire(kerberos: Realm, start: Start, echo: Any, tmp_path: Path) -> None:
    service = start("-b", "::1", "--explain", "-vv", "--pcap", str(tmp_path / "pcap"), *options(kerberos))
    with KerberosClient(("::1", service.port)) as client:
        client.enter()
        client.connect(echo)
        client.exchange(b"this is a secret")
    service.wait_for(" ok, ")
    service.stop()
    assert "Traceback" not in service.stderr
    recorded = (tmp_path / "pcap").read_bytes()
    assert recorded.count(b"this is a secret") == 2, "on its way to the echo and back, and not between client and proxy"


# --- what must be right before ---

@pytest.mark.parametrize("kind", ["missing", "empty", "junk", "a folder", "half of one"])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_keytab_without_a_key_is_told_by_name(kerberos: Realm, run_command: Run, tmp_path: Path, kind: str, by: str) -> None:
    path = tmp_path / "proxy.keytab"
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "junk": b"junk" * 100, "half of one": kerberos.keytab.read_bytes()[:20]}[kind])
    if by == "option":
        error = run_command("--gssapi", "--keytab", str(path), "0").error(1)
    else:
        error = run_command("--gssapi", "0", KRB5_KTNAME=f"FILE:{path}").error(1)
    assert str(path) in error.splitlines()[0]
    assert "cannot use the keytab" in error
    assert "--keytab FILE" in error


def test_without_the_package_it_is_told_what_to_install(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "gssapi.py").write_text("raise ImportError('libgssapi_krb5.so.2: cannot open shared object file')\n")
    root = Path(__file__).resolve().parent.parent.parent
    error = run_command("--gssapi", "0", PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)])).error(1)
    assert error.splitlines()[0] == "--gssapi needs the package gssapi: libgssapi_krb5.so.2: cannot open shared object file"
    assert "pip install 'socks5srv[gssapi]'" in error
    assert "libkrb5-dev" in error
    error = run_command("--upstream", "socks5h+gssapi://proxy.example", "0", PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)])).error(1)
    assert error.startswith("--upstream socks5h+gssapi://proxy.example:1080 needs the package gssapi: ")


def test_without_the_option_the_package_is_not_loaded(kerberos: Realm) -> None:
    run = "import sys; from socks5srv.cli.main import main; main(['--self-test']); print([name for name in sys.modules if 'gssapi' in name])"
    assert kerberos.run(sys.executable, "-c", run).splitlines()[-1] == "[]"


def test_with_users_a_password_does_as_well(kerberos: Realm, start: Start) -> None:
    service = start(*options(kerberos, "-u", "anna:sesame"))
    assert service.admits("anna", "sesame")
    assert service.client().greet(0) == MethodSelection(Method.NO_ACCEPTABLE_METHODS)
    assert "auth=gssapi,password " in service.stderr
    assert entered(service, kerberos, "alice", 0).protection.level is Level.CONFIDENTIALITY


def test_all_goes_through_an_upstream_if_there_is_one(kerberos: Realm, start: Start, start_server: Any, echo: Any) -> None:
    far = start_server(handler_with())
    service = start(*options(kerberos, "--upstream", "socks5h://%s:%d" % far.server_address))
    client = entered(service, kerberos, "alice", 0)
    assert client.request(Command.CONNECT, echo).code is ReplyCode.SUCCEEDED
    client.exchange()
    assert far.sessions


@pytest.mark.usefixtures("one_process")
def test_the_upstream_may_ask_for_it_instead(kerberos: Realm, start: Start, echo: Any, tmp_path: Path) -> None:
    far = start(*options(kerberos))
    near = start("--pcap", str(tmp_path / "pcap"), "--upstream", f"socks5h+gssapi://localhost:{far.port}")
    with connect(f"socks5h://{LOCALHOST}:{near.port}", *echo) as sock:
        exchange(sock, b"this is a secret")
    assert f"user {ALICE} CONNECT" in far.wait_for(" ok, ")
    near.wait_for(" ok, ")
    near.stop()
    assert (tmp_path / "pcap").read_bytes().count(b"this is a secret") == 2, "on its way from the client and back, and not to the upstream"
