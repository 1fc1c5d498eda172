"""
A Kerberos realm of the test session's own: a KDC on 127.0.0.1, with its files in a temporary folder.

Nothing of the computer's own Kerberos is read or written.  The library is told by its environment variables where all of
it is, and takes a ticket by itself when it needs one, from a keytab: nobody has to run kinit.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

import pytest

REALM = "TEST.LOCAL"
CLIENTS = ("alice", "bob", r"o\@dd")      # the last one has an @ in its name
SERVICES = ("rcmd/localhost", "socks/localhost")
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
TOOLS = ("krb5kdc", "kdb5_util", "kadmin.local")
START = 10.0        # seconds that the KDC may take to listen

CLIENT_SIDE = """\
[libdefaults]
 default_realm = {realm}
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
 udp_preference_limit = 1
 ignore_acceptor_hostname = true
[realms]
 {realm} = {{
  kdc = 127.0.0.1:{port}
 }}
"""
KDC_SIDE = """\
[kdcdefaults]
 kdc_listen = ""
 kdc_tcp_listen = 127.0.0.1:{port}
[realms]
 {realm} = {{
  database_name = {folder}/principal
  key_stash_file = {folder}/stash
  acl_file = {folder}/kadm5.acl
  supported_enctypes = aes256-cts-hmac-sha1-96:normal
  max_life = 10h
 }}
[logging]
 kdc = FILE:{folder}/kdc.log
 admin_server = FILE:{folder}/kadmin.log
"""


class Realm:
    """A realm whose KDC serves: `keytab` is the server's, which has no other key in it than those of SERVICES."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.keytab = folder / "server.keytab"
        (folder / "krb5.conf").write_text(CLIENT_SIDE.format(realm=REALM, port=port))
        (folder / "kdc.conf").write_text(KDC_SIDE.format(realm=REALM, port=port, folder=folder))

    @property
    def environment(self) -> Dict[str, str]:
        """What a program needs to be in the realm; a client of it is alice.  It does not say where a server has its key."""
        return {
            "KRB5_CONFIG": str(self.folder / "krb5.conf"), "KRB5_KDC_PROFILE": str(self.folder / "kdc.conf"),
            "KRB5CCNAME": f"FILE:{self.folder / 'alice.cache'}", "KRB5_CLIENT_KTNAME": f"FILE:{self.folder / 'alice.keytab'}",
            "KRB5_KTNAME": f"FILE:{self.folder / 'there-is-none.keytab'}", "KRB5RCACHEDIR": str(self.folder),
            "KRB5RCACHENAME": f"dfl:{self.folder}",
        }

    def run(self, *command: str, commands: Sequence[str] = ()) -> str:
        """What one of the tools prints; it is given these commands to read."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment, "PATH": PATH}, input="".join(f"{each}\n" for each in commands),
            capture_output=True, text=True, check=False, timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def add(self, *principals: str, keytab: str) -> None:
        """New principals, with their keys in a file of the folder."""
        path = self.folder / keytab
        self.run("kadmin.local", commands=[f"addprinc -randkey {each}" for each in principals] + [f"ktadd -k {path} {each}" for each in principals])

    def keytab_of(self, name: str) -> Path:
        return self.folder / f"{name}.keytab"


@contextmanager
def realm(folder: Path) -> Iterator[Realm]:
    """A realm whose KDC serves meanwhile.  The test is skipped where there is no KDC."""
    for tool in TOOLS:
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} is missing: apt-get install krb5-kdc krb5-admin-server")
    found = Realm(folder, free_port())
    found.run("kdb5_util", "create", "-s", "-r", REALM, "-P", "master")
    found.add(*SERVICES, keytab="server.keytab")
    for name in CLIENTS:
        found.add(name, keytab=f"{name}.keytab")
    kdc = subprocess.Popen(
        ["krb5kdc", "-n"], env={**os.environ, **found.environment, "PATH": PATH}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(found.port)
        yield found
    finally:
        kdc.terminate()
        kdc.wait(START)


@pytest.fixture(scope="session")
def realm_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    with realm(tmp_path_factory.mktemp("kerberos")) as found:
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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(port: int) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=START):
            return
        time.sleep(0.005)
    raise AssertionError("the KDC does not serve")
