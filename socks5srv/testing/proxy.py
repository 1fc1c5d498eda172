"""
A proxy in the background: `Proxy`, which tests call `start`.

    with start(hosts={"api.example.com": "127.0.0.1"}) as proxy:
        requests.get("http://api.example.com:8000/", proxies=proxy.proxies)
        proxy.assert_used(host="api.example.com", times=1)

It is a Socks5Server on a free port of 127.0.0.1, and serves before start() returns.  Two ideas.
*What the client has been told, the list of sessions knows*: a session is in it before any reply is
sent, so no assertion can come too early; only the numbers of octets are not complete before the
session has ended, and wait_for(closed=True) waits for that.  And *nothing leaves this computer by
accident*: names have the addresses that `hosts` gives them, or none, and addresses beyond loopback
are refused, unless the test says ``internet=True``.

No pytest here: pytest_plugin.py has that.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union
from urllib.parse import quote

from ..handler import Socks5Handler
from ..names import canonical
from ..observer import Observer
from ..protocol import Address, Command, Datagram, Message, Reply, ReplyCode, Request, RequestFailed, Socks5Error
from ..rules import Rule
from ..server import Socks5Server, refuse_unknown
from ..session import Session
from ..upstream import UpstreamHandler
from ..users import Users
from .faults import Broken, Fault, Faults, MessageClass, SecondReply
from .link import LossyLink

Place = Union[str, Tuple[Any, ...]]     # an IP address; or that and a port
Selectors = Tuple[Optional[str], Optional[int], Optional[Command], Optional[str]]      # as find() takes them
AnyFault = TypeVar("AnyFault", bound=Fault)


class Proxy:
    """
    A proxy that serves, and does so until its stop(), or the end of a ``with`` block.

    `handler`   a subclass of Socks5Handler, with methods of your own; what they raise, stop() raises
    `port`      0 for a free one
    `hosts`     the names that there are, each with its IP address, or ``(IP address, port)`` to lead CONNECT to
                another port; all others but localhost get reply 04, and are looked up nowhere
    `internet`  let it look up other names, and reach addresses beyond loopback
    `users`     passwords by name; then a login is asked for, and `url` has the first one
    `rules`     lines like ``"deny *.ads.example"``
    `faults`    from faults.py
    `upstream`  the URL of another proxy, to go out through; names that `hosts` does not have are left to it

    Any other keyword is a setting of Socks5Server, such as `commands` or `idle_timeout`.  OSError if it cannot
    listen there; TypeError for a setting that there is not, ValueError for `hosts` that are no addresses, and for a `host`
    beyond loopback without `users`, unless ``allow_open_proxy=True``.

    Attributes to read: `host` and `port`; `user` and `password`, of the first of its users (None if it has none, or
    keeps hashes); `errors`, what the handler's methods have raised and nothing has been told of yet.  Its list of
    sessions, and its faults, outlive restart().
    """

    def __init__(self, handler: Type[Socks5Handler] = Socks5Handler, *, host: str = "127.0.0.1", port: int = 0,
                 hosts: Optional[Mapping[str, Place]] = None, internet: bool = False,
                 users: Union[Users, Mapping[str, str], None] = None, rules: Iterable[Union[str, Rule]] = (),
                 faults: Iterable[Fault] = (), upstream: Optional[str] = None, **settings: Any) -> None:
        refuse_unknown(settings, Socks5Server, "start", Proxy)
        self.handler = handler
        self.upstream = upstream
        self.host = host
        self.hosts = {canonical(name): as_place(name, place) for name, place in (hosts or {}).items()}
        self.internet = internet
        self.users = users
        self.rules = list(rules)
        self.settings = settings
        self.user: Optional[str] = next(iter(users), None) if isinstance(users, Mapping) else None
        self.password = users[self.user] if isinstance(users, Mapping) and self.user is not None else None
        self.injected = Faults()
        for fault in faults:
            self.inject(fault)
        self.errors: List[BaseException] = []
        self.news = threading.Condition()       # of sessions: one more, a reply, an end
        self.wakers: List[Callable[[], None]] = []      # of coroutines that wait for such news
        self.seen: List[Session] = []
        self.server: Optional[Server] = None
        self.port = port
        self.restart()

    # --- serving ---

    def restart(self) -> None:
        """Serve again, at the same port; stop first if it is serving."""
        self.close()
        server = Server(self)
        self.port = server.server_address[1]
        self.thread = threading.Thread(target=server.serve_forever, name="socks5srv-testing", daemon=True)
        self.thread.start()
        self.server = server

    def stop(self) -> None:
        """
        Serve no more, and end all connections.  May be called again.

        Raises what the handler's methods have raised; AssertionError if a fault has never struck, as
        assert_faults_struck() does.  Each of them is raised once.
        """
        __tracebackhide__ = True
        self._end()
        self.assert_faults_struck()

    def _end(self) -> None:
        """stop(), whatever the faults have done."""
        self.close()
        errors, self.errors = self.errors, []       # which count as told then
        if errors:
            raise errors[0]

    def close(self) -> None:
        """stop(), without a complaint."""
        server, self.server = self.server, None
        if server is not None:
            server.halted.set()
            server.server_close()
            self.thread.join()
            for link in server.links:
                link.thread.join()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> None:
        __tracebackhide__ = True
        if error is None:
            self.stop()
        elif isinstance(error, Exception):      # which may well have come from what _end() raises
            self._end()
        else:
            self.close()

    # --- its address ---

    @property
    def url(self) -> str:
        """``socks5h://127.0.0.1:1080``, with the login if there is one.  The h leaves names to the proxy."""
        login = f"{quote(self.user, safe='')}:{quote(self.password or '', safe='')}@" if self.user else ""
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"socks5h://{login}{host}:{self.port}"

    @property
    def address(self) -> Tuple[str, int]:
        return self.host, self.port

    @property
    def proxies(self) -> Dict[str, str]:
        """For Requests: ``requests.get(url, proxies=proxy.proxies)``."""
        return {"http": self.url, "https": self.url}

    @property
    def env(self) -> Dict[str, str]:
        """An environment for another program: this one's, with ALL_PROXY, and no other proxy in it."""
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {**clean, "ALL_PROXY": self.url, "all_proxy": self.url}

    # --- what it was used for ---

    @property
    def sessions(self) -> List[Session]:
        """All clients since start() or clear(), oldest first, those that are still there and those that are gone."""
        with self.news:
            return list(self.seen)

    def clear(self) -> None:
        """Forget the sessions, and take all faults away.  (One that has never struck fails the test nevertheless, at its end.)"""
        with self.news:
            self.seen.clear()
        self.injected.clear()

    def last(self) -> Session:
        """The latest of the sessions; AssertionError if there is none."""
        __tracebackhide__ = True
        sessions = self.sessions
        if not sessions:
            raise AssertionError(f"no client has connected to {self}")
        return sessions[-1]

    def find(self, host: Optional[str] = None, port: Optional[int] = None, command: Optional[Command] = None,
             user: Optional[str] = None) -> List[Session]:
        """The sessions that asked for this: `host` and `port` as the client wrote them."""
        return [session for session in self.sessions if is_about(session, host, port, command, user)]

    def wait_for(self, count: int = 1, timeout: float = 5.0, *, closed: bool = False, host: Optional[str] = None,
                 port: Optional[int] = None, command: Optional[Command] = None, user: Optional[str] = None) -> List[Session]:
        """
        Wait until so many sessions, of those that find() would find, have had their answer; or are over, with `closed`.

        Returns them.  AssertionError, with all sessions in it, when the seconds are over.
        """
        __tracebackhide__ = True
        wanted = Wanted(self, closed, (host, port, command, user))
        with self.news:
            if not self.news.wait_for(lambda: len(wanted.found()) >= count, timeout):
                raise AssertionError(wanted.complaint(count, timeout))
            return wanted.found()

    async def wait_for_async(self, count: int = 1, timeout: float = 5.0, *, closed: bool = False, host: Optional[str] = None,
                             port: Optional[int] = None, command: Optional[Command] = None, user: Optional[str] = None) -> List[Session]:
        """wait_for() in a coroutine of asyncio, which others go on beside, and which may be cancelled."""
        import asyncio      # which takes its time, and most tests do without

        __tracebackhide__ = True
        wanted = Wanted(self, closed, (host, port, command, user))
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        until = loop.time() + timeout
        timer = loop.call_at(until, news.set)

        def wake() -> None:
            with suppress(RuntimeError):        # the loop has been closed without an end of its coroutines
                loop.call_soon_threadsafe(news.set)

        with self.news:
            self.wakers.append(wake)
        try:
            while len(wanted.found()) < count:
                if loop.time() >= until:
                    raise AssertionError(wanted.complaint(count, timeout))
                await news.wait()
                news.clear()
            return wanted.found()
        finally:
            timer.cancel()
            with self.news:
                self.wakers.remove(wake)

    def assert_used(self, host: Optional[str] = None, port: Optional[int] = None, times: Optional[int] = None, *,
                    command: Optional[Command] = None, user: Optional[str] = None) -> None:
        """
        A client has asked for this, exactly so many `times`, or at least once.

        With a name for `host` it also says that the client left the name to the proxy: else it would have
        written an address.
        """
        __tracebackhide__ = True
        count = len([session for session in self.find(host, port, command, user) if session.command is not None])
        if count != times if times is not None else not count:
            wanted = "never asked" if times is None else f"asked {count} times, not {times},"
            raise AssertionError(f"the proxy was {wanted}{selection(host, port, command, user)}\n{self.report()}")

    def assert_not_used(self, host: Optional[str] = None, port: Optional[int] = None) -> None:
        """No client has asked for this; without arguments, none has connected at all."""
        __tracebackhide__ = True
        if self.find(host, port):
            raise AssertionError(f"the proxy was used{selection(host, port, None, None)}\n{self.report()}")

    def report(self) -> str:
        """All sessions, a line for each, and the faults that have never struck."""
        sessions = self.sessions
        head = f"{self._headline} {len(sessions)} session{'' if len(sessions) == 1 else 's'}"
        return "\n".join([head, *(f"  {session}" for session in sessions), *(f"  {armed}" for armed in self.injected.idle())])

    @property
    def _headline(self) -> str:
        """What a report() begins with: who has seen it in a message need not see it again."""
        return f"{self} has had"

    def __repr__(self) -> str:
        return f"<Proxy {Address.named(self.host, self.port)}{'' if self.server else ' stopped'}>"

    # --- what goes wrong ---

    @property
    def faults(self) -> List[Fault]:
        """Those that are there now, in their order; each says how often it has `struck`."""
        return [armed.fault for armed in list(self.injected.armed)]

    def inject(self, fault: AnyFault) -> AnyFault:
        """Let this go wrong from now on, after the faults that are there already.  Returns the fault, whose `struck` counts then."""
        self.injected.add(fault)
        return fault

    def assert_faults_struck(self) -> None:
        """Each fault has struck, also those that clear() took away, but for those with ``optional=True``."""
        __tracebackhide__ = True
        complaint = self._idle_faults()
        if complaint:
            raise AssertionError(complaint)

    def _idle_faults(self) -> str:
        """The complaint of faults that have never struck, made once; "" if there are none."""
        idle = self.injected.idle()
        if not idle:
            return ""
        words = "\n".join([*map(str, idle), "A fault that need not strike takes optional=True."])
        for armed in idle:
            armed.reported = True
        return f"{words}\n{self.report()}"

    # --- for the handlers ---

    def _tell(self) -> None:
        """There is news of a session."""
        with self.news:
            self.news.notify_all()
            for wake in self.wakers:
                wake()

    def _keep(self, error: BaseException) -> None:
        """For stop() to raise."""
        if not any(error is known for known in self.errors):
            self.errors.append(error)

    @contextmanager
    def _keeping_bugs(self, *answers: Type[BaseException]) -> Iterator[None]:
        """Keep whatever is raised, but for these, which have a meaning there."""
        try:
            yield
        except answers:
            raise
        except BaseException as error:
            self._keep(error)
            raise

    def _may_be_reached(self, address: Address) -> bool:
        """Whether the test has said that this may be reached, or it is on this computer anyway."""
        literal = address.literal
        if self.internet or literal is None or literal.is_unspecified or ip_address(literal.host).is_loopback:
            return True
        return literal.host in {*self.hosts, *(place[0] for place in self.hosts.values())}


start = Proxy       # as a test says it: what it wants is a proxy that has been started


def as_place(name: str, place: Place) -> Tuple[Any, ...]:
    """An IP address, and a port if there is one; ValueError if it is something else."""
    parts = (place,) if isinstance(place, str) else place[:2]
    try:
        return (str(ip_address(parts[0])), *map(int, parts[1:]))
    except (ValueError, IndexError):
        raise ValueError(f"hosts: {name!r} has to be an IP address as text, or (IP address, port), not {place!r}") from None


def is_about(session: Session, host: Optional[str], port: Optional[int], command: Optional[Command], user: Optional[str]) -> bool:
    where = session.destination
    found = (where and canonical(where.host), where and where.port, session.command, session.user)
    wanted = (host if host is None else canonical(host), port, command, user)
    return all(one is None or one == other for one, other in zip(wanted, found))


def selection(host: Optional[str], port: Optional[int], command: Optional[Command], user: Optional[str]) -> str:
    """What was looked for, in words."""
    words = [("host", host), ("port", port), ("command", command.name if command else None), ("user", user)]
    told = ", ".join(f"{name} {value}" for name, value in words if value is not None)
    return f" for {told}" if told else ""


class Wanted:
    """The sessions that somebody waits for."""

    def __init__(self, proxy: Proxy, closed: bool, selectors: Selectors) -> None:
        self.proxy = proxy
        self.closed = closed
        self.selectors = selectors

    def found(self) -> List[Session]:
        return [
            session for session in self.proxy.find(*self.selectors)
            if session.seconds is not None or (not self.closed and session.reply is not None)
        ]

    def complaint(self, count: int, timeout: float) -> str:
        asked = selection(*self.selectors) + (" closed" if self.closed else " answered")
        return f"{len(self.found())} of {count} sessions{asked} within {timeout:g} s\n{self.proxy.report()}"


class Server(Socks5Server):
    """A server that tells its proxy of bugs."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.halted = threading.Event()         # for those that pause
        self.links: List[LossyLink] = []
        handler = in_front_of(proxy.handler, proxy.upstream)
        super().__init__(
            (proxy.host, proxy.port), handler, users=proxy.users, rules=proxy.rules, upstream=proxy.upstream, **proxy.settings,
        )
        self.observers = (Sessions(proxy), *self.observers)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self.proxy._keep(error)


class Sessions(Observer):
    """Tells the proxy of its sessions."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    def started(self, session: Session) -> None:
        with self.proxy.news:
            self.proxy.seen.append(session)
            self.proxy._tell()

    def sending(self, session: Session, message: Message, error: Optional[Socks5Error]) -> None:
        self.proxy._tell()


def in_front_of(handler: Type[Socks5Handler], upstream: Optional[str]) -> Type[Socks5Handler]:
    """
    The test's handler with `Faulty` in front.

    Here alone a class is made at run time: faults decide, in place of methods that the test's own class may override.
    """
    behind = [each for each in (handler, UpstreamHandler if upstream is not None else Socks5Handler) if each is not Socks5Handler]

    class Handler(Faulty, *behind):  # type: ignore[misc]
        pass

    return Handler


class Faulty(Socks5Handler):
    """In front of the handler: lets the faults strike, and keeps the test on this computer."""

    server: Server
    link: Optional[LossyLink] = None
    replied = False             # what is sent after a reply is another one, and only BIND has two

    @property
    def proxy(self) -> Proxy:
        return self.server.proxy

    def handle(self) -> None:
        try:
            super().handle()
        except BaseException as error:      # an assertion in a method of the test's, for instance
            self.proxy._keep(error)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        super().close()
        self.proxy._tell()

    # --- where it leads ---

    def allow(self, command: Command, address: Address) -> bool:
        if not self.proxy._may_be_reached(address):
            raise RequestFailed(ReplyCode.NOT_ALLOWED, f"{address} is beyond loopback, where only internet=True leads")
        with self.proxy._keeping_bugs(Socks5Error):
            return super().allow(command, address)

    def resolve(self, host: str) -> Sequence[str]:
        place = self.proxy.hosts.get(canonical(host))
        if place is not None:
            return [place[0]]
        own = self.proxy.handler.resolve is not Socks5Handler.resolve
        if not (own or self.proxy.internet or canonical(host) == "localhost"):
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{host} is not in hosts=, and only internet=True looks further")
        with self.proxy._keeping_bugs(Socks5Error, OSError, UnicodeError):
            return super().resolve(host)

    def connect(self, request: Request) -> Any:
        place = self.proxy.hosts.get(canonical(request.destination.host))
        if place is not None and (len(place) > 1 or self.proxy.upstream is not None):
            self._check(request.command, request.destination)
            request = Request(request.command, Address.named(*[*place, request.destination.port][:2]))
        return super().connect(request)

    # --- what goes wrong ---

    def striking(self, message: MessageClass) -> Iterator[Fault]:
        destination = self.session.destination
        return self.proxy.injected.striking(message, destination.host if destination else "")

    def receive(self, message: Any) -> Any:
        received = super().receive(message)
        if message is not Request:              # that one is struck when the session knows of it
            for fault in self.striking(message):
                fault.received(self)
        return received

    def perform(self, request: Request) -> None:
        self.session.command, self.session.destination = request.command, request.destination
        for fault in self.striking(Request):
            fault.received(self)
        super().perform(request)

    def send(self, message: Message) -> None:
        changed, faults = self.by_lossy_link(message), []
        for fault in self.striking(SecondReply if self.replied else type(message)):
            changed = fault.sending(self, changed)
            faults.append(fault)
        self.replied = isinstance(message, Reply)
        super().send(changed)
        for fault in faults:
            fault.sent(self, message)

    def by_lossy_link(self, message: Message) -> Message:
        """The reply to UDP ASSOCIATE, with the address of a lossy link if datagrams are to have one."""
        if not isinstance(message, Reply) or message.code is not ReplyCode.SUCCEEDED:
            return message
        if self.session.command is not Command.UDP_ASSOCIATE or not any(Datagram in armed.fault.about for armed in list(self.proxy.injected.armed)):
            return message
        self.link = LossyLink(message.bound, self.session.client.zoned, self.proxy.injected.pass_on)
        self.server.links.append(self.link)
        return Reply(message.code, self.link.bound)

    def pause(self, seconds: float) -> None:
        """Do nothing for so many seconds; Broken if the proxy stops meanwhile."""
        if self.server.halted.wait(seconds):
            raise Broken("the proxy has stopped")
