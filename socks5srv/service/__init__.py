"""
Running the server as a program: what a library has no business with.

Signals, the command line, the screen, log files and exit codes are handled here and only
here; the rooms below (server.py and those it imports) touch none of them.
"""
