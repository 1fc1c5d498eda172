"""
What there is to measure: eight columns, and the numbers in each.  A table, and no code.

A number has a key of two parts: a quantity, and a situation that it was measured in.
``rate_16`` of the column ``connections`` are the connections per second of 16 clients.
"""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Tuple

GROWTH = (10, 100, 500, 1000, 2000, 5000, 9000)     # tunnels
BUSY = 10                   # of them, tunnels that carry messages
IDLE = 2000                 # tunnels


class Quantity(NamedTuple):
    """What a number says."""

    title: str
    unit: str
    more_is_better: bool = False


class Column(NamedTuple):
    """What is measured together."""

    title: str
    quantities: Dict[str, Quantity]
    situations: Dict[str, str]          # by the second part of the key, in words
    shown: Tuple[str, ...]              # keys in the table
    drawn: Tuple[str, ...]              # keys in the picture

    def describe(self, key: str) -> Tuple[Quantity, str]:
        """The quantity, and the situation in words; KeyError if there is no such key."""
        quantity, _, situation = key.partition("_")
        if situation not in self.situations and not re.fullmatch(r"[0-9]+", situation):
            raise KeyError(key)
        return self.quantities[quantity], self.situations.get(situation) or f"{int(situation):,} tunnels"

    def all_keys(self) -> List[str]:
        return [f"{quantity}_{situation}" for quantity in self.quantities for situation in self.situations]


FAILURES = "failures"       # in every column: how often something has failed
NOTE = "note"               # in every column: words about it

P50, P99, CPU, KIB = Quantity("p50", "µs"), Quantity("p99", "µs"), Quantity("CPU", "µs each"), Quantity("memory", "KiB/tunnel")


def rate(unit: str) -> Quantity:
    return Quantity("rate", unit, True)


COLUMNS: Dict[str, Column] = {
    "bulk": Column(
        "Bulk data",
        {"rate": rate("GiB/s"), "cpu": Quantity("CPU", "s/GiB")},
        {"download": "1 download", "downloads": "8 downloads", "upload": "1 upload"},
        ("rate_download", "rate_downloads", "rate_upload", "cpu_download", "cpu_downloads", "cpu_upload"),
        ("rate_download", "rate_downloads", "rate_upload"),
    ),
    "connections": Column(
        "New connections",
        {"rate": rate("connections/s"), "p50": P50, "p99": P99, "cpu": CPU},
        {"1": "1 client", "16": "16 clients", "128": "128 clients"},
        ("rate_1", "rate_16", "rate_128", "p50_16", "p99_16", "p99_128", "cpu_16"),
        ("rate_1", "rate_16", "rate_128"),
    ),
    "messages": Column(
        "Messages",
        {"rate": rate("messages/s"), "p50": P50, "p99": P99, "cpu": CPU},
        {"1": "1 tunnel", "64": "64 tunnels", "512": "512 tunnels"},
        ("rate_1", "rate_64", "rate_512", "p50_64", "p99_64", "p99_512", "cpu_64"),
        ("rate_1", "rate_64", "rate_512"),
    ),
    "datagrams": Column(
        "Datagrams",
        {"rate": rate("datagrams/s"), "loss": Quantity("lost", "%"), "cpu": CPU},
        {"1": "1 association", "64": "64 associations"},
        ("rate_1", "rate_64", "loss_1", "loss_64", "cpu_1", "cpu_64"),
        ("rate_1", "rate_64"),
    ),
    "quic": Column(
        "Bulk data in datagrams",
        {"rate": rate("GiB/s"), "loss": Quantity("lost", "%"), "cpu": Quantity("CPU", "s/GiB")},
        {"download": "1 download", "downloads": "8 downloads", "upload": "1 upload"},
        (
            "rate_download", "rate_downloads", "rate_upload", "loss_download", "loss_downloads", "loss_upload",
            "cpu_download", "cpu_downloads", "cpu_upload",
        ),
        ("rate_download", "rate_downloads", "rate_upload"),
    ),
    "idle": Column(
        "Idle tunnels",
        {
            "opened": Quantity("opened", "tunnels", True), "kib": KIB,
            "p50": Quantity("visit p50", "µs"), "p99": Quantity("visit p99", "µs"),
        },
        {str(IDLE): f"{IDLE:,} tunnels"},
        (f"opened_{IDLE}", f"kib_{IDLE}", f"p50_{IDLE}", f"p99_{IDLE}"),
        (f"kib_{IDLE}", f"p50_{IDLE}", f"p99_{IDLE}"),
    ),
    "growth": Column(
        "Growth",
        {"kib": KIB, "rate": rate("messages/s"), "p50": P50, "p99": P99, "open": Quantity("to open", "µs each")},
        {str(count): f"{count:,} tunnels" for count in GROWTH},
        (),                 # all of them, a table for each quantity
        (),                 # lines, not bars
    ),
    "fairness": Column(
        "Fairness",
        {"p50": P50, "p99": P99},
        {
            "new": "visit alone", "newbulk": "visit beside 8 downloads",
            "ping": "message alone", "pingbulk": "message beside 8 downloads", "pingflood": "message beside a UDP flood",
        },
        ("p50_new", "p99_new", "p50_newbulk", "p99_newbulk", "p99_ping", "p99_pingbulk", "p99_pingflood"),
        ("p99_newbulk", "p99_pingbulk", "p99_pingflood"),
    ),
}
