"""
A lossy link: it stands between a UDP client and its relay, and does to their datagrams what it is told.

    client  <- UDP ->  outside   inside  <- UDP ->  the association's own socket

The client is told `bound` instead of the relay's address, so the relay (datagrams.py) is the real one.
It ends with its session.
"""

from __future__ import annotations

import selectors
import threading
from contextlib import closing, suppress
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..outbound import Route
from ..protocol import DATAGRAM_MAX, Address
from ..waker import Waker

# What becomes of a datagram: its way, its octets, and what is held back on that way.
PassOn = Callable[[str, bytes, Dict[Any, bytes]], List[bytes]]


class LossyLink:
    """For one association, from the moment that it is made until close().  OSError if there are no sockets to be had."""

    def __init__(self, relay: Address, client_host: str, pass_on: PassOn) -> None:
        self.pass_on = pass_on
        self.held: Dict[str, Dict[Any, bytes]] = {"up": {}, "down": {}}
        self.client: Optional[Tuple[Any, ...]] = None       # where its datagrams come from
        self.client_host = client_host
        self.inside = Route().udp((client_host, 0))         # the relay hears the client's host only
        self.inside.connect(relay.sockaddr)
        self.outside = Route().udp((relay.zoned, 0))
        self.bound = Address.of(self.outside.getsockname())
        self.waker = Waker()
        self.thread = threading.Thread(target=self.run, name="socks5srv-link", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Called in any thread; that of the link then ends by itself."""
        self.waker.wake()

    def run(self) -> None:
        with self.outside, self.inside, closing(self.waker), selectors.DefaultSelector() as selector:
            selector.register(self.outside, selectors.EVENT_READ, self.move_up)
            selector.register(self.inside, selectors.EVENT_READ, self.move_down)
            selector.register(self.waker, selectors.EVENT_READ)
            while True:
                for key, _events in selector.select():
                    if key.data is None:
                        return
                    with suppress(OSError):     # an ICMP error of an earlier datagram; this one may be lost
                        key.data()

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
