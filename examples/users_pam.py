"""
Accounts of PAM: those of LDAP, of RADIUS, and whatever else there is a PAM module for.

Goal: to let clients in whom PAM lets in, on Linux and by python-pam (pip install python-pam six).  What PAM
asks is up to the administrator: the service is called socks5srv, and its file is /etc/pam.d/socks5srv.  With this
one there is a single user, anna, whose password is sesame:

    auth     requisite   pam_succeed_if.so quiet user = anna
    auth     sufficient  pam_exec.so quiet expose_authtok /bin/grep -qxz sesame
    auth     required    pam_deny.so
    account  required    pam_permit.so

A real one has pam_sss.so, pam_ldap.so or pam_radius_auth.so in it, for auth and account.  (pam_unix.so reads
/etc/shadow, which a proxy should not be able to.)

Run it:

    python examples/users_pam.py

You should see, with that file (the ports are others each time):

    anna says sesame: you are in!
      #1 127.0.0.1:40001 user anna CONNECT 127.0.0.1:40002 ok, 0 B up, 11 B down, 0.0 s, closed by target
    anna says open: the proxy does not accept the name or the password
      #2 127.0.0.1:40003 user anna login failed: wrong name or password
    ben says sesame: the proxy does not accept the name or the password
      #3 127.0.0.1:40004 user ben login failed: wrong name or password

The lines with a # are the proxy's log.  While PAM cannot be asked, nobody comes in: a client's connection is closed without
an answer then, and the line has the reason.

Questions (answers in README.rst): Why does each login make a PamAuthenticator of its own?  What would be wrong with
returning False for all that is no success?
"""

import contextlib
import os
import queue
import socketserver
import sys
import threading

import pam

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Error, Socks5Handler, Socks5Server
from socks5srv.client import connect

SERVICE = "socks5srv"
REFUSED = {
    pam.PAM_AUTH_ERR, pam.PAM_USER_UNKNOWN, pam.PAM_MAXTRIES, pam.PAM_PERM_DENIED, pam.PAM_ACCT_EXPIRED,
    pam.PAM_NEW_AUTHTOK_REQD, pam.PAM_AUTHTOK_EXPIRED, pam.PAM_CRED_INSUFFICIENT,
}


class Handler(Socks5Handler):
    def authenticate(self, username, password):
        """Whether PAM lets this user in.  OSError if it cannot say."""
        if "\0" in username + password:         # which SOCKS5 can carry, and PAM cannot
            return False
        asked = pam.PamAuthenticator()          # pam.authenticate() has one for all threads, which mixes them up
        if asked.authenticate(username, password, SERVICE, resetcreds=False):
            return True
        if asked.code not in REFUSED:
            raise OSError(f"PAM: {asked.reason}")
        return False

    def session_ended(self):
        self.server.lines.put(str(self.session))


class Welcome(socketserver.BaseRequestHandler):
    """What the clients want to reach: it greets, and hangs up."""

    def handle(self):
        self.request.sendall(b"you are in!")


def knock(proxy, target, username, password):
    """Log in, and read the target's greeting; in a line, how that went, and what the proxy logs."""
    url = "socks5h://{}:{}@{}:{}".format(username, password, *proxy.server_address)
    try:
        with connect(url, *target) as sock, sock.makefile() as stream:
            answer = stream.read()
    except Socks5Error as error:
        answer = error
    print(f"{username} says {password}: {answer}")
    print(" ", proxy.lines.get(timeout=5))


def main():
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(socketserver.TCPServer(("127.0.0.1", 0), Welcome))
        proxy = stack.enter_context(Socks5Server(("127.0.0.1", 0), Handler))
        proxy.lines = queue.SimpleQueue()
        for server in (target, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(target.shutdown)

        for username, password in (("anna", "sesame"), ("anna", "open"), ("ben", "sesame")):
            knock(proxy, target.server_address, username, password)


if __name__ == "__main__":
    main()
