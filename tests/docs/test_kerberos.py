"""The page about Kerberos: who does what it says, with a KDC, has a proxy that works."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Optional

import pytest

from socks5srv.gssapi.messages import Abort, ContextToken
from socks5srv.protocol import Method
from tests.conftest import exchange
from tests.kerberos import REALM, Realm
from tests.program import Start, needs_posix

from .pages import blocks, page

PROXY = "proxy.example.com"


def test_the_lines_from_a_keytab_to_a_proxy_lead_there(kerberos: Realm, start: Start, echo: Any, tmp_path: Path) -> None:
    from socks5srv.gssapi.context import Initiator
    from tests.gssapi.harness import KerberosClient

    keytab = tmp_path / "proxy.keytab"
    shown, by_us, _by_dante = blocks("console", "kerberos")
    lines = [shlex.split(line[2:].replace("proxy.keytab", str(keytab)).replace("EXAMPLE.COM", REALM)) for line in shown.splitlines()]
    for _kadmin, *words in [line for line in lines if line[0] == "kadmin"]:
        kerberos.run("kadmin.local", *words)
    (command,) = [line for line in lines if line[0] == "socks5srv"]
    service = start(*command[1:])
    for name in ("rcmd", "socks"):
        with KerberosClient(service.server_address, Initiator(PROXY, name)) as client:
            client.enter()
            client.connect(echo)
            client.exchange()
    (command,) = [shlex.split(line) for line in by_us.splitlines() if "--upstream" in line]
    near = start(*[word.replace(PROXY, f"localhost:{service_of_localhost(kerberos, start)}") for word in command[2:]])
    with near.client() as client:
        client.connect(echo)
        exchange(client)


def service_of_localhost(kerberos: Realm, start: Start) -> int:
    """The port of a proxy that is asked for by this name."""
    return start("--gssapi", "--keytab", str(kerberos.keytab)).port


@needs_posix
@pytest.mark.parametrize(("variable", "value", "file"), [
    ("KRB5RCACHEDIR", "{}", "krb5_{}.rcache2"), ("KRB5RCACHENAME", "file2:{}/proxy.rcache", "proxy.rcache"), ("KRB5RCACHEDIR", "{}/missing", None),
])
def test_the_replay_cache_is_where_it_says_and_without_it_nobody_gets_in(
    kerberos: Realm, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, file: Optional[str],
) -> None:
    from tests.gssapi.harness import KerberosClient

    for name in ("KRB5RCACHEDIR", "KRB5RCACHENAME"):
        monkeypatch.delenv(name)
        assert name in page("kerberos")
    service = start("--gssapi", "--keytab", str(kerberos.keytab), **{variable: value.format(tmp_path)})
    with KerberosClient(service.server_address) as client:
        if file is not None:
            client.enter()
            assert (tmp_path / file.format(os.getuid())).stat().st_size > 0
        else:
            client.greet(Method.GSSAPI)
            client.send(ContextToken(client.initiator.step()))
            assert client.exactly(2) == bytes(Abort())
            assert f"krb5_{os.getuid()}.rcache2" in service.wait_for("login failed")
