"""
Lab 10.  A thread for each tunnel, or one thread for all of them?

Goal: to measure two ways to carry octets.  So far it was this server's own: a client has a thread while it talks SOCKS,
which then hands the sockets over to the one *relay thread*; that waits for all sockets of all tunnels at once.  Most
textbooks keep the client's thread until its tunnel ends.  That takes a dozen lines: `relay()` is the method to override.

Run it (with matplotlib, ``--svg FILE`` draws a picture, too):

    python examples/lab10_threads_or_one.py

You should see (the numbers are others each time, and on each computer):

    tunnels                questions answered in a second
          1  thread each   #############################                21,550
          1  relay thread  ############################                 20,810
          8  thread each   ######################                       16,777
          8  relay thread  #######################################      29,217
         64  thread each   #########################                    19,101
         64  relay thread  ###########################################  31,898
        200  thread each   ###################                          14,673
        200  relay thread  ##################################           25,536

Each proxy is a process of its own; this one is all clients and all targets.  With one tunnel there is nothing to choose.
With many, the relay thread finds many sockets ready each time it looks, and serves them in a row; the threads have to be
woken one by one, and wait for one lock: one at a time runs Python (the GIL).

Questions (answers in docs/course/labs.rst): What must the relay thread never do, if all tunnels are to go on?  What does an
idle tunnel cost in each design?  Where would threads win?  When does ThreadEach hang, in a sendall() that never returns?
"""

import os
import select
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # for a clone that is not installed

from socks5srv import Socks5Handler, Socks5Server, client

TUNNELS, MESSAGE, SECONDS = (1, 8, 64, 200), b"x" * 64, 0.05      # for each measurement; the better one of two counts
with suppress(ImportError, ValueError):     # the sockets that a process may have: on macOS 256; Windows does not count
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))


class ThreadEach(Socks5Handler):
    """The thread that has talked to the client stays with its tunnel."""

    def relay(self, target):
        target.setblocking(True)
        target.sendall(self.stream.take())          # what the client has sent ahead
        other = {self.connection: target, target: self.connection}
        open_ways = list(other)
        while open_ways:
            for sock in select.select(open_ways, [], [])[0]:
                octets = sock.recv(65536)
                other[sock].sendall(octets)
                if not octets:                      # this way has ended, the other may go on
                    other[sock].shutdown(socket.SHUT_WR)
                    open_ways.remove(sock)


DESIGNS = {"thread each": ThreadEach, "relay thread": Socks5Handler}


def measure(tunnels):
    """Questions answered in a second; `tunnels` are pairs of sockets, the client's and the target's."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + SECONDS:
        for asking, _answering in tunnels:
            asking.sendall(MESSAGE)
        for _asking, answering in tunnels:
            answering.sendall(answering.recv(len(MESSAGE), socket.MSG_WAITALL))
        count += sum(len(asking.recv(len(MESSAGE), socket.MSG_WAITALL)) == len(MESSAGE) for asking, _answering in tunnels)
    return count / (time.perf_counter() - begin)


def main():
    rates, urls, tunnels = {}, {}, {design: [] for design in DESIGNS}
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        for design in DESIGNS:
            proxy = stack.enter_context(subprocess.Popen([sys.executable, __file__, "--serve", design], stdout=subprocess.PIPE))
            stack.callback(proxy.kill)
            urls[design] = f"socks5h://127.0.0.1:{int(proxy.stdout.readline())}"
        for count, design in [(count, design) for count in TUNNELS for design in [*DESIGNS] * 2]:
            while len(tunnels[design]) < count:
                ends = client.connect(urls[design], *listener.getsockname()), listener.accept()[0]
                tunnels[design].append([stack.enter_context(sock) for sock in ends])
            rates[count, design] = max(rates.get((count, design), 0), measure(tunnels[design]))
    print("tunnels                questions answered in a second")
    for (count, design), rate in rates.items():
        print(f"{count:>7}  {design:<12}  {'#' * max(1, int(43 * rate / max(rates.values()))):<43} {rate:>7,.0f}")
    return rates


def check(rates):
    gains = [rates[count, "relay thread"] / rates[count, "thread each"] for count in TUNNELS if count >= 64]
    assert max(gains) > 0.7, f"with many tunnels one thread is not slower: {gains}"


if __name__ == "__main__":
    if "--serve" in sys.argv:
        with Socks5Server(("127.0.0.1", 0), DESIGNS[sys.argv[-1]]) as proxy:
            print(proxy.server_address[1], flush=True)
            proxy.serve_forever()
    rates = main()
    if "--svg" in sys.argv:
        from matplotlib import pyplot
        for design in DESIGNS:
            pyplot.semilogx(TUNNELS, [rates[count, design] for count in TUNNELS], "o-", label=design)
        pyplot.gca().set(xlabel="tunnels", ylabel="questions answered in a second", xticks=TUNNELS, xticklabels=TUNNELS, ylim=(0, None))
        pyplot.legend()
        pyplot.savefig(sys.argv[sys.argv.index("--svg") + 1], format="svg")
    if "--check" in sys.argv:
        check(rates)
