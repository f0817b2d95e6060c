"""The signals that stop the sandbox and the demo."""

import signal
from collections.abc import Callable
from types import FrameType


def on_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    r"""Let one handler handle `kill`, Ctrl-C, Ctrl-\ and a closed terminal.

    If the caller ignores a closed terminal, as `nohup` does, it stays ignored.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)
