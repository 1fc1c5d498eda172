"""
A Kerberos realm for a test: a KDC on 127.0.0.1, with its files in a folder of its own.

    with realm(clients=["anna"]) as kerberos, kerberos.entered(), start(GssapiHandler, gssapi=Gssapi(str(kerberos.keytab))) as proxy: ...

Nothing of the computer's own Kerberos is read or written.  The library is told by its environment variables where all of
it is, and takes a ticket by itself when it needs one, from a keytab: nobody has to run kinit.

It needs the programs of MIT's KDC, which start in a tenth of a second; who is in it needs the package gssapi.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence

NAME = "TEST.LOCAL"
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
    """
    A realm whose KDC serves.

    Attributes:
        folder: where all its files are
        port: of the KDC
        keytab: the server's, with the keys of all services
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.keytab = folder / "server.keytab"
        self.first = ""             # of the clients
        (folder / "krb5.conf").write_text(CLIENT_SIDE.format(realm=NAME, port=port), encoding="utf-8")
        (folder / "kdc.conf").write_text(KDC_SIDE.format(realm=NAME, port=port, folder=folder), encoding="utf-8")

    @property
    def environment(self) -> Dict[str, str]:
        """What a program needs to be in the realm, as the first of its clients.  It does not say where a server has its key."""
        return {
            "KRB5_CONFIG": str(self.folder / "krb5.conf"), "KRB5_KDC_PROFILE": str(self.folder / "kdc.conf"),
            "KRB5CCNAME": f"FILE:{self.folder / f'{self.first}.cache'}", "KRB5_CLIENT_KTNAME": f"FILE:{self.keytab_of(self.first)}",
            "KRB5_KTNAME": f"FILE:{self.folder / 'there-is-none.keytab'}", "KRB5RCACHEDIR": str(self.folder),
            "KRB5RCACHENAME": f"dfl:{self.folder}",
        }

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this process be in the realm meanwhile."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, *command: str, commands: Sequence[str] = ()) -> str:
        """What one of the tools prints; it is given these commands to read.  RuntimeError if it fails."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment, "PATH": PATH}, input="".join(f"{each}\n" for each in commands),
            capture_output=True, text=True, check=False, timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr}")
        return done.stdout

    def add(self, *principals: str, keytab: str) -> None:
        """New principals, with their keys in a file of the folder."""
        path = self.folder / keytab
        self.run("kadmin.local", commands=[f"addprinc -randkey {each}" for each in principals] + [f"ktadd -k {path} {each}" for each in principals])

    def keytab_of(self, name: str) -> Path:
        return self.folder / f"{name}.keytab"


@contextmanager
def realm(folder: Optional[Path] = None, clients: Sequence[str] = ("alice",), services: Sequence[str] = ("rcmd/localhost",)) -> Iterator[Realm]:
    """A realm with these principals, whose KDC serves meanwhile.  RuntimeError if there are no programs for it."""
    if missing_programs():
        raise RuntimeError(missing_programs())
    with ExitStack() as stack:
        found = Realm(folder or Path(stack.enter_context(tempfile.TemporaryDirectory())), free_port())
        found.run("kdb5_util", "create", "-s", "-r", NAME, "-P", "master")
        found.add(*services, keytab="server.keytab")
        for name in clients:
            found.first = found.first or name
            found.add(name, keytab=f"{name}.keytab")
        kdc = subprocess.Popen(
            ["krb5kdc", "-n"], env={**os.environ, **found.environment, "PATH": PATH}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        stack.callback(kdc.wait, START)
        stack.callback(kdc.kill)        # it does not hear SIGTERM at every moment, and nothing of it is kept
        wait_for(found.port)
        yield found


def missing() -> str:
    """What is needed and not there, in a sentence; empty if all is."""
    try:
        from ..gssapi import context        # noqa: F401
    except ImportError as error:
        return str(error)
    return missing_programs()


def missing_programs() -> str:
    lack = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"The program {lack[0]} is not there; on Debian:  apt-get install krb5-kdc krb5-admin-server" if lack else ""


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
    raise RuntimeError("the KDC does not serve")
