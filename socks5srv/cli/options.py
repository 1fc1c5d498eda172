"""
The command line: words to `Settings`, or to what is to be done in place of serving.

A mistake is told in one sentence with the way out, and exit code 2.  Nothing is opened but an ``@FILE``,
nothing bound or started: what only the system can say is asked by startup.py.
"""

from __future__ import annotations

import argparse
import getpass
import ipaddress
import itertools
import os
import shlex
import socket
import sys
from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, NoReturn, Optional, Sequence, Tuple, Type, Union

from .. import __version__, advertise
from ..client import Proxy
from ..protocol import Command
from ..rules import BadRule, Network, Rule, parse_ports
from ..service.build import CannotStart
from ..service.log import complain
from ..service.settings import DEFAULT_ADDRESS, DEFAULT_PORT, Settings
from ..session import COMMAND_WORDS
from ..users import hash_password
from . import unknown
from .selftest import self_test

MAX_WORKERS = 256       # more are a typing error
TEXT = "1 to 255 bytes of printable text"       # that SOCKS5 can carry as a name or a password

DESCRIPTION = """\
A SOCKS5 proxy server.  Without options it serves this computer only, on
127.0.0.1 port 1080, and asks for no password.

commands, each with its own --help, which start no server:
  socks5srv check HOST:PORT          test any SOCKS5 server against the RFCs
  socks5srv explain HEX              show bytes as the messages of SOCKS5
  socks5srv hash-password            print the HASH of a password
"""

COMMANDS = ("check", "explain", "hash-password")        # in the place of the first word

EXAMPLES = """\
examples:
  socks5srv                          this computer only, port 1080
  socks5srv 0                        a free port, printed at the start
  socks5srv -b 192.168.1.20 -u anna  the local network; asks for a password
  socks5srv -u anna --commands connect
  socks5srv @proxy.conf              options from a file, one a line, # comments

SOCKS5SRV_OPTIONS in the environment holds further options, read before these.
Exit codes: 0 stopped, 1 cannot start or serve, 2 usage, 130 second Ctrl-C.
"""


class Word(str):
    """A word of an ``@FILE``, which knows where it stands: FILE:LINE."""

    where: str


class Parser(argparse.ArgumentParser):
    """One whose errors look like all others of the program."""

    def error(self, message: str) -> NoReturn:
        complain(message, f"see  {self.prog} --help", prog=self.prog)
        self.exit(2)


class Reader(Parser):
    """One that a server which serves reads files with: a mistake in them is a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def exit(self, status: int = 0, message: Optional[str] = None) -> NoReturn:
        raise ValueError("--help or --version is among the options")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Nobody has asked for it."""


def build_parser(kind: Type[Parser] = Parser) -> Parser:
    parser = kind(
        prog="socks5srv", usage="socks5srv [options] [PORT | ADDRESS:PORT]", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        allow_abbrev=False,     # or a new option could break a script that abbreviates
    )

    where = parser.add_argument_group("Listening")
    where.add_argument("address", nargs="?", metavar="PORT", type=listen_address, help="port, or ADDRESS:PORT (same as -b and -p)")
    where.add_argument("-b", "--bind", dest="hosts", action="append", default=[], metavar="ADDRESS", help=f"address to listen on; may be repeated (default: {DEFAULT_ADDRESS})")
    where.add_argument("-p", "--port", type=port_number, help=f"port to listen on; 0 picks a free one (default: {DEFAULT_PORT})")
    where.add_argument("--port-file", metavar="FILE", help="write the port to FILE when ready to serve")
    where.add_argument("--reuse-port", action="store_true", help="let a second server, started with the same option, listen on the same port")

    where.add_argument("--proxy-protocol", action="append", type=network, metavar="NETWORK",
                       help="expect a PROXY header with the client's address of load balancers in NETWORK; may be repeated")

    who = parser.add_argument_group("Access")
    who.add_argument("-u", "--user", dest="users", action="append", default=[], metavar="NAME[:PASSWORD]",
                     help="require this name and password of clients; may be repeated. Without :PASSWORD it is taken from SOCKS5SRV_PASSWORD, or asked for")
    who.add_argument("--users-file", metavar="FILE", help="users, one NAME:HASH a line; read again when the file changes")
    who.add_argument("--hash-password", action="store_true", help="the same as the command hash-password")
    who.add_argument("--gssapi", action="store_true", help="require Kerberos of clients (GSSAPI, RFC 1961); with -u a password does as well. Needs the package gssapi")
    who.add_argument("--keytab", metavar="FILE", help="the proxy's own keys for Kerberos, any of which is accepted (default: as KRB5_KTNAME says, or the system's)")
    who.add_argument("--gssapi-levels", type=level_list, metavar="LIST",
                     help="protection to agree to, of 0,1,2: none, integrity, encryption (default: 1,2). 0 alone also serves clients that can do no other, such as curl")
    who.add_argument("--gssapi-nec", action="store_true", help="serve clients that ask for their level in clear, too, as NEC's did")
    who.add_argument("--gssapi-allow", action="append", metavar="PATTERN",
                     help="let in only principals that PATTERN fits as a whole, such as '*@EXAMPLE.COM'; may be repeated")
    who.add_argument("--allow-from", action="append", type=network, metavar="NETWORK",
                     help="serve clients in NETWORK, such as 192.168.1.0/24, without authentication; may be repeated")
    who.add_argument("--allow-open-proxy", action="store_true", help="serve other computers without authentication")

    what = parser.add_argument_group("Targets and commands")
    what.add_argument("--allow", dest="rules", action="append", type=partial(rule, "allow"), metavar="TARGET",
                      help="HOST, *.DOMAIN or NETWORK/BITS, each with :PORT or :PORT-PORT, or :PORT alone; may be repeated. With --deny, the first match wins")
    what.add_argument("--deny", dest="rules", action="append", type=partial(rule, "deny"), metavar="TARGET",
                      help="refuse such targets (reply 02)")
    what.add_argument("--allow-local-targets", action="store_true", help="let other computers reach this computer's own addresses")
    what.add_argument("--commands", type=command_list, metavar="LIST",
                      help="serve only these, of connect,bind,udp (default: all three)")

    out = parser.add_argument_group("Outgoing")
    family = out.add_mutually_exclusive_group()
    family.add_argument("-4", dest="family", action="store_const", const=socket.AF_INET, help="use IPv4 only")
    family.add_argument("-6", dest="family", action="store_const", const=socket.AF_INET6, help="use IPv6 only")
    out.add_argument("--source", action="append", type=source, metavar="ADDRESS",
                     help="bind outgoing connections to this address, and use its family only; may be given once for IPv4 and once for IPv6")
    out.add_argument("--upstream", type=proxy_url, metavar="URL",
                     help="connect through another SOCKS5 proxy, socks5h://[NAME:PASSWORD@]HOST:PORT, which resolves names; with Kerberos: "
                          "socks5h+gssapi://[SERVICE@]HOST:PORT (default: rcmd). Put a URL with a password in an @FILE")

    behind = parser.add_argument_group("Behind a load balancer or NAT")
    behind.add_argument("--advertise", action="append", type=advertised, metavar="[NETWORK=]ADDRESS",
                        help="where we are reached from NETWORK, or from everywhere: the address in replies to UDP ASSOCIATE and BIND; may be repeated. auto: the one by which the client has come (default)")
    behind.add_argument("--udp-ports", type=udp_ports, metavar="A-B",
                        help="use only these ports for UDP ASSOCIATE and BIND, such as 20000-20999 (default: any free one)")

    many = parser.add_argument_group("Limits")
    many.add_argument("--max-clients", type=count, metavar="N", help="at most N connections at a time (default: what the file descriptors allow)")
    many.add_argument("--max-per-client", type=count, metavar="N", help="at most N connections from one address (default: no limit)")
    many.add_argument("--workers", type=workers, default=1, metavar="N|auto",
                      help="serve with N processes; auto: one for each CPU (default: 1). Limits apply to all together")

    limit = partial(parser.add_argument_group("Timeouts, in seconds").add_argument, type=seconds, metavar="S")
    limit("--handshake-timeout", help="longest handshake of a client (default: 30)")
    limit("--connect-timeout", help="longest wait for a target to answer, lookup included (default: 10)")
    limit("--bind-timeout", help="longest wait for the incoming connection of BIND (default: 120)")
    limit("--idle-timeout", help="longest silence of a tunnel (default: no limit)")
    limit("--drain-grace", type=seconds_or_none, help="on SIGTERM, go on accepting for so long, while /readyz says 503 (default: 0)")
    limit("--drain-timeout", type=seconds_or_none, help="on SIGTERM, then wait at most so long for open connections (default: 3)")

    see = parser.add_argument_group("Output")
    see.add_argument("-v", "--verbose", action="count", default=0, help="log also when clients connect; -vv: every message")
    see.add_argument("--explain", action="store_true", help="log each message of each client as the RFC draws it, and why it was answered so")
    see.add_argument("-q", "--quiet", action="store_true", help="log errors only")
    see.add_argument("--log-format", choices=("text", "json"), help="one line a connection, for people or for programs (default: text)")
    see.add_argument("--log-file", metavar="FILE", help="append log lines to FILE instead of writing them to stderr")
    see.add_argument("--pcap", metavar="FILE", help="record all traffic as packets for Wireshark, passwords included; - is standard output")
    see.add_argument("--status", type=listen_address, metavar="[ADDRESS:]PORT",
                     help="serve a status page on this address; also /status.json, /metrics, /healthz, /readyz (PORT alone: on 127.0.0.1; 0: a free one)")
    see.add_argument("--status-open", action="store_true", help="show that page to other computers: who uses the proxy, and for what")
    see.add_argument("--color", choices=("auto", "always", "never"), help="color in the log (default: auto, which obeys NO_COLOR)")

    other = parser.add_argument_group("Other")
    other.add_argument("-h", "--help", action="help", help="print this and exit")
    other.add_argument("-V", "--version", action="version", version=f"socks5srv {__version__}", help="print the version and exit")
    other.add_argument("--run", dest="command", nargs=argparse.REMAINDER, metavar="COMMAND",
                       help="run COMMAND with this proxy in ALL_PROXY, print the destinations that it has contacted, and exit as it does; the last option: what follows is COMMAND's")
    other.add_argument("--self-test", action="store_true", help="test CONNECT, BIND and UDP ASSOCIATE through itself, on this computer only, and exit")
    return parser


def parse(words: Optional[Sequence[str]] = None) -> Union[Settings, Callable[[], int]]:
    """What SOCKS5SRV_OPTIONS and then `words` (default: the command line) ask for; a function returns the exit code."""
    parser = build_parser()
    given = list(sys.argv[1:] if words is None else words)
    options = read(parser, given)
    if options.self_test or options.hash_password:
        return self_test if options.self_test else print_hash
    refuse_contradictions(parser, options)
    complete(parser, options)
    values: Dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()
    }
    values["words"] = tuple(given)
    return Settings(**{field.name: values[field.name] for field in fields(Settings) if values[field.name] is not None})


def read(parser: Parser, given: Sequence[str]) -> argparse.Namespace:
    """The options that these words are, and before them SOCKS5SRV_OPTIONS."""
    ours, command = split(parser, given)
    ours = unknown.with_values(parser, expand(parser, ours))
    complaint = unknown.complaint(parser, ours)     # before anything else is told of: what follows an unknown option looks wrong, too
    if complaint is not None:
        parser.error(complaint)
    return parser.parse_args([*ours, *command])


def split(parser: Parser, given: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Our words, those of the environment first; and from --run on those that are not ours, not even with an @."""
    end = given.index("--run") if "--run" in given else len(given)
    try:
        return [*shlex.split(os.environ.get("SOCKS5SRV_OPTIONS", "")), *given[:end]], list(given[end:])
    except ValueError as error:         # a quote that is not closed
        parser.error(f"{error} in SOCKS5SRV_OPTIONS")


def has_files(words: Sequence[str]) -> bool:
    """Whether some of the options are in files."""
    ours, _command = split(Reader(), words)
    return any(word.startswith("@") for word in ours)


def rules_again(words: Sequence[str]) -> Optional[Sequence[Rule]]:
    """The rules among these options as their files have them now; None if there are no files.  ValueError if they cannot be read."""
    return read(build_parser(Reader), words).rules or () if has_files(words) else None


def refuse_contradictions(parser: Parser, options: argparse.Namespace) -> None:
    command, pcap, many = options.command, options.pcap, options.workers > 1
    gssapi = {"--keytab": options.keytab, "--gssapi-levels": options.gssapi_levels, "--gssapi-nec": options.gssapi_nec, "--gssapi-allow": options.gssapi_allow}
    for is_wrong, message in (
        (options.address and options.port is not None, "the port is given twice, as PORT and as -p"),
        (options.users and options.users_file is not None, "-u and --users-file exclude each other: put all users into the file"),
        (not options.gssapi and any(gssapi.values()), f"{next(filter(gssapi.get, gssapi), '')} needs --gssapi, which asks for Kerberos"),
        (command == [], "--run needs a COMMAND after it, such as  --run curl example.com"),
        (command and (many or options.users_file is not None), "--run needs neither --users-file nor --workers: leave them out"),
        (command and options.proxy_protocol, "--run serves one COMMAND, and no balancer: leave --proxy-protocol out"),
        (options.reuse_port and not hasattr(socket, "SO_REUSEPORT"), "--reuse-port: two servers cannot share a port on this system; leave it out"),
        (pcap is not None and many, "--pcap records one process: leave --workers out"),
        (pcap == "-" and command, "--pcap - and the COMMAND of --run would write to the same output: give a FILE"),
        (pcap == "-" and sys.stdout is not None and sys.stdout.isatty(),
         "refusing to write binary data to a terminal: give --pcap a FILE, or add  | wireshark -k -i -"),
    ):
        if is_wrong:
            parser.error(message)


def complete(parser: Parser, options: argparse.Namespace) -> None:
    """Make of the options what `Settings` has under their names; what is None has its default."""
    host, port = options.address or (None, options.port)
    options.hosts = [host] * bool(host) + options.hosts or None
    options.port = 0 if port is None and options.command else port       # which is told where to look
    options.summary = not options.quiet
    options.quiet = options.quiet or (bool(options.command) and not options.verbose)        # with --run only the summary is shown, or more with -v
    if options.status is not None:
        options.status = (options.status[0] or DEFAULT_ADDRESS, options.status[1])
    refuse_sources(parser, options)
    try:
        options.advertise = advertise.parse(*options.advertise or ())
    except ValueError as error:
        parser.error(f"--advertise: {error}")
    options.users = logins_of(parser, options.users) or None


def refuse_sources(parser: Parser, options: argparse.Namespace) -> None:
    """Where they leave no way out, or a choice."""
    families = [6 if ":" in source else 4 for source in options.source or ()]
    if len(families) > len(set(families)):
        parser.error(f"--source is given twice for IPv{families[-1]}: one address of each family is enough")
    family = {socket.AF_INET: 4, socket.AF_INET6: 6}.get(options.family)
    if families and family not in (None, *families):
        parser.error(f"-{family} and --source {options.source[0]} leave no way out: leave one of them out")


def expand(parser: Parser, words: Iterable[str], depth: int = 0) -> Iterator[str]:
    """Replace each ``@FILE`` by the words in it: as in a shell several a line, with quotes and comments."""
    for word in words:
        if not word.startswith("@"):
            yield word
        elif depth > 9:
            parser.error(f"{word} is in itself")
        else:
            yield from expand(parser, words_of(parser, word[1:]), depth + 1)


def words_of(parser: Parser, path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read the options in {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}")
    for number, line in enumerate(lines, 1):
        try:
            words = words_in(line)
        except ValueError as error:
            parser.error(f"{path}:{number}: {error}")
        for text in words:
            option, equals, value = text.partition("=")
            for part in (option, value) if equals and text.startswith("--") else (text,):
                word = Word(part)
                word.where = f"{path}:{number}"
                yield word


def words_in(line: str) -> List[str]:
    """As a shell splits it.  What follows the # of a comment is never looked at, and may have a quote that is not closed."""
    # Not shlex's own comments, which begin also within a word: a password may have a #.
    lexer = shlex.shlex(line, posix=True)
    lexer.commenters, lexer.whitespace_split = "", True
    return [] if line.lstrip().startswith("#") else list(itertools.takewhile(lambda word: word[0:1] != "#", lexer))


# --- the types of the options: text to value ---

def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise ArgumentTypeError(f"invalid port {text!r}: expected 0-65535")
    return int(text)


def listen_address(text: str) -> Tuple[Optional[str], int]:
    """``PORT``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon:
        if not port.isdigit():
            raise ArgumentTypeError(
                f"the command comes first: socks5srv {text} ..." if text in COMMANDS else
                f"invalid port {text!r}: expected 0-65535; an address takes -b {text}, or {text}:{DEFAULT_PORT}"
            )
        return None, port_number(port)
    if not host:
        raise ArgumentTypeError(f"invalid address {text!r}: write 127.0.0.1{text} for this computer only, or 0.0.0.0{text} for all")
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        raise ArgumentTypeError(f"invalid address {text!r}: IPv6 needs brackets, as in [::1]:{DEFAULT_PORT}")
    return host.strip("[]"), port_number(port)


def source(text: str) -> str:
    host, percent, _zone = text.partition("%")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ArgumentTypeError(f"invalid address {text!r}: expected an IP address") from None
    if percent or (ip.version == 6 and ip.is_link_local):
        raise ArgumentTypeError(f"invalid address {text!r}: expected one that is not link-local, without a zone")
    return str(ip)


def advertised(text: str) -> str:
    """As it is: that two contradict each other is seen when all are read."""
    try:
        advertise.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def udp_ports(text: str) -> range:
    try:
        ports = parse_ports(text, text)
    except BadRule as error:
        raise ArgumentTypeError(str(error)) from None
    if 0 in ports:
        raise ArgumentTypeError(f"invalid ports {text!r}: 0 is none that a client could send to; leave the option out for any")
    return ports


def rule(verb: str, text: str) -> Rule:
    try:
        return Rule.parse(f"{verb} {text}")
    except BadRule as error:
        raise ArgumentTypeError(f"{text.where}: {error}" if isinstance(text, Word) else str(error)) from None


def proxy_url(text: str) -> Proxy:
    try:
        return Proxy.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def network(text: str) -> Network:
    if "%" in text:
        raise ArgumentTypeError(f"invalid network {text!r}: leave out the zone, which is the % and what follows")
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ArgumentTypeError(f"invalid network {text!r}: expected an IP address or NETWORK/BITS, such as 192.168.1.0/24") from None
    if ipaddress.ip_interface(text).ip != found.network_address:
        raise ArgumentTypeError(f"invalid network {text!r}: host bits set; did you mean {found}?")
    return found


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ArgumentTypeError(f"invalid number {text!r}: expected 1 or more")
    return int(text)


def workers(text: str) -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1       # that this process may use
    number = cpus if text == "auto" else int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 0 < number <= MAX_WORKERS:
        raise ArgumentTypeError(f"invalid number of processes {text!r}: expected 1-{MAX_WORKERS}, or auto")
    if number > 1 and os.name != "posix":
        raise ArgumentTypeError("several processes cannot share a listening socket on this system; leave the option out")
    return number


def seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise ArgumentTypeError(f"invalid number of seconds {text!r}: expected more than 0")


def seconds_or_none(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return float(text)
    raise ArgumentTypeError(f"invalid number of seconds {text!r}: expected 0 or more")


def command_list(text: str) -> FrozenSet[Command]:
    words: Dict[str, Command] = {word: command for command, word in COMMAND_WORDS.items()}
    wrong = [word for word in text.split(",") if word not in words]
    if wrong:
        raise ArgumentTypeError(f"invalid command {wrong[0]!r}: choose from {','.join(words)}")
    return frozenset(words[word] for word in text.split(","))


def level_list(text: str) -> Tuple[int, ...]:
    if not all(word in ("0", "1", "2") for word in text.split(",")):
        raise ArgumentTypeError(f"invalid levels {text!r}: expected some of 0,1,2")
    return tuple(sorted(set(map(int, text.split(",")))))


def logins_of(parser: Parser, given: Sequence[str]) -> Dict[str, str]:
    """The passwords of -u, by name."""
    logins: Dict[str, str] = {}
    for text in given:
        name, colon, password = text.partition(":")
        if not name:
            parser.error("-u needs a NAME, as in -u anna")
        if not fits(name):
            parser.error(f"invalid name {name!r}: expected {TEXT}")
        if not colon:
            password = password_for(parser, name)
        if not fits(password):
            parser.error(f"invalid password of user {name!r}: expected {TEXT}")
        logins[name] = password
    return logins


def fits(text: str) -> bool:
    """Whether it can be a name or a password of SOCKS5, and be told."""
    return text.isprintable() and 1 <= len(text.encode("utf-8", "surrogateescape")) <= 255


def password_for(parser: Parser, name: str) -> str:
    if "SOCKS5SRV_PASSWORD" in os.environ:
        return os.environ["SOCKS5SRV_PASSWORD"]
    if not sys.stdin.isatty():
        parser.error(f"user {name!r} has no password: set SOCKS5SRV_PASSWORD, or write -u {name}:PASSWORD")
    return ask_password(f"Password for {name}: ")


def ask_password(prompt: str) -> str:
    """Asked for twice, since what is typed is not shown.  CannotStart if there is none in the end."""
    try:
        password, again = getpass.getpass(prompt), getpass.getpass("Repeat it: ")
    except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
        raise CannotStart("no password was given, or none in the encoding of this terminal", "try again", code=2) from None
    if password != again:
        raise CannotStart("the two passwords differ", "try again", code=2)
    if not fits(password):
        raise CannotStart(f"invalid password: expected {TEXT}", "try again", code=2)
    return password


def print_hash() -> int:
    """``--hash-password`` and ``socks5srv hash-password``: ask, and print once."""
    print(hash_password(ask_password("Password: ")))
    return 0
