"""Security contexts of both sides against a real KDC, and what they make of octets."""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, List, Tuple
from unittest.mock import Mock

import pytest

pytest.importorskip("gssapi")

from socks5srv.gssapi import context as contexts
from socks5srv.gssapi.context import KRB5, SPNEGO, Acceptor, GssapiError, Initiator, Protection, acceptor_credentials
from socks5srv.gssapi.messages import TOKEN_MAX, Encapsulated, FrameError, Level

from ..kerberos import CLIENTS, REALM, SERVICES, Realm, credentials_of

needs_statm = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="not on this platform: the memory of a process")
LEVELS = (Level.INTEGRITY, Level.CONFIDENTIALITY)
Pair = Tuple[Initiator, Acceptor]


def establish(initiator: Initiator, acceptor: Acceptor) -> List[bytes]:
    """Have them talk until both are complete: their tokens."""
    tokens = [initiator.step()]
    while not (initiator.complete and acceptor.complete):
        tokens.append(acceptor.step(tokens[-1]))
        if not initiator.complete:
            tokens.append(initiator.step(tokens[-1]))
    return tokens


@pytest.fixture
def pair(kerberos: Realm) -> Callable[..., Pair]:
    """Both sides of a context: ``pair(service=, sequence=, mech=)``."""
    def make(**arguments: Any) -> Pair:
        found = Initiator("localhost", **arguments), Acceptor(acceptor_credentials(str(kerberos.keytab)))
        establish(*found)
        return found

    return make


@pytest.fixture
def protections(pair: Callable[..., Pair]) -> Callable[..., Tuple[Protection, Protection]]:
    """Those of the client and of the server: ``protections(level)``."""
    def make(level: Level, **arguments: Any) -> Tuple[Protection, Protection]:
        initiator, acceptor = pair(**arguments)
        return Protection(initiator, level), Protection(acceptor, level)

    return make


def decoded(protection: Protection, octets: bytes) -> List[bytes]:
    """What is in all frames of these."""
    received, found = bytearray(octets), []
    for plain in iter(lambda: protection.decode(received), None):
        found.append(plain)
    assert not received
    return found


def memory() -> int:
    """Octets that this process has in memory."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- establishing ---

@pytest.mark.parametrize("service", ["rcmd", "socks", *SERVICES])
def test_r47_any_key_in_the_keytab_is_accepted_and_each_side_knows_the_other(pair: Any, service: str) -> None:
    initiator, acceptor = pair(service=service)
    assert acceptor.peer == f"alice@{REALM}"
    assert initiator.peer.split("@")[0] in SERVICES or initiator.peer == f"{service}@localhost"


def test_r49_spnego_agrees_on_kerberos(pair: Any) -> None:
    assert pair(mech=SPNEGO)[1].peer == f"alice@{REALM}"


@pytest.mark.parametrize("sequence", [True, False])
def test_r48_the_client_asks_for_both_sides_to_be_known_and_for_no_replays_and_for_order_on_tcp_only(pair: Any, sequence: bool) -> None:
    """And hands on no ticket of its own (DELEG), which no proxy needs."""
    for side in pair(sequence=sequence):
        flags = side._context.actual_flags
        assert {contexts.Flag.mutual_authentication, contexts.Flag.replay_detection} <= flags
        assert (contexts.Flag.out_of_sequence_detection in flags, contexts.Flag.delegate_to_peer in flags) == (sequence, False)


def test_r63_another_mechanism_than_kerberos_is_refused(kerberos: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    initiator, acceptor = Initiator("localhost"), Acceptor(acceptor_credentials(str(kerberos.keytab)))
    token = initiator.step()
    monkeypatch.setattr(contexts, "KRB5", SPNEGO)       # so that Kerberos is another one
    with pytest.raises(GssapiError, match=r"1\.2\.840\.113554\.1\.2\.2 is not Kerberos"):
        acceptor.step(token)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_name_of_a_client_is_the_whole_principal_with_its_escapes(kerberos: Realm, name: str) -> None:
    acceptor = Acceptor(acceptor_credentials(str(kerberos.keytab)))
    establish(Initiator("localhost", credentials=credentials_of(kerberos, name)), acceptor)
    assert acceptor.peer == f"{name}@{REALM}"


@pytest.mark.parametrize("token", [b"", b"junk", b"\0" * 715, bytes(TOKEN_MAX)])
def test_a_token_that_is_none_is_refused_in_words(kerberos: Realm, token: bytes) -> None:
    acceptor = Acceptor(acceptor_credentials(str(kerberos.keytab)))
    with pytest.raises(GssapiError, match=r"^[^<(]{10,}$"):
        acceptor.step(token)
    assert not acceptor.complete


def test_so_is_a_token_that_has_been_seen_before(kerberos: Realm) -> None:
    """The library's replay cache is on."""
    credentials = acceptor_credentials(str(kerberos.keytab))
    token = establish(Initiator("localhost"), Acceptor(credentials))[0]
    with pytest.raises(GssapiError, match="replay"):
        Acceptor(credentials).step(token)


def test_one_for_another_server_and_one_that_was_changed(kerberos: Realm) -> None:
    token = bytearray(Initiator("localhost").step())
    token[-20] ^= 1
    with pytest.raises(GssapiError):
        Acceptor(acceptor_credentials(str(kerberos.keytab))).step(bytes(token))
    kerberos.add("rcmd/elsewhere", keytab="elsewhere.keytab")
    token = bytearray(Initiator("elsewhere").step())
    with pytest.raises(GssapiError):
        Acceptor(acceptor_credentials(str(kerberos.keytab))).step(bytes(token))


def test_a_token_after_the_last_one_is_refused(pair: Any) -> None:
    for side in pair():
        with pytest.raises(GssapiError, match="had been complete"):
            side.step(b"more")


@pytest.mark.parametrize(("complete", "attributes", "says"), [
    (False, {}, "leads nowhere"), (True, {"mech": SPNEGO}, "1.3.6.1.5.5.2 is not Kerberos"), (True, {"actual_flags": []}, "no integrity"),
])
def test_r63_a_context_of_another_kind_is_refused(complete: bool, attributes: Any, says: str) -> None:
    """This library makes none, so here is one of our own."""
    acceptor = Acceptor(None)
    acceptor._context = Mock(**{"complete": complete, "step.return_value": None, "mech": KRB5, "actual_flags": [contexts.Flag.integrity], **attributes})
    with pytest.raises(GssapiError, match=says):
        acceptor.step(b"token")


@pytest.mark.usefixtures("kerberos")
def test_a_client_whom_the_kdc_gives_no_ticket_is_told_so() -> None:
    with pytest.raises(GssapiError, match="not found in Kerberos database"):
        Initiator("localhost", "nosuchservice").step()


# --- the keytab ---

def test_a_keytab_is_read_when_it_is_asked_for(kerberos: Realm, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    for name in ("missing", "empty", "junk"):
        with pytest.raises(GssapiError):
            acceptor_credentials(str(tmp_path / name))
    with pytest.raises(GssapiError):        # what KRB5_KTNAME says
        acceptor_credentials()
    monkeypatch.setenv("KRB5_KTNAME", f"FILE:{kerberos.keytab}")
    establish(Initiator("localhost"), Acceptor(acceptor_credentials()))


def test_keys_that_come_later_are_found(kerberos: Realm, tmp_path: Any) -> None:
    path = tmp_path / "growing.keytab"
    path.write_bytes(kerberos.keytab.read_bytes())
    credentials = acceptor_credentials(str(path))
    kerberos.add("rcmd/later", keytab="later.keytab")
    path.write_bytes((kerberos.folder / "later.keytab").read_bytes())
    establish(Initiator("later"), Acceptor(credentials))


def test_where_a_library_takes_no_keytab_the_environment_tells_it(kerberos: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(contexts.raw, "acquire_cred_from")
    establish(Initiator("localhost"), Acceptor(acceptor_credentials(str(kerberos.keytab))))


# --- frames ---

@pytest.fixture(params=["unwrap_in_place", "unwrap_plainly"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "unwrap", getattr(contexts, request.param))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.usefixtures("_either_way")
def test_r60_what_is_encoded_is_decoded_either_way_at_once(protections: Any, level: Level) -> None:
    sides = protections(level)
    for length in (1, 100, 8192, TOKEN_MAX, 300_000):
        octets = os.urandom(length)
        for sender, receiver in (sides, sides[::-1]):
            assert b"".join(decoded(receiver, sender.encode(octets))) == octets


@pytest.mark.parametrize("level", LEVELS)
def test_e66_no_frame_is_longer_than_its_header_can_say_and_bulk_has_long_ones(protections: Any, level: Level) -> None:
    sender, receiver = protections(level)
    assert 8192 < sender.block < TOKEN_MAX
    assert len(sender.frame(bytes(sender.block))) == 4 + TOKEN_MAX
    with pytest.raises(FrameError, match="do not fit"):
        sender.frame(bytes(sender.block + 1))
    sender, receiver = protections(level)
    assert [len(each) for each in decoded(receiver, sender.encode(bytes(2 * sender.block + 1)))] == [sender.block, sender.block, 1]


def test_r59_at_level_1_nothing_is_encrypted_and_at_level_2_everything(protections: Any) -> None:
    secret = b"a password of someone's"
    for level in LEVELS:
        assert (secret in protections(level)[0].encode(secret)) == (level is Level.INTEGRITY)


@pytest.mark.parametrize("level", LEVELS)
def test_r61_the_quality_of_protection_is_the_default(pair: Any, level: Level) -> None:
    initiator, acceptor = pair()
    assert contexts.raw.unwrap(initiator._context, Protection(acceptor, level).frame(b"octets")[4:]).qop == 0


def test_r59_a_frame_in_clear_is_refused_at_level_2_and_an_encrypted_one_accepted_at_level_1(pair: Any) -> None:
    for level in LEVELS:
        initiator, acceptor = pair()
        other = Protection(initiator, Level(3 - level)).encode(b"octets")
        if level is Level.INTEGRITY:
            assert decoded(Protection(acceptor, level), other) == [b"octets"]
        else:
            with pytest.raises(FrameError, match="not encrypted"):
                decoded(Protection(acceptor, level), other)


def test_a_frame_may_be_empty_within_but_not_without(protections: Any) -> None:
    sender, receiver = protections(Level.CONFIDENTIALITY)
    assert decoded(receiver, sender.frame(b"")) == [b""]
    with pytest.raises(FrameError, match="empty"):
        receiver.decode(bytearray(bytes(Encapsulated(b""))))


def test_a_frame_is_waited_for_to_its_end_but_no_longer(protections: Any) -> None:
    sender, receiver = protections(Level.CONFIDENTIALITY)
    frame = sender.frame(b"octets")
    received = bytearray()
    for octet in frame[:-1]:
        received.append(octet)
        assert receiver.decode(received) is None
    received += frame[-1:] + b"\x01\x03"
    assert receiver.decode(received) == b"octets"
    assert received == b"\x01\x03"


def changed(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.parametrize("spoil", [
    lambda first, _: changed(first), lambda _, second: second, lambda first, _: first + first,
    lambda first, _: b"\x01\x02" + first[2:], lambda first, _: b"\x05" + first[1:], lambda _first, _: b"\x01\xff",
    lambda _first, _: bytes(Encapsulated(b"junk")), lambda _first, _: bytes(Encapsulated(bytes(TOKEN_MAX))),
], ids=["MIC", "gap", "replay", "MTYP", "VER", "abort", "junk", "zeros"])
@pytest.mark.usefixtures("_either_way")
def test_a_frame_that_is_not_the_next_one_as_it_was_sent_is_an_error(protections: Any, spoil: Any) -> None:
    sender, receiver = protections(Level.CONFIDENTIALITY)
    with pytest.raises((FrameError, GssapiError)):
        decoded(receiver, spoil(sender.frame(b"first"), sender.frame(b"second")))


def test_another_sessions_frame_is_an_error(protections: Any) -> None:
    (sender, _), (_, receiver) = protections(Level.CONFIDENTIALITY), protections(Level.CONFIDENTIALITY)
    with pytest.raises(GssapiError):
        decoded(receiver, sender.frame(b"octets"))


def test_a_datagram_is_one_frame_and_nothing_else(protections: Any) -> None:
    sender, receiver = protections(Level.CONFIDENTIALITY, sequence=False)
    frame = sender.frame(b"datagram")
    for wrong in (b"", frame[:3], frame[:-1], frame + b"\0", frame + frame, b"\x05" + frame[1:], changed(frame), frame[:3] + b"\0" + frame[4:]):
        with pytest.raises((FrameError, GssapiError)):
            receiver.decode_datagram(wrong)
    assert receiver.decode_datagram(frame) == b"datagram"


def test_datagrams_may_get_lost_and_come_in_any_order_but_not_twice(protections: Any) -> None:
    sender, receiver = protections(Level.CONFIDENTIALITY, sequence=False)
    frames = [sender.frame(b"%d" % number) for number in range(6)]
    assert [receiver.decode_datagram(frames[number]) for number in (1, 0, 4, 3)] == [b"1", b"0", b"4", b"3"]
    for number in (1, 0, 4, 3):
        with pytest.raises(GssapiError):
            receiver.decode_datagram(frames[number])
    assert receiver.decode_datagram(frames[5]) == b"5"


@needs_statm
def test_what_is_refused_is_not_kept(protections: Any) -> None:
    if contexts.unwrap is contexts.unwrap_plainly:
        pytest.skip("not on this platform: the library cannot unwrap in place")
    sender, receiver = protections(Level.CONFIDENTIALITY, sequence=False)
    frame = sender.frame(bytes(60_000))
    receiver.decode_datagram(frame)
    before = memory()
    for _ in range(500):        # 30 MB
        with pytest.raises(GssapiError):
            receiver.decode_datagram(frame)
    assert memory() - before < 5_000_000


def test_only_context_py_needs_the_package(kerberos: Realm) -> None:
    run = "import sys, socks5srv.gssapi.messages; print('gssapi' in sys.modules)"
    assert kerberos.run(sys.executable, "-c", run).strip() == "False"
