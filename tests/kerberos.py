"""The Kerberos realm of the test session; see socks5srv/testing/kerberos.py."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from socks5srv.testing import kerberos as realms
from socks5srv.testing.kerberos import Realm

from .clients.harness import lack

REALM = realms.NAME
CLIENTS = ("alice", "bob", r"o\@dd")      # the last one has an @ in its name
SERVICES = ("rcmd/localhost", "socks/localhost")


@pytest.fixture(scope="session")
def realm_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    if realms.missing_programs():
        lack(realms.missing_programs())
    with realms.realm(tmp_path_factory.mktemp("kerberos"), CLIENTS, SERVICES) as found:
        yield found


@pytest.fixture
def kerberos(realm_of_the_session: Realm, monkeypatch: pytest.MonkeyPatch) -> Realm:
    """A realm that this process is in: who acts as a client is alice.  To be asked for before what has sockets."""
    pytest.importorskip("gssapi")
    for name, value in realm_of_the_session.environment.items():
        monkeypatch.setenv(name, value)
    return realm_of_the_session


def credentials_of(realm: Realm, name: str, cache: str = "") -> Any:
    """For an `Initiator` that is to be this client of the realm, whose keytab is named like it; its tickets are kept in memory."""
    import gssapi

    store = {"client_keytab": f"FILE:{realm.keytab_of(name)}", "ccache": f"MEMORY:{name}{cache}"}
    return gssapi.Credentials(usage="initiate", store=store)
