#!/usr/bin/env python3
"""
In place of PySocks' 3proxy: reads the same file, and serves SOCKS5 at every port in it, from the address it names.

Its tests of HTTP and SOCKS4 proxies are not run; those ports only have to be open.
"""

import re
import sys
import threading

from socks5srv.outbound import Route
from socks5srv.testing import start

with open(sys.argv[1], encoding="ascii") as stream:
    proxies = [
        start(host=source, port=int(port), route=Route(source=source))
        for port, source in re.findall(r"^(?:proxy|socks) .*-p(\d+) -e(\S+)$", stream.read(), re.MULTILINE)
    ]
try:
    threading.Event().wait()
except KeyboardInterrupt:       # as PySocks ends it
    for proxy in proxies:
        proxy.stop()
