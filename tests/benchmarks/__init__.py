"""
How fast: a SOCKS5 server measured on this computer, beside others if there are any.

    python -m tests.benchmarks          see README.rst in this folder, and --help

To be read in this order: measures.py says what there is to measure; loop.py waits for many
sockets at once; traffic.py is both ends of every connection; columns.py puts them together,
one function for each column; rounds.py runs them, server by server; the rest shows the results.
"""
