"""
Lab 2.  A client by hand: the four messages of SOCKS5, octet by octet.

Goal: to write the client of lab 1 with nothing but a socket, and to see each message as RFC 1928 draws it: a row of
boxes, "size" in octets, "here" what is in them now, in hexadecimal.  The target is called echo, a name that this proxy
knows.  Behind the reply SOCKS is over: "hello" is in no box.

Run it:

    python examples/lab02_client_by_hand.py

You should see (the ports are others each time):

    GREETING                                                     RFC 1928 section 3
    client -> proxy, 3 octets
         +-----+----------+----------+
         | VER | NMETHODS | METHODS  |
         +-----+----------+----------+
    size |  1  |    1     | 1 to 255 |
    here |  05 |    01    |    00    |
         +-----+----------+----------+
         VER       05  SOCKS version 5
         NMETHODS  01  1 method follows
         METHODS   00  no authentication required
      = "I speak SOCKS5. Here is the one way I can log in."

    METHOD SELECTION                                             RFC 1928 section 3
    client <- proxy, 2 octets
         +-----+--------+
         | VER | METHOD |
         +-----+--------+
    size |  1  |   1    |
    here |  05 |   00   |
         +-----+--------+
         VER     05  SOCKS version 5
         METHOD  00  no authentication required
      = "You need no authentication. Send your request."

    REQUEST                                                      RFC 1928 section 4
    client -> proxy, 11 octets
         +-----+-----+-------+------+----------------+----------+
         | VER | CMD |  RSV  | ATYP |    DST.ADDR    | DST.PORT |
         +-----+-----+-------+------+----------------+----------+
    size |  1  |  1  | X'00' |  1   |    Variable    |    2     |
    here |  05 |  01 |   00  |  03  | 04 65 63 68 6f |  9c 41   |
         +-----+-----+-------+------+----------------+----------+
         VER       05           SOCKS version 5
         CMD       01           CONNECT (02 BIND, 03 UDP ASSOCIATE)
         RSV       00           reserved, must be 00
         ATYP      03           domain name (01 IPv4, 04 IPv6)
         DST.ADDR  04           4 octets of name, without a zero at its end
                   65 63 68 6f  echo
         DST.PORT  9c 41        0x9c41 = 40001, most significant octet first
      = "Connect me to echo, port 40001."

    REPLY                                                        RFC 1928 section 6
    client <- proxy, 10 octets
         +-----+-----+-------+------+-------------+----------+
         | VER | REP |  RSV  | ATYP |   BND.ADDR  | BND.PORT |
         +-----+-----+-------+------+-------------+----------+
    size |  1  |  1  | X'00' |  1   |   Variable  |    2     |
    here |  05 |  00 |   00  |  01  | 7f 00 00 01 |  9c 42   |
         +-----+-----+-------+------+-------------+----------+
         VER       05           SOCKS version 5
         REP       00           succeeded
         RSV       00           reserved, must be 00
         ATYP      01           IPv4 (03 domain name, 04 IPv6)
         BND.ADDR  7f 00 00 01  127.0.0.1
         BND.PORT  9c 42        0x9c42 = 40002, most significant octet first
      = "Done. My end is 127.0.0.1:40002."

    hello goes up, and comes back: hello

Questions (answers in docs/course/labs.rst): Why does the greeting need NMETHODS, when each method has one octet?  What would a
name of 300 octets look like?  When is it wrong to read ten octets of reply, and when to read 4096?  Whose is 40002?
"""

import os
import socket
import sys
from io import BytesIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv.explain import table
from socks5srv.protocol import Greeting, MethodSelection, Reply, Request
from socks5srv.testing import start
from socks5srv.testing.targets import EchoServer


def show(kind, octets):
    print(table(kind.read(BytesIO(octets))), end="\n\n")
    return octets


def exactly(sock, n):
    return sock.recv(n, socket.MSG_WAITALL)     # TCP keeps their order, but not the pieces in which they were sent


def main():
    with EchoServer() as echo, start(hosts={"echo": echo.host}) as proxy, socket.create_connection(proxy.address) as sock:
        sock.sendall(show(Greeting, b"\x05\x01\x00"))
        selection = show(MethodSelection, exactly(sock, 2))
        sock.sendall(show(Request, b"\x05\x01\x00\x03\x04echo" + echo.port.to_bytes(2, "big")))
        reply = show(Reply, exactly(sock, 10))
        sock.sendall(b"hello")
        answer = exactly(sock, 5)
        print("hello goes up, and comes back:", answer.decode())
        return selection, reply, answer, echo.clients


def check(selection, reply, answer, clients):
    assert (selection, answer) == (b"\x05\x00", b"hello")
    assert reply == b"\x05\x00\x00\x01\x7f\x00\x00\x01" + clients[0][1].to_bytes(2, "big"), "BND is what the target sees"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
