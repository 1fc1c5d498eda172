"""
A snapshot in the formats of Prometheus, through prometheus_client: ``pip install "socks5srv[metrics]"``.

The one idea: nothing is counted twice.  A collector makes all samples when they are asked for, so that
the library has to be told of nothing meanwhile.

Labels are of closed sets; no name, user or address is among them.
"""

from __future__ import annotations

import os
import sys
from itertools import accumulate
from typing import Iterator, List, Mapping, Sequence, Tuple

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from .. import __version__
from ..session import COMMAND_WORDS
from .metrics import BOUNDS
from .stats import DRAINING, Snapshot, Stats, sum_of_counters

OUTCOMES = ("close", "denied", "failed", "login_failed", "no_acceptable_method", "bad_protocol", "probe", "lost")

# Counts that become a metric as they are: name in Counters, name, what it is, labels, and the values of these that are there
# from the start: that a series has grown is not seen where it begins with 1.
COUNTERS: List[Tuple[str, str, str, Tuple[str, ...], Sequence[Tuple[str, ...]]]] = [
    ("clients", "socks5srv_connections", "Connections of clients, accepted (taken) or rejected (turned_away).", ("result",), [("taken",), ("turned_away",)]),
    ("sessions", "socks5srv_sessions_ended", "Sessions that have ended, by outcome.", ("event",), [(outcome,) for outcome in OUTCOMES]),
    ("requests", "socks5srv_requests", "Requests, by command and final reply.", ("command", "reply"), []),
    ("handshake_failures", "socks5srv_handshake_failures", "Connections that ended before authentication or a request, by reason.", ("reason",), []),
    ("auth_attempts", "socks5srv_auth_attempts", "Authentication attempts, by method and result.", ("method", "result"),
     [("username_password", "success"), ("username_password", "failure")]),
    ("accept_errors", "socks5srv_accept_errors", "Calls of accept() that failed, by errno.", ("errno",), []),
    ("octets", "socks5srv_relay_bytes", "Bytes of payload moved: up from clients, down to them.", ("direction",), [("up",), ("down",)]),
    ("datagrams", "socks5srv_udp_datagrams", "Datagrams of UDP ASSOCIATE that have come: up from clients, down from targets.", ("direction",), [("up",), ("down",)]),
    ("drops", "socks5srv_udp_drops", "Of these, those that have not been sent on.", ("direction",), [("up",), ("down",)]),
    ("worker_deaths", "socks5srv_worker_deaths", "Processes that served and have died; their clients were cut off.", (), [()]),
]
HISTOGRAMS: List[Tuple[str, str, str]] = [
    ("connecting", "socks5srv_connect_duration_seconds", "How long it took to connect to a target, once its addresses were known."),
    ("resolving", "socks5srv_dns_duration_seconds", "How long DNS resolution took, successful or not."),
]


class Collector:
    """Makes the samples, when it is asked for them."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        snapshots = self.stats.snapshots(sessions=False)
        counters = sum_of_counters(snapshots)
        info = GaugeMetricFamily(
            "socks5srv_build_info", "Always 1; its labels say what runs.", labels=["version", "python"],
        )
        info.add_metric([__version__, "%d.%d.%d" % sys.version_info[:3]], 1)
        yield info
        for name, metric, text, labels, always in COUNTERS:
            family = CounterMetricFamily(metric, text, labels=labels)
            for values, number in {**dict.fromkeys(always, 0), **counters.by(name)}.items():
                family.add_metric(values, number)
            yield family
        for name, metric, text in HISTOGRAMS:
            numbers = accumulate(counters[name, bound] for bound in BOUNDS)
            yield HistogramMetricFamily(metric, text, buckets=list(zip(BOUNDS, numbers)), sum_value=counters[name, "microseconds"] / 1e6)
        yield CounterMetricFamily("socks5srv_cpu_seconds", "CPU time of all processes that serve.", counters["cpu", "microseconds"] / 1e6)
        yield from self.gauges(snapshots)

    def gauges(self, snapshots: Mapping[int, Snapshot]) -> Iterator[Metric]:
        sessions = GaugeMetricFamily("socks5srv_sessions", "Open sessions, by command; none: no request yet.", labels=["command"])
        for command in [*COMMAND_WORDS.values(), "none"]:
            sessions.add_metric([command], sum(snapshot.live[command] for snapshot in snapshots.values()))
        yield sessions
        threads, workers = sum(snapshot.threads for snapshot in snapshots.values()), sum(number >= 0 for number in snapshots)
        yield GaugeMetricFamily("socks5srv_threads", "Threads of all processes that serve.", threads)
        yield GaugeMetricFamily("socks5srv_workers", "Processes that serve.", workers)
        reason = self.stats.not_ready()
        yield GaugeMetricFamily("socks5srv_ready", "1 if more connections are accepted, as /readyz says.", float(not reason))
        yield GaugeMetricFamily("socks5srv_draining", "1 from SIGTERM on, until the last connection has ended.", float(reason == DRAINING))
        yield GaugeMetricFamily("socks5srv_limit_connections", "How many connections of clients may be open at a time; +Inf: no limit.", self.stats.capacity()[1])


def exposition(stats: Stats, accept: str) -> Tuple[bytes, str]:
    """The text of all metrics in a form that `accept` asks for, and its content type."""
    registry = CollectorRegistry()
    registry.register(Collector(stats))
    ProcessCollector(registry=registry, pid=os.getpid)
    PlatformCollector(registry=registry)
    try:
        encode, kind = choose_encoder(accept if accept.isascii() and accept.isprintable() else "")
    except (TypeError, ValueError):     # a version that is no number; `kind` would repeat it
        encode, kind = choose_encoder("")
    return encode(registry), kind
