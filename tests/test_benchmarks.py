"""
The benchmarks: that they measure what they say, count what fails, and end.

The numbers themselves are nothing for a test: how fast a computer is, it may decide for itself.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from socks5srv.protocol import Command
from socks5srv.handler import Socks5Handler

from .benchmarks import __main__, columns, processes, rounds
from .benchmarks.columns import Job
from .benchmarks.measures import COLUMNS, FAILURES, NOTE
from .benchmarks.results import BadResults, check, load, save
from .benchmarks.rounds import DIRECT, OURS, ROOT, summary
from .benchmarks.tables import digits, tables
from .benchmarks.loop import Loop, Task
from .benchmarks.traffic import TRAIN, WINDOW, Failures, Place, Transfer, Waiting, Way, datagram_socket

HERE = ROOT / "tests" / "benchmarks"
README = (HERE / "README.rst").read_text(encoding="utf-8")
QUICK = ("--quick", "--seconds", "0.03")
SLOW = 60                   # seconds that a run may take on a computer that has other work to do

on_linux = sys.platform == "linux"
linux_tells = pytest.mark.skipif(not on_linux, reason="not on this platform: only Linux tells what a process costs")


def benchmarks(*words: object, **environment: str) -> Tuple[int, str, str]:
    """Run the program as a user does; its exit code, output and errors."""
    command = [sys.executable, "-m", "tests.benchmarks", *map(str, words)]
    environment = {**os.environ, "PYTHONWARNINGS": "error", **environment}
    done = subprocess.run(command, cwd=str(ROOT), env=environment, capture_output=True, timeout=SLOW, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextmanager
def measuring(job: Job) -> Iterator[columns.Measurement]:
    measurement = columns.Measurement(job)
    try:
        yield measurement
    finally:
        measurement.loop.close()


def measured(job: Job, *names: str) -> columns.Measurement:
    """Measure these columns in this process."""
    with measuring(job) as measurement:
        for name in names:
            columns.FUNCTIONS[name](measurement)
    return measurement


# --- a whole run ---

@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """What a run of everything has found; few tunnels have to do, or it would take too long."""
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    code, output, errors = benchmarks(*QUICK, "--columns", ",".join(set(COLUMNS) - set(FEW)), "--json", file)
    assert code == 0, errors
    results = load(str(file))
    plan = rounds.Plan([], [*FEW], 1, 0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "IDLE", FEW["idle"][-1])
        patch.setattr(columns, "GROWTH", FEW["growth"])
        for server, ready in rounds.contenders(plan).items():
            for column in FEW:
                with ready() as (way, pid):
                    measurement = measured(Job(way, plan.seconds, pid), column)
                results[server][column] = {**measurement.numbers, FAILURES: measurement.all_failures}
    return {"results": results, "file": file, "output": output}


FEW = {"idle": (200,), "growth": (10, 100)}      # tunnels


def expected(column: str, server: str) -> List[str]:
    """The keys that there have to be."""
    costs = {"cpu", "kib"} if server == DIRECT or not on_linux else set()
    situations = FEW.get(column) or COLUMNS[column].situations
    return [f"{quantity}_{situation}" for quantity in COLUMNS[column].quantities if quantity not in costs for situation in situations]


@pytest.mark.parametrize("server", [DIRECT, OURS])
@pytest.mark.parametrize("column", COLUMNS)
def test_every_number_of_every_column_is_measured_and_nothing_fails(run: Dict[str, Any], column: str, server: str) -> None:
    numbers = dict(run["results"][server][column])
    assert numbers.pop(FAILURES) == 0, numbers
    assert sorted(numbers) == sorted(expected(column, server))
    # Some may be too little to be seen in so short a time.
    assert [key for key, value in numbers.items() if value <= 0 and not key.startswith(("loss", "cpu", "kib"))] == []


def test_the_numbers_fit_together(run: Dict[str, Any]) -> None:
    for columns_ in run["results"].values():
        for column in ("connections", "messages", "growth", "idle", "fairness"):
            found = columns_[column]
            assert [key for key in found if key.startswith("p50_") and found[key] > found["p99_" + key[4:]]] == []
        # Little's law: those under way are the rate times the time that each takes; roughly, in so short a time.
        assert 6 < columns_["messages"]["rate_64"] * columns_["messages"]["p50_64"] / 1e6 < 640
        assert columns_["idle"]["opened_200"] == 200
        assert 0 <= columns_["datagrams"]["loss_1"] < 100
        assert 0 <= columns_["quic"]["loss_upload"] < 100


@linux_tells
def test_a_server_costs_time_and_memory(run: Dict[str, Any]) -> None:
    ours = run["results"][OURS]
    costs = [value for column in ours.values() for name, value in column.items() if name.startswith("cpu_")]
    assert min(costs) >= 0
    assert any(costs)       # some are less than the system can measure: it counts hundredths of a second
    assert 0.2 < ours["idle"]["kib_200"] < 100


def test_the_tables_are_what_is_printed(run: Dict[str, Any]) -> None:
    for name in set(COLUMNS) - set(FEW):
        assert f"**{COLUMNS[name].title}" in run["output"]
    code, output, errors = benchmarks("--draw", run["file"], "--rst", "--reference", DIRECT)
    assert (code, errors) == (0, "")
    assert output == tables(load(str(run["file"])), DIRECT)
    faster = run["results"][DIRECT]["bulk"]["rate_upload"] / run["results"][OURS]["bulk"]["rate_upload"]
    assert re.search(rf"^{OURS} .*\({digits(1 / faster)}x\)", output, re.MULTILINE)


def test_tables_and_page_are_restructured_text(run: Dict[str, Any]) -> None:
    rst = pytest.importorskip("readme_renderer.rst", reason="readme_renderer is not installed")
    for text in (run["output"], README):
        html = rst.render(text)
        assert html is not None
        assert html.count("<table") >= len(COLUMNS) - len(FEW)


def test_the_same_results_make_the_same_pictures(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    found = load(str(HERE / "results.json"))
    save({server: {name: found[server][name] for name in ("bulk", "growth") if name in found[server]} for server in found}, str(tmp_path / "two.json"))
    for folder, file, count in (("first", HERE / "results.json", len(COLUMNS)), ("second", tmp_path / "two.json", 2)):
        code, _output, errors = benchmarks("--draw", file, "--svg", tmp_path / folder, PYTHONWARNINGS="")
        assert code == 0, errors
        assert len(errors.splitlines()) == count
    for name in COLUMNS:
        picture = (tmp_path / "first" / f"{name}.svg").read_text(encoding="utf-8")
        assert OURS in picture
        assert not re.search(r"<dc:date>|/home/|20\d\d-", picture)
    for name in ("bulk", "growth"):
        assert (tmp_path / "first" / f"{name}.svg").read_bytes() == (tmp_path / "second" / f"{name}.svg").read_bytes()


# --- other servers ---

def test_a_server_of_somebody_else_is_measured_with_its_login(start_server: Any) -> None:
    server = start_server(users={"anna": "sesame"})
    host, port = server.server_address
    words = f"--server other={host}:{port} --user anna:sesame --columns datagrams --rounds 2 --seconds 0.03 --reference other"
    code, output, errors = benchmarks(*words.split())
    assert code == 0, errors
    assert [line.rpartition(" ")[2] for line in errors.splitlines()] == [DIRECT, OURS, "other"] * 2      # they take turns
    assert "failed" not in output
    assert re.search(r"^other +[1-9]", output, re.MULTILINE)
    assert "CPU and memory of other are left out" in output
    assert server.next_ended().user == "anna"


def test_a_login_that_is_missing_is_a_failure_that_is_shown(start_server: Any) -> None:
    measurement = measured(Job(Way(start_server(users={"anna": "sesame"}).server_address), 0.03), "datagrams")
    assert (measurement.numbers, measurement.notes[0]) == ({}, "1 association: 1 wants a login")
    assert measurement.all_failures >= 2


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "fairness"])
def test_a_server_that_is_not_there_has_failures_and_no_numbers(column: str, refusing: Any) -> None:
    measurement = measured(Job(Way(refusing()), 0.03), column)
    assert measurement.all_failures > 0
    assert "connection refused" in " ".join(measurement.notes)
    if column == "messages":        # those that were not even tried are missing, too
        assert measurement.notes[-1] == "512 tunnels: 160 connection refused, 352 not opened"
    assert [key for key in measurement.numbers if not key.startswith("opened")] == []


def test_there_is_no_number_beside_a_load_that_does_not_run(start_server: Any, tmp_path: Path) -> None:
    host, port = start_server(commands=frozenset({Command.CONNECT})).server_address
    code, output, errors = benchmarks("--server", f"{OURS}={host}:{port}", "--columns", "fairness", "--json", tmp_path / "json", *QUICK)
    assert code == 0, errors
    numbers = load(str(tmp_path / "json"))[OURS]["fairness"]
    assert {"p99_ping", "p99_pingbulk"} <= set(numbers)
    assert "p99_pingflood" not in numbers
    assert "beside a flood: 1 refused with reply 07" in output


def test_a_server_that_never_answers_takes_up_no_more_time_than_it_is_given(listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.traffic.PATIENCE", 0.35)
    with listen() as mute:
        measurement = measured(Job(Way(mute.getsockname()), 0.3), "connections")
    assert measurement.numbers == {}
    assert measurement.notes == ["1 client: 1 without an answer", "16 clients: 16 without an answer", "128 clients: 128 without an answer"]


def test_a_tunnel_that_nothing_comes_back_through_is_a_failure(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "GRACE", 0.2)

    class Deaf(Socks5Handler):
        def relay(self, target: Any) -> None:
            with target:            # and never a word comes back
                self.connection.settimeout(5)
                while self.connection.recv(1024):
                    pass

    failures, job = Failures(), Job(Way(start_server(Deaf).server_address), 0.05)
    with measuring(job) as measurement, measurement.tunnels(failures, 2, measurement.target()) as tunnels:
        times, _rate = columns.ping_pong(measurement, tunnels.sockets, failures)
    assert times == []
    assert failures.kinds == {"without an answer": 2}


PIECE = b"q" * columns.QUIC_PAYLOAD


def careless_relay(loop: Loop, sock: socket.socket, target: Place) -> Task:
    """Loses every tenth of the large datagrams that go to and fro, and changes another."""
    client, count = target, 0
    with Waiting(loop, sock):
        while True:
            yield
            octets, sender = sock.recvfrom(2048)
            if sender != target:
                client = sender
            count += len(octets) == len(PIECE)
            if count % 10 == 7:
                octets = octets.replace(PIECE, b"x" + PIECE[1:])
            if count % 10 != 5 or len(octets) < len(PIECE):
                sock.sendto(octets, client if sender == target else target)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_acknowledgements_keep_bulk_data_in_datagrams_going(start_server: Any, up: bool, portable: bool) -> None:
    target, failures, way = datagram_socket(), Failures(), Way(start_server().server_address)
    with measuring(Job(way, 0)) as m, columns.relays_to(m.loop, way, target, 1, failures) as ((relay,), header):
        transfer = Transfer(target, relay, header, PIECE, up, portable)
        transfer.start(m.loop)
        transfer.look()             # once, and nothing else is given up
        m.loop.run(10, lambda: transfer.received >= 10 * WINDOW)
    assert transfer.received >= 10 * WINDOW
    assert (transfer.lost, transfer.wrong, failures.total()) == (0, 0, 0)


@pytest.mark.parametrize("up", [False, True])
def test_bulk_data_in_datagrams_goes_on_after_a_loss_and_what_is_lost_or_changed_is_counted(up: bool) -> None:
    target, relay, failures = datagram_socket(), datagram_socket(), Failures()
    transfer = Transfer(target, relay.getsockname(), b"", PIECE, up, portable=False)
    with measuring(Job(Way(), 0.5)) as measurement:
        measurement.loop.start(careless_relay(measurement.loop, relay, target.getsockname()))
        columns.juggle(measurement, "upload", [transfer], failures)
    assert transfer.lost > 0        # it has given them up, and sent others
    assert transfer.sent - transfer.received >= transfer.lost
    assert 5 < measurement.numbers["loss_upload"] < 20
    assert failures.kinds["changed on the way"] == transfer.wrong > 0


def test_a_relay_that_is_gone_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "GRACE", 0.1)
    with datagram_socket() as gone:
        place = gone.getsockname()
    failures = Failures()
    with measuring(Job(Way(), 0.05)) as measurement:
        columns.juggle(measurement, "download", [Transfer(datagram_socket(), place, b"", PIECE, False, False)], failures)
    assert (measurement.numbers, failures.kinds) == ({}, {"nothing arrived": 1})


def test_rounds_become_medians() -> None:
    rounds = [({"rate_1": value}, 1, ["a word"]) for value in (1.0, 9.0, 2.0)]
    assert summary([*rounds, ({}, 0, []), ({"kib_10": 7.0}, 0, [])]) == {"rate_1": 2.0, "kib_10": 7.0, FAILURES: 3, NOTE: "a word"}


def test_memory_is_that_of_a_fresh_server(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: List[Tuple[str, str, bool]] = []

    def measure(column: str, job: Job) -> Any:
        jobs.append((column, "other" if job.way.proxy else "direct or ours", job.fresh))
        return ({"kib_2000": 5.0} if job.fresh else {}), 0, []

    monkeypatch.setattr(rounds, "in_a_process", measure)
    monkeypatch.setattr(rounds, "our_server", lambda _plan: nullcontext((Way(), None)))
    plan = rounds.Plan([rounds.Server("other", ("127.0.0.1", 1), None)], ["idle", "bulk", "growth"], 2, 0.01)
    found = rounds.run(plan, lambda _text: None)
    assert [fresh for _column, who, fresh in jobs if who == "other"] == [True] + [False] * 5
    assert [column for column, _who, _fresh in jobs[::6]] == ["growth", "idle", "bulk"]
    assert found["other"]["idle"]["kib_2000"] == 5.0


# --- what only Linux has ---

def test_it_measures_without_what_only_linux_has(start_server: Any) -> None:
    job = Job(Way(start_server().server_address), 0.03, os.getpid(), portable=True, most=100)
    measurement = measured(job, "bulk", "connections", "datagrams", "quic", "growth")
    assert measurement.all_failures == 0, measurement.notes
    assert measurement.loop.portable
    assert {"rate_download", "rate_upload", "rate_128", "rate_64", "p99_100"} <= set(measurement.numbers)
    assert not [key for key in measurement.numbers if key.startswith(("cpu", "kib"))]


@pytest.mark.parametrize(("unknown", "portable", "sends", "reads"), [
    ((), False, TRAIN, TRAIN), (("UDP_GRO",), False, TRAIN, 1), (("UDP_SEGMENT", "UDP_GRO"), False, 1, 1), ((), True, 1, 1),
])
def test_datagrams_go_in_trains_where_the_system_has_them(
    unknown: Tuple[str, ...], portable: bool, sends: int, reads: int, monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not on_linux and sends > 1:
        pytest.skip("not on this platform: only Linux has trains of datagrams")
    for name in unknown:
        monkeypatch.setattr(f"tests.benchmarks.traffic.{name}", 9999)
    with datagram_socket() as target:
        transfer = Transfer(target, target.getsockname(), b"", PIECE, True, portable)
        with transfer.client:
            transfer.acknowledged = transfer.carries - WINDOW       # room for one
            transfer.fill()
            target.settimeout(5)
            assert [len(target.recv(1 << 16)) for _ in range(sends // reads)] == [reads * len(PIECE)] * (sends // reads)
    assert transfer.sent == sends


def test_where_there_is_no_proc_nothing_is_known_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "PROC", str(tmp_path))
    assert (processes.cpu(os.getpid()), processes.memory(os.getpid())) == (None, None)
    processes.rest(os.getpid())


@linux_tells
def test_the_children_of_a_process_count() -> None:
    program = "import sys; block = b'x' * (40 << 20); print(flush=True); sys.stdin.read()"
    before = processes.memory(os.getpid())
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        after = processes.memory(os.getpid())
        child.communicate()
    assert before
    assert after
    assert after - before > 30 << 10


def test_what_there_are_no_descriptors_for_is_left_out_and_said() -> None:
    with measuring(Job(Way(), 0.01)) as measurement:
        measurement.limit = 1300
        assert columns.affordable(measurement, [10, 500, 1000]) == [10, 500]
    assert measurement.notes == ["1,000 tunnels left out: the generator may have 1,300 descriptors only (ulimit -n)"]


# --- mistakes ---

@pytest.mark.parametrize(("words", "sentence"), [
    ("--server name", "is not NAME=HOST:PORT"), ("--server name=127.0.0.1:http", "is not NAME=HOST:PORT"),
    ("--server name=example.com:1080", "with an IP address for a host"), ("--server direct=127.0.0.1:1", "'direct' is taken"),
    ("--server a=127.0.0.1:1 --server a=127.0.0.1:2", "needs a name of its own"), ("--user anna", "expected NAME:PASSWORD"),
    ("--columns bulk,speed", "there is no column 'speed'"), ("--rounds 0", "not a whole number above 0"),
    ("--seconds nan", "not a number of seconds"), ("--reference dante", "is none of direct, socks5srv"),
    ("--draw results.json", "with --svg FOLDER, or tables with --rst"), ("--draw no-such-file --rst", "cannot read no-such-file"),
    ("--draw README.rst --rst", "is no JSON"), ("--fast", "unrecognized arguments: --fast"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(words.split())
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, len(errors.splitlines())) == (2, "", 1)
    assert sentence in errors


def test_our_own_server_that_does_not_start_is_quoted() -> None:
    code, output, errors = benchmarks("--user", 300 * "a" + ":sesame", "--columns", "bulk", "--seconds", 0.01, "--rounds", 1)
    assert (code, output) == (1, "")
    assert "socks5srv did not start, and said: socks5srv: error:" in errors.splitlines()[-1]


def test_without_matplotlib_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(__main__.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit):
        __main__.main(["--svg", "pictures"])
    assert 'python -m pip install -e ".[benchmarks]"' in capsys.readouterr().err


@pytest.mark.parametrize(("found", "sentence"), [
    ([], "not of the form"), ({}, "not of the form"), ({"a": 1}, "not of the form"),
    ({"a": {"speed": {}}}, "has a column 'speed'"), ({"a": {"bulk": {"rate": 1}}}, "there is no key 'rate'"),
    ({"a": {"bulk": {"rate_download": "fast"}}}, "should be a number"),
    ({"a": {"bulk": {"rate_download": True}}}, "should be a number"),
])
def test_results_that_are_none_are_told_apart(found: Any, sentence: str) -> None:
    with pytest.raises(BadResults, match=re.escape(sentence)):
        check(found, "file")


def test_results_from_elsewhere_may_have_other_sizes_and_holes(tmp_path: Path) -> None:
    found = {"a": {"growth": {"rate_20000": 5, "rate_10": None, FAILURES: 2}}, "b": {"bulk": {"rate_upload": 1.23456}}}
    (tmp_path / "in").write_text(json.dumps(found), encoding="utf-8")
    read = load(str(tmp_path / "in"))
    save(read, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out").read_text(encoding="utf-8"))["b"]["bulk"]["rate_upload"] == 1.235
    assert [words in tables(read) for words in ("20,000", "- a: 2 failed", "Messages")] == [True, True, False]


# --- the page ---

def test_every_key_is_explained_in_the_readme() -> None:
    for name, column in COLUMNS.items():
        told = re.search(rf"^``{name}``\n((?:   .*\n|\n)+)", README, re.MULTILINE)
        assert told, name
        for word in [*column.quantities, *([] if name == "growth" else column.situations)]:
            assert f"``{word}``" in told.group(1), f"{name}: {word}"


def test_the_tables_in_the_readme_are_those_of_the_results_beside_it() -> None:
    assert tables(load(str(HERE / "results.json")), "microsocks") in README


def test_the_pictures_in_the_readme_are_there() -> None:
    pictures = re.findall(r"^\.\. image:: (.+)$", README, re.MULTILINE)
    assert "growth.svg" in pictures
    assert all((HERE / picture).exists() for picture in pictures)


def test_every_option_in_the_readme_is_one() -> None:
    options = {option for action in __main__.build_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z]+", README)) <= options | {"--port-file"}
