"""Thin programs that import orderlib and hold no knowledge of their own."""

import os
import signal


def end_at_early_sigterm() -> None:
    """Let SIGTERM end a program with 0 while it imports its modules, which takes most of a second.

    For programs that run until a signal stops them. They set their own handlers later. The first process of a container
    would ignore the signal.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
