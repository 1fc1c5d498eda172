"""The metrics as Prometheus takes them: what promtool says of them and of examples/prometheus/, and three nodes that are scraped with those files."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from tests.clients.harness import PATIENCE, need, need_module
from tests.conftest import LOCALHOST, TIMEOUT, T, eventually, in_thread, udp_socket
from tests.program import ROOT, Service
from tests.workers.processes import kill, needs_linux, workers_of

from socks5srv.protocol import Address, Command, Datagram, ProtocolError, ReplyCode

from .watched import Page, Start, one_of_each

EXAMPLES = ROOT / "examples" / "prometheus"
DASHBOARD = json.loads((EXAMPLES / "dashboard.json").read_text(encoding="utf-8"))
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
patient = pytest.mark.timeout(10 * PATIENCE)
VARIABLES = {"$job": "socks5srv", "$instance": ".*", "$__rate_interval": "10s", "$__range": "1m"}


def promtool(*words: str, stdin: bytes = b"") -> Tuple[int, str]:
    """Its exit code, and all that it says."""
    done = subprocess.run([need("promtool"), *words], cwd=EXAMPLES, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False)
    return done.returncode, done.stdout.decode()


# --- promtool ---

def test_promtool_finds_nothing_wrong_with_the_metrics(watch: Start, echo: Any, new_client: Any, refusing: Any) -> None:
    page = watch(users={"anna": "sesame"})
    one_of_each(page, new_client, refusing(), echo)
    with new_client(page) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        client.rest()
    page.metrics.count("accept_errors", "EMFILE")
    need_module("prometheus_client")
    assert promtool("check", "metrics", stdin=page.ask("/metrics").body) == (0, "")


def test_promtool_would_find_what_is_wrong() -> None:
    code, text = promtool("check", "metrics", stdin=b"# TYPE seconds counter\nseconds 1\n")
    assert code != 0
    assert "_total" in text


@pytest.mark.parametrize("words", [
    ("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", str(ROOT / "tests" / "monitor" / "alerts_test.yml")),
], ids=" ".join)
def test_promtool_is_content_with_the_example(words: Tuple[str, ...]) -> None:
    code, text = promtool(*words)
    assert code == 0, text
    assert "SUCCESS" in text


def test_each_alert_has_a_test() -> None:
    def alerts(path: Path, key: str) -> List[str]:
        return re.findall(rf"\b{key}: (\w+)", path.read_text(encoding="utf-8"))

    tested = set(alerts(ROOT / "tests" / "monitor" / "alerts_test.yml", "alertname"))
    assert sorted(tested) == sorted(alerts(EXAMPLES / "alerts.yml", "alert"))


# --- the dashboard ---

def test_each_panel_of_the_dashboard_says_what_it_shows_and_has_a_place_of_its_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"] for panel in panels)
    cells = [
        (place["x"] + right, place["y"] + down) for place in (panel["gridPos"] for panel in panels)
        for right in range(place["w"]) for down in range(place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(right for right, _down in cells) < 24
    assert all('job=~"$job", instance=~"$instance"' in query for _title, query in QUERIES)


# --- a real Prometheus ---

def seen(condition: Callable[[], T]) -> T:
    """As eventually(), but with more patience for five processes on a busy computer, and without taking what they need."""
    return eventually(condition, PATIENCE, 0.1)


class Prometheus:
    """One that scrapes these pages once a second, which is also how long it waits for one, with the files of the example."""

    def __init__(self, folder: Path, pages: List[Page]) -> None:
        config = (EXAMPLES / "prometheus.yml").read_text(encoding="utf-8").replace("_interval: 15s", "_interval: 1s")
        for number, page in enumerate(pages, 1):
            assert f"node{number}.example:9180" in config
            config = config.replace(f"node{number}.example:9180", f"{LOCALHOST}:{page.port}")
        (folder / "prometheus.yml").write_text(config)
        (folder / "alerts.yml").write_bytes((EXAMPLES / "alerts.yml").read_bytes())
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [need("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={LOCALHOST}:0"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return "Server is ready" in self.log.read_text()

        seen(is_ready)
        self.port = int(re.findall(r'"Listening on".* address=\S+:(\d+)', self.log.read_text())[0])

    def ask(self, path: str) -> Any:
        with urlopen(f"http://{LOCALHOST}:{self.port}/api/v1/{path}", timeout=TIMEOUT) as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> List[Tuple[Dict[str, str], float]]:
        """The labels and the value of each series."""
        return [(each["metric"], float(each["value"][1])) for each in self.ask(f"query?query={quote(text)}")["result"]]

    def number(self, text: str) -> float:
        """The value of the only series; -1 if there is none."""
        found = self.query(text)
        assert len(found) < 2
        return found[0][1] if found else -1


def firing(prometheus: Prometheus) -> Dict[str, str]:
    """The alerts that are pending or firing."""
    return {alert["labels"]["alertname"]: alert["state"] for alert in prometheus.ask("alerts")["alerts"]}


@pytest.fixture
def nodes(start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> List[Service]:
    """One like any other, one of two processes, and one that asks for a password."""
    monkeypatch.delenv("SOCKS5SRV_TEST_WORKERS", raising=False)
    return [start("--status", "0", *words) for words in ((), ("--workers", "2"), ("-u", "anna:sesame"))]


@pytest.fixture
def pages(nodes: List[Service]) -> List[Page]:
    return [Page.of(node) for node in nodes]


@pytest.fixture
def prometheus(pages: List[Page], tmp_path: Path) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    prometheus = Prometheus(folder, pages)
    try:
        prometheus.wait_until_ready()
        seen(lambda: prometheus.number("count(up)") == 3)     # it looks whom to scrape once in five seconds
        yield prometheus
    finally:
        prometheus.process.kill()
        prometheus.process.wait(TIMEOUT)


@pytest.fixture
def traffic(nodes: List[Service], echo: Any, refusing: Any) -> Iterator[Callable[[], int]]:
    """Clients of all kinds come to the nodes, one after the other; the call ends it, and returns how many octets they have sent by TCP."""
    over, sent, refused = threading.Event(), [0], refusing()

    def come() -> None:
        while not over.is_set():
            for node in nodes[:2]:
                with suppress(OSError, ProtocolError), node.client() as client:      # a worker of it may be killed
                    client.ask(Command.CONNECT, ("localhost", echo[1]))
                    client.send(b"x" * 1000)
                    client.exactly(1000)
                    sent[0] += 1000
                with suppress(OSError, ProtocolError), node.client() as client:
                    assert client.ask(Command.CONNECT, refused).code is ReplyCode.CONNECTION_REFUSED
            with nodes[0].client() as client:
                client.send(b"GET / HTTP/1.0\r\n\r\n")
                client.rest()
            with nodes[0].client() as client, udp_socket() as ours, udp_socket() as target:
                relay = client.ask(Command.UDP_ASSOCIATE, ("0.0.0.0", 0)).bound[:2]
                for datagram in (b"nonsense", bytes(Datagram(Address.of(target.getsockname()), b""))):
                    ours.sendto(datagram, relay)
                target.recv(1)
            assert not nodes[2].admits("anna", "wrong")
            assert nodes[2].admits("anna", "sesame")
            over.wait(0.05)

    done = in_thread(come)

    def end() -> int:
        over.set()
        done()
        return sent[0]

    yield end
    end()


@patient
@pytest.mark.usefixtures("traffic")
def test_every_query_of_the_dashboard_has_an_answer(prometheus: Prometheus) -> None:
    for title, query in QUERIES:
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        names = {re.sub("_(bucket|total)$", "", name) for name in re.findall(r"\bsocks5srv_\w+(?={)", query)}
        assert names or "up{" in query, title
        assert seen(lambda names=names: names <= set(prometheus.ask("metadata"))), title     # though "or vector(0)" has an answer anyway
        assert "$" not in query, title
        assert seen(lambda query=query: [value for _labels, value in prometheus.query(query) if math.isfinite(value)]), title


@patient
def test_the_sum_over_the_nodes_is_what_the_clients_have_sent_and_one_that_ends_is_missed(prometheus: Prometheus, traffic: Any, nodes: List[Service]) -> None:
    seen(lambda: prometheus.number("sum(socks5srv_relay_bytes_total)") > 5_000)
    sent = traffic()
    for direction in ("up", "down"):
        seen(lambda direction=direction: prometheus.number(f'sum(socks5srv_relay_bytes_total{{direction="{direction}"}})') == sent)
    seen(lambda: prometheus.number("sum(socks5srv_connections_total)") == prometheus.number("sum(socks5srv_sessions_ended_total)") > 0)
    seen(lambda: (prometheus.number("sum(up)"), firing(prometheus)) == (3, {}))
    nodes[0].stop()
    seen(lambda: (prometheus.number("sum(up)"), firing(prometheus)) == (2, {"Socks5NodeDown": "pending"}))


@patient
@needs_linux
def test_a_worker_that_dies_is_seen_and_resets_no_counter(prometheus: Prometheus, traffic: Any, nodes: List[Service]) -> None:
    seen(lambda: prometheus.number("min(rate(socks5srv_relay_bytes_total[10s]) > 0)") > 0)
    for deaths in (1, 2):
        kill(nodes[1], min(workers_of(nodes[1])))
        seen(lambda deaths=deaths: prometheus.number("max(socks5srv_worker_deaths_total)") == deaths)
    traffic()
    series = {labels["__name__"] for labels, _value in prometheus.query('{__name__=~"socks5srv_.+_(total|bucket|count|sum)"}')}
    assert {name: prometheus.number(f"sum(resets({name}[1m]))") for name in series} == dict.fromkeys(series, 0)
    seen(lambda: (prometheus.number("sum(up)"), firing(prometheus)) == (3, {"Socks5WorkerDied": "firing"}))
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
