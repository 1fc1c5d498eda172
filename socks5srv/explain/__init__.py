"""
What a message means, and why the server answered so.

    print(table(Greeting(b"\\x00\\x02")))                     one message
    python -m socks5srv.explain 05 01 00                    whatever these octets may be

fields.py takes a message apart, tables.py draws it as the RFC does, reasons.py puts decisions into
sentences, tracer.py follows the clients of a server that serves, datagrams.py prints what it has found.
"""

from .tables import Explanation, broken, explanation, explanations, not_socks, readings, table

Exhibit, exhibit, exhibits, stranger = Explanation, explanation, explanations, not_socks    # the former names, for one release

__all__ = ["Explanation", "broken", "explanation", "explanations", "not_socks", "readings", "table"]
