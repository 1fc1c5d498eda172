"""
What goes wrong between a client and its proxy, octet by octet, on demand.

Goal: to see what each fault of `socks5srv.testing.faults` looks like to a client, and that a program has to be
ready for more than a failure reply.  (What real clients make of them is in docs/faults.rst.)

Run it:

    python examples/faults.py

You should see (the ports are others each time):

    no fault at all                              05 00 | 05 00 00 01 7f 00 00 01 9c 41
    ReplyWith(ReplyCode.CONNECTION_REFUSED)      05 00 | 05 05 00 01 00 00 00 00 00 00, end
    ReplyWith(153)                               05 00 | 05 99 00 01 00 00 00 00 00 00, end
    SelectMethod(Method.NO_ACCEPTABLE_METHODS)   05 ff, end
    SelectMethod(Method.USERNAME_PASSWORD)       05 02, end
    CloseAfter(Greeting)                         end
    CloseAfter(Request)                          05 00 | end
    ResetAfter(Request)                          05 00 | reset
    CloseAfter(Reply)                            05 00 | 05 00 00 01 7f 00 00 01 9c 42, end
    Truncate(Reply, 3)                           05 00 | 05 00 00, end
    Raw(Reply, b'HTTP/1.1 502')                  05 00 | 48 54 54 50 2f 31 2e 31 20 35 30 32
    BoundTo('proxy.example.com', 1080)           05 00 | 05 00 00 03 11 70 72 6f 78 79 2e 65 78 61 6d 70 6c 65 2e 63 6f 6d 04 38
    Delay(Reply, 60)                             05 00 | silence

The first two octets answer the greeting, what follows answers the request.  Where nothing is said of an end,
the connection lives on.

Questions (answers in examples/README.rst): Which of these would a client that reads ten octets, and looks at the
second, take for a success?  Which of them leave a client waiting that has no timeout?
"""

import os
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, Method, Request
from socks5srv.protocol import Greeting
from socks5srv.testing import start
from socks5srv.testing.faults import BoundTo, CloseAfter, Delay, Raw, Reply, ReplyCode, ReplyWith, ResetAfter, SelectMethod, Truncate
from socks5srv.testing.targets import EchoServer

FAULTS = [
    None,
    ReplyWith(ReplyCode.CONNECTION_REFUSED),
    ReplyWith(0x99),
    SelectMethod(Method.NO_ACCEPTABLE_METHODS),
    SelectMethod(Method.USERNAME_PASSWORD),
    CloseAfter(Greeting),
    CloseAfter(Request),
    ResetAfter(Request),
    CloseAfter(Reply),
    Truncate(Reply, 3),
    Raw(Reply, b"HTTP/1.1 502"),
    BoundTo("proxy.example.com", 1080),
    Delay(Reply, 60),
]


def hear(sock):
    """What comes until there is silence, as octets in hexadecimal, and how it ends if it does."""
    words = []
    try:
        while True:
            octets = sock.recv(100)
            if not octets:
                words.append("end")
                break
            words.append(octets.hex(" "))
    except ConnectionResetError:
        words.append("reset")
    except socket.timeout:
        pass
    return ", ".join(words) or "silence"


def converse(proxy, target):
    """A greeting and a request; what is heard after each."""
    with socket.create_connection(proxy.address) as sock:
        sock.settimeout(0.15)       # seconds; silence on loopback
        sock.sendall(bytes(Greeting(b"\x00")))
        heard = hear(sock)
        if heard.endswith("end"):
            return heard
        sock.sendall(bytes(Request(Command.CONNECT, Address.of(target))))
        return f"{heard} | {hear(sock)}"


def main():
    with EchoServer() as echo:
        for fault in FAULTS:
            with start(faults=[fault] if fault else []) as proxy:
                name = repr(fault) if fault else "no fault at all"
                print(f"{name:<45}{converse(proxy, echo.address)}")


if __name__ == "__main__":
    main()
