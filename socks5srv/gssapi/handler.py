"""
Clients that log in by Kerberos: the server's side of RFC 1961.

    server = Socks5Server(("192.0.2.1", 1080), GssapiHandler, gssapi=Gssapi("/etc/socks5.keytab", allow=["*@EXAMPLE.COM"]))

`GssapiHandler` is a handler like any other, and a mixin: ``class Both(GssapiHandler, UpstreamHandler)``.  It asks every
client for method 01, but those that know a password, if there are users, and those in networks that need neither.

The one idea: once a level of protection is agreed upon, `stream` is another one, and the relay is told how its octets are
coded.  The conversation goes on as without.

Not here: what is in the tokens (context.py), and in the frames (protected.py).
"""

from __future__ import annotations

import socket
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import Optional, Sequence

from ..datagrams import Association
from ..handler import Socks5Handler
from ..names import quoted
from ..protocol import LoginFailed, Method, Socks5Error, octet
from ..relay import RESET
from .context import Acceptor, Context, GssapiError, Protection, acceptor_credentials
from .messages import Abort, Aborted, ContextToken, FrameError, Level, LevelToken
from .protected import DATAGRAMS, ProtectedStream, protected

LEVELS = (Level.INTEGRITY, Level.CONFIDENTIALITY)


class GssapiLoginFailed(LoginFailed):
    """No Kerberos, not like this, or not for this principal; all of them are told the same."""

    def __init__(self, reason: str, principal: str = "", answer: Optional[Abort] = None) -> None:
        super().__init__(reason, principal)
        self.answer = answer


class Gssapi:
    """
    Who may log in by Kerberos, and how.  ValueError for a level that there is not, GssapiError for a keytab without keys.

    Attributes:
        keytab: a file with the server's keys, of which any will do (None: as KRB5_KTNAME says, or the system's own)
        levels: those that may be agreed upon; 0 is no protection, which RFC 1961 does not know (1 and 2)
        nec: serve clients that send the level in clear, as NEC's did: who is in between can change it (False)
        allow: patterns of principals, where ``*`` is anything; whole names, in which letters are told apart by case (all)
    """

    def __init__(self, keytab: Optional[str] = None, *, levels: Sequence[int] = LEVELS, nec: bool = False, allow: Sequence[str] = ()) -> None:
        if not levels or not set(levels) <= {*LEVELS, Level.NONE}:
            raise ValueError(f"invalid levels {levels!r}: expected some of 0, 1 and 2")
        self.keytab, self.nec, self.allow = keytab, nec, tuple(allow)
        self.levels = frozenset(map(Level, levels))
        self.credentials = acceptor_credentials(keytab)

    def allows(self, principal: str) -> bool:
        return not self.allow or any(fnmatchcase(principal, pattern) for pattern in self.allow)

    def grant(self, wanted: int) -> Level:
        """The level for a client that wants this one; FrameError if there is none."""
        if wanted not in list(Level):
            raise FrameError(f"protection level {wanted:02x} is none")
        if wanted in self.levels:
            return Level(wanted)
        if wanted == Level.NONE:
            raise FrameError("the client wants no protection, and --gssapi-levels has no 0")
        return max(self.levels)


class GssapiHandler(Socks5Handler):
    """
    A handler that asks for Kerberos; who may log in is said by `gssapi`.

    A relay() of one's own finds frames in `connection`, but at level 0: it reads and writes by `stream`.
    """

    asks_for_login = True
    gssapi: Optional[Gssapi] = None         # to be set in a subclass, or on the server

    @property
    def _gssapi(self) -> Gssapi:
        found: Optional[Gssapi] = self.gssapi if self.gssapi is not None else self.server.gssapi
        if found is None:
            raise RuntimeError("a GssapiHandler needs gssapi=Gssapi(...): on its server, or in a subclass")
        return found

    # --- method negotiation ---

    def select_method(self, offered: Sequence[int]) -> Method:
        """
        Kerberos for whoever offers nothing else that would do.

        It is not taken first: curl, for one, offers it to every server, and fails if it is taken and there is no ticket.
        """
        method = super().select_method(offered)
        return Method.GSSAPI if method is Method.NO_ACCEPTABLE_METHODS and Method.GSSAPI in offered else method

    def _wanted_method(self) -> Method:
        method = super()._wanted_method()
        if method is Method.NO_AUTHENTICATION_REQUIRED and not self.server.policy.trusts(self.session.client):
            return Method.GSSAPI
        return method

    def _why_no_method(self, offered: Sequence[int]) -> str:
        if self._wanted_method() is Method.GSSAPI:
            return "the client does not offer GSSAPI: set it there, and have a ticket; or serve it by a password, with -u NAME"
        return super()._why_no_method(offered)

    def auth_GSSAPI(self) -> str:
        """RFC 1961.  Returns the principal or raises: no request is read without one."""
        context = Acceptor(self._gssapi.credentials)
        try:
            self._establish(context)
            level = self._agree(context)
        except Aborted as error:
            raise GssapiLoginFailed("the client has aborted GSSAPI", context.peer) from error
        except (FrameError, GssapiError) as error:
            raise GssapiLoginFailed(f"GSSAPI: {error}", context.peer, Abort()) from error
        if level is not Level.NONE:
            self.stream = ProtectedStream(self.stream, Protection(context, level))
        return context.peer

    def _establish(self, context: Context) -> None:
        """Take turns until the client is known, and may log in.  RFC 1961 section 3."""
        while not context.complete:
            answer = context.step(self.receive(ContextToken).token)
            if context.complete and not self._gssapi.allows(context.peer):
                raise GssapiError(f"no pattern of --gssapi-allow is {quoted(context.peer)}")
            self.send(ContextToken(answer))         # an empty one at the end says: ready

    def _agree(self, context: Context) -> Level:
        """The client says what protection it wants, we say what it gets.  RFC 1961 section 4."""
        token = self.receive(LevelToken).token
        in_clear = len(token) == 1                  # which no wrapped octet is
        if in_clear and not self._gssapi.nec:
            raise FrameError("the client sends the protection level in clear, as NEC's did: --gssapi-nec serves it")
        wanted = token if in_clear else context.unwrap(token)[0]
        if len(wanted) != 1:
            raise FrameError(f"a protection level of {len(wanted)} octets")
        level = self._gssapi.grant(wanted[0])
        self.send(LevelToken(octet(level) if in_clear else context.wrap(octet(level), False), level))
        return level

    # --- under protection ---

    def _association(self) -> Association:
        association = super()._association()
        if isinstance(self.stream, ProtectedStream):
            association.most, client_socket = DATAGRAMS, association.client_socket
            client_socket.coded = partial(protected, protection=self.stream.protection)
            client_socket.listen_on(client_socket.socket)
        return association

    def relay(self, target: socket.socket) -> None:
        if isinstance(self.stream, ProtectedStream):
            self._client_coded = self.stream.rest
        super().relay(target)

    def _refuse(self, error: Socks5Error) -> None:
        """As ever; but after a frame that is no good nothing is said, not even that this is the end."""
        super()._refuse(error)
        if isinstance(error, (FrameError, GssapiError)):
            with suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.connection.close()
