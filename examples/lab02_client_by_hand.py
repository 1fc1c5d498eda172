"""
A SOCKS5 client by hand: every message it sends and receives, as octets and as fields.

Goal: to see a whole conversation of RFC 1928, with the login of RFC 1929 in it, octet by octet.
Read it beside the pictures in socks5srv/protocol.py: what they call fields is what is printed.

Run it:

    python examples/by_hand.py

You should see (the ports are others each time):

    -> 05 02 00 02
       Greeting VER=5 NMETHODS=2 METHODS=NO_AUTHENTICATION_REQUIRED,USERNAME_PASSWORD
    <- 05 02
       MethodSelection VER=5 METHOD=USERNAME_PASSWORD
    -> 01 04 61 6e 6e 61 06 73 65 73 61 6d 65
       Credentials VER=1 ULEN=4 UNAME=anna PLEN=*** PASSWD=***
    <- 01 00
       CredentialsReply VER=1 STATUS=success
    -> 05 01 00 03 09 6c 6f 63 61 6c 68 6f 73 74 9c 41
       Request VER=5 CMD=CONNECT RSV=00 ATYP=DOMAINNAME DST.ADDR=localhost DST.PORT=40001
    <- 05 00 00 01 7f 00 00 01 9c 42
       Reply VER=5 REP=SUCCEEDED RSV=00 ATYP=IPV4 BND.ADDR=127.0.0.1 BND.PORT=40002
    -> 68 65 6c 6c 6f
       5 octets, and no more to come
    <- 68 65 6c 6c 6f
       5 octets, and no more to come

From "hello" on SOCKS has nothing more to say: those octets belong to the client and the echo server.

Questions (answers in examples/README.rst): Which octets are the password?  Why is VER 01 in the
login, when it is 05 everywhere else?  What would a name of 300 octets look like?
"""

import os
import socket
import socketserver
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, Method, ReplyCode, Request, Socks5Server
from socks5srv.protocol import Credentials, CredentialsReply, Greeting, MethodSelection, Reply


class Client:
    """A connection to a proxy.  Whatever passes is printed: octets first, then what they mean."""

    def __init__(self, proxy):
        self.socket = socket.create_connection(proxy, timeout=5)
        self.stream = self.socket.makefile("rb", buffering=0)       # unbuffered: what follows a message is not ours

    def send(self, message):
        print("->", bytes(message).hex(" "))
        print("  ", message)
        self.socket.sendall(bytes(message))

    def receive(self, kind):
        message = kind.read(self.stream)
        print("<-", bytes(message).hex(" "))
        print("  ", message)
        return message

    def login(self, username, password):
        self.send(Greeting(bytes([Method.NO_AUTHENTICATION_REQUIRED, Method.USERNAME_PASSWORD])))
        selection = self.receive(MethodSelection)
        if selection.method == Method.USERNAME_PASSWORD:
            self.send(Credentials(username.encode(), password.encode()))
            if self.receive(CredentialsReply).status != CredentialsReply.SUCCESS:
                raise PermissionError("wrong name or password")
        elif selection.method != Method.NO_AUTHENTICATION_REQUIRED:
            raise PermissionError("the proxy wants a login that we have not")

    def connect(self, host, port):
        self.send(Request(Command.CONNECT, Address.named(host, port)))
        reply = self.receive(Reply)
        if reply.code is not ReplyCode.SUCCEEDED:
            raise ConnectionError(reply.code.phrase)

    def close(self):
        self.stream.close()
        self.socket.close()


class Echo(socketserver.BaseRequestHandler):
    """The target: it sends back what it gets, until there is no more."""

    def handle(self):
        for octets in iter(lambda: self.request.recv(4096), b""):
            self.request.sendall(octets)


def main():
    with socketserver.TCPServer(("127.0.0.1", 0), Echo) as echo, \
            Socks5Server(("127.0.0.1", 0), users={"anna": "sesame"}) as proxy:
        for server in (echo, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(proxy.server_address)
        client.login("anna", "sesame")
        client.connect("localhost", echo.server_address[1])

        print("->", b"hello".hex(" "))
        print("   5 octets, and no more to come")
        client.socket.sendall(b"hello")
        client.socket.shutdown(socket.SHUT_WR)      # this way ends, the other one is still open
        answer = client.stream.readall()
        print("<-", answer.hex(" "))
        print(f"   {len(answer)} octets, and no more to come")
        client.close()
        echo.shutdown()


if __name__ == "__main__":
    main()
