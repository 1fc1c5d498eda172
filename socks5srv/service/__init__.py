"""A server configured as a program runs it, in one process: its settings, its log, its summary."""
