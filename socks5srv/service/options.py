"""
The command line: words to a checked `argparse.Namespace`.

Whatever is wrong with an option is said here, in one sentence with the way out and exit
code 2.  Nothing is opened, bound or started.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import ipaddress
import itertools
import os
import shlex
import sys
from typing import Any, Dict, FrozenSet, List, NoReturn, Optional, Sequence, Tuple, Union

from .. import __version__
from ..client import Proxy
from ..protocol import Command
from ..rules import BadRule, Network, Rule, network_around
from ..session import COMMAND_WORDS
from ..users import BadUsersFile, UsersFile, hash_password

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 1080
MOST_WORKERS = 256      # more are a slip of the finger

DESCRIPTION = """\
A SOCKS5 proxy server.  Without options it serves this computer only, on
127.0.0.1 port 1080, and asks for no password.
"""

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


class AppendRule(argparse.Action):
    """``--allow TARGET`` and ``--deny TARGET`` go into one list, in their order."""

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, option: Optional[str] = None) -> None:
        try:
            rule = Rule.parse(f"{str(option).lstrip('-')} {value}")
        except BadRule as error:
            where = f"{value.where}: " if isinstance(value, Word) else ""
            raise argparse.ArgumentError(self, f"{where}{error}") from None
        setattr(options, self.dest, [*getattr(options, self.dest), rule])


class Word(str):
    """A word of an ``@FILE``, which knows where it stands: FILE:LINE."""

    where: str


class Parser(argparse.ArgumentParser):
    """One whose errors look like all others of the program."""

    def error(self, message: str) -> NoReturn:
        complain(message, f"see  {self.prog} --help")
        self.exit(2)


def complain(message: str, *ways_out: str) -> None:
    """An error as every error looks: what is wrong, then what to do."""
    show("\n".join([f"socks5srv: error: {message}", *(f"  {way}" for way in ways_out)]))


def show(text: str) -> None:
    """Write it to stderr.  Where the terminal or the reader of a pipe has gone it is lost, and that is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")       # at once, or a log line could come in between
        sys.stderr.flush()


def build_parser() -> Parser:
    parser = Parser(
        prog="socks5srv", usage="socks5srv [options] [PORT | ADDRESS:PORT]", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        allow_abbrev=False,     # or a new option could break a script that abbreviates
    )
    parser.set_defaults(parser=parser)

    where = parser.add_argument_group("where to listen")
    where.add_argument("address", nargs="?", metavar="PORT", type=listen_address, help="port, or ADDRESS:PORT (same as -b and -p)")
    where.add_argument("-b", "--bind", action="append", default=[], metavar="ADDRESS", help=f"address to listen on; may be repeated (default: {DEFAULT_ADDRESS})")
    where.add_argument("-p", "--port", type=port_number, help=f"port to listen on; 0 picks a free one (default: {DEFAULT_PORT})")
    where.add_argument("--port-file", metavar="FILE", help="write the port to FILE when ready to serve")

    who = parser.add_argument_group("who may use it")
    who.add_argument("-u", "--user", action="append", default=[], metavar="NAME[:PASSWORD]",
                     help="ask clients for this login; may be repeated. Without :PASSWORD it is taken from SOCKS5SRV_PASSWORD, or asked for")

    who.add_argument("--users-file", metavar="FILE", help="logins, one NAME:HASH a line; read again when it changes")
    who.add_argument("--hash-password", action="store_true", help="ask for a password, print its HASH, and exit")
    who.add_argument("--allow-from", action="append", default=[], type=network, metavar="NETWORK",
                     help="serve clients in NETWORK, such as 192.168.1.0/24, without a login; may be repeated")
    who.add_argument("--allow-open-proxy", action="store_true", help="serve other computers although nobody has to log in")

    what = parser.add_argument_group("what it may do")
    what.add_argument("--allow", dest="rules", action=AppendRule, default=[], metavar="TARGET",
                      help="HOST, *.DOMAIN or NETWORK/BITS, each with :PORT or :PORT-PORT, or :PORT alone; may be repeated. With --deny, the first match wins")
    what.add_argument("--deny", dest="rules", action=AppendRule, metavar="TARGET", help="refuse such targets (reply 02)")
    what.add_argument("--allow-local-targets", action="store_true", help="let other computers reach this computer's own addresses")
    what.add_argument("--commands", type=command_list, default=frozenset(Command), metavar="LIST",
                      help="of connect,bind,udp (default: all three)")

    out = parser.add_argument_group("how it goes out")
    family = out.add_mutually_exclusive_group()
    family.add_argument("-4", dest="family", action="store_const", const=4, help="use IPv4 only")
    family.add_argument("-6", dest="family", action="store_const", const=6, help="use IPv6 only")
    out.add_argument("--source", action="append", type=source, metavar="ADDRESS",
                     help="go out from this address, and by its family only; may be given once for IPv4 and once for IPv6")
    out.add_argument("--upstream", type=proxy_url, metavar="URL",
                     help="go out through another SOCKS5 proxy, socks5h://[NAME:PASSWORD@]HOST:PORT; names are left to it. A URL with a password belongs into an @FILE")

    many = parser.add_argument_group("how many")
    many.add_argument("--max-clients", type=count, metavar="N", help="at most so many clients at a time (default: what the descriptors allow)")
    many.add_argument("--max-per-client", type=count, metavar="N", help="of those from one address (default: no limit)")

    many.add_argument("--workers", type=workers, default=1, metavar="N|auto",
                      help="serve with so many processes; auto: one for each CPU (default: 1). Limits are of all together")

    limits = parser.add_argument_group("how long it waits, in seconds")
    for name, default, meaning in (
        ("handshake", "30", "for a client to say what it wants"),
        ("connect", "10", "for a target to answer"),
        ("bind", "120", "for the peer of BIND to call"),
        ("idle", "for ever", "for a silent tunnel"),
    ):
        limits.add_argument(f"--{name}-timeout", type=seconds, metavar="S", help=f"{meaning} (default: {default})")

    see = parser.add_argument_group("what you see")
    see.add_argument("-v", "--verbose", action="count", default=0, help="also when clients connect; -vv every message")
    see.add_argument("--explain", action="store_true", help="each message of each client as the RFC draws it, and why it was answered so")
    see.add_argument("-q", "--quiet", action="store_true", help="errors only")
    see.add_argument("--log-format", choices=("text", "json"), default="text", help="one line a client, for people or for programs (default: text)")
    see.add_argument("--log-file", metavar="FILE", help="append log lines to FILE instead")
    see.add_argument("--pcap", metavar="FILE", help="record everything as packets, for Wireshark; passwords, too. - is standard output")
    see.add_argument("--status", type=listen_address, metavar="[ADDRESS:]PORT",
                     help="a web page of what goes on, on this address; also /status.json, /metrics, /healthz, /readyz (PORT alone: on 127.0.0.1; 0: a free one)")
    see.add_argument("--status-open", action="store_true", help="let other computers see that page: who uses the proxy, and for what")
    see.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: auto; obeys NO_COLOR")

    other = parser.add_argument_group("help and setup")
    other.add_argument("-h", "--help", action="help", help="print this and exit")
    other.add_argument("-V", "--version", action="version", version=f"socks5srv {__version__}", help="print the version and exit")
    other.add_argument("--run", nargs=argparse.REMAINDER, metavar="COMMAND",
                       help="run COMMAND with this proxy in ALL_PROXY, print what it has contacted, and exit as it does; the last option, what follows is COMMAND's")
    other.add_argument("--self-test", action="store_true", help="try CONNECT, BIND and UDP through itself, on this computer only, and exit")
    return parser


def parse(words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The options in force: SOCKS5SRV_OPTIONS, then `words` (default: the command line)."""
    parser = build_parser()
    try:
        further = shlex.split(os.environ.get("SOCKS5SRV_OPTIONS", ""))
    except ValueError as error:         # a quote that is not closed
        parser.error(f"{error} in SOCKS5SRV_OPTIONS")
    ours, command = split_command(list(sys.argv[1:] if words is None else words))
    options = parser.parse_args(expand(parser, further + ours) + command)
    host, port = options.address or (None, None)
    if port is not None and options.port is not None:
        parser.error("the port is given twice, as PORT and as -p")
    check_command(parser, options)
    check_recording(parser, options)
    options.source = sources(parser, options)
    default = DEFAULT_PORT if options.run is None else 0
    options.port = next(number for number in (port, options.port, default) if number is not None)
    options.bind = ([host] if host else []) + options.bind or [DEFAULT_ADDRESS]
    options.users = users(parser, options)
    options.status_address = options.status_url = None      # till it is there
    return options


def split_command(words: List[str]) -> Tuple[List[str], List[str]]:
    """What is for us, and from --run on the words of a program, in which an ``@`` means what that says."""
    end = words.index("--run") if "--run" in words else len(words)
    return words[:end], words[end:]


def check_command(parser: Parser, options: argparse.Namespace) -> None:
    """What --run needs, and what it changes: only its summary is shown, unless -v asks for more."""
    if options.run is None:
        return
    if not options.run:
        parser.error("--run needs a COMMAND after it, such as  --run curl example.com")
    if options.users_file is not None or options.workers > 1:
        parser.error("--run needs neither --users-file nor --workers: leave them out")
    options.summary, options.quiet = not options.quiet, options.quiet or not options.verbose


def check_recording(parser: Parser, options: argparse.Namespace) -> None:
    """Where --pcap can write to, and who can."""
    if options.pcap is None:
        return
    if options.workers > 1:
        parser.error("--pcap records one process: leave --workers out")
    if options.pcap == "-" and options.run is not None:
        parser.error("--pcap - and the COMMAND of --run would write to the same output: give a FILE")
    if options.pcap == "-" and sys.stdout is not None and sys.stdout.isatty():
        parser.error("--pcap - is nothing to be read at a terminal: give a FILE, or add  | wireshark -k -i -")


def sources(parser: Parser, options: argparse.Namespace) -> Optional[Tuple[str, ...]]:
    """The addresses of --source, one of each family at most; None if there are none."""
    if not options.source:
        return None
    families = [6 if ":" in source else 4 for source in options.source]
    if len(families) > len(set(families)):
        parser.error(f"--source is given twice for IPv{families[-1]}: one address of each family is enough")
    if options.family is not None and options.family not in families:
        parser.error(f"-{options.family} and --source {options.source[0]} leave no way out: leave one of them out")
    return tuple(options.source)


def expand(parser: Parser, words: Sequence[str], depth: int = 0) -> List[str]:
    """Replace each ``@FILE`` by the words in it: as in a shell several a line, with quotes and comments."""
    found: List[str] = []
    for word in words:
        if not word.startswith("@"):
            found.append(word)
        elif depth > 9:
            parser.error(f"{word} is in itself")
        else:
            found += expand(parser, words_of(parser, word[1:]), depth + 1)
    return found


def words_of(parser: Parser, path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read the options in {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}")
    found: List[str] = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line)
        except ValueError as error:
            parser.error(f"{path}:{number}: {error}")
        # Not shlex's own comments, which begin also within a word: a password may have a #.
        for text in itertools.takewhile(lambda word: word[0:1] != "#", words):
            option, equals, value = text.partition("=")
            for part in (option, value) if equals and text.startswith("--") else (text,):
                word = Word(part)
                word.where = f"{path}:{number}"
                found.append(word)
    return found


# --- the types of the options: text to value, ValueError-like complaints with a way out ---

def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535 is")
    return int(text)


def listen_address(text: str) -> Tuple[Optional[str], int]:
    """``PORT``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon:
        if not port.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is no port; an address takes -b {text}, or {text}:{DEFAULT_PORT}")
        return None, port_number(port)
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} lacks an address: write 127.0.0.1{text} for this computer only, or 0.0.0.0{text} for all")
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        raise argparse.ArgumentTypeError(f"{text!r} needs brackets around its IPv6 address, as in [::1]:{DEFAULT_PORT}")
    return host.strip("[]"), port_number(port)


def source(text: str) -> str:
    host, percent, _zone = text.partition("%")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address") from None
    if percent or (ip.version == 6 and ip.is_link_local):
        raise argparse.ArgumentTypeError(f"{text!r} reaches only one link: give an address without a zone that is not link-local")
    return str(ip)


def proxy_url(text: str) -> Proxy:
    try:
        return Proxy.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def network(text: str) -> Network:
    if "%" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a zone, and networks are known without: leave the % and what follows away")
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        meant = network_around(text)
        hint = f"; {meant} would be one" if meant is not None else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no network{hint}") from None


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def workers(text: str) -> int:
    number = cpus() if text == "auto" else int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 0 < number <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: 1 to {MOST_WORKERS}, or auto, is")
    if number > 1 and os.name != "posix":
        raise argparse.ArgumentTypeError("several processes cannot share a listening socket on this system; leave the option out")
    return number


def cpus() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return number


def command_list(text: str) -> FrozenSet[Command]:
    words: Dict[str, Command] = {word: command for command, word in COMMAND_WORDS.items()}
    unknown = [word for word in text.split(",") if word not in words]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no command; choose from {','.join(words)}")
    return frozenset(words[word] for word in text.split(","))


def users(parser: Parser, options: argparse.Namespace) -> Union[UsersFile, Dict[str, str], None]:
    """Who may log in; None if nobody has to."""
    if options.users_file is None:
        return logins_of(parser, options.user) or None
    if options.user:
        parser.error("-u and --users-file exclude each other: put all logins into the file")
    try:
        return UsersFile(options.users_file)
    except BadUsersFile as error:
        parser.error(str(error))


def logins_of(parser: Parser, given: Sequence[str]) -> Dict[str, str]:
    """The passwords of -u, by name."""
    logins: Dict[str, str] = {}
    for text in given:
        name, colon, password = text.partition(":")
        if not colon:
            password = password_for(parser, name)
        for what, value in (("name", name), ("password", password)):
            length = len(value.encode("utf-8", "surrogateescape"))
            if not 1 <= length <= 255 or not value.isprintable():
                parser.error(f"the {what} of user {name!r} does not do: SOCKS5 takes 1 to 255 octets of text")
        logins[name] = password
    return logins


def password_for(parser: Parser, name: str) -> str:
    if "SOCKS5SRV_PASSWORD" in os.environ:
        return os.environ["SOCKS5SRV_PASSWORD"]
    if not sys.stdin.isatty():
        parser.error(f"user {name!r} has no password: set SOCKS5SRV_PASSWORD, or write -u {name}:PASSWORD")
    try:
        return getpass.getpass(f"Password for {name}: ")
    except (EOFError, KeyboardInterrupt):
        parser.error("no password was given")
    except UnicodeDecodeError:
        parser.error("the password is no text in the encoding of this terminal")


def print_hash() -> int:
    """``--hash-password``: ask twice, print once."""
    try:
        password = getpass.getpass("Password: ")
        again = getpass.getpass("The same again: ")
    except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
        complain("no password was given, or none that is text")
        return 2
    if password != again or not password.isprintable() or not 1 <= len(password.encode()) <= 255:
        complain("the two are not the same" if password != again else "a password has 1 to 255 octets of text", "try again")
        return 2
    print(hash_password(password))
    return 0


def settings(options: argparse.Namespace) -> Dict[str, Any]:
    """The options that are attributes of the server under the same name, as far as they were given."""
    names = ("commands", "allow_from", "allow_local_targets", "max_clients", "max_per_client", "handshake_timeout", "connect_timeout", "bind_timeout", "idle_timeout")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
