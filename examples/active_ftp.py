"""
BIND, as FTP uses it: the server calls the client back.

Goal: to see what BIND is for, and why it has two replies.  In FTP's active mode the client says
where it listens (PORT), and the server connects to it to deliver a file.  Behind a proxy nobody
can connect to the client; so the proxy listens in its place.

Run it:

    python examples/active_ftp.py

You should see (the ports are others each time):

    CONNECT      127.0.0.1:40001 succeeded: this connection is for control
    control  <-  220 toy FTP server
    control  ->  USER anonymous
    control  <-  230 come in
    BIND         first reply: the proxy listens on 127.0.0.1:40002
    control  ->  PORT 127,0,0,1,156,66
    control  <-  200 I will call there
    control  ->  RETR notes.txt
    control  <-  150 here it comes
    BIND         second reply: 127.0.0.1:40003 has called
    data     <-  BIND serves a second connection, after a CONNECT.
    control  <-  226 that was all
    control  ->  QUIT
    control  <-  221 bye

The same host answers on both connections.  The proxy insists on that: a stranger who calls the
port is turned away.

Questions (answers in examples/README.rst): Why are there two replies?  What does the client know
after the first one that it could not have known before?  Why does nobody miss this today?
"""

import os
import socket
import socketserver
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, ReplyCode, Request, Socks5Server
from socks5srv.protocol import Greeting, MethodSelection, Reply

NOTES = b"BIND serves a second connection, after a CONNECT."


# --- a toy FTP server, active mode only ---

class ToyFtp(socketserver.StreamRequestHandler):
    """It has one file, and delivers it by calling where PORT says."""

    timeout = 5     # seconds

    def handle(self):
        self.say("220 toy FTP server")
        for line in self.rfile:
            verb, _, argument = line.decode().strip().partition(" ")
            getattr(self, f"do_{verb}", self.do_nothing)(argument)
            if verb == "QUIT":
                return

    def say(self, line):
        self.wfile.write(line.encode() + b"\r\n")

    def do_USER(self, _name):
        self.say("230 come in")

    def do_PORT(self, argument):
        """h1,h2,h3,h4,p1,p2: an address and a port, octet by octet (RFC 959)."""
        numbers = argument.split(",")
        self.call = ".".join(numbers[:4]), int(numbers[4]) << 8 | int(numbers[5])
        self.say("200 I will call there")

    def do_RETR(self, _name):
        self.say("150 here it comes")
        with socket.create_connection(self.call, timeout=5) as data:
            data.sendall(NOTES)
        self.say("226 that was all")

    def do_QUIT(self, _argument):
        self.say("221 bye")

    def do_nothing(self, _argument):
        self.say("502 that is beyond a toy")


# --- the client, all of whose connections lead to the proxy ---

class Asked:
    """A connection to the proxy on which a command has been asked for."""

    def __init__(self, proxy, command, destination):
        self.socket = socket.create_connection(proxy, timeout=5)
        self.stream = self.socket.makefile("rb", buffering=0)
        self.socket.sendall(bytes(Greeting(b"\x00")))
        MethodSelection.read(self.stream)
        self.socket.sendall(bytes(Request(command, destination)))

    def reply(self):
        """The address in the next reply."""
        reply = Reply.read(self.stream)
        if reply.code is not ReplyCode.SUCCEEDED:
            raise ConnectionError(reply.code.phrase)
        return reply.bound

    def close(self):
        self.stream.close()
        self.socket.close()


def listen_for_answers(control):
    for line in control.stream:     # by lines although unbuffered: slow, and right
        print("control  <- ", line.decode().strip())
        yield


def say(control, line):
    print("control  -> ", line)
    control.socket.sendall(line.encode() + b"\r\n")


def fetch(proxy, ftp):
    control = Asked(proxy, Command.CONNECT, ftp)
    control.reply()
    print(f"CONNECT      {ftp} succeeded: this connection is for control")
    answers = listen_for_answers(control)
    next(answers)
    say(control, "USER anonymous")
    next(answers)

    data = Asked(proxy, Command.BIND, ftp)      # whom we expect to call
    where = data.reply()
    print(f"BIND         first reply: the proxy listens on {where}")
    say(control, "PORT {},{},{}".format(where.host.replace(".", ","), where.port >> 8, where.port & 255))
    next(answers)
    say(control, "RETR notes.txt")
    next(answers)
    print(f"BIND         second reply: {data.reply()} has called")
    print("data     <- ", data.stream.readall().decode())
    data.close()

    next(answers)
    say(control, "QUIT")
    next(answers)
    control.close()


def main():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), ToyFtp) as ftp, Socks5Server(("127.0.0.1", 0)) as proxy:
        for server in (ftp, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        fetch(proxy.server_address, Address.of(ftp.server_address))
        ftp.shutdown()


if __name__ == "__main__":
    main()
