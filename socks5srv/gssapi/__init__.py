"""Kerberos for both sides of SOCKS5: GSSAPI, the method 01 of RFC 1928, as RFC 1961 has it.  Only context.py needs the package ``gssapi``."""
