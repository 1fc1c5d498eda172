"""
Lab 7.  BIND, as FTP uses it: the server calls the client back.

Goal: to see what the second command of SOCKS5 is for, and why it has two replies.  So far the client asked to CONNECT.
But in FTP's active mode the *server* connects: the client says where it listens (PORT), the server calls there and delivers
the file.  Behind a proxy nobody can call the client.  So the client asks the proxy to BIND: to listen in its place.

    client ---- CONNECT, "control" ----> proxy ----------------------> FTP server, port 21
    client <--- BIND, "data" ----------- proxy <---------------------- FTP server calls back

Run it:

    python examples/lab07_active_ftp.py

You should see (the ports are others each time):

    CONNECT      127.0.0.1:40001 succeeded: this connection is for control
    control  <-  220 ready
    control  ->  USER anonymous
    control  <-  230 come in
    BIND         05 00 00 01 7f 00 00 01 9c 42   first reply: the proxy listens on 127.0.0.1:40002
    control  ->  PORT 127,0,0,1,156,66
    control  <-  200 I will call there
    control  ->  RETR notes.txt
    control  <-  150 calling
    BIND         05 00 00 01 7f 00 00 01 9c 43   second reply: 127.0.0.1:40003 has called
    data     <-  BIND serves a second connection, after a CONNECT.
    control  <-  226 done
    control  ->  QUIT
    control  <-  221 bye

The last six octets of a reply are an address and a port (BND.ADDR, BND.PORT), each number from its most significant octet
on: 9c 42 is 156 * 256 + 66 = 40002.  PORT writes the same six in decimal.  What follows the second reply is no SOCKS any
more: it comes from the FTP server.

Questions (answers in docs/course/labs.rst): Why are there two replies?  What does the client know after the first one that
it could not have known before?  BIND names a host (DST.ADDR): what is it for, and what happens to anybody else who connects?
Why is FTP's passive mode, in which the client connects twice, the usual one today?
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Command, Socks5Handler, client
from socks5srv.testing import start
from socks5srv.testing.targets import FtpServer

NOTES = {"notes.txt": b"BIND serves a second connection, after a CONNECT."}


sent = []           # by the proxy


class Recording(Socks5Handler):
    """A proxy that keeps the messages that it sends."""

    def send(self, message):
        sent.append(message)
        super().send(message)


def last_reply():
    return bytes(sent[-1]).hex(" ")


def hear(control):
    print("control  <- ", control.readline().decode().strip())


def say(control, line):
    """Give an order, and hear the answer."""
    print("control  -> ", line)
    control.write(line.encode() + b"\r\n")
    control.flush()
    hear(control)


def fetch(proxy, ftp):
    with client.connect(proxy.url, *ftp.address) as sock, sock.makefile("rwb") as control:
        print(f"CONNECT      {ftp.host}:{ftp.port} succeeded: this connection is for control")
        hear(control)
        say(control, "USER anonymous")
        with client.bind(proxy.url, ftp.host) as waiting:           # for a call of this host
            host, port = waiting.address.host, waiting.address.port
            print(f"BIND         {last_reply()}   first reply: the proxy listens on {host}:{port}")
            say(control, f"PORT {host.replace('.', ',')},{port >> 8},{port & 255}")
            say(control, "RETR notes.txt")
            data, caller = waiting.accept()                         # the second reply ends the waiting
        print(f"BIND         {last_reply()}   second reply: {caller} has called")
        with data, data.makefile("rb") as stream:
            notes = stream.read()
        print("data     <- ", notes.decode())
        hear(control)
        say(control, "QUIT")
    return ftp.calls, (host, port), caller, notes


def main():
    with FtpServer(NOTES) as ftp, start(Recording) as proxy:
        return (*fetch(proxy, ftp), proxy.find(command=Command.BIND))


def check(calls, announced, caller, notes, sessions):
    assert calls == [announced], "the server has called where the first reply said that the proxy listens"
    assert notes == NOTES["notes.txt"]
    assert [session.peer for session in sessions] == [caller], "the second reply is about who has called"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
