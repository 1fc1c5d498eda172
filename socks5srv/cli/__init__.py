"""``python -m socks5srv``: from the words of the command line to the exit code."""
