"""
Coverage-guided fuzzing of all that reads what others wrote: messages, rules, users files.

    python -m tests.fuzz -max_total_time=60         (needs: pip install atheris)

The invariant: whatever comes, it parses or raises the error made for it, never another.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from io import BytesIO

import atheris

with atheris.instrument_imports():
    from socks5srv import datagrams, foreign, protocol, proxyprotocol, rules, users

MESSAGES = (
    protocol.Greeting, protocol.MethodSelection, protocol.Credentials, protocol.CredentialsReply, protocol.Request,
    protocol.Reply, protocol.Datagram,
)
HERE = protocol.Address.numeric("127.0.0.1", 1080)


def message(octets: bytes) -> None:
    for kind in MESSAGES:
        try:
            read = kind.read(BytesIO(octets))
        except protocol.Socks5Error as error:
            bytes(error.answer or b"")
            continue
        assert kind.read(BytesIO(bytes(read))) == read
        assert str(read).isprintable()


def header(octets: bytes) -> None:
    length = datagrams.header_length(memoryview(octets))
    if 0 < length <= len(octets):
        with suppress(protocol.RequestFailed):      # a name that cannot exist
            protocol.Datagram.read(BytesIO(octets[:length]))


def proxy_header(octets: bytes) -> None:
    for start in (b"", proxyprotocol.WORD, proxyprotocol.SIGNATURE):
        with suppress(proxyprotocol.BadHeader):
            read = proxyprotocol.ProxyHeader.read(BytesIO(start + octets))
            assert read.source is None or read.source == protocol.Address.numeric(read.source.host, read.source.port)


def rule(octets: bytes) -> None:
    try:
        read = rules.Rule.parse(octets.decode("utf-8", "replace"))
    except rules.BadRule:
        return
    read.matches(HERE, "example.com")


def users_line(octets: bytes) -> None:
    with suppress(users.BadUsersFile):
        users.read_line(octets.decode("utf-8", "replace"), "file:1")


def stranger(octets: bytes) -> None:
    if octets:
        bytes(foreign.identify(octets, HERE, pac=True).answer or b"")


TARGETS = (message, header, proxy_header, rule, users_line, stranger)


def one(octets: bytes) -> None:
    if octets:
        TARGETS[octets[0] % len(TARGETS)](octets[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
