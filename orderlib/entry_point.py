"""How every program of orderlib starts, stops and ends: its streams, its exit status, and an error as one line."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
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


#: How long a write to stderr waits for a reader that has stalled.
_STALLED_S = 0.5


def _lost_lines(count: int) -> bytes:
    return b"lines lost here, because they could not be written: %d\n" % count


class _LossyFile(io.FileIO):
    """A file that loses what it cannot write.

    A full disk, and a reader that has left or stalled, must not stop a program. After a wait of ``_STALLED_S``, no line
    waits until the file can be written again. Then the file gets the number of lost lines as a line.
    """

    def __init__(self, fd: int, lost_lines: Callable[[int], bytes]) -> None:
        # A regular file that is opened again would have another position.
        self._is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        own = None if self._is_regular else _open_again(fd)
        super().__init__(fd if own is None else own, "w", closefd=False)
        self._may_block = own is None and not self._is_regular
        self._writable = select.poll()
        self._writable.register(self, select.POLLOUT)
        self._format_lost_lines = lost_lines
        self._lost_lines = 0
        self._is_within_line = False

    def write(self, data: Buffer) -> int:
        """Write as much as possible. Return the number of bytes written or lost."""
        rest = view = memoryview(data)
        if self._lost_lines:
            message = self._format_lost_lines(self._lost_lines)
            if self._write_part(b"\n" + message if self._is_within_line else message):
                self._lost_lines = 0
        while rest and (written := self._write_part(self._first_part(rest))):
            rest = rest[written:]
        if rest:
            self._lost_lines += bytes(rest).count(b"\n") or 1
        return view.nbytes

    def _first_part(self, data: memoryview) -> memoryview:
        """Return what to write at once: whole lines, so that other processes write none of theirs into them.

        A pipe takes only PIPE_BUF bytes without those of others in between. A longer line is written in parts.
        """
        if self._is_regular or len(data) <= select.PIPE_BUF:
            return data
        end = bytes(data[: select.PIPE_BUF]).rfind(b"\n") + 1
        return data[: end or select.PIPE_BUF]

    def _write_part(self, part: bytes | memoryview) -> int:
        """Write a part. Return the number of bytes written, or 0 if the part is lost.

        If a pipe or socket is writable, at most PIPE_BUF bytes do not block.
        """
        try:
            written = None if self._may_block else super().write(part)
            if written is None:
                until_s = time.monotonic() + (0 if self._lost_lines else _STALLED_S)
                # If another process is faster, the pipe is full again.
                while written is None and self._writable.poll(max(until_s - time.monotonic(), 0) * 1000):
                    written = super().write(part)
        except OSError:
            return 0
        if written:
            self._is_within_line = part[written - 1] != ord("\n")
        return written or 0


def _open_again(fd: int) -> int | None:
    """Open the pipe or terminal of a file descriptor again, so that writing never blocks. Return ``None`` if it fails.

    O_NONBLOCK of ``fd`` itself would affect all processes that share it.
    """
    # A socket cannot be opened, nor a pipe of another user. Some systems return a duplicate of ``fd``.
    with contextlib.suppress(OSError):
        own = os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if not os.get_blocking(own):
            return own
        os.close(own)
    return None


def set_up_streams(lost_lines: Callable[[int], bytes] = _lost_lines) -> None:
    """Write UTF-8 in every locale. Lose output to a closed stdout, and any output that stderr cannot take.

    ``lost_lines`` formats how many lines stderr could not take. Python has None for a stream that the caller closed.
    """
    if (stderr := sys.__stderr__) is not None and sys.stderr is stderr:
        # Not stdout: a program fails if it cannot write its result.
        lossy = io.BufferedWriter(_LossyFile(stderr.fileno(), lost_lines))
        sys.stderr = io.TextIOWrapper(lossy, line_buffering=True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - a device; never closed
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
