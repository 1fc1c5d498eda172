"""Packets, the file, and the thread that writes it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socks5srv.capture import pcap
from socks5srv.capture.pcap import CLIENT, SERVER, CaptureWriter, TcpStream
from socks5srv.protocol import Address
from tests.clients.harness import environment, need, run
from tests.conftest import LOCALHOST, TIMEOUT, Client, eventually, exchange
from tests.networks import LinkLocal

from .recorded import COMMAND, Packet, Place, Record, assert_sound, packets_in, parse, said, sum_of_words, visit


@contextlib.contextmanager
def piped(*words: str) -> Iterator[Any]:
    """A server whose output we have, and do not have to read."""
    command = [*COMMAND, "0", *words]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port_in(file: Path) -> int:
    return int(eventually(lambda: file.exists() and file.read_text()))


# --- the file ---

def test_it_can_be_read_while_the_server_serves(recorded: Record, echo: Place) -> None:
    server = recorded()
    with Client(server.place) as client:
        ours = client.socket.getsockname()
        client.connect(echo)
        exchange(client, b"seen already")
        eventually(lambda: b"seen already" in server.path.read_bytes())
        eventually(lambda: said(packets_in(server.path.read_bytes())).get((server.place, ours), b"").endswith(b"seen already"))
        assert_sound(server.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_the_end_it_is_complete(recorded: Record, echo: Place, number: int) -> None:
    server = recorded()
    with Client(server.place) as client:
        client.connect(echo)
        exchange(client, b"x" * 100_000)
        assert server.service.stop(number) == 0
    octets = said(server.packets())
    assert sorted(len(text) for text in octets.values()) == [100_000, 100_000, 100_012, 100_013]
    assert "Traceback" not in server.service.stderr


@pytest.mark.skipif(os.name == "nt", reason="not on this platform: modes of files")
@pytest.mark.parametrize("there_already", [False, True])
def test_only_its_owner_may_read_it(recorded: Record, tmp_path: Path, there_already: bool) -> None:
    path = tmp_path / "recording.pcap"
    if there_already:
        path.write_bytes(b"of an earlier run" * 100)
        path.chmod(0o644)
    server = recorded()
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert server.packets() == []


def test_a_file_that_cannot_be_written_is_told_in_one_sentence(run_command: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "recording.pcap"
    outcome = run_command("0", "--workers", "1", "--pcap", str(path))
    message = f"cannot write the recording {path}: No such file or directory\n  choose another file with --pcap"
    assert (outcome.code, outcome.stderr) == (1, f"socks5srv: error: {message}\n")


def test_who_cannot_listen_leaves_other_recordings_alone(run_command: Callable[..., Any], recorded: Record, echo: Place) -> None:
    server = recorded()
    visit(server.service.port, echo)
    server.service.wait_for("ok")
    assert run_command(str(server.place[1]), "--pcap", str(server.path)).code == 1
    assert said(server.packets()) != {}


@pytest.mark.parametrize(("words", "complaint"), [
    (("--workers", "2", "--pcap", "x.pcap"), "--pcap records one process: leave --workers out"),
    (("--pcap", "-", "--run", "true"), "--pcap - and the COMMAND of --run would write to the same output: give a FILE"),
])
def test_what_does_not_go_together_is_refused(run_command: Callable[..., Any], words: Tuple[str, ...], complaint: str) -> None:
    outcome = run_command(*words)
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"socks5srv: error: {complaint}\n")


def test_a_terminal_is_spared(at_terminal: Callable[..., Any]) -> None:
    code, text = at_terminal("--pcap", "-").end()
    assert code == 2
    assert "| wireshark -k -i -" in text


def test_to_standard_output_it_goes_packet_by_packet(echo: Place, tmp_path: Path) -> None:
    with piped("-q", "--pcap", "-", "--port-file", str(tmp_path / "port")) as process:
        with Client((LOCALHOST, port_in(tmp_path / "port"))) as client:
            client.connect(echo)
            exchange(client, b"seen")
            octets = b""
            while octets.count(b"seen") < 4:            # in and out, there and back
                octets += os.read(process.stdout.fileno(), 65536)
        process.terminate()
        octets += process.stdout.read()
        assert process.wait(TIMEOUT) == 0
    assert sum(packet.payload == b"seen" for packet in packets_in(octets)) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: named pipes")
def test_a_named_pipe_is_read_by_tshark_as_it_comes(start: Callable[..., Any], echo: Place, tmp_path: Path) -> None:
    program, fifo = need("tshark"), tmp_path / "pipe"
    os.mkfifo(fifo)
    with subprocess.Popen([program, "-n", "-l", "-r", str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        try:
            service = start("--pcap", str(fifo), "--workers", "1")
            visit(service.port, echo)
            service.stop()
            assert reader.stdout is not None
            assert b"[SYN]" in reader.stdout.read()
        finally:
            reader.kill()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: named pipes")
def test_a_named_pipe_without_a_reader_can_be_given_up(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with piped("--pcap", str(fifo)) as process:
        assert f"waiting for a program that reads {fifo}" in process.stderr.readline().decode()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().decode() == f"socks5srv: error: no program reads {fifo}\n"
        assert process.wait(TIMEOUT) == 130


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this platform: /dev/full")
def test_when_the_disk_is_full_it_is_told_once_and_serving_goes_on(start: Callable[..., Any], echo: Place) -> None:
    service = start("--pcap", "/dev/full", "--workers", "1")
    for _ in range(3):
        visit(service.port, echo, b"x" * 1000)
    assert service.stop() == 0
    assert service.stderr.count(f"recording stopped: {os.strerror(errno.ENOSPC)}; serving goes on") == 1
    assert "Traceback" not in service.stderr


def test_a_reader_that_goes_is_no_reason_to_stop(echo: Place, tmp_path: Path) -> None:
    with piped("-q", "--pcap", "-", "--port-file", str(tmp_path / "port")) as process:
        port = port_in(tmp_path / "port")
        process.stdout.close()
        visit(port, echo)
        assert b"recording stopped: " in process.stderr.readline()      # which the end would be too late for
        visit(port, echo)
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == b""


def test_a_program_can_be_recorded(run_command: Callable[..., Any], tmp_path: Path, echo: Place) -> None:
    path = tmp_path / "recording.pcap"
    program = (
        "import os; from socks5srv import client\n"
        f"with client.connect(os.environ['ALL_PROXY'], {LOCALHOST!r}, {echo[1]}) as sock: sock.sendall(b'hello'); sock.recv(5)"
    )
    outcome = run_command("--pcap", str(path), "--run", sys.executable, "-c", program)
    assert outcome.code == 0, outcome.stderr
    assert [packet.payload for packet in packets_in(path.read_bytes())].count(b"hello") == 4


def test_without_the_option_nothing_of_it_is_imported() -> None:
    code = "import sys; import socks5srv.cli.main; print(*[name for name in sys.modules if 'pcap' in name or 'capture' in name])"
    assert run(sys.executable, "-c", code).split() == []


# --- the writer by itself ---

def test_a_reader_that_is_stuck_delays_serving_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(CaptureWriter, "max_buffered", 100_000)
    monkeypatch.setattr(CaptureWriter, "timeout", 0.1)
    reader, pipe = os.pipe()
    writer = CaptureWriter(open(pipe, "wb", buffering=0))       # noqa: SIM115
    with caplog.at_level(logging.ERROR, "socks5srv"):
        for _ in range(1000):
            writer.add(lambda octets: [octets], bytes(10_000))
    assert caplog.messages == ["recording stopped: it cannot be written as fast as it comes; serving goes on"]
    writer.close()               # and does not wait
    os.close(reader)
    writer.thread.join(TIMEOUT)
    assert not writer.thread.is_alive()


def test_nothing_is_added_after_the_end(tmp_path: Path) -> None:
    writer = CaptureWriter(pcap.open_file(str(tmp_path / "file")))
    writer.close()
    writer.add(lambda: [b"x"])
    writer.close()
    assert writer.events == []
    assert (tmp_path / "file").read_bytes() == pcap.FILE_HEADER


def test_a_reader_that_does_not_read_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CaptureWriter(pcap.open_file(str(tmp_path / "file")))
    waits: List[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(writer.thread, "join", waits.append)
        writer.close()
        writer.close()
    writer.thread.join()
    assert waits == [2.0, 0]


def test_a_bug_ends_the_recording_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CaptureWriter(pcap.open_file(str(tmp_path / "file")))
    writer.add(lambda: [bytes(1 // 0)])
    writer.thread.join(TIMEOUT)
    assert writer.over
    stopped = "recording stopped: integer division or modulo by zero; serving goes on"
    assert caplog.messages == ["unhandled exception while recording", stopped]
    writer.close()


def test_that_the_last_packets_are_missing_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    reader, pipe = os.pipe()
    writer = CaptureWriter(open(pipe, "wb", buffering=0))       # noqa: SIM115
    assert os.read(reader, 100) == pcap.FILE_HEADER
    with writer.changed:            # it writes when this is over, and so at its end
        writer.add(lambda: [b"x" * 100])
        writer.over = True
        os.close(reader)
    writer.thread.join(TIMEOUT)
    assert caplog.messages == ["recording stopped: Broken pipe"]


# --- packets ---

@given(st.lists(st.binary(max_size=40).filter(lambda octets: len(octets) % 2 == 0), max_size=3), st.binary(max_size=41))
def test_the_checksum_is_that_of_the_rfc(parts: List[bytes], last: bytes) -> None:
    octets = b"".join(parts) + last
    found = pcap.checksum(*parts, last)
    assert found != b"\xff\xff"
    assert sum_of_words(found + octets) == (0xFFFF if any(octets) else 0)


@pytest.mark.parametrize(("protocol", "checksum"), [(pcap.TCP, b"\0\0"), (pcap.UDP, b"\xff\xff")])
def test_a_checksum_of_zero_is_another_number_for_udp_alone(protocol: int, checksum: bytes) -> None:
    """RFC 768; for TCP tshark complains of that (RFC 1624)."""
    ends = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
    some = pcap.ip_packet(*ends, protocol, bytes(30), checksum_at=6)[26:28]
    assert pcap.ip_packet(*ends, protocol, bytes(28) + some, checksum_at=6)[26:28] == checksum


@pytest.mark.parametrize("length", [pcap.PIECE - 1, pcap.PIECE, pcap.PIECE + 1, pcap.PIECE + 2, 3 * pcap.PIECE + 1, pcap.SEGMENT])
def test_the_checksum_of_much_is_that_of_the_rfc(length: int) -> None:
    octets = os.urandom(length)
    assert sum_of_words(pcap.checksum(octets) + octets) == 0xFFFF


@pytest.mark.parametrize("zone", [True, False])
def test_a_packet_has_no_zone_but_the_address_on_that_link(link_local: LinkLocal, zone: bool) -> None:
    """And where there is no way, the zeros stay."""
    there = Address.numeric(link_local.zoned if zone else link_local.host, 9)
    (packet,) = pcap.udp(Address.numeric("::", 7), there, b"data")
    address = ip_address(link_local.host).packed
    assert packet[8:40] == (address if zone else bytes(16)) + address


ENDS = Address.numeric("192.0.2.1", 40000), Address.numeric("192.0.2.2", 1080)
OPEN = ("syn",), ("establish",)


def packets_of(stream: TcpStream, *steps: Tuple[Any, ...]) -> List[Packet]:
    return [parse(0, packet) for name, *details in steps for packet in getattr(stream, name)(*details)]


@pytest.mark.parametrize(("steps", "packets"), [
    ([("fin", CLIENT), ("data", CLIENT, b"late")], [">FA", "<A"]),
    ([("fin", CLIENT), ("fin", CLIENT)], [">FA", "<A"]),
    ([("fin", CLIENT), ("data", SERVER, b"answer"), ("fin", SERVER)], [">FA", "<A", "<PA6", "<FA", ">A"]),
    ([("reset", SERVER), ("data", CLIENT, b"late"), ("fin", CLIENT), ("reset", CLIENT)], ["<RA"]),
    ([("fin", CLIENT), ("fin", SERVER), ("reset", SERVER)], [">FA", "<A", "<FA", ">A"]),
    ([("establish",), ("reset", CLIENT), ("establish",)], [">RA"]),
    ([("data", CLIENT, b"x" * 70_000)], [">PA65495", ">PA4505"]),
    ([("data", CLIENT, b"x")] * 17, [">PA1"] * 16 + ["<A", ">PA1"]),
])
def test_the_rules_of_tcp_are_kept(steps: List[Tuple[Any, ...]], packets: List[str]) -> None:
    found = packets_of(TcpStream(*ENDS), *OPEN, *steps)
    said(found)                         # which checks the numbers
    signs = [">" if packet.source == ENDS[0][:2] else "<" for packet in found]
    assert [sign + packet.flags + str(len(packet.payload) or "") for sign, packet in zip(signs, found)][3:] == packets


def test_a_refused_call_is_refused_once_and_carries_nothing() -> None:
    refused = ("reset", SERVER)
    steps = [("syn",), ("syn",), ("data", CLIENT, b"x"), ("fin", CLIENT), refused, refused, ("establish",)]
    assert [packet.flags for packet in packets_of(TcpStream(*ENDS), *steps)] == ["S", "RA"]


def test_sequence_numbers_begin_again_behind_the_largest() -> None:
    stream = TcpStream(*ENDS)
    stream.ends[CLIENT].next = 2 ** 32 - 3
    packets = packets_of(stream, *OPEN, ("data", CLIENT, b"hello"), ("data", CLIENT, b"again"), ("fin", CLIENT))
    assert said(packets)[ENDS[0][:2], ENDS[1][:2]] == b"helloagain"


def test_tshark_would_see_a_fault(recorded: Record, echo: Place, tmp_path: Path) -> None:
    """Of the tests: what they ask for can be missed."""
    server = recorded()
    visit(server.service.port, echo)
    packets, octets = server.packets("ok"), server.path.read_bytes()
    first = octets.index(b"hello") - 16 - 20 - 20           # headers of the record, IP and TCP
    damaged, cut = tmp_path / "damaged", tmp_path / "cut"
    damaged.write_bytes(octets.replace(b"hello", b"hullo", 1))
    cut.write_bytes(octets[:first] + octets[first + 16 + 20 + 20 + len(b"hello"):])
    assert len(packets_in(cut.read_bytes())) == len(packets) - 1
    for path in (damaged, cut):
        with pytest.raises(AssertionError):
            assert_sound(path)
