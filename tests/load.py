"""Clients that come and go all the time, and look at every octet: what has been lost meanwhile is in `lost`."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, List, Tuple

from socks5srv.client import connect

from .conftest import TIMEOUT, eventually

Place = Tuple[Any, ...]


class Load:
    """``with Load(port, echo) as load:``, from the first sessions that have succeeded to the end of the last ones."""

    def __init__(self, port: int, echo: Place, short: int = 3, long: int = 2, login: str = "") -> None:
        self.proxy, self.echo = f"socks5://{login}127.0.0.1:{port}", echo
        self.done: List[float] = []         # how many seconds each session has taken
        self.lost: List[str] = []
        self.over = threading.Event()
        turns = [1] * short + [20] * long   # a long one has a turn every 50 ms: one second
        self.threads = [threading.Thread(target=self.run, args=(number,), name="test-load", daemon=True) for number in turns]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        self.wait_for(20)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(3 * TIMEOUT)

    def wait_for(self, more: int) -> None:
        """So many sessions from now on."""
        wanted = len(self.done) + more
        eventually(lambda: len(self.done) >= wanted or self.lost)

    def run(self, turns: int) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            try:
                self.session(turns)
            except Exception as error:
                self.lost.append(f"{error!r} after {time.monotonic() - began:.2f} s")
                self.over.wait(0.05)
            else:
                self.done.append(time.monotonic() - began)

    def session(self, turns: int) -> None:
        with connect(self.proxy, *self.echo, timeout=TIMEOUT) as sock:
            sock.settimeout(TIMEOUT)
            for _ in range(turns):
                octets, received = os.urandom(5000), b""
                sock.sendall(octets)
                while len(received) < len(octets):
                    more = sock.recv(65536)
                    assert more, f"the end after {len(received)} octets"
                    received += more
                assert received == octets
                if turns > 1:
                    time.sleep(0.05)
