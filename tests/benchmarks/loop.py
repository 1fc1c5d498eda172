"""
Many sockets in one thread, as lean as plain Python gets.

The one idea: a *task* is a generator, which says on which socket it waits and then yields.
The loop takes it up again when that socket is ready, so a conversation reads from top to
bottom, as if it were alone:

    def echo(loop, sock):
        loop.watch(sock, READ)
        while True:
            yield
            sock.send(sock.recv(1024))

A task that has set itself a deadline gets a `TimeoutError` where it waits, if it is late.
There is nothing here about SOCKS5: that is in traffic.py.
"""

from __future__ import annotations

import select
import selectors
import socket
import time
from typing import Callable, Dict, Generator, List, Optional, Tuple

clock = time.perf_counter

Task = Generator[None, None, None]

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
LOOK = 0.1                  # seconds between two looks for tasks that are late


class Epoll:
    """Linux: the kernel keeps the list, and forgets a socket when it is closed."""

    def __init__(self) -> None:
        epoll = select.epoll()
        self.wait: Callable[[float], List[Tuple[int, int]]] = epoll.poll
        self.epoll, self.close = epoll, epoll.close
        self.masks = {READ: select.EPOLLIN, WRITE: select.EPOLLOUT}

    def add(self, fd: int, events: int) -> None:
        self.epoll.register(fd, self.masks[events])

    def change(self, fd: int, events: int) -> None:
        self.epoll.modify(fd, self.masks[events])

    def drop(self, fd: int, closing: bool) -> None:
        if not closing:
            self.epoll.unregister(fd)


class Selector:
    """Everywhere else: what the standard library has found to be best."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.close = self.selector.close

    def wait(self, seconds: float) -> List[Tuple[int, int]]:
        return [(key.fd, events) for key, events in self.selector.select(seconds)]

    def add(self, fd: int, events: int) -> None:
        self.selector.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        self.selector.modify(fd, events)

    def drop(self, fd: int, closing: bool) -> None:
        self.selector.unregister(fd)


class Loop:
    """Runs tasks, each when its socket is ready.  `portable` does without what only Linux has."""

    def __init__(self, portable: bool = False) -> None:
        self.portable = portable or not hasattr(select, "epoll")
        self.poller = Selector() if self.portable else Epoll()
        self.tasks: Dict[int, Task] = {}                # by the descriptor that they wait for
        self.deadlines: Dict[Task, float] = {}
        self.current: Optional[Task] = None

    def close(self) -> None:
        """End all tasks where they wait; that closes their sockets."""
        for task in [*self.tasks.values()]:
            task.close()
        self.poller.close()

    # --- for tasks ---

    def watch(self, sock: socket.socket, events: int) -> None:
        """The running task waits for this socket from now on."""
        assert self.current is not None
        self.poller.add(sock.fileno(), events)
        self.tasks[sock.fileno()] = self.current

    def change(self, sock: socket.socket, events: int) -> None:
        self.poller.change(sock.fileno(), events)

    def leave(self, sock: socket.socket) -> None:
        """Nobody waits for this socket, but it stays open."""
        fd = sock.fileno()
        task = self.tasks.pop(fd, None)
        if task is not None:
            self.poller.drop(fd, False)

    def shut(self, sock: socket.socket) -> None:
        """Close this socket, whether somebody waits for it or not."""
        fd = sock.fileno()
        task = self.tasks.pop(fd, None)     # kept till the end: without it the task ends, and closes its socket
        if task is not None:
            self.poller.drop(fd, True)
        sock.close()

    def hurry(self, seconds: float) -> None:
        """The running task gets a TimeoutError if it is not ready in time."""
        assert self.current is not None
        self.deadlines[self.current] = clock() + seconds

    # --- for whoever runs them ---

    def start(self, task: Task) -> None:
        """Run a new task until it waits for the first time; a task may start others."""
        before, self.current = self.current, task
        try:
            next(task)
        except StopIteration:
            self.deadlines.pop(task, None)
        finally:
            self.current = before

    def run(self, seconds: float, done: Callable[[], object] = lambda: False) -> None:
        """Let the tasks run for so long, or until it is `done`."""
        tasks, wait = self.tasks, self.poller.wait
        now = clock()
        end, look = now + seconds, now + LOOK
        while now < end and not done():
            for fd, _events in wait(min(end - now, LOOK)):
                task = tasks.get(fd)
                if task is not None:                # a task before it may have closed this one's socket
                    self.current = task
                    try:
                        next(task)
                    except StopIteration:
                        self.deadlines.pop(task, None)
            now = clock()
            if now > look:
                look = now + LOOK
                self.throw_at_the_late(now)
        self.current = None

    def throw_at_the_late(self, now: float) -> None:
        for task in [task for task, deadline in self.deadlines.items() if deadline < now]:
            del self.deadlines[task]
            self.current = task
            try:
                task.throw(TimeoutError())
            except StopIteration:
                pass
