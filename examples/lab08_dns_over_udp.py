"""
Lab 8.  UDP ASSOCIATE: a DNS query through the proxy, and the TCP connection that it all hangs on.

Goal: to see the third command of SOCKS5, for datagrams; the header that stands in front of each of them; and that the
proxy's relay is gone as soon as the TCP connection is closed on which it was asked for.  (A relay is the UDP port that the
proxy opens for this one client.)

    client ==== TCP: "UDP ASSOCIATE", and then silence ====> proxy
    client <--- UDP: header and payload -------------------> relay <--- UDP: payload ---> DNS server

Run it:

    python examples/lab08_dns_over_udp.py

You should see (the ports are others each time):

    client      sends from 127.0.0.1:40001 to the relay at 127.0.0.1:40002
    client  ->  00 00 00 01 7f 00 00 01 9c 43   and 33 octets, which ask for api.example.com
    DNS         is asked for api.example.com by 127.0.0.1:40004
    client  <-  00 00 00 01 7f 00 00 01 9c 43   and 49 octets: api.example.com is 192.0.2.7
    client      closes its TCP connection
    proxy's log #1 127.0.0.1:40005 UDP ASSOCIATE 0.0.0.0:0 ok, 33 B up, 49 B down, 0.0 s, closed by client
    client  ->  the same query again
    client      nobody answers: the relay is gone

The header is RSV 00 00 (reserved), FRAG 00 (a whole datagram, not a fragment), ATYP 01, an address and a port.  On the
way there it says where to send the rest: to the DNS server, 127.0.0.1:40003.  On the way back it says who has sent it.
The DNS server sees the relay's other side (40004) only, and no header.

Questions (answers in docs/course/labs.rst): Why does the client write zeros (0.0.0.0:0) into its request?  Why is a UDP relay
tied to a TCP connection?  What is FRAG for, and what does it cost?  Which of the two ways of lab 3 is this, and who would
resolve the DNS server's name if the header had one (ATYP 03)?
"""

import os
import socket
import struct
import sys
from io import BytesIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Address, client
from socks5srv.protocol import Datagram
from socks5srv.testing import start
from socks5srv.testing.targets import DnsServer

NAME = "api.example.com"


def query(name):
    """A DNS question for the IPv4 address (type 1, class 1) of a name: RFC 1035 section 4."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


def taken_apart(octets):
    """The header of a datagram, in hexadecimal, and its payload."""
    payload = Datagram.read(BytesIO(octets)).data
    return octets[:len(octets) - len(payload)].hex(" "), payload


def nobody_answers(relay, octets):
    relay.socket.settimeout(0.5)        # seconds: an age on this computer, for an answer that is not to come
    try:
        relay.socket.send(octets)
        return not relay.socket.recv(65535)
    except OSError:                     # told so by the system; or (where it does not tell) the time is up
        return True


def main():
    with DnsServer({NAME: "192.0.2.7"}) as dns, start() as proxy, client.udp_associate(proxy.url) as relay:
        relay.socket.settimeout(5)
        print(f"client      sends from {Address.of(relay.socket.getsockname())} to the relay at {relay.address}")

        question = bytes(Datagram(Address.of(dns.address), query(NAME)))
        header, payload = taken_apart(question)
        print(f"client  ->  {header}   and {len(payload)} octets, which ask for {NAME}")
        relay.socket.send(question)
        header_back, payload = taken_apart(relay.socket.recv(65535))
        host, port = dns.clients[0]
        print(f"DNS         is asked for {dns.questions[0]} by {host}:{port}")
        address = socket.inet_ntoa(payload[-4:])
        print(f"client  <-  {header_back}   and {len(payload)} octets: {NAME} is {address}")

        print("client      closes its TCP connection")
        relay.control.close()
        (session,) = proxy.wait_for(closed=True)
        print("proxy's log", session)
        print("client  ->  the same query again")
        gone = nobody_answers(relay, question)
        print("client      nobody answers: the relay is gone" if gone else "client      has an answer, which is a bug")
        return header == header_back, address, port != relay.address.port, gone


def check(same_header, address, another_port, gone):
    assert same_header, "the address in it is the DNS server's, there and back"
    assert address == "192.0.2.7"
    assert another_port, "the relay has two sides, each with a port of its own"
    assert gone, "no relay without its TCP connection"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
