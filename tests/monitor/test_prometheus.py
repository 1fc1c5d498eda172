"""``/metrics``, read by Prometheus' own parser."""

from __future__ import annotations

import errno
import sys
from typing import Any, Dict, Set, Tuple

import pytest
from tests.clients.harness import need_module
from tests.conftest import eventually, exchange, needs_proc
from tests.monitor.watched import Start, Watched, one_of_each

from socks5srv.monitor.stats import DRAINING
from socks5srv.protocol import ReplyCode
from socks5srv.session import COMMAND_WORDS

REASONS = {"closed", "timeout", "crowded_out", "stopped", "no_acceptable_method", "socks4", "http", "tls", "proxy_protocol", "not_socks", "bad_message"}

# After "socks5srv_", by their types.
KINDS = {
    "counter": {
        "connections", "sessions_ended", "requests", "handshake_failures", "auth_attempts", "accept_errors", "relay_bytes", "udp_datagrams",
        "udp_drops", "worker_deaths", "cpu_seconds",
    },
    "gauge": {"build_info", "sessions", "threads", "workers", "ready", "draining", "limit_connections"},
    "histogram": {"connect_duration_seconds", "dns_duration_seconds"},
}

# All values that a label can have; what is not here has none but numbers.
CLOSED = {
    "result": {"taken", "turned_away", "success", "failure"},
    "event": {"close", "denied", "failed", "login_failed", "no_acceptable_method", "bad_protocol", "probe", "lost"},
    "command": {*COMMAND_WORDS.values(), "none"},
    "reply": {code.name.lower() for code in ReplyCode} | {"none"},
    "reason": REASONS,
    "method": {"none", "username_password"},
    "direction": {"up", "down"},
}


def families(page: Watched) -> Dict[str, Any]:
    parser = need_module("prometheus_client.parser")
    answer = page.ask("/metrics")
    assert answer.status == 200, answer.body
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}


def samples(page: Watched, name: str) -> Dict[Tuple[str, ...], float]:
    """By the values of their labels, those of the family of this name that are not 0, or have no labels."""
    return {tuple(sample.labels.values()): sample.value for sample in families(page)[name].samples if sample.value or not sample.labels}


def one(page: Watched, name: str, part: str) -> float:
    """The only sample of a part of this family."""
    (value,) = [sample.value for sample in families(page)[name].samples if sample.name == f"{name}_{part}"]
    return float(value)


def test_the_names_are_those_that_are_promised(page: Watched) -> None:
    found = families(page)
    promised = {f"socks5srv_{name}": kind for kind, names in KINDS.items() for name in names}
    assert {name: family.type for name, family in found.items() if name.startswith("socks5srv_")} == promised
    assert all(family.documentation for family in found.values())


def test_what_a_rate_is_asked_of_is_there_before_it_is_more_than_none(page: Watched) -> None:
    counters: Dict[str, Set[Tuple[str, ...]]] = {}
    for name, *labels in page.metrics_by_type("counter"):
        counters.setdefault(name, set()).add(tuple(labels))
    assert {name[len("socks5srv_"):-len("_total")]: found for name, found in counters.items() if name.startswith("socks5srv_")} == {
        "connections": {("taken",), ("turned_away",)}, "sessions_ended": {(event,) for event in CLOSED["event"]},
        "auth_attempts": {("username_password", "success"), ("username_password", "failure")}, "relay_bytes": {("up",), ("down",)},
        "udp_datagrams": {("up",), ("down",)}, "udp_drops": {("up",), ("down",)}, "worker_deaths": {()}, "cpu_seconds": {()},
    }


def test_they_count_what_happens(watch: Start, echo: Any, new_client: Any, refusing: Any) -> None:
    page = watch(users={"anna": "sesame"})
    client = one_of_each(page, new_client, refusing(), echo)
    exchange(client, b"x" * 100)
    assert eventually(lambda: samples(page, "socks5srv_relay_bytes") == {("up",): 100.0, ("down",): 100.0})
    assert samples(page, "socks5srv_requests") == {("connect", "connection_refused"): 1.0, ("connect", "succeeded"): 1.0}
    assert samples(page, "socks5srv_auth_attempts") == {("username_password", "failure"): 1.0, ("username_password", "success"): 2.0}
    assert samples(page, "socks5srv_connections") == {("taken",): 3.0}
    assert samples(page, "socks5srv_sessions") == {("connect",): 1.0}
    assert one(page, "socks5srv_connect_duration_seconds", "count") == one(page, "socks5srv_dns_duration_seconds", "count") == 1
    client.close()
    eventually(lambda: samples(page, "socks5srv_sessions_ended") == {("close",): 1.0, ("failed",): 1.0, ("login_failed",): 1.0})
    assert samples(page, "socks5srv_relay_bytes") == {("up",): 100.0, ("down",): 100.0}


def test_a_histogram_is_cumulative(page: Watched) -> None:
    for seconds in (0.001, 0.005, 0.3, 99.0):
        page.metrics.counters.time("resolving", seconds)
    found = samples(page, "socks5srv_dns_duration_seconds")
    assert [found[bound,] for bound in ("0.005", "0.25", "0.5", "10.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert one(page, "socks5srv_dns_duration_seconds", "sum") == pytest.approx(99.306)


def test_labels_are_of_closed_sets_whatever_comes_over_the_wire(page: Watched, new_client: Any) -> None:
    octets = [
        b"\x05\x01\x00\x05\x09\x00\x01\x01\x01\x01\x01\x00\x50", b"\x05\x01\x00\x05\x01\x00\x09\x01\x01\x01\x01\x00\x50", b"\x04", b"{evil=\"1\"}",
        b"\x05\x01\x00\x05\x01\x00\x03\x0dno such name!\x00\x50", b"\x05\x01\x00\x05\x01\x00\x01", b"\x05\x00", b"",
    ]
    for message in octets:
        client = new_client(page)
        client.send(message)
        client.end()
        client.rest()
    eventually(lambda: page.sessions_ended() == len(octets))
    for family in families(page).values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label in CLOSED and family.name.startswith("socks5srv_"):
                    assert value in CLOSED[label], sample
                else:
                    assert label in {"le", "version", "python", "errno", "implementation", "major", "minor", "patchlevel"}


def test_what_is_turned_away_is_counted(watch: Start, new_client: Any) -> None:
    page = watch(max_clients=1)
    new_client(page).greet()
    assert new_client(page).rest() == b""
    assert samples(page, "socks5srv_connections") == {("taken",): 1.0, ("turned_away",): 1.0}
    assert samples(page, "socks5srv_ready") == {(): 0.0}
    assert samples(page, "socks5srv_limit_connections") == {(): 1.0}


def test_what_the_system_is_out_of_is_counted(page: Watched) -> None:
    page.server.stopped.set()           # or it would wait a while

    class Full:
        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "too many open files")

    with pytest.raises(OSError, match="too many"):
        page.server._accept(Full())
    page.server.stopped.clear()
    assert samples(page, "socks5srv_accept_errors") == {("EMFILE",): 1.0}


def test_it_drains_as_the_readiness_says(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (samples(page, "socks5srv_ready"), samples(page, "socks5srv_draining")) == ({(): 1.0}, {(): 0.0})
    monkeypatch.setattr(page.stats, "not_ready", lambda: DRAINING)
    assert page.ask("/readyz")[:2] == (503, b"draining\n")
    assert (samples(page, "socks5srv_ready"), samples(page, "socks5srv_draining")) == ({(): 0.0}, {(): 1.0})


def test_what_it_has_taken_of_the_cpu_grows(page: Watched) -> None:
    before = samples(page, "socks5srv_cpu_seconds")[()]
    assert 0 < before < eventually(lambda: [now for now in [samples(page, "socks5srv_cpu_seconds")[()]] if now > before])[0]


@needs_proc
def test_the_process_is_told_of(page: Watched) -> None:
    told = ("open_fds", "max_fds", "resident_memory_bytes", "cpu_seconds", "start_time_seconds")
    assert {f"process_{name}" for name in told} <= set(families(page))


def test_openmetrics_is_spoken_to_who_asks_for_it(page: Watched) -> None:
    need_module("prometheus_client")
    answer = page.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


def test_without_the_extra_it_says_what_to_install(page: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "socks5srv.monitor.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)         # so that it cannot be imported
    answer = page.ask("/metrics")
    assert (answer.status, answer.body.count(b"\n")) == (501, 1)
    assert b'pip install "socks5srv[metrics]"' in answer.body
    assert b'"metrics"' not in page.ask("/").body
    assert page.ask("/healthz").body == b"ok\n"


def test_with_the_extra_the_page_links_to_the_metrics(page: Watched) -> None:
    need_module("prometheus_client")
    assert b'<a href="metrics">metrics</a>' in page.ask("/").body


def test_the_manual_has_every_metric_and_every_label(page: Watched) -> None:
    from tests.docs.pages import literals, table

    rows = table("observing", "Metric")
    documented = {name[:-len("_total")] if name.endswith("_total") else name for names, _labels in rows for name in literals(names)}
    assert documented == {name for name in families(page) if name.startswith("socks5srv_")}
    labels = {label for _names, cell in rows for label in literals(cell)}
    assert labels == {*CLOSED, "errno", "version", "python"}
    (reasons,) = [cell.partition(": ")[2] for names, cell in rows if "handshake" in names]
    assert set(reasons.split(", ")) == REASONS


@pytest.mark.parametrize("version", ["abc", "1.x", "1.0.0\r\n X: y", "\xff", ""])
@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_a_version_that_is_none_is_no_bug_and_comes_not_back(page: Watched, caplog: pytest.LogCaptureFixture, kind: str, version: str) -> None:
    need_module("prometheus_client")
    accept = f"Accept: {kind};version={version}".encode("latin-1")
    answer = page.raw(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s\r\n\r\n" % (page.port, accept))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (b"socks5srv_build_info" in answer, b"X: y" in answer) == (True, False)
    assert "unhandled exception" not in caplog.text
