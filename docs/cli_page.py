"""
The page of the command line: ``python3 docs/cli_page.py`` writes cli.rst, from the parsers themselves.

What an option does is its help.  `MORE` has what the help has no room for; tests/docs says when the page is out of date.
"""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, Action, ArgumentParser
from pathlib import Path
from typing import Dict, Iterator, List

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from socks5srv import check  # noqa: E402  (they are found by the line above)
from socks5srv.cli.options import build_parser  # noqa: E402

PAGE = HERE / "cli.rst"
OPTION = re.compile(r"(?<![\w/-])(--?[a-z][a-z-]*)")

HEAD = """\
.. Written by python3 docs/cli_page.py, from the parsers: do not edit it.

Command line
============

On this page you can look up what every option does, what its default is, and what the program exits with.

``socks5srv`` and ``python3 -m socks5srv`` are the same program.  All of this, shorter, is printed by ``socks5srv --help``.

.. code-block:: text

   $ socks5srv [options] [PORT | ADDRESS:PORT]
   $ socks5srv check HOST:PORT
   $ socks5srv explain HEX
   $ socks5srv hash-password

The last three start no server: they ask any SOCKS5 server some 50 questions (:ref:`check`), draw messages as the RFC
does (:ref:`explain`), and print the hash of a password for a users file (:ref:`users`).

.. program:: socks5srv
"""

# By the name of an option, or of an argument: what is said after its help.
MORE: Dict[str, str] = {
    "PORT": "The default is ``127.0.0.1:1080``.",
    "--bind": "A link-local IPv6 address has its zone with it: ``fe80::1%eth0``.",
    "--port": "It is that of all addresses.",
    "--port-file": "For scripts; the file is removed at the end.  A pipe must have its reader by then.",
    "--proxy-protocol": "From others a header is refused, and from these everything else.  See :ref:`proxy-protocol`.",
    "--user": "A password on the command line can be seen by other users of the computer.",
    "--users-file": "Also on SIGHUP.  See :ref:`users`.",
    "--gssapi": "See :doc:`kerberos`.",
    "--gssapi-nec": "Who is in between can then change the level.",
    "--gssapi-allow": "Upper and lower case differ.",
    "--allow-from": "Without users, nobody else is served.",
    "--allow": "See :ref:`rules`.",
    "--source": "Targets of the other family get reply 08, and their datagrams are dropped.",
    "--upstream": "See :ref:`upstream`.",
    "--advertise": "See :ref:`advertise`.",
    "--udp-ports": "When all are in use, the next client gets reply 01.",
    "--max-clients": "A connection counts as two descriptors, with BIND or UDP ASSOCIATE as four.",
    "--reuse-port": "See :ref:`restart`.",
    "--workers": "See :ref:`workers`.",
    "--idle-timeout": "Keepalive finds peers that are gone.",
    "--drain-grace": "See :ref:`draining`.",
    "--drain-timeout": "0 cuts them off.  See :ref:`draining`; on SIGUSR2 there is no limit unless this is one.",
    "--explain": "See :ref:`explain`.",
    "--log-format": "The form of lines for people may change; for programs there is :ref:`json-log`.",
    "--log-file": "When the file has been renamed (logrotate), the next line goes to a new file; on SIGHUP that is opened at once.  "
                  "``copytruncate`` does as well.",
    "--pcap": "Only its owner can read the file.  See :ref:`packets`.",
    "--status": "See :ref:`status-page`.",
    "--run": "126 or 127 if it cannot be run, 128 and a signal's number if that has ended it.",
}

TAIL = """\
Files and environment
---------------------

.. option:: @FILE

   Read options from a file, one or more a line; ``#`` begins a comment.  On SIGHUP the rules in it are read again.

.. envvar:: SOCKS5SRV_OPTIONS

   Further options, which those of the command line override.

.. envvar:: SOCKS5SRV_PASSWORD

   The password of a ``-u NAME`` without one.

.. envvar:: NO_COLOR

   No colors, unless ``--color always`` asks for them.

.. _exit-codes:

Exit codes
----------

.. list-table::
   :header-rows: 1
   :widths: 14 86

   * - Exit code
     - Meaning
   * - 0
     - stopped by Ctrl-C or SIGTERM, or with its terminal (SIGHUP); ``--self-test`` passed
   * - 1
     - cannot start or serve (the port is in use, say); ``--self-test`` failed
   * - 2
     - wrong usage, or refused to be an open proxy
   * - 130
     - a second Ctrl-C, which does not wait for anything

With ``--run`` it is the program's.

``socks5srv check`` exits with 0 if nothing failed, with 1 if something
did or it cannot connect, and with 2 for wrong usage or a server that does not speak SOCKS5.
"""


def name_of(action: Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def value_of(action: Action) -> str:
    """As it is written behind the option; empty for one that takes none."""
    if action.nargs == 0:
        return ""
    return "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())


def spelled(action: Action) -> str:
    if not action.option_strings:
        return str(action.metavar)
    return ", ".join(f"{option} {value_of(action)}".rstrip() for option in action.option_strings)


def entry(action: Action, more: str) -> str:
    """One option: its forms, its help as a sentence, and what there is to add."""
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("*", r"\*").rstrip(".")
    text = OPTION.sub(r"``\1``", text)
    sentences = f"{text[:1].upper()}{text[1:]}.  {more}".rstrip()
    return f".. option:: {spelled(action)}\n\n   {sentences}\n"


def entries(parser: ArgumentParser, more: Dict[str, str]) -> Iterator[str]:
    for group in parser._action_groups:
        actions: List[Action] = [action for action in group._group_actions if action.help != SUPPRESS]
        if actions:
            title = f"{(group.title or '')[:1].upper()}{(group.title or '')[1:]}"
            yield f"{title}\n{'-' * len(title)}\n"
            yield from (entry(action, more.get(name_of(action), "")) for action in actions)


def questions() -> str:
    """The options of ``socks5srv check``, all under one heading."""
    title = "Options of socks5srv check"
    parser = check.build_parser("socks5srv check")
    listed = [entry(action, "") for action in parser._actions if action.dest != "help"]
    return "\n".join([title, "-" * len(title), "", ".. program:: socks5srv check", "", *listed, ".. program:: socks5srv", ""])


def page() -> str:
    return "\n".join([HEAD, *entries(build_parser(), MORE), questions(), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
