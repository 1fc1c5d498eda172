"""
Accounts in an SQL database, which many proxies share.

Goal: to let clients in by a database that other programs write, here SQLite, which comes with Python;
with another one only the lines with `sqlite3` in them change.  A password that is changed there counts from the
next login on, and while the database cannot be read nobody comes in.

Run it:

    python examples/users_sql.py

You should see (the ports are others each time):

    anna says sesame: you are in!
      #1 127.0.0.1:40001 user anna CONNECT 127.0.0.1:40002 ok, 0 B up, 11 B down, 0.0 s, closed by target
    anna says open: the proxy does not accept the name or the password
      #2 127.0.0.1:40003 user anna login failed: wrong name or password
    ben says sesame: the proxy does not accept the name or the password
      #3 127.0.0.1:40004 user ben login failed: wrong name or password
    anna's password is open from now on
    anna says sesame: the proxy does not accept the name or the password
      #4 127.0.0.1:40005 user anna login failed: wrong name or password
    anna says open: you are in!
      #5 127.0.0.1:40006 user anna CONNECT 127.0.0.1:40002 ok, 0 B up, 11 B down, 0.0 s, closed by target
    the database is gone
    anna says open: the proxy has closed the connection instead of answering
      #6 127.0.0.1:40007 user anna bad protocol: the accounts cannot be read: unable to open database file

The lines with a # are the proxy's log.  The last client is not told that its password is wrong, and the line is
none that fail2ban looks for: it was not the client's fault.

Questions (answers in README.rst): Why is a hash computed for ben, who is no user?  Why is what is remembered of a
right password not forgotten after a minute, as caches usually do?
"""

import contextlib
import hmac
import os
import pathlib
import queue
import socketserver
import sqlite3
import sys
import tempfile
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Error, Socks5Handler, Socks5Server
from socks5srv.client import connect
from socks5srv.users import hash_password, verify

NOBODY = hash_password("")      # as expensive as those of the users


class Accounts:
    """The users in a table.  Each login has a thread of its own, and a connection to the database."""

    def __init__(self, path):
        self.uri = f"{pathlib.Path(path).resolve().as_uri()}?mode=ro"       # without it, a missing file would be made, and empty
        self.computing = threading.BoundedSemaphore(os.cpu_count() or 1)    # a hash takes 16 MiB and 50 ms
        self.key = os.urandom(32)
        self.verified = {}          # the hash, and a keyed digest of the password that was right for it, by name

    def check(self, username, password):
        """Whether this is a user and the password is right.  OSError while that cannot be known."""
        stored = self.hash_of(username)
        seen = stored, hmac.new(self.key, password.encode(), "sha256").digest()
        if stored is not None and self.verified.get(username) == seen:
            return True
        with self.computing:
            right = verify(password, stored or NOBODY) and stored is not None
        if right:
            self.verified[username] = seen
        return right

    def hash_of(self, username):
        try:
            with contextlib.closing(sqlite3.connect(self.uri, timeout=2, uri=True)) as database:
                row = database.execute("SELECT hash FROM users WHERE name = ?", (username,)).fetchone()
        except sqlite3.Error as error:
            raise OSError(f"the accounts cannot be read: {error}") from error
        return row and row[0]


class Handler(Socks5Handler):
    accounts: Accounts

    def authenticate(self, username, password):
        return self.accounts.check(username, password)

    def session_ended(self):
        self.server.lines.put(str(self.session))


class Welcome(socketserver.BaseRequestHandler):
    """What the clients want to reach: it greets, and hangs up."""

    def handle(self):
        self.request.sendall(b"you are in!")


def set_password(path, name, password):
    """What another program does."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS users (name TEXT PRIMARY KEY, hash TEXT NOT NULL)")
        database.execute("INSERT OR REPLACE INTO users VALUES (?, ?)", (name, hash_password(password)))


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
        path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "accounts.db")
        set_password(path, "anna", "sesame")
        Handler.accounts = Accounts(path)
        target = stack.enter_context(socketserver.TCPServer(("127.0.0.1", 0), Welcome))
        proxy = stack.enter_context(Socks5Server(("127.0.0.1", 0), Handler))
        proxy.lines = queue.SimpleQueue()
        for server in (target, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(target.shutdown)

        for username, password in (("anna", "sesame"), ("anna", "open"), ("ben", "sesame")):
            knock(proxy, target.server_address, username, password)
        set_password(path, "anna", "open")
        print("anna's password is open from now on")
        for password in ("sesame", "open"):
            knock(proxy, target.server_address, "anna", password)
        os.remove(path)
        print("the database is gone")
        knock(proxy, target.server_address, "anna", "open")


if __name__ == "__main__":
    main()
