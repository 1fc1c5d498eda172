"""
What is known of one client: the record that the log, tests and metrics read.

A `Session` begins when the client is accepted and is filled in as the conversation goes on;
after `end()` nothing changes any more.  It holds plain values, and while it lives the tunnel that
counts its octets; it does nothing but put them into words: no sockets, no threads, no passwords.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Optional, Tuple

from .protocol import Address, Command, ReplyCode, in_brackets

COMMAND_WORDS = {Command.CONNECT: "connect", Command.BIND: "bind", Command.UDP_ASSOCIATE: "udp"}     # for programs
COMMAND_NAMES = {word: command.name.replace("_", " ") for command, word in COMMAND_WORDS.items()}      # for people, as in the RFC


class Session:
    """
    One client, from accept() to the end of its tunnel.

    `outcome` says how far it got: ``open`` (it is live), ``close`` (it was served, and is
    over), ``denied`` (by a rule), ``failed`` (any other reply, or the client left first),
    ``login_failed``, ``no_acceptable_method`` (none that it offered to log in by would do), ``bad_protocol`` (what came was not SOCKS5,
    or not in time), or ``probe`` (a balancer has seen that we answer).
    """

    id: int
    client: Address
    via: Optional[Address] = None           # the balancer that it has come by, which has told us of the client
    probe = False                           # that balancer itself is the client, to check our health
    user: Optional[str] = None              # who logged in, or tried to
    command: Optional[Command] = None
    unknown_command: Optional[int] = None   # the octet CMD that is no command; then `command` is None
    destination: Optional[Address] = None   # as the client wrote it
    peer: Optional[Address] = None          # what it was connected to
    bound: Optional[Address] = None         # the proxy's end of that
    upstream: Optional[Address] = None      # the proxy that it goes out through, which looks up names
    reply: Optional[ReplyCode] = None       # the last one sent
    login_failed = False
    no_acceptable_method = False
    reason = ""                             # why it failed, or how it ended
    hung_up = ""                            # the same in a word, if the server has hung up on it during the handshake
    up = 0                                  # octets of payload, client to target
    down = 0                                # octets of payload, target to client
    datagrams_up = 0                        # of UDP ASSOCIATE, that have come from the client
    datagrams_down = 0                      # and from targets
    dropped_up = 0                          # of these, that have not been sent on
    dropped_down = 0
    seconds: Optional[float] = None         # how long it took; None while it lives
    tunnel: Any = None                      # the relay.Tunnel that has the octets of a TCP session until it has ended

    def __init__(self, id: int, client: Address) -> None:
        self.id = id
        self.client = client
        self.started = time.time()          # seconds since 1970, for the eye
        self.clock = time.monotonic()       # seconds, for the length: it never jumps

    def end(self, reason: str = "") -> None:
        """It is over, unless it is so already: the first time counts, and the first reason given."""
        if self.seconds is None:
            self.reason = self.reason or reason
            self.seconds = time.monotonic() - self.clock

    def octets(self) -> Tuple[int, int]:
        """
        Octets of payload, up and down, by now; any thread may ask.

        A tunnel adds its own to `up` and `down` when it ends: until then those are zero, and then both are the
        same, so there is no moment at which the larger one is wrong.
        """
        tunnel = self.tunnel
        if tunnel is None:
            return self.up, self.down
        return max(self.up, tunnel.up.octets), max(self.down, tunnel.down.octets)

    @property
    def outcome(self) -> str:
        if self.login_failed:
            return "login_failed"
        if self.no_acceptable_method:
            return "no_acceptable_method"
        if self.seconds is None:
            return "open"
        if self.command is None and self.reply is None:
            return "probe" if self.probe else "bad_protocol"
        if self.reply is ReplyCode.SUCCEEDED:
            return "close"
        return "denied" if self.reply is ReplyCode.NOT_ALLOWED else "failed"

    event = outcome     # under its name in the JSON log, for one release

    def as_dict(self) -> Dict[str, Any]:
        """
        What `--log-format json` prints.  Names and meanings are stable: more may come,
        none will go.  `up` and `down` are octets, `time` is UTC by RFC 3339.
        """
        return {
            "time": rfc3339(self.started + (self.seconds or 0)),
            "event": self.outcome,
            "id": self.id,
            "client": str(self.client),
            "via": str(self.via) if self.via else None,
            "user": self.user,
            "command": self.command_word,
            "host": self.destination.host if self.destination else None,
            "port": self.destination.port if self.destination else None,
            "peer": str(self.peer) if self.peer else None,
            "reply": self.reply,
            "reason": self.reason,
            "up": self.up,
            "down": self.down,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
        }

    def __str__(self) -> str:
        return self.line()

    def line(self, mark: Callable[[str], str] = str) -> str:
        """One line for people: who, what, how it ended and why.  `mark` is given the outcome, to color it for instance."""
        via = ["via", in_brackets(self.via.host)] if self.via else []
        user = ["user", word(self.user)] if self.user else []
        line = " ".join([f"#{self.id}", str(self.client), *via, *user, *self.target_words(), mark(self.outcome_words)])
        served = self.outcome == "close"
        if served:
            line += f", {amount(self.up)} up, {amount(self.down)} down, {self.seconds:.1f} s"
        return f"{line}{', ' if served else ': '}{shown(self.reason)}" if self.reason else line

    @property
    def outcome_words(self) -> str:
        """``ok``, ``open``, or what went wrong, with the reply: ``denied (reply 02)``."""
        if self.outcome == "close":
            return "ok"
        return self.outcome.replace("_", " ") + (f" (reply {self.reply:02x})" if self.reply and self.seconds is not None else "")

    @property
    def command_word(self) -> Optional[str]:
        """What was asked for, in a word; an octet that is no command as such (``0x09``)."""
        if self.command is not None:
            return COMMAND_WORDS[self.command]
        return None if self.unknown_command is None else f"0x{self.unknown_command:02x}"

    def target_words(self) -> Tuple[str, ...]:
        """The command and where it led, if it has come so far; the peer only where the client did not name it."""
        command = self.command_word
        if command is None or self.destination is None:
            return ()
        asked = (COMMAND_NAMES.get(command, f"CMD {command}"), word(str(self.destination)))
        if self.peer is None or str(self.peer) == str(self.destination):
            return asked
        return (*asked, f"({word(str(self.peer))})")        # which an upstream may give a name


def rfc3339(seconds: float) -> str:
    """Seconds since 1970 as UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def shown(text: str) -> str:
    """The text with whatever could forge a line, or hide in one, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def word(text: str) -> str:
    """The same with its blanks escaped as well, which would forge the columns behind it."""
    return shown(text).replace(" ", "\\x20")


def amount(octets: int) -> str:
    """A number of octets in the fewest digits that say enough: 79 B, 1.2 kB, 34.5 MB."""
    if octets < 1000:
        return f"{octets} B"
    number = float(octets)
    for unit in "kMGT":
        number /= 1000
        if number < 999.95 or unit == "T":
            break
    return f"{number:.1f} {unit}B"


def plural(number: int, thing: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{number} {thing}{'s' * (number != 1)}"
