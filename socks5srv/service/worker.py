"""
One of several processes that serve: what ``--workers N`` starts N times.

It is a server like any other, but for what belongs to all workers together.  Its listening
sockets are the parent's (workers.py), so that the kernel hands each client to one of the
workers.  What it must know of the others it hears from the parent, over a `Line`, or reads
off the `Board`.  It reads no options and no users file, and ends when the parent says so,
or when there is none any more.

The one idea: on the way of a client nobody is asked anything, unless --max-per-client is
given.  A worker writes only its own numbers and only tells; whoever wants to know adds up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import mmap
import os
import pickle
import queue
import selectors
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Set, Tuple, Type, cast

from ..listener import Listener
from ..protocol import Address
from ..handler import Socks5Handler
from ..users import AT_ONCE, Guessing, UsersFile
from . import log
from .banner import Tally
from .run import ServiceServer, configure, handler_class

logger = logging.getLogger("socks5srv")

LENGTH = struct.Struct("!I")    # in front of each message
ENOUGH = 1024 * 1024            # octets that wait on a line, after which hints are left out
ANSWER_TIME = 1.0               # seconds that the parent has to answer whether one more client may come
STOP_TIME = 5.0                 # seconds that a worker has to end


class Line:
    """
    What the parent and a worker tell each other: tuples, of which the first is a word.

    send() may be called in any thread and never blocks: what the other end is too slow to take
    waits for the next flush().
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.lock = threading.Lock()
        self.incoming = bytearray()
        self.outgoing = bytearray()

    def send(self, *message: Any) -> None:
        octets = pickle.dumps(message)
        with self.lock:
            self.outgoing += LENGTH.pack(len(octets)) + octets
        self.flush()

    def hint(self, *message: Any) -> None:
        """The same for what may be lost, if the other end does not listen."""
        if len(self.outgoing) < ENOUGH:
            self.send(*message)

    def flush(self) -> None:
        with self.lock:
            try:
                while self.outgoing:
                    del self.outgoing[:self.socket.send(self.outgoing)]
            except BlockingIOError:
                pass
            except OSError:         # there is nobody any more, as receive() will tell
                self.outgoing.clear()

    def fill(self) -> None:
        """Take what has come; EOFError when the other end is gone."""
        try:
            octets = self.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        if not octets:
            raise EOFError
        self.incoming += octets

    def messages(self) -> Iterator[bytes]:
        """One by one, as pickled, what is there as a whole, and is taken away."""
        while len(self.incoming) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self.incoming)[0]
            if len(self.incoming) < end:
                return
            message = bytes(self.incoming[LENGTH.size:end])
            del self.incoming[:end]
            yield message

    def close(self) -> None:
        with self.lock:
            self.outgoing.clear()
            self.socket.close()


class Board:
    """
    What the workers count together, in a file that has no name and is open in all of them.

    Its content is one number for each: the `clients` that it has let in.  Each writes only its
    own, and all may read: there is nothing to lock.  Its position is the last session id; the
    system moves it for one process at a time.
    """

    def __init__(self, descriptor: int, workers: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, 8 * workers)
        self.clients = memoryview(self.memory).cast("Q")        # 8 octets, which are written at once

    def next_id(self) -> int:
        return os.lseek(self.descriptor, 1, os.SEEK_CUR)

    def close(self) -> None:
        self.clients.release()
        self.memory.close()
        os.close(self.descriptor)


class Orders(NamedTuple):
    """What a worker is told at its start."""

    number: int                     # from 0
    workers: int                    # of so many
    options: argparse.Namespace
    users: Optional[Mapping[str, str]]      # by name: hashes if they come from a file, else passwords
    listeners: List[int]            # descriptors
    board: int                      # another
    failures: OrderedDict[str, Tuple[int, float]]       # of logins, by address: see users.Guessing
    relays: Dict[int, Set[Address]]         # for datagrams, of the other workers by their numbers


class HandedUsers(UsersFile):
    """The users of a file that the parent reads, or reads again, and hands on."""

    def __init__(self, hashes: Mapping[str, str], workers: int) -> None:
        self.lock = threading.Lock()
        self.computing = threading.BoundedSemaphore(max(1, AT_ONCE // workers))
        self.key = os.urandom(32)
        self.have(dict(hashes))
        self.verified = {}
        self.gone: queue.SimpleQueue[Set[str]] = queue.SimpleQueue()

    def hand(self, hashes: Dict[str, str]) -> None:
        """They count from now on; refresh() tells whom to cut off."""
        self.gone.put(self.replace(hashes))

    def refresh(self) -> Set[str]:
        gone: Set[str] = set()
        while not self.gone.empty():
            gone |= self.gone.get()
        return gone


class SharedGuessing(Guessing):
    """Who guesses here has to wait at the other workers, too."""

    def __init__(self, tell: Callable[..., None], failures: OrderedDict[str, Tuple[int, float]]) -> None:
        super().__init__()
        self.tell = tell
        self.failures = failures

    def failed(self, host: str) -> None:
        super().failed(host)
        self.tell("failed", host)

    def succeeded(self, host: str) -> None:
        if host in self.failures:       # and hardly anybody is, so that a login tells nobody anything
            super().succeeded(host)
            self.tell("succeeded", host)


class SharedRelays(Set[Address]):
    """Where clients of this worker send their datagrams to; those of the others are known, too."""

    def __init__(self, tell: Callable[..., None], elsewhere: Dict[int, Set[Address]]) -> None:
        super().__init__()
        self.tell = tell
        self.elsewhere = elsewhere

    def add(self, address: Address) -> None:
        super().add(address)
        self.tell("opened", address)

    def discard(self, address: object) -> None:
        if super().__contains__(address):
            super().discard(address)
            self.tell("closed", address)

    def __contains__(self, address: object) -> bool:
        return super().__contains__(address) or any(address in relays for relays in list(self.elsewhere.values()))


class SharedListener(Listener):
    """A socket that other processes accept from as well: it ends when all of them do."""

    def __init__(self, server: WorkerServer, sock: socket.socket) -> None:
        super().__init__(sock, server.accept, server.talk)
        self.told_to_stop = server.told_to_stop

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
        if not self.told_to_stop.is_set():      # a bug ends us, and the others go on
            return
        try:
            self.socket.shutdown(socket.SHUT_RDWR)      # on Linux every accept() of it fails then, everywhere
        except OSError:
            self.call_until_all_have_gone()

    def call_until_all_have_gone(self) -> None:
        """It may be somebody else's thread that takes the call; but all of them are leaving."""
        dialled, until = self.address.dialled, time.monotonic() + STOP_TIME / 2
        while self.waiting and time.monotonic() < until:
            try:
                socket.create_connection((dialled.zoned, dialled.port), timeout=0.2).close()
            except OSError:         # then nobody is waiting any more
                return

    def close(self) -> None:
        self.stopping = True
        self.socket.close()


class WorkerServer(ServiceServer):
    """The server of one worker.  Its methods ``on_...`` are what the parent can say."""

    def __init__(self, line: Line, orders: Orders) -> None:
        self.line = line
        self.number = orders.number
        self.sockets = [socket.socket(fileno=descriptor) for descriptor in orders.listeners]
        self.board = Board(orders.board, orders.workers)
        self.most = self.most_told = 0      # clients at a time, of all workers
        self.told_to_stop = threading.Event()
        self.serving = False                # and the parent knows
        self.questions = itertools.count()
        self.answers: Dict[int, queue.SimpleQueue[bool]] = {}      # that are to come, by question
        users: Any = orders.users
        if orders.options.users_file is not None:
            users = HandedUsers(users, orders.workers)
        super().__init__(self.sockets[0].getsockname(), handler_class(orders.options), users=users, rules=orders.options.rules)
        self.listeners[:] = [SharedListener(self, sock) for sock in self.sockets]
        self.guessing = SharedGuessing(line.hint, orders.failures)
        self.udp_relays = self.relays_of_all = SharedRelays(line.hint, orders.relays)

    def server_bind(self) -> None:
        """It is bound: take the parent's."""
        self.socket.close()
        self.socket = self.sockets[0]
        self.server_address = self.socket.getsockname()

    # --- what the parent says ---

    def obey(self) -> None:
        """In a thread of its own: do what the parent says, until it says to stop, or nothing ever again."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.line.socket, selectors.EVENT_READ)
            try:
                while not self.has_been_told_to_stop():     # words may have come with the orders
                    if selector.select(0.5):
                        self.line.fill()
                    self.line.flush()
            except EOFError:
                pass
            except Exception:           # who is deaf would never stop
                logger.exception("a bug, met while obeying")
                os._exit(1)
        self.end()

    def has_been_told_to_stop(self) -> bool:
        """After doing what has come by now."""
        for message in self.line.messages():
            self.attempt(self.do, message)
        return self.told_to_stop.is_set()

    def do(self, message: bytes) -> None:
        word, *details = pickle.loads(message)
        getattr(self, f"on_{word}")(*details)

    def end(self) -> None:
        self.told_to_stop.set()
        for question in list(self.answers):     # nobody else will answer
            self.on_answer(question, "", False)
        self.shutdown()
        threading.Event().wait(STOP_TIME)
        os._exit(1)                 # whatever it is that still goes on

    def on_stop(self) -> None:
        self.told_to_stop.set()

    def on_users(self, hashes: Dict[str, str]) -> None:
        cast(HandedUsers, self.users).hand(hashes)
        self.bell.ring()

    def on_failed(self, host: str) -> None:
        Guessing.failed(self.guessing, host)

    def on_succeeded(self, host: str) -> None:
        Guessing.succeeded(self.guessing, host)

    def on_news(self, kind: str) -> None:
        """Another one has told of it."""
        self.news.told(kind)

    def on_opened(self, number: int, address: Address) -> None:
        self.relays_of_all.elsewhere.setdefault(number, set()).add(address)

    def on_closed(self, number: int, address: Address) -> None:
        self.relays_of_all.elsewhere.get(number, set()).discard(address)

    def on_gone(self, number: int) -> None:
        """Another worker has died."""
        self.relays_of_all.elsewhere.pop(number, None)

    def on_follow_log(self) -> None:
        self.follow_log()

    def on_explain(self, on: bool) -> None:
        self.explain(on)

    def on_answer(self, question: int, host: str, yes: bool) -> None:
        answer = self.answers.pop(question, None)
        if answer is not None:
            answer.put(yes)
        elif not yes:               # too late: it has been let in, and is to be counted
            self.line.send("stays", host)

    # --- what it tells ---

    def service_actions(self) -> None:
        super().service_actions()
        if not self.serving:
            self.serving = True
            self.line.send("serving")
        self.tell_tally()

    def tell_tally(self) -> None:
        """What has been added since the last time, so that little is lost if we are killed; later, if the parent does not listen."""
        if (self.tally.events or self.most > self.most_told) and len(self.line.outgoing) < ENOUGH:
            tally, self.tally = self.tally, Tally()
            tally.most = self.most_told = self.most
            self.line.send("tally", tally)

    def left_out(self, kind: str) -> Optional[int]:
        """A line once a minute over all workers, which tells what this one has left out."""
        left_out = super().left_out(kind)
        if left_out is not None:
            self.line.hint("news", kind)
        return left_out

    # --- what is counted over all workers ---

    def next_id(self) -> int:
        return self.board.next_id()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """
        As ever, and then the limits of all together.

        Counted first and looked at then, so that there is never one too many; of two that come at
        the same time for the last place, both may be turned away.
        """
        if not super().verify_request(request, client_address):
            return False
        self.note_clients()
        clients = sum(self.board.clients)
        if self.max_clients is not None and clients > self.max_clients:
            self.warn("full", "%d clients are being served, and more do not fit: see --max-clients", self.max_clients)
        elif self.max_per_client is not None and not self.ask(Address.of(client_address).host):
            host = Address.of(client_address).host
            self.warn("full " + host, "%s has %d connections, and may have no more", host, self.max_per_client)
        else:
            self.most = max(self.most, clients)
            return True
        self.uncount(Address.of(client_address).host)
        return False

    def note_clients(self) -> None:
        """Write down how many there are here."""
        with self.lock:
            self.board.clients[self.number] = self.clients

    def uncount(self, host: str) -> None:
        with self.lock:
            self.one_less(host)
        self.note_clients()

    def ask(self, host: str) -> bool:
        """
        Ask the parent whether one more may come from there, and wait for its answer, but not long.

        Without one, what is known here counts: verify_request() has seen that there are not too many at this worker.
        """
        number = next(self.questions)
        answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.answers[number] = answer
        try:
            if self.told_to_stop.is_set():
                return False
            self.line.send("came", number, host)
            return answer.get(timeout=ANSWER_TIME)
        except queue.Empty:
            return self.answers.pop(number, None) is not None or answer.get()       # it may just be coming
        finally:
            self.answers.pop(number, None)

    def finished(self, handler: Socks5Handler) -> None:
        super().finished(handler)
        self.note_clients()
        if self.max_per_client is not None:
            self.line.send("left", handler.session.client.host)


# --- the process ---

def main(descriptor: int) -> NoReturn:
    """Serve as the other end of this socket says.  Whoever starts us has blocked all signals that are for the parent."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")      # noqa: SIM115
    line = Line(socket.socket(fileno=descriptor))
    try:
        server = prepare(line, hear_orders(line))
    except EOFError:
        sys.exit(1)
    except Exception as error:      # whatever it is, the parent will tell it
        say_last(line, "trouble", f"{type(error).__name__}: {error}")
        sys.exit(1)
    serve(server)
    sys.exit(0)


def hear_orders(line: Line) -> Orders:
    """The first message; what has come with it stays where it is."""
    line.socket.setblocking(True)
    while True:
        line.fill()
        for message in line.messages():
            line.socket.setblocking(False)
            return cast(Orders, pickle.loads(message)[0])


def prepare(line: Line, orders: Orders) -> WorkerServer:
    keep_to_one_cpu(orders.number, orders.workers)
    log.set_up(orders.options)
    server = worker_class(orders.options)(line, orders)
    configure(server, orders.options)
    return server


def worker_class(options: argparse.Namespace) -> Type[WorkerServer]:
    if options.status is None:
        return WorkerServer
    from .gathering import WatchedWorker

    return WatchedWorker


def keep_to_one_cpu(number: int, workers: int) -> None:
    """Worker k on the k-th CPU, if each can have one: threads that move between CPUs wait for each other."""
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) >= workers:
            os.sched_setaffinity(0, {cpus[number]})


def serve(server: WorkerServer) -> None:
    threading.Thread(target=server.obey, name="socks5srv-obey", daemon=True).start()
    server.bell.ring()              # to tell at once that we serve
    gc.freeze()                     # as in run.py
    try:
        server.serve_forever()
    except Exception:
        logger.exception("a bug, met while keeping the books")
        os._exit(1)
    server.server_close()
    server.tell_tally()
    say_last(server.line, "stopped")


def say_last(line: Line, *message: Any) -> None:
    """Send it, with whatever still waits, before we end."""
    line.socket.settimeout(STOP_TIME)
    line.send(*message)
    line.close()
