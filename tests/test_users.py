"""The users file, its hashes, and what guessing costs."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import Any, Callable, ClassVar, Iterable, Iterator, List, Optional, Tuple, Type

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socks5srv import handler, users
from socks5srv.handler import Socks5Handler
from socks5srv.protocol import Command, Credentials, CredentialsReply, Method
from socks5srv.users import BadUsersFile, LoginThrottle, Hash, Users, UsersFile, hash_password, verify

from .conftest import LOCALHOST, TIMEOUT, eventually, exchange, handler_with, in_thread, needs_neighbour, within

CHEAP = (2, 1, 1)       # n, r, p of scrypt: nobody guesses here


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "SCRYPT", CHEAP)
    monkeypatch.setattr(users, "SETTLED", 0.0)


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Any) -> Write:
    """Write the users file: ``write(lines, mode=)`` returns its path."""
    path = str(tmp_path / "users")

    def write_lines(*lines: str, mode: int = 0o600) -> str:
        with open(path + ".new", "w", encoding="utf-8") as stream:
            stream.write("".join(line + "\n" for line in lines))
        os.chmod(path + ".new", mode)
        os.replace(path + ".new", path)
        return path

    return write_lines


def login(username: str, password: str) -> str:
    return f"{username}:{hash_password(password)}"


def computed_from_now_on(monkeypatch: pytest.MonkeyPatch) -> List[Tuple[str, Hash]]:
    """The passwords that are computed, each with the hash that it is compared with; all of them are wrong."""
    computed: List[Tuple[str, Hash]] = []
    monkeypatch.setattr(users, "verify", lambda password, text: bool(computed.append((password, Hash.parse(text)))))
    return computed


# --- hashes ---

@pytest.mark.parametrize("password", ["sesame", "s", "\u00fc\u20ac", "with:colon$dollar", "x" * 255])
def test_a_hash_is_that_of_its_password_and_of_no_other(password: str) -> None:
    text = hash_password(password)
    assert text.startswith("scrypt$2$1$1$")
    assert str(Hash.parse(text)) == text
    assert verify(password, text)
    assert not verify(password + "x", text)
    assert hash_password(password) != text      # salted


def test_a_hash_is_expensive_unless_a_test_makes_it_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    n, r, p = users.SCRYPT
    assert 128 * n * r * p >= 16 * 1024 * 1024
    assert users.PBKDF2 >= 600_000


def test_where_there_is_no_scrypt_pbkdf2_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "PBKDF2", 1000)
    monkeypatch.delattr(hashlib, "scrypt")
    text = hash_password("sesame")
    assert text.startswith("pbkdf2_sha256$1000$")
    assert verify("sesame", text)
    assert not verify("other", text)


@pytest.mark.parametrize("text", [
    "", "sesame", "scrypt$2$1$1$c2FsdA==", "md5$1$c2FsdA==$c2FsdA==", "scrypt$2$1$1$?$?", "scrypt$x$1$1$c2FsdA==$" + "A" * 44,
    "scrypt$3$1$1$c2FsdA==$" + "A" * 44, "scrypt$1073741824$8$1$c2FsdA==$" + "A" * 44, "pbkdf2_sha256$1$c2FsdA==$" + "A" * 44,
    "scrypt$524288$8$1$c2FsdA==$" + "A" * 44, "scrypt$2$1$1$$" + "A" * 44, "scrypt$2$1$1$c2FsdA==$AAAA",
    "scrypt$-2$1$1$c2FsdA==$" + "A" * 44,
    "scrypt$65536$1$1$c2FsdA==$" + "A" * 44,        # RFC 7914 section 6 bounds N by r
])
def test_what_is_no_hash_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"socks5srv hash-password|too little or too much"):
        Hash.parse(text)


# --- the file ---

def test_the_users_of_a_file_can_log_in(write: Write) -> None:
    file = UsersFile(write("# those who may", "", login("anna", "sesame"), login("b\u00e4r", "gr\u00fcn")))
    assert len(file) == 2
    for _ in range(2):
        assert file.check("anna", "sesame")
        assert file.check("b\u00e4r", "gr\u00fcn")
        assert not file.check("anna", "gr\u00fcn")
        assert not file.check("nobody", "sesame")
        assert not file.check("anna", "")


@pytest.mark.parametrize("before", [[], ["# those who may"]])
def test_the_file_may_begin_with_a_byte_order_mark(write: Write, before: List[str]) -> None:
    """As editors of Windows write it; it would be a part of the first name."""
    first, *more = [*before, login("anna", "sesame")]
    assert UsersFile(write("\ufeff" + first, *more)).check("anna", "sesame")


def test_a_login_that_was_right_is_remembered(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = UsersFile(write(login("anna", "sesame")))
    assert file.check("anna", "sesame")
    computed = computed_from_now_on(monkeypatch)
    began = time.perf_counter()
    for _ in range(100):
        assert file.check("anna", "sesame")
    assert (time.perf_counter() - began) / 100 < within(0.0005)
    assert not computed
    assert not file.check("anna", "guess")
    assert [password for password, _hash in computed] == ["guess"]
    assert b"sesame" not in repr(vars(file)).encode()


ROUNDS = f"pbkdf2_sha256${600_000}$c2FsdA==${'A' * 43}="
LONG_ROUNDS = f"pbkdf2_sha256${400_000}$c2FsdA==${'A' * 86}=="        # 64 octets: each round twice
SCRYPT_OF_50_MS = f"scrypt$16384$8$1$c2FsdA==${'A' * 43}="


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize(("cheap", "dear"), [
    (f"scrypt$2$1$1$c2FsdA==${'A' * 43}=", f"scrypt$16$8$1$c2FsdA==${'A' * 43}="), (SCRYPT_OF_50_MS, ROUNDS), (ROUNDS, LONG_ROUNDS),
    (ROUNDS.replace("600000", "1000"), SCRYPT_OF_50_MS),
])
def test_an_unknown_name_costs_as_much_as_the_dearest_hash_and_a_file_of_several_costs_says_so(
        cheap: str, dear: str, turn: int, write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = UsersFile(write(*[f"anna:{cheap}", f"ben:{dear}"][::turn]))
    computed = computed_from_now_on(monkeypatch)
    for username in ("nobody", "ben"):
        assert not file.check(username, "guess")
    of_nobody, of_ben = [(hash.method, hash.cost, len(hash.digest)) for _password, hash in computed]
    assert of_nobody == of_ben
    assert "tells who is a user" not in caplog.text         # the log may not be set up yet
    for _ in range(3):
        file.refresh()
    assert caplog.text.count("tells who is a user") == 1
    for anna, ben, times in ((dear, dear, 1), (cheap, cheap, 1), (dear, cheap, 2)):
        write(f"anna:{anna}", f"ben:{ben}")
        file.refresh()
        assert caplog.text.count("tells who is a user") == times


def test_a_file_without_users_costs_as_much_as_a_new_hash(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = UsersFile(write("# nobody yet"))
    computed = computed_from_now_on(monkeypatch)
    assert not file.check("nobody", "guess")
    assert [hash.cost for _password, hash in computed] == [CHEAP]


@pytest.mark.parametrize(("line", "says"), [
    ("anna", "expected NAME:HASH"), (":scrypt", "expected NAME:HASH"), ("anna:sesame", "expected a HASH"),
    ("x" * 256 + ":scrypt$", "expected NAME:HASH"), ("ä" * 128 + ":scrypt$", "expected NAME:HASH"),
    ("anna:scrypt$2$1$1$?$?", "this HASH is damaged"), (f"ben:{SCRYPT_OF_50_MS}", "user 'ben' is listed twice"),
])
def test_a_bad_line_is_reported_with_its_number_and_what_was_expected(write: Write, line: str, says: str) -> None:
    with pytest.raises(BadUsersFile, match=f":3: {says}"):
        UsersFile(write("# a comment", login("ben", "b"), line))


@pytest.mark.skipif(os.name != "posix", reason="not on this platform: no such modes")
@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
def test_a_file_that_everyone_may_read_is_refused_with_the_command_to_type(write: Write, mode: int) -> None:
    with pytest.raises(BadUsersFile, match="chmod o-rw"):
        UsersFile(write(login("anna", "a"), mode=mode))


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not on this platform: pipes with a name")
needs_devices = pytest.mark.skipif(not os.path.exists("/dev/null"), reason="not on this platform: devices with a name")


@pytest.mark.parametrize(("path", "says"), [
    ("nothing", "No such file"), pytest.param("/dev/null", "is not a regular file", marks=needs_devices),
    pytest.param("pipe", "is not a regular file", marks=needs_pipes),
])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Any, path: str, says: str) -> None:
    if path == "pipe":
        os.mkfifo(str(tmp_path / path), 0o600)
    with pytest.raises(BadUsersFile, match=says):
        in_thread(UsersFile, str(tmp_path / path))()


@needs_pipes
def test_a_pipe_that_takes_the_place_of_the_file_changes_nothing_and_is_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    file = UsersFile(write(login("anna", "a")))
    os.mkfifo(file.path + ".pipe", 0o600)
    os.replace(file.path + ".pipe", file.path)
    assert in_thread(file.refresh)() == set()
    assert "is not a regular file" in caplog.text
    assert file.check("anna", "a")


@given(st.text())
@settings(max_examples=200)
def test_any_line_is_a_login_or_refused_as_one(line: str) -> None:
    try:
        users.read_line(line, "file:1")
    except BadUsersFile:
        pass


def test_a_changed_file_is_read_again_and_tells_who_is_gone(write: Write) -> None:
    anna, ben = login("anna", "a"), login("ben", "b")
    file = UsersFile(write(anna, ben))
    assert file.refresh() == set()
    assert file.check("anna", "a")
    assert file.check("ben", "b")
    write(login("anna", "new"), login("carl", "c"))
    assert file.refresh() == {"anna", "ben"}
    assert not file.check("anna", "a")          # remembered no longer
    assert not file.check("ben", "b")
    assert file.check("anna", "new")
    assert file.check("carl", "c")
    assert file.refresh() == set()


def test_a_file_that_is_another_one_is_read_again_although_its_time_is_the_same(write: Write) -> None:
    path = write(login("anna", "a"))
    before = os.stat(path)
    file = UsersFile(path)
    write(login("ben", "b"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.refresh() == {"anna"}


class Clock:
    """Time that goes on when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(users, "SETTLED", 0.5)
    monkeypatch.setattr(users, "time", Clock())
    return users.time       # type: ignore[attr-defined, return-value]


def test_a_file_in_the_middle_of_a_write_is_not_read_until_it_has_settled(write: Write, clock: Clock) -> None:
    anna, ben = login("anna", "a"), login("ben", "b")
    file = UsersFile(write(anna, ben))
    with open(file.path, "w", encoding="utf-8") as stream:
        for part in (anna + "\n", ben[:9], ben[9:] + "\n", login("carl", "c") + "\n"):
            assert file.refresh() == set()
            clock.now += 0.4
            assert file.refresh() == set()      # not even a long look later, as it has changed in between
            stream.write(part)
            stream.flush()
            clock.now += 0.4
    assert file.refresh() == set()
    assert len(file) == 2
    clock.now += 0.5
    assert file.refresh() == set()
    assert len(file) == 3


def test_a_file_that_changes_while_it_is_read_is_read_again(
        write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    anna, ben = login("anna", "a"), login("ben", "b")
    file = UsersFile(write(anna, ben))
    write(anna)
    read_users = users.read_users

    def changed(path: str) -> Any:
        found = read_users(path)
        monkeypatch.setattr(users, "read_users", read_users)
        write("nonsense")
        write(anna, ben, login("carl", "c"))
        return found

    monkeypatch.setattr(users, "read_users", changed)
    assert file.refresh() == set()
    assert len(file) == 2
    assert file.refresh() == set()
    assert len(file) == 3
    assert "keeping the previous users" not in caplog.text


@pytest.mark.usefixtures("clock")
def test_a_file_that_is_asked_for_is_read_at_once(write: Write) -> None:
    file = UsersFile(write(login("anna", "a")))
    write(login("ben", "b"))
    assert file.refresh() == set()
    file.seen = None
    assert file.refresh() == {"anna"}
    assert file.refresh() == set()


def test_a_login_that_is_right_for_a_user_who_is_removed_meanwhile_is_wrong(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = UsersFile(write(login("anna", "a")))
    monkeypatch.setattr(users, "verify", lambda _password, _hash: file._replace({}) or True)
    assert not file.check("anna", "a")
    assert file.verified == {}


def test_a_broken_new_file_keeps_the_old_users_and_says_so(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    file = UsersFile(write(login("anna", "a")))
    path = write("nonsense")
    assert file.refresh() == set()
    assert file.check("anna", "a")
    assert "keeping the previous users" in caplog.text
    os.remove(path)
    assert file.refresh() == set()
    assert file.check("anna", "a")
    caplog.clear()
    assert file.refresh() == set()
    assert caplog.text == ""                    # said once
    write(login("anna", "new"))
    assert file.refresh() == {"anna"}


def test_plain_users_compare_octets_and_know_nobody_else() -> None:
    plain = Users({"anna": "sesame", "blank": ""})
    assert plain.check("anna", "sesame")
    assert not plain.check("anna", "sesame\0junk")
    assert not plain.check("nobody", "")
    assert plain.refresh() == set()


# --- in the server ---

def test_removing_a_user_ends_that_users_tunnels_and_no_others(write: Write, start_server: Any, new_client: Any, echo: Any) -> None:
    anna, ben = login("anna", "a"), login("ben", "b")
    server = start_server(users=UsersFile(write(anna, ben)))
    of_anna, of_ben = new_client(server), new_client(server)
    for client, username, password in ((of_anna, "anna", "a"), (of_ben, "ben", "b")):
        assert client.log_in(username, password)
        client.request(Command.CONNECT, echo)
        exchange(client)
    write(anna)
    assert of_ben.rest() == b""
    session = server.next_ended()
    assert (session.user, session.reason) == ("ben", "the user has been removed")
    exchange(of_anna)


def test_removing_a_user_ends_a_login_of_that_user_that_is_being_looked_at(write: Write, start_server: Any, new_client: Any) -> None:
    release = threading.Event()
    anna, ben = login("anna", "a"), login("ben", "b")
    handler = handler_with(authenticate=lambda _self, _username, _password: release.wait(TIMEOUT))
    server = start_server(handler, users=UsersFile(write(anna, ben)))
    client = new_client(server)
    client.greet(Method.USERNAME_PASSWORD)
    client.send(Credentials(b"ben", b"b"))
    eventually(lambda: server.sessions[0].user)
    write(anna)
    assert client.rest() == b""
    release.set()
    session = server.next_ended()
    assert (session.user, session.reason) == ("ben", "the user has been removed")


def test_who_has_to_wait_may_leave(monkeypatch: pytest.MonkeyPatch, start_server: Any, try_to_log_in: Any) -> None:
    monkeypatch.setattr(users, "LONGEST_WAIT", 60.0)
    server = start_server(users={"anna": "sesame"})
    for _ in range(64):
        server.policy.throttle.failed(LOCALHOST)
    try_to_log_in(server).reset()
    assert server.next_ended().user == "anna"


class Judging(Socks5Handler):
    """Logins that take until `release` is set, and are wrong; `running` are those that are judged, `most` at a time."""

    running: ClassVar[List[str]] = []
    judged: ClassVar[List[int]] = []        # how many were running when each of them began
    release = threading.Event()
    lock = threading.Lock()

    def authenticate(self, username: str, password: str) -> bool:
        with self.lock:
            self.running.append(username)
            self.judged.append(len(self.running))
        assert self.release.wait(TIMEOUT)
        with self.lock:
            self.running.remove(username)
        return password == "sesame"


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Type[Judging]]:
    monkeypatch.setattr(Judging, "running", [])
    monkeypatch.setattr(Judging, "judged", [])
    monkeypatch.setattr(Judging, "release", threading.Event())
    yield Judging
    Judging.release.set()


@pytest.fixture
def try_to_log_in(new_client: Any) -> Callable[..., Any]:
    def begin(server: Any, password: str = "guess", source: Optional[str] = None) -> Any:
        client = new_client(server, source=source)
        assert client.greet(Method.USERNAME_PASSWORD).method == Method.USERNAME_PASSWORD
        client.send(Credentials(b"anna", password.encode()))
        return client

    return begin


def all_wait(server: Any, number: int) -> bool:
    return sum(map(len, list(server.policy.throttle.waiting.values()))) == number


@pytest.fixture
def after_a_failure(judging: Any, start_server: Any, try_to_log_in: Any) -> Callable[..., Any]:
    """A server, a client that it judges, whose address has failed before, and another one from there, which waits."""
    def begin(second_password: str = "guess") -> Any:
        server = start_server(judging)
        server.policy.throttle.failed(LOCALHOST)
        first = try_to_log_in(server)
        eventually(lambda: judging.running)
        second = try_to_log_in(server, second_password)
        eventually(lambda: all_wait(server, 1))
        return server, first, second

    return begin


def test_an_address_that_has_failed_has_one_try_at_a_time(judging: Any, after_a_failure: Any) -> None:
    _server, first, second = after_a_failure("sesame")
    assert len(judging.running) == 1
    judging.release.set()
    assert CredentialsReply.read(first).status == 1
    assert CredentialsReply.read(second).status == 0


@needs_neighbour
def test_tries_of_one_address_hold_up_no_other(judging: Any, start_server: Any, try_to_log_in: Any) -> None:
    server = start_server(judging)
    for _ in range(20):
        try_to_log_in(server)
    eventually(lambda: all_wait(server, 20 - users.FREE_TRIES))
    client = try_to_log_in(server, "sesame", source="127.0.0.2")
    eventually(lambda: len(judging.running) == users.FREE_TRIES + 1)
    judging.release.set()
    assert CredentialsReply.read(client).status == 0


def test_right_logins_side_by_side_do_not_wait_for_each_other_for_long(judging: Any, start_server: Any, try_to_log_in: Any) -> None:
    server = start_server(judging)
    clients = [try_to_log_in(server, "sesame") for _ in range(30)]
    eventually(lambda: all_wait(server, 30 - users.FREE_TRIES))
    judging.release.set()
    assert [CredentialsReply.read(client).status for client in clients] == [0] * 30
    assert max(judging.judged) <= users.FREE_TRIES


def test_a_client_that_waits_for_its_turn_may_leave(monkeypatch: pytest.MonkeyPatch, judging: Any, after_a_failure: Any) -> None:
    monkeypatch.setattr(handler, "LOOK", 0.01)
    server, first, second = after_a_failure()
    second.reset()
    assert server.next_ended().reply is None
    assert all_wait(server, 0)
    judging.release.set()
    assert CredentialsReply.read(first).status == 1


def test_closing_the_server_wakes_those_that_wait_for_their_turn(
        monkeypatch: pytest.MonkeyPatch, judging: Any, start_server: Any, try_to_log_in: Any) -> None:
    monkeypatch.setattr(handler, "LOOK", 60.0)
    server = start_server(judging)
    for _ in range(20):
        try_to_log_in(server)
    eventually(lambda: all_wait(server, 20 - users.FREE_TRIES))
    for live in server.registry.serving():
        live.hang_up("for a test")
    eventually(lambda: all_wait(server, 0))
    judging.release.set()


def test_waits_grow_from_none_to_some_seconds_and_are_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = LoginThrottle()
    waits = []
    for _ in range(12):
        waits.append(throttle.delay("192.0.2.1"))
        throttle.failed("192.0.2.1")
    assert waits == [0.0] * 5 + [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert throttle.delay("192.0.2.2") == 0
    monkeypatch.setattr(users, "FORGIVEN", -1.0)
    assert throttle.delay("192.0.2.1") == 0
    throttle.failed("192.0.2.1")
    assert throttle.failures["192.0.2.1"][0] == 1


@pytest.mark.parametrize(("failed", "remembered"), [
    pytest.param(range(10), [7, 8, 9], id="once each"), pytest.param([1, 2, 3, 1, 4], [3, 1, 4], id="one twice"),
])
def test_only_so_many_addresses_are_remembered_and_the_one_that_has_failed_longest_ago_is_forgotten(
        monkeypatch: pytest.MonkeyPatch, failed: Iterable[int], remembered: List[int]) -> None:
    monkeypatch.setattr(users, "REMEMBERED", 3)
    throttle = LoginThrottle()
    for number in failed:
        throttle.failed(f"192.0.2.{number}")
    assert list(throttle.failures) == [f"192.0.2.{number}" for number in remembered]


def test_an_address_may_fail_as_often_as_it_likes() -> None:
    throttle = LoginThrottle()
    for _ in range(2000):
        throttle.failed("192.0.2.1")
    assert throttle.delay("192.0.2.1") == users.LONGEST_WAIT


def test_only_so_many_hashes_are_computed_at_a_time(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = UsersFile(write(login("anna", "sesame")))
    running: List[int] = []
    most: List[int] = []
    release = threading.Event()

    def slow(_password: str, _hash: str) -> bool:
        running.append(1)
        most.append(len(running))
        release.wait(5)
        running.pop()
        return False

    monkeypatch.setattr(users, "verify", slow)
    checks = [in_thread(file.check, "anna", "guess") for _ in range(users.AT_ONCE + 5)]
    eventually(lambda: len(most) == users.AT_ONCE)
    release.set()
    assert [check() for check in checks] == [False] * len(checks)
    assert max(most) == users.AT_ONCE
