"""
One of several processes that serve: what ``--workers N`` starts N times.

It is a server like any other, but for what belongs to all workers together (shared.py).  Its listening sockets are
the supervisor's, so that the kernel hands each client to one of the workers.  It reads no options and no users file,
and ends when the supervisor says so, or has ended itself.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import selectors
import socket
import sys
import threading
from functools import partial
from typing import Any, Dict, NoReturn, Optional, cast

from ..handler import Socks5Handler
from ..registry import Refusal, Registry, host_limit_reached, limit_reached
from ..rules import Rules
from ..server import Drain, Socks5Server
from ..service import log
from ..service.build import Service, handler_class, server_settings
from ..service.shared_listener import SharedListener
from ..service.summary import Summary
from .channel import (
    UPDATES, Answer, Channel, HostCount, MayAdmit, NotAccepting, Question, ReopenLog, Report, ReportWanted, Requests, RulesChanged, Serving,
    SessionWanted, SetExplain, StartFailed, Stop, StopAccepting, SummaryUpdate, UsersChanged, WorkerConfig, dispatch,
)
from .shared import RelayAddresses, Replica, ReplicatedUsers, Scoreboard, SharedRateLimit, SharedThrottle

logger = logging.getLogger("socks5srv")

STOP_TIMEOUT = 5.0      # seconds that a worker has to end


class WorkerRegistry(Registry[Socks5Handler]):
    """Who is being served by this worker, within the limits of all together."""

    answer_timeout = 1.0    # seconds that the supervisor has to say whether a host may have one more client

    def __init__(self, server: WorkerServer) -> None:
        super().__init__(server, server.policy.throttle)
        self.server = server
        self.peak = 0       # clients at a time, of all workers

    def next_id(self) -> int:
        return self.server.scoreboard.next_id()

    # A client is counted first and compared with the limit then, so that there is never one too many; of two that
    # come at the same time for the last place, both may be turned away.

    def admit(self, host: str) -> Optional[Refusal]:
        refusal = super().admit(host)
        if refusal is None and (refusal := self.refusal_of_all(host)):
            with self.lock:
                self.release(host)
        return refusal

    def count(self, host: str) -> Optional[Refusal]:
        refusal = super().count(host)
        self.publish()
        return refusal

    def release(self, host: str) -> None:
        super().release(host)
        self.publish()

    def publish(self) -> None:
        """Let the other workers know how many clients are here; to be called with the lock."""
        self.server.scoreboard.clients[self.server.number] = self.clients

    def refusal_of_all(self, host: str) -> Optional[Refusal]:
        clients, limits = self.server.scoreboard.total(), self.limits
        if limits.max_clients is not None and clients > limits.max_clients:
            return limit_reached(limits.max_clients)
        if limits.max_per_client is not None and not self.host_may_come(host):
            return host_limit_reached(host, limits.max_per_client)
        self.peak = max(self.peak, clients)
        return None

    def host_may_come(self, host: str) -> bool:
        """Without an answer of the supervisor our own count decides, and has: super().admit() comes first."""
        server = self.server
        if server.stopping_all.is_set():
            return False
        answers = server.requests.ask(MayAdmit(host), [server.channel], self.answer_timeout)
        return bool(answers.get(server.channel, not server.stopping_all.is_set()))

    def remove(self, client: Socks5Handler) -> None:
        super().remove(client)
        if self.limits.max_per_client is not None:
            self.server.channel.send(HostCount(client.session.client.host, -1))


class WorkerServer(Socks5Server):
    """The server of one worker.  Its methods ``on_<Message>`` are what the supervisor can say."""

    def __init__(self, channel: Channel, config: WorkerConfig) -> None:
        self.channel = channel
        self.number = config.number
        self.scoreboard = Scoreboard(config.scoreboard, config.workers)
        self.requests = Requests()
        self.stopping_all = threading.Event()
        self.peak_told = 0
        self.told_not_accepting = False
        settings, (failures, relays) = config.settings, config.state
        users: Any = settings.users if config.users is None else ReplicatedUsers(config.users, config.workers)
        sockets = [socket.socket(fileno=descriptor) for descriptor in config.listeners]
        super().__init__(sockets[0].getsockname(), handler_class(settings), users=users, sockets=sockets, **server_settings(settings))
        self.listeners[:] = [SharedListener(sock, self._accept, self._talk) for sock in sockets]
        self.rate_limit = SharedRateLimit(channel.hint)
        self.policy.throttle = SharedThrottle(channel.hint)
        self.policy.throttle.failures.update(failures)
        self.policy.relays = RelayAddresses(channel.hint, config.number, relays)
        self.policy.private.update(config.private)
        self.replica = Replica(self.policy.throttle, self.rate_limit, relays)
        self.registry = registry = WorkerRegistry(self)
        self.service = Service(self, settings, Summary(lambda: registry.peak))

    # --- what the supervisor says ---

    def control(self) -> None:
        """In a thread of its own: do what the supervisor says, until it says to stop, or can say nothing any more."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel.socket, selectors.EVENT_READ)
            try:
                while not self.stopping_all.is_set():
                    for octets in self.channel.messages():      # they may have come with the config
                        self._attempt(self.receive, octets)
                    self.channel.flush()
                    if not self.stopping_all.is_set() and selector.select(0.5):
                        self.channel.fill()
            except EOFError:
                pass
            except Exception:           # without the control channel we would never be told to stop
                logger.exception("unhandled exception in the control thread")
                os._exit(1)
        self.stopping_all.set()
        self.requests.closed(self.channel)
        self.shutdown()
        threading.Event().wait(STOP_TIMEOUT)
        os._exit(1)                 # something does not end

    def receive(self, octets: bytes) -> None:
        message = pickle.loads(octets)
        dispatch(self.replica if isinstance(message, UPDATES) else self, message)

    def on_Stop(self, _message: Stop) -> None:
        self.stopping_all.set()

    def on_StopAccepting(self, message: StopAccepting) -> None:
        for listener in self.listeners:
            cast(SharedListener, listener).takes_queue = message.last
        self.draining = Drain(0, message.timeout)       # which may be the second, with less time
        self.registry.wake.ring()

    def _stop_accepting(self) -> None:
        super()._stop_accepting()
        if not self.told_not_accepting and all(listener.socket.fileno() < 0 for listener in self.listeners):
            self.told_not_accepting = True
            self.channel.send(NotAccepting())

    def on_RulesChanged(self, message: RulesChanged) -> None:
        self.rules = Rules(message.rules)

    def on_UsersChanged(self, message: UsersChanged) -> None:
        cast(ReplicatedUsers, self.users).update(message.hashes)
        self.registry.wake.ring()

    def on_ReopenLog(self, _message: ReopenLog) -> None:
        log.reopen()

    def on_SetExplain(self, message: SetExplain) -> None:
        self.service.set_explain(message.on)

    def on_Question(self, message: Question) -> None:
        self.channel.hint(Answer(message.number, message.question, dispatch(self, message.question)))

    def on_ReportWanted(self, question: ReportWanted) -> Report:
        (snapshot,) = self.service.stats.snapshots(question.sessions).values()
        return Report(snapshot, self.service.stats.recent() if question.sessions else None)

    def on_SessionWanted(self, question: SessionWanted) -> Optional[Dict[str, Any]]:
        return self.service.stats.session(question.id)

    def on_Answer(self, message: Answer) -> None:
        if not self.requests.answered(self.channel, message) and message.answer is False:     # the client has been admitted
            self.channel.send(HostCount(message.question.host, 1))

    # --- what it tells ---

    def service_actions(self) -> None:
        super().service_actions()
        self.update_summary()

    def update_summary(self) -> None:
        """At each turn, so that little is lost if we are killed; later, if the supervisor does not read."""
        summary = self.service.summary
        if (summary.outcomes or summary.peak > self.peak_told) and not self.channel.congested:
            self.peak_told = summary.peak
            self.channel.send(SummaryUpdate(summary.take()))


# --- the process ---

def main(descriptor: int) -> NoReturn:
    """Serve as the other end of this socket says.  Signals that are for the supervisor are blocked by now."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")      # noqa: SIM115
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        config = receive_config(channel)
        keep_to_one_cpu(config.number, config.workers)
        log.set_up(config.settings)
        server = WorkerServer(channel, config)
    except EOFError:
        sys.exit(1)
    except Exception as error:      # the supervisor will log it
        channel.send(StartFailed(f"{type(error).__name__}: {error}"))
        channel.close(STOP_TIMEOUT)
        sys.exit(1)
    serve(server)
    sys.exit(0)


def receive_config(channel: Channel) -> WorkerConfig:
    """The first message; what has come with it stays in the channel."""
    channel.socket.setblocking(True)
    while True:
        channel.fill()
        for octets in channel.messages():
            channel.socket.setblocking(False)
            return cast(WorkerConfig, pickle.loads(octets))


def keep_to_one_cpu(number: int, workers: int) -> None:
    """Worker k on the k-th CPU, if each can have one: threads that move between CPUs wait for each other."""
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) >= workers:
            os.sched_setaffinity(0, {cpus[number % workers]})


def serve(server: WorkerServer) -> None:
    threading.Thread(target=server.control, name="socks5srv-control", daemon=True).start()
    server.call(partial(server.channel.send, Serving()))
    gc.freeze()     # start-up objects live forever; keep them out of every collection
    try:
        server.serve_forever()
    except Exception:
        logger.exception("unhandled exception in serve_forever()")
        os._exit(1)
    server.server_close()
    server.update_summary()
    if server.service.metrics is not None:
        server.channel.send(server.on_ReportWanted(ReportWanted(sessions=False)))
    server.channel.close(STOP_TIMEOUT)
