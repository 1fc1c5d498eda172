"""
Lab 3.  Who resolves the name: the client or the proxy?

Goal: to see that a client may send the proxy a name, or look the name up by itself and send an address; and what each
choice gives away.  To resolve a name, or to look it up, is to ask DNS for its addresses.

Which of the two a client does, the URL of its proxy says: with ``socks5h://`` the proxy resolves (h for host name), with
``socks5://`` the client.  On the wire it is ATYP, the fourth octet of the request (lab 2): 03 a name, 01 an IPv4 address.

Run it:

    python examples/lab03_who_resolves.py

You should see (the ports are others each time):

    www.example.com by way of socks5h://
        request  05 01 00 03 0f 77 77 77 2e 65 78 61 6d 70 6c 65 2e 63 6f 6d 9c 41
        client   is connected
    www.example.com by way of socks5://
        DNS here is asked for www.example.com
        request  05 01 00 01 7f 00 00 01 9c 41
        client   is connected
    printer.office by way of socks5h://
        request  05 01 00 03 0e 70 72 69 6e 74 65 72 2e 6f 66 66 69 63 65 9c 41
        client   is connected
    printer.office by way of socks5://
        DNS here is asked for printer.office
        client   fails: no such name here
    www.example.com by urllib, with ALL_PROXY=socks5h://...
        DNS here is asked for www.example.com
        client   has its answer, and the proxy has seen 0 of this

printer.office is known where the proxy is, not here.  And urllib knows no SOCKS: it finds ALL_PROXY, cannot use it, and
goes direct without a word.  (DNS here is a stand-in, so that this lab asks nobody on the Internet.)

Questions (answers in docs/course/labs.rst): Where could an eavesdropper read the name, in each of the five?  Why does the
proxy's log of the second one not have the name?  What is wrong with "it works, so it goes through the proxy"?
"""

import os
import socket
import sys
import urllib.request
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Handler, client
from socks5srv.testing import start
from socks5srv.testing.targets import WebServer

PUBLIC, INTERNAL = "www.example.com", "printer.office"

getaddrinfo = socket.getaddrinfo


def dns_here(host, *details, **more):
    """In place of this computer's resolver: it tells what it is asked for, and knows one name only."""
    if host in (PUBLIC, INTERNAL):
        print("    DNS here is asked for", host)
    if host == INTERNAL:
        raise socket.gaierror(socket.EAI_NONAME, "no such name here")
    return getaddrinfo("127.0.0.1" if host == PUBLIC else host, *details, **more)


class Telling(Socks5Handler):
    """A proxy that prints every request as it was on the wire."""

    def perform(self, request):
        print("    request ", bytes(request).hex(" "))
        super().perform(request)


def try_it(proxy, scheme, name, port):
    print(f"{name} by way of {scheme}://")
    try:
        with client.connect(proxy.url.replace("socks5h", scheme), name, port):
            print("    client   is connected")
    except socket.gaierror as error:
        print("    client   fails:", error.strerror)


def main():
    with WebServer() as web, start(Telling, hosts={PUBLIC: "127.0.0.1", INTERNAL: "127.0.0.1"}) as proxy, \
         mock.patch("socket.getaddrinfo", dns_here):
        for name in (PUBLIC, INTERNAL):
            for scheme in ("socks5h", "socks5"):
                try_it(proxy, scheme, name, web.port)
        asked = [session.destination.host for session in proxy.sessions]

        print(f"{PUBLIC} by urllib, with ALL_PROXY=socks5h://...")
        proxy.clear()
        with mock.patch.dict(os.environ, proxy.env, clear=True), urllib.request.urlopen(f"http://{PUBLIC}:{web.port}/", timeout=5):
            print(f"    client   has its answer, and the proxy has seen {len(proxy.sessions)} of this")
        return asked, proxy.sessions, web.requests


def check(asked, seen, requests):
    assert asked == [PUBLIC, "127.0.0.1", INTERNAL], "a name, an address, a name; and one that never came so far"
    assert seen == [], "urllib went around the proxy"
    assert len(requests) == 1, "and yet it reached the web server"


if __name__ == "__main__":
    facts = main()
    if "--check" in sys.argv:
        check(*facts)
