"""
``python -m tests.benchmarks`` from its options to its exit code.

Exit codes: 0 done, 1 could not be measured, 2 a wrong option, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import sys
from typing import List, NoReturn, Optional, Sequence, Tuple

from . import results, rounds
from .measures import COLUMNS, GROWTH
from .rounds import Plan, Server, Trouble
from .tables import tables
from .traffic import Login

DESCRIPTION = """\
How fast: socks5srv, and other SOCKS5 servers if you name some, beside the
straight connection without a proxy.  All traffic stays on this computer.
"""

EXAMPLES = """\
examples:
  python -m tests.benchmarks --quick
  python -m tests.benchmarks --server dante=127.0.0.1:1081:4711 --reference dante
  python -m tests.benchmarks --columns bulk,growth --json results.json --svg pictures
  python -m tests.benchmarks --draw results.json --svg pictures --rst
"""

QUICK = {"rounds": 1, "seconds": 0.15, "most": 2000}
FULL = {"rounds": 3, "seconds": 1.0, "most": GROWTH[-1]}


class Parser(argparse.ArgumentParser):
    """What is wrong in one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        print(f"tests.benchmarks: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def build_parser() -> Parser:
    parser = Parser(prog="python -m tests.benchmarks", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    whom = parser.add_argument_group("whom to measure")
    whom.add_argument("--server", action="append", default=[], type=server, metavar="NAME=HOST:PORT[:PID]", help="a server that runs already, and its process; may be repeated")
    whom.add_argument("--user", type=login, metavar="NAME:PASSWORD", help="log in; socks5srv will ask for it")
    whom.add_argument("--workers", type=positive, metavar="N", help="start socks5srv with so many workers")
    whom.add_argument("--reference", metavar="NAME", help="show rates also as multiples of this server's")

    what = parser.add_argument_group("what to measure")
    what.add_argument("--columns", type=columns, default=list(COLUMNS), metavar="LIST", help=f"of {','.join(COLUMNS)} (default: all)")
    what.add_argument("--rounds", type=positive, metavar="N", help=f"how often, for a median (default: {FULL['rounds']})")
    what.add_argument("--seconds", type=seconds, metavar="S", help=f"for each number (default: {FULL['seconds']:g})")
    what.add_argument("--quick", action="store_true", help=f"{QUICK['rounds']} round, {QUICK['seconds']} seconds, {QUICK['most']:,} tunnels at most; for a first look")
    what.add_argument("--portable", action="store_true", help="do without what only Linux has, as on other systems")

    show = parser.add_argument_group("what to make of it")
    show.add_argument("--json", metavar="FILE", help="write the results")
    show.add_argument("--svg", metavar="FOLDER", help="draw pictures; needs matplotlib")
    show.add_argument("--draw", metavar="FILE", help="measure nothing, take these results")
    show.add_argument("--rst", action="store_true", help="with --draw: print the tables (a measurement always does)")
    return parser


# --- the types of options; what they say is the end of a sentence ---

def server(text: str) -> Server:
    name, _, place = text.partition("=")
    # An IPv6 address has its colons in brackets.
    host, _, rest = place[1:].partition("]:") if place.startswith("[") else place.partition(":")
    port, _, pid = rest.partition(":")
    try:
        address = str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
        if not name or not 0 < int(port) < 65536:
            raise ValueError
        return Server(name, (address, int(port)), int(pid) if pid else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=HOST:PORT or NAME=HOST:PORT:PID, with an IP address for a host") from None


def login(text: str) -> Login:
    name, colon, password = text.partition(":")
    if not name or not colon or not password:
        raise argparse.ArgumentTypeError("expected NAME:PASSWORD")
    return name, password


def columns(text: str) -> List[str]:
    wanted = text.split(",")
    for name in wanted:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"there is no column {name!r}; choose from {','.join(COLUMNS)}")
    return list(dict.fromkeys(wanted))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    try:
        found = float(text)
        if 0.01 <= found <= 60:
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.01 to 60")


# --- the program ---

def main(words: Optional[Sequence[str]] = None) -> int:
    parser = build_parser()
    options = parser.parse_args(words)
    check(parser, options)
    try:
        found, notes = (results.load(options.draw), []) if options.draw else measured(options)
        check_reference(parser, options, list(found))
        if options.json:
            results.save(found, options.json)
        if options.svg:
            from .pictures import draw

            for path in draw(found, options.svg):
                print(path, file=sys.stderr)
    except results.BadResults as error:
        parser.error(str(error))
    except (Trouble, OSError) as error:
        said = f"cannot write {error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"tests.benchmarks: error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tests.benchmarks: stopped", file=sys.stderr)
        return 130
    if options.rst or not options.draw:
        sys.stdout.buffer.write("\n".join([tables(found, options.reference), *notes]).encode())
        sys.stdout.flush()
    return 0


def check(parser: Parser, options: argparse.Namespace) -> None:
    """What can be said before anything is measured."""
    names = [each.name for each in options.server]
    if len(set(names)) < len(names) or rounds.DIRECT in names:
        parser.error(f"every --server needs a name of its own, and {rounds.DIRECT!r} is taken")
    if options.draw and not options.svg and not options.rst:
        parser.error("--draw makes pictures with --svg FOLDER, or tables with --rst")
    if options.svg and importlib.util.find_spec("matplotlib") is None:
        parser.error("--svg needs matplotlib:  python -m pip install -e \".[benchmarks]\"")
    if not options.draw:
        check_reference(parser, options, [rounds.DIRECT, rounds.OURS, *names])


def check_reference(parser: Parser, options: argparse.Namespace, names: List[str]) -> None:
    if options.reference and options.reference not in names:
        parser.error(f"--reference {options.reference} is none of {', '.join(names)}")


def measured(options: argparse.Namespace) -> Tuple[results.Results, List[str]]:
    """Measure; the results, and sentences about what is left out."""
    usual = QUICK if options.quick else FULL
    plan = Plan(
        options.server, options.columns, options.rounds or int(usual["rounds"]), options.seconds or usual["seconds"], options.user, options.workers,
        options.portable, int(usual["most"]),
    )
    notes = rounds.unknown_here(plan)
    return rounds.run(plan, lambda text: print(text, file=sys.stderr, flush=True)), notes


if __name__ == "__main__":
    sys.exit(main())
