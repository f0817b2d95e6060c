"""How every program of orderlib starts, stops and ends: its streams, its exit status, and an error as one line."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from orderlib.errors import ConfigurationError, OrderlibError

if TYPE_CHECKING:
    from typing_extensions import Buffer

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIGURATION = 2

#: For ``--help``.
CONFIGURATION_STATUS = f"{EXIT_CONFIGURATION} wrong usage or configuration"
EXIT_STATUSES = f"Exit status: {EXIT_DONE} done, {EXIT_FAILED} failed or stopped itself, {CONFIGURATION_STATUS}."


#: How soon a waiting program notices a stop request.
_STOP_POLL_S = 0.1


class StopEvent:
    """A stop request, for a signal handler to set.

    The lock of a ``threading.Event`` is not reentrant: a handler that runs while its thread waits for the event, or
    sets it, may wait for ever.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Request the stop."""
        self._is_set = True

    def is_set(self) -> bool:
        """Return whether the stop was requested."""
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Wait for the request, at most this long. Return whether there is one."""
        until_s = time.monotonic() + timeout_s
        while not self._is_set and (remaining_s := until_s - time.monotonic()) > 0:
            time.sleep(min(remaining_s, _STOP_POLL_S))
        return self._is_set


def run(main: Callable[[], int]) -> int:
    """Run a program and return its exit status. An error of orderlib becomes its status and one line on stderr."""
    try:
        status = main()
        sys.stdout.flush()
    except ConfigurationError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except OrderlibError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of stdout has closed it.
        _drop_output()
        return EXIT_FAILED
    except OSError as exc:
        _drop_output()
        print(f"error: {exc.strerror or exc}", file=sys.stderr)
        return EXIT_FAILED
    else:
        return status


def _drop_output() -> None:
    """Discard what is still buffered for stdout. Python would flush it at exit, and report the failure again."""
    with open(os.devnull, "wb") as devnull:  # noqa: PTH123 - a device
        os.dup2(devnull.fileno(), sys.stdout.fileno())


class _LossyFile(io.FileIO):
    """A file that loses what it cannot write: a full disk, or a reader that has left, must not stop a program."""

    def write(self, data: Buffer) -> int:
        """Write as much as possible. Return the number of bytes written or lost."""
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:
                return written
        return memoryview(data).nbytes


def set_up_streams() -> None:
    """Write UTF-8 in every locale. Lose output to a closed stdout, and any output that stderr cannot take.

    Python has None for a stream that the caller closed.
    """
    if (stderr := sys.__stderr__) is not None and sys.stderr is stderr:
        # Not stdout: a program fails if it cannot write its result.
        lossy = io.BufferedWriter(_LossyFile(stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(lossy, line_buffering=True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - a device; never closed
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
