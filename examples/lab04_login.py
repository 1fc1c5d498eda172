"""
Lab 4.  The login, and what the wire shows.

Goal: to see username and password on their way (RFC 1929), and what follows from the fact that they can be read there.  A
client that offers method 02 in its greeting, and gets it selected, sends its login before the request.

Run it:

    python examples/lab04_login.py

You should see:

    USERNAME/PASSWORD                                            RFC 1929 section 2
    client -> proxy
         +-----+------+-------------+------+----------+
         | VER | ULEN |    UNAME    | PLEN |  PASSWD  |
         +-----+------+-------------+------+----------+
    size |  1  |  1   |   1 to 255  |  1   | 1 to 255 |
    here |  01 |  04  | 61 6e 6e 61 | ***  |   ***    |
         +-----+------+-------------+------+----------+
         VER     01           version of this sub-negotiation, not of SOCKS: 01,
                              not 05
         ULEN    04           4 octets of user name
         UNAME   61 6e 6e 61  anna
         PLEN                 hidden, as it tells how long the password is
         PASSWD               hidden here; on the wire anyone can read it
      = "I am anna, here is my password."

    LOGIN STATUS                                                 RFC 1929 section 2
    client <- proxy, 2 octets
         +-----+--------+
         | VER | STATUS |
         +-----+--------+
    size |  1  |   1    |
    here |  01 |   00   |
         +-----+--------+
         VER     01  version of this sub-negotiation, not of SOCKS: 01, not 05
         STATUS  00  success (any other value is failure)
      = "Welcome."

    what was on the wire: 01 04 61 6e 6e 61 06 73 65 73 61 6d 65
    as text:              ..anna.sesame
    an eavesdropper says the same octets:     STATUS 00
    anna says another password:               STATUS 01
    somebody offers method 00 only:           METHOD ff
    ben, whose passwords are good once:       STATUS 00
    an eavesdropper says ben's octets again:  STATUS 01

The table hides the password, as all that this server prints does.  The wire does not.  Against those who listen there only
encryption helps (ssh, a VPN), or a password that is worth nothing the second time.

Questions (answers in docs/course/labs.rst): Which octets are the password?  Why is VER 01 here, and 05 in every other message?
Why does the proxy not tell a wrong name from a wrong password?  Would it help to send a hash of the password instead?
"""

import os
import socket
import sys
from io import BytesIO

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Handler
from socks5srv.explain import table
from socks5srv.protocol import Credentials, CredentialsReply
from socks5srv.testing import start

unused = {("ben", "4711"), ("ben", "0815")}


class OneTime(Socks5Handler):
    """authenticate() is the method to override for users who are kept elsewhere; here every password is good once."""

    def authenticate(self, username, password):
        good = (username, password) in unused
        unused.discard((username, password))
        return good


def say(proxy, *messages):
    """Send messages that get two octets each for an answer; the last of these answers."""
    with socket.create_connection(proxy.address) as sock:
        for octets in messages:
            sock.sendall(octets)
            answer = sock.recv(2, socket.MSG_WAITALL)
    return answer


def login(username, password):
    return b"\x01" + bytes([len(username)]) + username + bytes([len(password)]) + password


def main():
    offer, anna, ben = b"\x05\x01\x02", login(b"anna", b"sesame"), login(b"ben", b"4711")
    with start(users={"anna": "sesame"}) as proxy, start(OneTime) as careful:
        status = say(proxy, offer, anna)
        print(table(Credentials.read(BytesIO(anna))), table(CredentialsReply.read(BytesIO(status))), sep="\n\n", end="\n\n")
        print("what was on the wire:", anna.hex(" "))
        print("as text:             ", "".join(chr(octet) if 32 <= octet < 127 else "." for octet in anna))
        others = {
            "an eavesdropper says the same octets:     STATUS": say(proxy, offer, anna),
            "anna says another password:               STATUS": say(proxy, offer, login(b"anna", b"open")),
            "somebody offers method 00 only:           METHOD": say(proxy, b"\x05\x01\x00"),
            "ben, whose passwords are good once:       STATUS": say(careful, offer, ben),
            "an eavesdropper says ben's octets again:  STATUS": say(careful, offer, ben),
        }
    for what, answer in others.items():
        print(what, answer[1:].hex())
    return anna, [status, *others.values()]


def check(octets, answers):
    assert octets[2:6] + octets[7:] == b"annasesame", "it is on the wire in clear"
    assert [answer.hex() for answer in answers] == ["0100", "0100", "0101", "05ff", "0100", "0101"]


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
