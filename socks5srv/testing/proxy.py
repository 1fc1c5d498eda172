"""
A proxy in the background: `start()`, and the `Proxy` that it returns.

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
import socketserver
import sys
import threading
import time
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, Union, cast
from urllib.parse import quote

from ..protocol import Address, Command, Message, Reply, ReplyCode, Request, RequestFailed, Socks5Error
from ..names import normal
from ..rules import Rule
from ..handler import Socks5Handler
from ..server import Socks5Server
from ..session import Session
from ..users import Users
from .faults import Broken, Fault, Faults, MessageClass, SecondReply
from .line import Line

Place = Union[str, Tuple[Any, ...]]     # an IP address; or that and a port


def start(handler: Type[Socks5Handler] = Socks5Handler, *, host: str = "127.0.0.1", port: int = 0,
          hosts: Optional[Mapping[str, Place]] = None, internet: bool = False,
          users: Union[Users, Mapping[str, str], None] = None, rules: Iterable[Union[str, Rule]] = (),
          faults: Iterable[Fault] = (), upstream: Optional[str] = None, **settings: Any) -> Proxy:
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
    listen there; TypeError for a setting that there is not, ValueError for `hosts` that are no addresses.
    """
    return Proxy(handler, host, port, hosts or {}, internet, users, list(rules), faults, upstream, settings)


class Proxy:
    """
    A proxy that serves; see start().

    `host`, `port`  where
    `user`, `password`  the first of its users; None if it has none, or keeps hashes
    `errors`        what the handler's methods have raised, and nobody has been told of yet

    Its list of sessions, and its faults, outlive restart().
    """

    def __init__(self, handler: Type[Socks5Handler], host: str, port: int, hosts: Mapping[str, Place], internet: bool,
                 users: Union[Users, Mapping[str, str], None], rules: Sequence[Union[str, Rule]], faults: Iterable[Fault],
                 upstream: Optional[str], settings: Mapping[str, Any]) -> None:
        for name in settings:
            if not is_setting(name):
                raise TypeError(f"a proxy has no {name}=; README.rst has a table of its settings")
        self.handler = handler
        self.upstream = upstream
        self.host = host
        self.hosts = {normal(name): as_place(name, place) for name, place in hosts.items()}
        self.internet = internet
        self.users = users
        self.rules = rules
        self.settings = settings
        self.user: Optional[str] = next(iter(users), None) if isinstance(users, Mapping) else None
        self.password = users[self.user] if isinstance(users, Mapping) and self.user is not None else None
        self.faults = Faults()
        for fault in faults:
            self.inject(fault)
        self.errors: List[BaseException] = []
        self.news = threading.Condition()       # of sessions: one more, a reply, an end
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
        End all connections, serve no more, and raise what the handler's methods have raised.

        May be called again: the second time, nothing happens.
        """
        self.close()
        self.check()

    def close(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.halted.set()
            server.server_close()
            self.thread.join()
            for line in server.lines:
                line.join()

    def check(self) -> None:
        """Raise the first of `errors`, with its own traceback; they then count as told."""
        if self.errors:
            error = self.errors[0]
            self.errors.clear()
            raise error

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> None:
        self.close()
        if error is None or isinstance(error, Exception):       # which may well have come from that
            self.check()

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
        """Forget the sessions, and take all faults away."""
        with self.news:
            self.seen.clear()
        self.faults.clear()

    def last(self) -> Session:
        """The latest of the sessions; AssertionError if there is none."""
        sessions = self.sessions
        if not sessions:
            raise AssertionError(f"nobody has come to {self}")
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
        def done(session: Session) -> bool:
            return session.seconds is not None or (not closed and session.reply is not None)

        def found() -> List[Session]:
            return [session for session in self.seen if done(session) and is_about(session, host, port, command, user)]

        until = time.monotonic() + timeout
        with self.news:
            while len(found()) < count:
                if not self.news.wait(until - time.monotonic()):
                    asked = selection(host, port, command, user) + (" closed" if closed else " answered")
                    raise AssertionError(f"{len(found())} of {count} sessions{asked} within {timeout:g} s\n{self.report()}")
            return found()

    def assert_used(self, host: Optional[str] = None, port: Optional[int] = None, times: Optional[int] = None, *,
                    command: Optional[Command] = None, user: Optional[str] = None) -> None:
        """
        Somebody has asked for this, exactly so many `times`, or at least once.

        With a name for `host` it also says that the client left the name to the proxy: else it would have
        written an address.
        """
        count = len([session for session in self.find(host, port, command, user) if session.command is not None])
        if count != times if times is not None else not count:
            wanted = "never asked" if times is None else f"asked {count} times, not {times},"
            raise AssertionError(f"the proxy was {wanted}{selection(host, port, command, user)}\n{self.report()}")

    def assert_not_used(self, host: Optional[str] = None, port: Optional[int] = None) -> None:
        """Nobody has asked for this; without arguments, nobody has come at all."""
        if self.find(host, port):
            raise AssertionError(f"the proxy was used{selection(host, port, None, None)}\n{self.report()}")

    def report(self) -> str:
        """All sessions, a line for each."""
        sessions = self.sessions
        head = f"{self} has had {len(sessions)} session{'' if len(sessions) == 1 else 's'}"
        return "\n".join([head, *(f"  {session}" for session in sessions)])

    def __repr__(self) -> str:
        return f"<Proxy {Address.named(self.host, self.port)}{'' if self.server else ' stopped'}>"

    # --- what goes wrong ---

    def inject(self, fault: Fault) -> None:
        """Let this go wrong from now on, after the faults that are there already."""
        self.faults.add(fault)

    # --- for the handlers ---

    def add(self, session: Session) -> None:
        with self.news:
            self.seen.append(session)
            self.news.notify_all()

    def tell(self) -> None:
        """There is news of a session."""
        with self.news:
            self.news.notify_all()

    def keep(self, error: BaseException) -> None:
        """For stop() to raise."""
        if not any(error is known for known in self.errors):
            self.errors.append(error)

    @contextmanager
    def keeping_bugs(self, *answers: Type[BaseException]) -> Iterator[None]:
        """Keep whatever is raised, but for these, which have a meaning there."""
        try:
            yield
        except answers:
            raise
        except BaseException as error:
            self.keep(error)
            raise

    def place_of(self, host: str) -> Optional[Tuple[Any, ...]]:
        """Where `hosts` says that this is: an IP address, and perhaps a port."""
        return self.hosts.get(normal(host))

    def may_be_reached(self, address: Address) -> bool:
        """Whether the test has said that this may be reached, or it is on this computer anyway."""
        literal = address.literal
        if self.internet or literal is None or literal.is_unspecified or ip_address(literal.host).is_loopback:
            return True
        return literal.host in {*self.hosts, *(place[0] for place in self.hosts.values())}


def as_place(name: str, place: Place) -> Tuple[Any, ...]:
    """An IP address, and a port if there is one; ValueError if it is something else."""
    parts = (place,) if isinstance(place, str) else place[:2]
    try:
        return (str(ip_address(parts[0])), *map(int, parts[1:]))
    except (ValueError, IndexError):
        raise ValueError(f"hosts: {name!r} has to be an IP address as text, or (IP address, port), not {place!r}") from None


def is_setting(name: str) -> bool:
    """Whether a Socks5Server has this setting.  (What any socketserver has is none of ours.)"""
    known = hasattr(Socks5Server, name) and not hasattr(socketserver.ThreadingTCPServer, name)
    return known and not name.startswith("_") and not callable(getattr(Socks5Server, name))


def is_about(session: Session, host: Optional[str], port: Optional[int], command: Optional[Command], user: Optional[str]) -> bool:
    where = session.destination
    return (
        (host is None or (where is not None and normal(where.host) == normal(host)))
        and (port is None or (where is not None and where.port == port))
        and (command is None or session.command is command)
        and (user is None or session.user == user)
    )


def selection(host: Optional[str], port: Optional[int], command: Optional[Command], user: Optional[str]) -> str:
    """What was looked for, in words."""
    words = [("host", host), ("port", port), ("command", command.name if command else None), ("user", user)]
    told = ", ".join(f"{name} {value}" for name, value in words if value is not None)
    return f" for {told}" if told else ""


def observed(handler: Type[Socks5Handler], upstream: Optional[str]) -> Type[Socks5Handler]:
    """The handler as a proxy needs it."""
    bases: List[Type[Socks5Handler]] = [Observed, handler]
    if upstream is not None:
        from ..upstream import UpstreamHandler

        bases = [Observed, *([] if handler is Socks5Handler else [handler]), UpstreamHandler]
    return type(handler.__name__, tuple(bases), {"upstream": upstream})


class Server(Socks5Server):
    """A server that keeps its bugs for whoever started it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.halted = threading.Event()         # for those that pause
        self.lines: List[Line] = []
        super().__init__((proxy.host, proxy.port), observed(proxy.handler, proxy.upstream), users=proxy.users, rules=proxy.rules)
        for name, value in proxy.settings.items():
            setattr(self, name, value)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self.proxy.keep(error)


class Observed(Socks5Handler):
    """Mixed into the handler, in front of it: tells the proxy, and lets the faults strike."""

    line: Optional[Line] = None
    replied = False             # what is sent after a reply is another one, and only BIND has two

    @property
    def proxy(self) -> Proxy:
        return cast(Server, self.server).proxy

    # --- what is told ---

    def setup(self) -> None:
        super().setup()
        self.proxy.add(self.session)

    def handle(self) -> None:
        try:
            super().handle()
        except BaseException as error:      # an assertion in a method of the test's, for instance
            self.proxy.keep(error)

    def finished(self) -> None:
        if self.line is not None:
            self.line.close()
        super().finished()
        self.proxy.tell()

    # --- where it leads ---

    def allow(self, command: Command, address: Address) -> bool:
        if not self.proxy.may_be_reached(address):
            raise RequestFailed(ReplyCode.NOT_ALLOWED, f"{address} is beyond loopback, where only internet=True leads")
        with self.proxy.keeping_bugs(Socks5Error):
            return super().allow(command, address)

    def resolve(self, host: str) -> Sequence[str]:
        place = self.proxy.place_of(host)
        if place is not None:
            return [place[0]]
        own = self.proxy.handler.resolve is not Socks5Handler.resolve
        if not (own or self.proxy.internet or normal(host) == "localhost"):
            raise RequestFailed(ReplyCode.HOST_UNREACHABLE, f"{host} is not in hosts=, and only internet=True looks further")
        with self.proxy.keeping_bugs(Socks5Error, OSError, UnicodeError):
            return super().resolve(host)

    def connect(self, request: Request) -> Any:
        place = self.proxy.place_of(request.destination.host)
        if place is not None and (len(place) > 1 or self.proxy.upstream is not None):
            self.check(request.command, request.destination)
            request = Request(request.command, Address.named(*[*place, request.destination.port][:2]))
        return super().connect(request)

    # --- what goes wrong ---

    def striking(self, message: MessageClass) -> Iterator[Fault]:
        destination = self.session.destination
        return self.proxy.faults.striking(message, destination.host if destination else "")

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
        self.proxy.tell()
        changed, faults = self.on_bad_line(message), []
        for fault in self.striking(SecondReply if self.replied else type(message)):
            changed = fault.sending(self, changed)
            faults.append(fault)
        self.replied = isinstance(message, Reply)
        super().send(changed)
        for fault in faults:
            fault.sent(self, message)

    def on_bad_line(self, message: Message) -> Message:
        """The reply to UDP ASSOCIATE, with the address of a bad line if datagrams are to have one."""
        if not isinstance(message, Reply) or message.code is not ReplyCode.SUCCEEDED:
            return message
        if self.session.command is not Command.UDP_ASSOCIATE or not self.proxy.faults.of_datagrams():
            return message
        self.line = Line(message.bound, self.session.client.zoned, self.proxy.faults.pass_on)
        cast(Server, self.server).lines.append(self.line)
        return Reply(message.code, self.line.bound)

    def pause(self, seconds: float) -> None:
        """Do nothing for so many seconds; Broken if the proxy stops meanwhile."""
        if cast(Server, self.server).halted.wait(seconds):
            raise Broken("the proxy has stopped")
