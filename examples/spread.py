"""
How a load balancer's choice spreads long sessions over ten nodes: a simulation.

Goal: to see, for five ways to choose, how much more than the others the fullest node has, also when one is killed and its clients
come again at once, and how many clients come to a node that is back, and is empty.  What each node has to have room for follows
from that.

Run it (with --seed N other clients come):

    python examples/spread.py

You should see:

                            fullest of    fullest of nine,    new clients of
                             ten nodes       one is killed  one that is back
    round robin                  1.07x               1.18x              1.0x
    random                       1.08x               1.17x              1.0x
    the better of two            1.01x               1.12x              2.2x
    least connections            1.00x               1.11x              9.7x
    hash of the address          1.26x               1.37x              0.9x

1x is a tenth: of the sessions that are open, or of the clients that come.  20 clients come each second, half of them stay for
a minute at most, and one in a hundred for half an hour and more, so that there are 3,600 at a time.  They come from 1,000
addresses, and a sixth of them from ten of these, as they do where many are behind one address.

Questions (answers in examples/README.rst): Why does nearly every new client come to the node that is back, where connections are counted?
What is different with a million sessions?  Why is that no help for a hash?
"""

import argparse
import hashlib
import heapq
import itertools
import random
from statistics import fmean

NODES = 10
RATE = 20.0                         # clients a second
MEDIAN, SIGMA = 60.0, 1.5           # seconds that a session takes: the logarithm has a normal distribution
ADDRESSES, ZIPF = 1000, 0.68        # the client with the nth most sessions has them in proportion to n ** -ZIPF
FILLING, STEADY, DOWN, BACK = 1800.0, 200.0, 60.0, 20.0      # seconds until it is full, of looking, without node 1, and with it again


class Choice:
    """A way to choose among the nodes that are there."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def choose(self, up, open_sessions, client):
        raise NotImplementedError


class RoundRobin(Choice):
    name = "round robin"
    turn = 0

    def choose(self, up, open_sessions, client):
        self.turn += 1
        return up[self.turn % len(up)]


class Random(Choice):
    name = "random"

    def choose(self, up, open_sessions, client):
        return self.random.choice(up)


class BetterOfTwo(Choice):
    name = "the better of two"

    def choose(self, up, open_sessions, client):
        return min(self.random.sample(up, 2), key=open_sessions.__getitem__)


class LeastConnections(Choice):
    name = "least connections"

    def choose(self, up, open_sessions, client):
        return min(up, key=lambda node: (open_sessions[node], self.random.random()))


class Hash(Choice):
    """Consistent: of a node that goes, only its own clients go to others."""

    name = "hash of the address"

    def __init__(self, seed):
        super().__init__(seed)
        self.ranks = {}

    def choose(self, up, open_sessions, client):
        if client not in self.ranks:
            self.ranks[client] = sorted(range(NODES), key=lambda node: hashlib.sha256(b"%d %d" % (client, node)).digest())
        return next(node for node in self.ranks[client] if node in up)


def clients(seed):
    """When each comes, who it is, and how long it stays; the same for each choice."""
    source = random.Random(seed)
    shares = list(itertools.accumulate((rank + 1) ** -ZIPF for rank in range(ADDRESSES)))
    now = 0.0
    while now < FILLING + STEADY + DOWN + BACK:
        now += source.expovariate(RATE)
        yield now, source.choices(range(ADDRESSES), cum_weights=shares)[0], source.lognormvariate(0, SIGMA) * MEDIAN


class Cluster:
    """The nodes, and who is on them."""

    def __init__(self, choice):
        self.choice = choice
        self.up = list(range(NODES))
        self.open = [0] * NODES
        self.sessions = []              # a heap: when it ends, its node, its client

    def come(self, client, end):
        """A session; its node."""
        node = self.choice.choose(self.up, self.open, client)
        self.open[node] += 1
        heapq.heappush(self.sessions, (end, node, client))
        return node

    def end_until(self, now):
        while self.sessions and self.sessions[0][0] <= now:
            self.open[heapq.heappop(self.sessions)[1]] -= 1

    def kill(self, node):
        """All who were on it come again at once."""
        self.up.remove(node)
        lost = [session for session in self.sessions if session[1] == node]
        self.sessions = [session for session in self.sessions if session[1] != node]
        heapq.heapify(self.sessions)
        self.open[node] = 0
        for end, _node, client in lost:
            self.come(client, end)

    def fullest(self):
        """As a multiple of what each would have if all nodes were there, and had the same."""
        return max(self.open) * NODES / sum(self.open)


def simulate(choice, arrivals):
    """The fullest node on average, and without node 1; and how many new clients come to node 1 when it is back."""
    cluster = Cluster(choice)
    steady, without, came = [], [], []
    for now, client, stay in arrivals:
        cluster.end_until(now)
        time = now - FILLING
        if time >= STEADY + DOWN and 0 not in cluster.up:
            cluster.up.insert(0, 0)
        elif STEADY <= time < STEADY + DOWN and 0 in cluster.up:
            cluster.kill(0)
        node = cluster.come(client, now + stay)
        if time >= STEADY + DOWN:
            came.append(node == 0)
        elif time >= 0:
            (steady if time < STEADY else without).append(cluster.fullest())
    return fmean(steady), fmean(without), fmean(came) * NODES


def main():
    parser = argparse.ArgumentParser(description="Simulate how a balancer's choice spreads long sessions.")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random numbers (default: 1)")
    seed = parser.parse_args().seed
    arrivals = list(clients(seed))
    print(f"{'':22}{'fullest of':>12}{'fullest of nine,':>20}{'new clients of':>18}")
    print(f"{'':22}{'ten nodes':>12}{'one is killed':>20}{'one that is back':>18}")
    for kind in (RoundRobin, Random, BetterOfTwo, LeastConnections, Hash):
        fullest, without, came = simulate(kind(seed), arrivals)
        print(f"{kind.name:22}{fullest:11.2f}x{without:19.2f}x{came:17.1f}x")


if __name__ == "__main__":
    main()
