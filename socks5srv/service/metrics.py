"""
The figures as Prometheus reads them, through prometheus_client: ``pip install "socks5srv[metrics]"``.

The one idea: nothing is counted twice.  A collector makes all samples from the reports at the moment
when somebody asks, so that no library has to be told of anything meanwhile.

Labels are of closed sets; no name, user or address is among them.
"""

from __future__ import annotations

import os
import sys
from itertools import accumulate
from typing import Dict, Iterator, List, Tuple

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from .. import __version__
from ..session import COMMAND_WORDS
from .figures import SECONDS, Figures, Histogram, Report, WatchedServer

# Counts that become a metric as they are: name in the book, name, what it is, labels.
COUNTERS: List[Tuple[str, str, str, Tuple[str, ...]]] = [
    ("clients", "socks5srv_connections", "Clients that have connected, by what became of them: taken, turned_away.", ("result",)),
    ("sessions", "socks5srv_sessions_ended", "Sessions that have ended, by how far they came.", ("event",)),
    ("requests", "socks5srv_requests", "Requests, by command and final reply.", ("command", "reply")),
    ("handshake_failures", "socks5srv_handshake_failures", "Clients that never came to a login or request, by reason.", ("reason",)),
    ("auth_attempts", "socks5srv_auth_attempts", "Logins, by method and result.", ("method", "result")),
    ("accept_errors", "socks5srv_accept_errors", "Calls of accept() that failed, by errno.", ("errno",)),
]


class Collector:
    """Makes the samples, when it is asked for them."""

    def __init__(self, server: WatchedServer) -> None:
        self.server = server

    def collect(self) -> Iterator[Metric]:
        reports = self.server.reports(sessions=False)
        figures = Figures()
        for report in reports.values():
            figures.merge(report.figures)
        yield info()
        for name, metric, text, labels in COUNTERS:
            family = CounterMetricFamily(metric, text, labels=labels)
            for values, number in figures.by(name).items():
                family.add_metric(values, number)
            yield family
        octets = CounterMetricFamily("socks5srv_relay_bytes", "Octets of payload moved: up from clients, down to them.", labels=["direction"])
        octets.add_metric(["up"], figures.up)
        octets.add_metric(["down"], figures.down)
        yield octets
        yield histogram("socks5srv_connect_duration_seconds", "How long it took to connect to a target, once its addresses were known.", figures.connecting)
        yield histogram("socks5srv_dns_duration_seconds", "How long a name's look-up took, successful or not.", figures.resolving)
        yield from self.gauges(reports)

    def gauges(self, reports: Dict[int, Report]) -> Iterator[Metric]:
        sessions = GaugeMetricFamily("socks5srv_sessions", "Sessions that live, by command; none: has not asked yet.", labels=["command"])
        for command in [*COMMAND_WORDS.values(), "none"]:
            sessions.add_metric([command], sum(report.live[command] for report in reports.values()))
        yield sessions
        yield GaugeMetricFamily("socks5srv_threads", "Threads of all processes that serve.", sum(report.threads for report in reports.values()))
        yield GaugeMetricFamily("socks5srv_workers", "Processes that serve.", sum(number >= 0 for number in reports))
        yield GaugeMetricFamily("socks5srv_ready", "1 if more clients may come, as /readyz has it.", float(not self.server.not_ready()))
        limits = GaugeMetricFamily("socks5srv_limit_clients", "How many clients may be here at a time; +Inf for no limit.")
        limits.add_metric([], self.server.fullness()[1])
        yield limits


def info() -> Metric:
    family = GaugeMetricFamily("socks5srv_build_info", "Always 1; its labels say what runs.", labels=["version", "python"])
    family.add_metric([__version__, "%d.%d.%d" % sys.version_info[:3]], 1)
    return family


def histogram(name: str, text: str, figures: Histogram) -> Metric:
    bounds = [*map(str, SECONDS), "+Inf"]
    return HistogramMetricFamily(name, text, buckets=list(zip(bounds, accumulate(figures.counts))), sum_value=figures.sum)


def exposition(server: WatchedServer, accept: str) -> Tuple[bytes, str]:
    """The text of all metrics in a form that `accept` asks for, and its content type."""
    registry = CollectorRegistry()
    registry.register(Collector(server))
    ProcessCollector(registry=registry, pid=os.getpid)
    PlatformCollector(registry=registry)
    try:
        encode, kind = choose_encoder(accept if accept.isascii() and accept.isprintable() else "")
    except (TypeError, ValueError):     # a version that is no number; `kind` has that of whoever asks in it
        encode, kind = choose_encoder("")
    return encode(registry), kind
