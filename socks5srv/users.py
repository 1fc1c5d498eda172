"""
Who may log in: names and passwords, and how guessing is slowed down.

Three ideas.  *Right and wrong take the same time*, for known names and unknown ones, so that
a stopwatch learns nothing (as long as the hashes of a file cost the same).  *A hash is slow, so a login that was right is remembered*, as a
keyed digest in memory: a SOCKS client logs in anew for every connection, and a page opens
dozens.  And *a client that guesses has to wait*, longer each time but never for good, or anyone
could lock out the owner of a name.

A users file has a line ``NAME:HASH`` for each user, and comments after a ``#`` at the start of
a line.  It is read again when it has changed and settled; a version that cannot be read changes nothing.

This file sees no network: handler.py asks it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import stat
import threading
import time
from collections import Counter, OrderedDict
from operator import attrgetter
from random import randrange
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from .descriptors import open_at_once

logger = logging.getLogger("socks5srv")

SCRYPT = (2 ** 14, 8, 1)        # n, r, p: 16 MiB and some 50 ms, which a guesser pays for each guess
PBKDF2 = 600_000                # rounds, where there is no scrypt; some 150 ms
SCRYPT_SECONDS = 0.05 / (2 ** 14 * 8)   # for each n * r * p, as fast as computers are; to compare costs with
PBKDF2_SECONDS = 0.15 / 600_000         # for each round
SALT = 16                       # octets
AT_ONCE = min(4, os.cpu_count() or 1)   # hashes computed at a time: 16 MiB each, and cores are few

SETTLED = 0.5       # seconds without a change after which a changed file is read: it may be in the middle of a write

FREE_TRIES = 5                  # failures of one address before its next ones wait, and tries at a time before its first failure
LONGEST_WAIT = 8.0              # seconds
FORGIVEN = 15 * 60.0            # seconds without a failure after which an address is forgotten
REMEMBERED = 10_000             # addresses


class BadUsersFile(ValueError):
    """The users file cannot be used; the text says where, and what was expected."""


class Asking(threading.local):
    """For whom the thread at hand checks a login: `still_there` raises once that client is gone."""

    still_there: Callable[[], object] = staticmethod(lambda: None)


class Users:
    """Names and passwords, from a mapping.  `check()` is called in any thread."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self.passwords = passwords

    def __len__(self) -> int:
        return len(self.passwords)

    def check(self, username: str, password: str) -> bool:
        """Whether this is a user and the password is right."""
        known = self.passwords.get(username, "")
        right = hmac.compare_digest(known.encode(), password.encode())
        return right and username in self.passwords

    def check_for(self, still_there: Callable[[], object], username: str, password: str) -> bool:
        """check(), for a client that may be hung up on before its turn comes: still_there() raises then, and nothing is computed."""
        return self.check(username, password)

    def refresh(self) -> Set[str]:
        """Users removed, or whose password changed, since the last call."""
        return set()


class UsersFile(Users):
    """
    Names and hashes, from a file.

    BadUsersFile if it cannot be read at first.  Later versions that cannot be read are logged,
    and the users stay what they were.
    """

    _asking = Asking()

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.computing = threading.BoundedSemaphore(AT_ONCE)
        self.key = os.urandom(32)
        self.seen: Optional[Tuple[int, ...]] = self._signature()     # when it was read; None: read it now, whatever it is
        self.latest = self.seen                 # at the last look
        self.changed = 0.0                      # when that was seen first, by time.monotonic()
        self._have(read_users(path))
        self.verified: Dict[str, bytes] = {}    # a keyed digest of the right password, by name

    def __len__(self) -> int:
        return len(self.hashes)

    def check(self, username: str, password: str) -> bool:
        digest = hmac.new(self.key, password.encode(), "sha256").digest()
        known = self.hashes.get(username)
        if hmac.compare_digest(self.verified.get(username, b""), digest):
            return True
        with self.computing:
            self._asking.still_there()
            right = verify(password, known or self.nobody)
        with self.lock:
            found = right and known is not None and self.hashes.get(username) == known  # neither changed nor removed meanwhile
            if found:
                self.verified[username] = digest
            return found

    def check_for(self, still_there: Callable[[], object], username: str, password: str) -> bool:
        """By way of the thread, so that an override of check() is called, too."""
        before, self._asking.still_there = self._asking.still_there, still_there
        try:
            return self.check(username, password)
        finally:
            self._asking.still_there = before

    def _have(self, hashes: Dict[str, str]) -> None:
        """Let these users in, and compare the password of any other name with a hash that takes as long as the dearest of theirs."""
        parsed = [Hash.parse(hash) for hash in hashes.values()] or [Hash.blank()]
        dearest = max(parsed, key=attrgetter("seconds"))
        self.hashes = hashes
        self.nobody = str(dearest._replace(digest=os.urandom(len(dearest.digest))))
        self.uneven = any(hash.seconds != dearest.seconds for hash in parsed)      # and that is still to be told of

    def _tell_if_uneven(self) -> None:
        """Once for each version of the file, and not before it is in use: the log may not be set up when it is read."""
        if self.uneven:
            self.uneven = False
            logger.warning("the hashes in %s cost more or less, so the time that an answer takes tells who is a user: make the "
                           "cheaper ones again with socks5srv hash-password", self.path)

    def refresh(self) -> Set[str]:
        """Read the file again if it has changed, and has settled since; at once if that is asked for."""
        self._tell_if_uneven()
        signature, now = self._signature(), time.monotonic()
        if signature != self.latest:
            self.latest, self.changed = signature, now
        if signature == self.seen or (self.seen is not None and now - self.changed < SETTLED):
            return set()
        self.seen = signature
        return self._reload(signature)

    def read_again(self) -> None:
        """Have the next refresh() read the file, whether it has changed or not."""
        self.seen = None

    def _reload(self, signature: Tuple[int, ...]) -> Set[str]:
        """The same at once.  Nothing comes of it if the file changes meanwhile: the next look sees that, too."""
        try:
            hashes = read_users(self.path)
        except BadUsersFile as error:
            if self._signature() == signature:
                logger.error("keeping the previous users: %s", error)
            return set()
        if self._signature() != signature:
            return set()
        gone = self._replace(hashes)
        logger.info("%d users read from %s", len(hashes), self.path)
        self._tell_if_uneven()
        return gone

    def _replace(self, hashes: Dict[str, str]) -> Set[str]:
        """Have these users instead; those that are none any more, or have another password."""
        with self.lock:
            gone = {name for name, hash in self.hashes.items() if hashes.get(name) != hash}
            self._have(hashes)
            for name in gone:
                self.verified.pop(name, None)
        return gone

    def _signature(self) -> Tuple[int, ...]:
        """What changes when the file does."""
        try:
            status = os.stat(self.path)
        except OSError:
            return ()
        return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def read_users(path: str) -> Dict[str, str]:
    """The hashes in a users file, by name; BadUsersFile if there is anything wrong with it."""
    try:
        with open(path, encoding="utf-8-sig", opener=open_at_once) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):        # reading it could last, and it cannot be read again
                raise BadUsersFile(f"users file {path} is not a regular file")
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsersFile(f"users file {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if os.name == "posix" and status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise BadUsersFile(f"users file {path} is readable by everyone: chmod o-rw {path}")
    users: Dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, hash = read_line(line.strip(), f"{path}:{number}")
            if name in users:
                raise BadUsersFile(f"{path}:{number}: user {name!r} is listed twice")
            users[name] = hash
    return users


def read_line(line: str, where: str) -> Tuple[str, str]:
    name, colon, hash = line.partition(":")
    if not colon or not 1 <= len(name.encode()) <= 255:
        raise BadUsersFile(f"{where}: expected NAME:HASH, with a HASH from socks5srv hash-password")
    try:
        Hash.parse(hash)
    except ValueError as error:
        raise BadUsersFile(f"{where}: {error}") from None
    return name, hash


# --- hashes ---

class Hash(NamedTuple):
    """``scrypt$N$R$P$SALT$DIGEST`` or ``pbkdf2_sha256$ROUNDS$SALT$DIGEST``, the last two in base64."""

    method: str
    cost: Tuple[int, ...]
    salt: bytes
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> Hash:
        method, *cost, salt, digest = text.split("$") if text.count("$") >= 3 else [text, "", ""]
        if (method, len(cost)) not in (("scrypt", 3), ("pbkdf2_sha256", 1)):
            raise ValueError("expected a HASH from socks5srv hash-password: scrypt$... or pbkdf2_sha256$...")
        try:
            numbers = tuple(map(int, cost))
            found = cls(method, numbers, base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True))
        except ValueError:
            raise ValueError("this HASH is damaged; make another with socks5srv hash-password") from None
        if not found.affordable:
            raise ValueError("this HASH takes too little or too much to compute; make another with socks5srv hash-password")
        return found

    @classmethod
    def blank(cls) -> Hash:
        """A hash as new ones are, but of no password."""
        method, cost = ("scrypt", SCRYPT) if hasattr(hashlib, "scrypt") else ("pbkdf2_sha256", (PBKDF2,))
        return cls(method, cost, os.urandom(SALT), bytes(32))

    @property
    def seconds(self) -> float:
        """About how long it takes to compute: the work is known, so that equal costs are equal here on any computer."""
        if self.method == "pbkdf2_sha256":
            return self.cost[0] * PBKDF2_SECONDS * -(-len(self.digest) // 32)      # once for every 32 octets of it
        n, r, p = self.cost
        return n * r * p * SCRYPT_SECONDS

    @property
    def affordable(self) -> bool:
        """Whether it can be computed here, and is worth it."""
        if not self.salt or not 16 <= len(self.digest) <= 64:
            return False
        if self.method == "pbkdf2_sha256":
            return 1000 <= self.cost[0] <= 10_000_000
        n, r, p = self.cost
        if min(n - 1, r, p) < 1 or n & (n - 1) or n >= 2 ** (16 * min(r, 4)):       # RFC 7914 section 6
            return False
        return 128 * n * r * p <= 256 * 1024 * 1024

    def of(self, password: str) -> bytes:
        """The digest of another password, at the same cost and with the same salt."""
        octets, length = password.encode(), len(self.digest)
        if self.method == "scrypt":
            n, r, p = self.cost
            return hashlib.scrypt(octets, salt=self.salt, n=n, r=r, p=p, dklen=length, maxmem=512 * 1024 * 1024)
        return hashlib.pbkdf2_hmac("sha256", octets, self.salt, self.cost[0], length)

    def __str__(self) -> str:
        numbers = "$".join(map(str, self.cost))
        salt, digest = (base64.b64encode(octets).decode() for octets in (self.salt, self.digest))
        return f"{self.method}${numbers}${salt}${digest}"


def hash_password(password: str) -> str:
    """A new hash, as a users file has it."""
    blank = Hash.blank()
    return str(blank._replace(digest=blank.of(password)))


def verify(password: str, hash: str) -> bool:
    """Whether this is the password of the hash.  ValueError if that is none."""
    known = Hash.parse(hash)
    return hmac.compare_digest(known.digest, known.of(password))


# --- guessing ---

class LoginThrottle:
    """
    How often each address has failed to log in of late, and how long its next try is delayed.

    A try counts from its beginning: an address that has failed has one at a time, others have as many as may fail.
    Without that, hundreds side by side would all be judged before the first of them has failed.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.failures: OrderedDict[str, Tuple[int, float]] = OrderedDict()      # count, and when last; by address
        self.trying: Counter[str] = Counter()                   # tries that are under way, by address
        self.waiting: Dict[str, List[threading.Event]] = {}     # those that wait for their turn; set when it comes

    def begin(self, host: str) -> Optional[threading.Event]:
        """A try begins, or has to wait until what is returned is set.  Either way end() has to follow."""
        with self.lock:
            if self.trying[host] < self.at_once(host):
                self.trying[host] += 1
                return None
            turn = threading.Event()
            self.waiting.setdefault(host, []).append(turn)
            return turn

    def end(self, host: str, turn: Optional[threading.Event]) -> None:
        """A try is over, or will never begin because it no longer waits for its `turn`."""
        with self.lock:
            waiting = self.waiting.get(host, [])
            if turn in waiting:
                waiting.remove(turn)
            else:
                self.trying[host] -= 1
            while waiting and self.trying[host] < self.at_once(host):
                self.trying[host] += 1
                # Any of them: in the order of their coming, a flood of guesses would be before the right login for good.
                waiting.pop(randrange(len(waiting))).set()
            if not waiting:
                self.waiting.pop(host, None)
                if not self.trying[host]:
                    del self.trying[host]

    def at_once(self, host: str) -> int:
        """How many tries of this address may be under way; to be called with the lock."""
        return 1 if self.count(host) else FREE_TRIES

    def has_failed(self, host: str) -> bool:
        """Whether this address has failed of late."""
        with self.lock:
            return self.count(host) > 0

    def count(self, host: str) -> int:
        """The failures of this address that are not forgiven; to be called with the lock."""
        count, last = self.failures.get(host, (0, 0.0))
        return count if time.monotonic() - last <= FORGIVEN else 0

    def delay(self, host: str) -> float:
        """Seconds that the next try has to wait: none at first, then twice as long each time."""
        with self.lock:
            count = self.count(host)
        return 0.0 if count < FREE_TRIES else min(LONGEST_WAIT, 0.25 * 2.0 ** (count - FREE_TRIES))

    def failed(self, host: str) -> None:
        with self.lock:
            self.failures[host] = min(self.count(host) + 1, 64), time.monotonic()
            self.failures.move_to_end(host)
            if len(self.failures) > REMEMBERED:
                self.failures.popitem(last=False)

    def succeeded(self, host: str) -> None:
        with self.lock:
            self.failures.pop(host, None)
