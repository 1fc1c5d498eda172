"""
UDP ASSOCIATE: a DNS query through the proxy, and the TCP connection that it all hangs on.

Goal: to see the header in front of every datagram (RFC 1928 section 7), and that the proxy's UDP
relay is gone as soon as the TCP connection is closed on which it was asked for.

Run it:

    python examples/dns_over_udp.py

You should see (the ports are others each time):

    client      sends from 127.0.0.1:40001 to the relay at 127.0.0.1:40002
    client  ->  00 00 00 01 7f 00 00 01 9c 43
                Datagram RSV=0000 FRAG=0 ATYP=IPV4 DST.ADDR=127.0.0.1 DST.PORT=40003 DATA=33 octets
    DNS         is asked for api.example.com by 127.0.0.1:40004
    client  <-  00 00 00 01 7f 00 00 01 9c 43
                Datagram RSV=0000 FRAG=0 ATYP=IPV4 DST.ADDR=127.0.0.1 DST.PORT=40003 DATA=49 octets
    client      api.example.com is 192.0.2.7
    client      closes its TCP connection
    proxy       #1 127.0.0.1:40005 - udp 0.0.0.0:0 ok 33 up 49 down 0.0s client closed
    client  ->  the same query again
    client      nobody answers: the relay is gone

The octets shown are the header.  On the way there it names the DNS server (40003) as the one to
send to, on the way back as the one that has sent.  The DNS server sees the proxy (40004) only.

Questions (answers in examples/README.rst): Why does the client send its request with zeros for an
address?  Why is a UDP relay tied to a TCP connection?  What is FRAG for, and who uses it?
"""

import os
import queue
import socket
import socketserver
import struct
import sys
import threading
from io import BytesIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, Command, ReplyCode, Request, Socks5Handler, Socks5Server
from socks5srv.protocol import Datagram, Greeting, MethodSelection, Reply

ADDRESS = "192.0.2.7"       # what the toy knows of any name


# --- DNS, just enough of RFC 1035 ---

def query(name):
    """A question for the IPv4 address (type A, class IN) of a name."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


def name_in(message):
    """The name that a message asks for, or answers."""
    labels, rest = [], message[12:]
    while rest[0]:
        labels.append(rest[1:1 + rest[0]].decode())
        rest = rest[1 + rest[0]:]
    return ".".join(labels)


def answer(message):
    """The answer to a query: the question again, and a record that refers to its name."""
    head = struct.pack("!6H", 4711, 0x8180, 1, 1, 0, 0)
    record = struct.pack("!3HIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(ADDRESS)
    return head + message[12:] + record


class ToyDns(socketserver.BaseRequestHandler):
    def handle(self):
        message, sock = self.request
        self.server.lines.put(f"is asked for {name_in(message)} by {Address.of(self.client_address)}")
        sock.sendto(answer(message), self.client_address)


class Telling(Socks5Handler):
    """The proxy: it hands its log lines to whoever waits for them."""

    def session_ended(self):
        self.server.lines.put(str(self.session))


# --- the client ---

def associate(proxy):
    """The TCP connection of a UDP association, and where to send the datagrams."""
    control = socket.create_connection(proxy, timeout=5)
    with control.makefile("rb", buffering=0) as stream:
        control.sendall(bytes(Greeting(b"\x00")))
        MethodSelection.read(stream)
        control.sendall(bytes(Request(Command.UDP_ASSOCIATE, Address.numeric("0.0.0.0", 0))))
        reply = Reply.read(stream)
    if reply.code is not ReplyCode.SUCCEEDED:
        control.close()
        raise ConnectionError(reply.code.phrase)
    return control, reply.bound


def show(arrow, octets):
    datagram = Datagram.read(BytesIO(octets))
    header = octets[:len(octets) - len(datagram.data)]
    print(f"client  {arrow}  {header.hex(' ')}")
    print("           ", datagram)
    return datagram.data


def main():
    with socketserver.UDPServer(("127.0.0.1", 0), ToyDns) as dns, Socks5Server(("127.0.0.1", 0), Telling) as proxy, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for server in (dns, proxy):
            server.lines = queue.SimpleQueue()
            threading.Thread(target=server.serve_forever, daemon=True).start()

        control, relay = associate(proxy.server_address)
        client.settimeout(2)
        client.connect((relay.host, relay.port))
        print(f"client      sends from {Address.of(client.getsockname())} to the relay at {relay}")

        question = bytes(Datagram(Address.of(dns.server_address), query("api.example.com")))
        show("->", question)
        client.send(question)
        print("DNS        ", dns.lines.get(timeout=5))
        data = show("<-", client.recv(65535))
        print(f"client      {name_in(data)} is {socket.inet_ntoa(data[-4:])}")

        control.close()
        print("client      closes its TCP connection")
        print("proxy      ", proxy.lines.get(timeout=5))
        print("client  ->  the same query again")
        try:
            client.send(question)
            client.recv(65535)
            print("client      has an answer, which is a bug")
        except OSError:             # refused, or (where nobody says so) just not answered
            print("client      nobody answers: the relay is gone")
        dns.shutdown()


if __name__ == "__main__":
    main()
