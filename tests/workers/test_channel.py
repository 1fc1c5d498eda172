"""What the supervisor and the workers tell each other, and how it gets there."""

from __future__ import annotations

import errno
import pickle
import socket
from typing import Any, Iterator, List, Tuple

import pytest

from socks5srv.workers.channel import Answer, Channel, LoginFailed, MayAdmit, Question, Requests, Stop, UsersChanged, dispatch
from tests.conftest import eventually, in_thread

from .processes import needs_posix

pytestmark = needs_posix

FAILED = LoginFailed("192.0.2.1")
MANY = UsersChanged({f"user {number}": 10 * str(number) for number in range(50_000)})       # more than a socket takes at once


def receive(channel: Channel) -> List[Any]:
    channel.fill()
    return [pickle.loads(octets) for octets in channel.messages()]


@pytest.fixture
def ends() -> Iterator[Tuple[Channel, Channel]]:
    """Both ends of a channel."""
    one, other = map(Channel, socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_messages_come_in_their_order(ends: Tuple[Channel, Channel]) -> None:
    one, other = ends
    assert receive(other) == []
    one.send(FAILED)
    one.send(Stop())
    assert [(type(message), message) for message in receive(other)] == [(LoginFailed, FAILED), (Stop, Stop())]


def test_a_message_is_a_call_of_the_method_for_it() -> None:
    class Receiver:
        def on_LoginFailed(self, context: str, message: LoginFailed) -> Tuple[str, str]:
            return context, message.host

    assert dispatch(Receiver(), FAILED, "from here") == ("from here", "192.0.2.1")


def test_a_long_message_waits_for_the_other_end_and_no_hint_is_added_to_it(ends: Tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send(MANY)                  # does not block
    assert one.outgoing
    assert one.congested
    one.hint(FAILED)
    one.send(Stop())
    received: List[Any] = []
    while len(received) < 2:
        received += receive(other)
        one.flush()
    assert received == [MANY, Stop()]


def test_a_channel_that_is_closed_in_time_sends_first_what_waits(ends: Tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send(MANY)
    done = in_thread(one.close, 10)
    received: List[Any] = []
    while not received:
        received += receive(other)
    assert received == [MANY]
    done()
    with pytest.raises(EOFError):
        receive(other)


def test_the_end_of_a_channel_comes_after_the_last_message(ends: Tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send(FAILED)
    one.close()
    assert receive(other) == [FAILED]
    with pytest.raises(EOFError):
        receive(other)
    other.send(Stop())              # which does not arrive, and is no error
    other.send(Stop())
    with pytest.raises(EOFError):
        receive(other)


class Short(socket.socket):
    """The system has no memory for it, once in each direction."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.setblocking(False)
        self.lacking = {"send", "recv"}

    def send(self, *arguments: Any) -> int:
        return int(self.unless_lacking("send", *arguments))

    def recv(self, *arguments: Any) -> bytes:
        return bytes(self.unless_lacking("recv", *arguments))

    def unless_lacking(self, what: str, *arguments: Any) -> Any:
        if what in self.lacking:
            self.lacking.remove(what)
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return getattr(super(), what)(*arguments)


def test_what_the_system_has_no_memory_for_is_tried_again_and_ends_nothing(ends: Tuple[Channel, Channel]) -> None:
    one, other = ends
    one.socket = Short(one.socket)
    one.send(FAILED)                # such as a worker's config, for which it would wait forever
    assert receive(other) == []
    one.flush()
    assert receive(other) == [FAILED]
    other.send(Stop())
    assert [receive(one), receive(one)] == [[], [Stop()]]


# --- questions ---

def answer(requests: Requests, ours: Channel, theirs: Channel, text: str) -> bool:
    """Receive the question at the other end, answer it there, and hand the answer in here."""
    (question,) = eventually(lambda: receive(theirs))
    assert question == Question(question.number, MayAdmit("192.0.2.1"))
    return requests.answered(ours, Answer(*question, text))


def test_all_are_asked_and_the_answers_are_told_apart(ends: Tuple[Channel, Channel]) -> None:
    requests, (one, other) = Requests(), ends
    done = in_thread(requests.ask, MayAdmit("192.0.2.1"), ends, 10)
    assert answer(requests, one, other, "first")
    assert answer(requests, other, one, "second")
    assert done() == {one: "first", other: "second"}
    assert requests.ask(MayAdmit("192.0.2.1"), [], 10) == {}, "where there is nothing to wait for"


def test_an_answer_that_comes_too_late_is_told_apart(ends: Tuple[Channel, Channel]) -> None:
    requests, (one, other) = Requests(), ends
    assert requests.ask(MayAdmit("192.0.2.1"), [one], 0.01) == {}
    assert not answer(requests, one, other, "late")
    assert not requests.pending


def test_no_answer_is_awaited_from_a_channel_that_is_closed(ends: Tuple[Channel, Channel]) -> None:
    requests, (one, other) = Requests(), ends
    done = in_thread(requests.ask, MayAdmit("192.0.2.1"), ends, 10)
    assert answer(requests, one, other, "first")
    requests.closed(other)
    assert done() == {one: "first"}
