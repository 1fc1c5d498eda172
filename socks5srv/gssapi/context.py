"""
Security contexts: what two sides share once each knows who the other is.  The only module that knows the package ``gssapi``.

    Acceptor    the server's side of it, with a key from a keytab
    Initiator   the client's, with a ticket for that server
    Protection  a context and the level agreed upon: octets to frames and back

The one idea: every failure of GSSAPI leaves here as a `GssapiError`, in words, and a frame that is wrong in any way as a
`FrameError`.  Name and flags of a context are read once, when it is complete: afterwards its ticket may expire, which
ends nothing, but then the library does not answer any more.

A context has a running number for each frame, either way, so only one thread at a time may wrap, and what is wrapped first
has to be sent first.

Not here: who sends which token when (handler.py, and client.py for the other side).
"""

from __future__ import annotations

import os
from typing import Any, Optional, Tuple, Union

from .messages import HEADER, TOKEN_MAX, Encapsulated, FrameError, Level, MessageType, judge
from ..protocol import ProtocolError

try:
    import gssapi
    from gssapi import raw
except ImportError as error:        # the package, or the system's library behind it
    raise ImportError(
        f"Kerberos needs the package gssapi: pip install 'socks5srv[gssapi]' (on Linux this takes a C compiler and Kerberos's headers: "
        f"apt-get install gcc python3-dev libkrb5-dev, or dnf install gcc python3-devel krb5-devel): {error}"
    ) from error

KRB5 = gssapi.OID.from_int_seq("1.2.840.113554.1.2.2")
SPNEGO = gssapi.OID.from_int_seq("1.3.6.1.5.5.2")       # which agrees on one of the others
OF_THE_MECHANISM = {0x70000, 0xD0000}       # GSS_S_NO_CRED and GSS_S_FAILURE, of which its own code says more

Flag, NameType = gssapi.RequirementFlag, gssapi.NameType
FLAGS = (Flag.mutual_authentication, Flag.replay_detection, Flag.confidentiality, Flag.integrity)


class GssapiError(ProtocolError):
    """GSSAPI refuses: no key, no ticket, a token that is wrong."""


def in_words(error: Any) -> str:
    """An error of the library's in a sentence; which of its two codes says more depends."""
    major, minor = (" ".join(error.get_all_statuses(code, is_major)) for code, is_major in ((error.maj_code, True), (error.min_code, False)))
    return str(minor if error.maj_code & 0xFF0000 in OF_THE_MECHANISM and error.min_code else major)


class Context:
    """A context of either side: established by step(), until `complete`; then `peer` is the other side's name."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._context.__DEFER_STEP_ERRORS__ = False     # or step() may give a token, and raise at the next call
        self.complete = False
        self.peer = ""

    def step(self, token: bytes = b"") -> bytes:
        """The token to answer this one with; empty if there is none.  GssapiError if it is not good."""
        if self.complete:
            raise GssapiError("a token came after the context had been complete")
        try:
            answer = self._context.step(token or None)
            self.complete = self._context.complete
            if self.complete:
                self.peer = self._established()
        except gssapi.exceptions.GSSError as error:
            raise GssapiError(in_words(error)) from error
        except UnicodeDecodeError as error:
            raise GssapiError("a principal's name that is not UTF-8") from error
        if not self.complete and not answer:
            raise GssapiError("the token leads nowhere")
        return answer or b""

    def _established(self) -> str:
        """Check what has been agreed; the other side's name."""
        if self._context.mech != KRB5:
            raise GssapiError(f"the mechanism {self._context.mech.dotted_form} is not Kerberos")
        if Flag.integrity not in self._context.actual_flags:
            raise GssapiError("the context has no integrity protection")
        return str(self._name_of_peer())

    def _name_of_peer(self) -> Any:
        raise NotImplementedError

    # --- once it is complete ---

    def wrap(self, octets: bytes, encrypt: bool) -> bytes:
        """The octets as a token.  GssapiError if they cannot be encrypted."""
        try:
            wrapped = self._context.wrap(octets, encrypt)
        except gssapi.exceptions.GSSError as error:
            raise GssapiError(in_words(error)) from error
        if encrypt and not wrapped.encrypted:
            raise GssapiError("the context cannot encrypt")
        return bytes(wrapped.message)

    def unwrap(self, token: bytes) -> Tuple[bytes, bool]:
        """What is in a token, and whether it was encrypted.  GssapiError if it is not the other side's, or not the next one."""
        try:
            return unwrap(self._context, token)
        except gssapi.exceptions.GSSError as error:
            raise GssapiError(in_words(error)) from error

    def most(self, encrypt: bool) -> int:
        """The most octets that fit in one token which LEN can count."""
        return int(self._context.get_wrap_size_limit(TOKEN_MAX, encrypt))


class Acceptor(Context):
    """The server's side; `peer` is the client's principal, as in ``alice@EXAMPLE.COM``, with a backslash before an @ of its own."""

    def __init__(self, credentials: Any) -> None:
        super().__init__(gssapi.SecurityContext(creds=credentials, usage="accept"))

    def step(self, token: bytes = b"") -> bytes:
        if not token:               # which the library takes for a question, and answers
            raise GssapiError("an empty token")
        return super().step(token)

    def _name_of_peer(self) -> Any:
        return self._context.initiator_name


class Initiator(Context):
    """
    The client's side, towards a `service` on a `host`: with ``rcmd`` that is ``rcmd/HOST`` in the realm of the host.

    A `service` with a slash is a principal's whole name.  `sequence`: have the library refuse what comes out of order, too,
    which is for TCP only.  `credentials` are those of ``gssapi.Credentials`` (None: whoever has logged in).
    """

    def __init__(self, host: str, service: str = "rcmd", *, sequence: bool = True, mech: Any = KRB5, credentials: Any = None) -> None:
        flags = (*FLAGS, Flag.out_of_sequence_detection) if sequence else FLAGS
        try:
            name = gssapi.Name(service, NameType.kerberos_principal) if "/" in service else gssapi.Name(f"{service}@{host}", NameType.hostbased_service)
            super().__init__(gssapi.SecurityContext(name=name, creds=credentials, usage="initiate", mech=mech, flags=flags))
        except gssapi.exceptions.GSSError as error:
            raise GssapiError(in_words(error)) from error

    def _name_of_peer(self) -> Any:
        return self._context.target_name


def acceptor_credentials(keytab: Optional[str] = None) -> Any:
    """
    Whatever key is in this keytab (default: where KRB5_KTNAME says, or the system's own), for `Acceptor`.

    GssapiError if there is none.  The file is read again when a client logs in, so that keys may change.
    """
    mechanisms = [KRB5, SPNEGO]
    try:
        if keytab is None:
            return gssapi.Credentials(usage="accept", mechs=mechanisms)
        if hasattr(raw, "acquire_cred_from"):
            return gssapi.Credentials(usage="accept", mechs=mechanisms, store={"keytab": f"FILE:{os.path.abspath(keytab)}"})
        os.environ["KRB5_KTNAME"] = f"FILE:{os.path.abspath(keytab)}"       # for the whole process
        return gssapi.Credentials(usage="accept", mechs=mechanisms)
    except gssapi.exceptions.GSSError as error:
        raise GssapiError(in_words(error)) from error


def unwrap_in_place(context: Any, token: bytes) -> Tuple[bytes, bool]:
    buffers = raw.IOV((raw.IOVBufferType.stream, token), (raw.IOVBufferType.data, True, None), std_layout=False)
    encrypted = raw.unwrap_iov(context, buffers).encrypted
    return buffers[1].value or b"", encrypted


def unwrap_plainly(context: Any, token: bytes) -> Tuple[bytes, bool]:
    unwrapped = context.unwrap(token)
    return unwrapped.message, unwrapped.encrypted


# The package frees what unwrap() has unwrapped only if all is well with it: who sends a frame twice would have us lose its
# octets each time.  The other way, which not every library has, they are freed.
unwrap = unwrap_in_place if hasattr(raw, "unwrap_iov") else unwrap_plainly


# --- frames ---

class Protection:
    """
    A complete context and the `level` agreed upon: what each side sends is encoded, and decoded by the other.

    `block` is how many octets fit in one frame.
    """

    def __init__(self, context: Context, level: Level) -> None:
        self.context = context
        self.level = level
        self.encrypts = level is Level.CONFIDENTIALITY
        self.block = context.most(self.encrypts)

    def encode(self, octets: Union[bytes, memoryview]) -> bytes:
        """As many frames as it takes."""
        view = memoryview(octets)
        return b"".join(self.frame(bytes(view[start:start + self.block])) for start in range(0, len(view), self.block))

    def frame(self, octets: bytes) -> bytes:
        """One frame.  FrameError if they are too many."""
        token = self.context.wrap(octets, self.encrypts)
        if len(token) > TOKEN_MAX:
            raise FrameError(f"{len(octets)} octets do not fit in a frame")
        return b"".join((BEGINNING, len(token).to_bytes(2, "big"), token))

    def decode(self, received: bytearray) -> Optional[bytes]:
        """
        Take the first frame off what has been received: what is in it, which may be nothing; None if there is more to come.

        FrameError or GssapiError if it is not good; from then on nothing is.
        """
        if len(received) >= 2:
            judge(MessageType.ENCAPSULATED, received[:2])
        if len(received) < HEADER:
            return None
        end = HEADER + (received[2] << 8 | received[3])
        if end == HEADER:
            raise FrameError("an empty frame")
        if len(received) < end:
            return None
        token = bytes(memoryview(received)[HEADER:end])
        del received[:end]
        return self.contents(token)

    def decode_datagram(self, octets: bytes) -> bytes:
        """What is in a datagram, which has to be one frame.  FrameError or GssapiError if it is not good; the next may be."""
        if len(octets) < HEADER or len(octets) != HEADER + (octets[2] << 8 | octets[3]):
            raise FrameError("a datagram that is not one frame")
        judge(MessageType.ENCAPSULATED, octets[:2])
        return self.contents(octets[HEADER:])

    def contents(self, token: bytes) -> bytes:
        """What is in a token, if it is protected as it has to be.  At the lower level, some encrypt all the same."""
        octets, encrypted = self.context.unwrap(token)
        if self.encrypts and not encrypted:
            raise FrameError("a frame that is not encrypted")
        return octets


BEGINNING = bytes(Encapsulated(b""))[:2]
