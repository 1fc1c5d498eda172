"""
A bad line: it stands between a UDP client and its relay, and does to their datagrams what it is told.

    client  <- UDP ->  outside   inside  <- UDP ->  the association's own socket

The client is told `bound` instead of the relay's address, so the relay (datagrams.py) is the real one.
It ends with its session.
"""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..outbound import with_scope
from ..protocol import DATAGRAM_MAX, Address

# What becomes of a datagram: its way, its octets, and what is held back on that way.
PassOn = Callable[[str, bytes, Dict[Any, bytes]], List[bytes]]


class Line:
    """For one association, from the moment that it is made until close().  OSError if there are no sockets to be had."""

    def __init__(self, relay: Address, client_host: str, pass_on: PassOn) -> None:
        self.pass_on = pass_on
        self.held: Dict[str, Dict[Any, bytes]] = {"up": {}, "down": {}}
        self.client: Optional[Tuple[Any, ...]] = None       # where its datagrams come from
        self.client_host = client_host
        self.inside = udp_socket(client_host, relay)        # the relay hears the client's host only
        self.outside = udp_socket(relay.zoned)
        self.bound = Address.of(self.outside.getsockname())
        self.end, self.ended = socket.socketpair()
        self.thread = threading.Thread(target=self.run, name="socks5srv-line", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Called in any thread, once; the thread then ends by itself."""
        self.end.close()

    def join(self) -> None:
        self.thread.join()

    def run(self) -> None:
        with self.outside, self.inside, self.ended, selectors.DefaultSelector() as selector:
            for sock in (self.outside, self.inside, self.ended):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _events in selector.select()}
                if self.ended.fileno() in ready:
                    return
                for fd in ready:
                    try:
                        (self.move_up if fd == self.outside.fileno() else self.move_down)()
                    except OSError:         # an ICMP error of an earlier datagram; this one may be lost
                        pass

    def move_up(self) -> None:
        octets, source = self.outside.recvfrom(DATAGRAM_MAX)
        if Address.of(source).zoned == self.client_host:
            self.client = source
            for datagram in self.pass_on("up", octets, self.held["up"]):
                self.inside.send(datagram)

    def move_down(self) -> None:
        octets = self.inside.recv(DATAGRAM_MAX)
        for datagram in self.pass_on("down", octets, self.held["down"]):
            if self.client is not None:
                self.outside.sendto(datagram, self.client)


def udp_socket(host: str, to: Optional[Address] = None) -> socket.socket:
    """On a free port of this host, and connected if it is to send to one place only."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(with_scope((host, 0)))
        if to is not None:
            sock.connect(to.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock
