"""What every command of ours does alike: logs, exit statuses, one line instead of a traceback.

Logs go to stderr, one event a line: JSON, or on a terminal a person's format. Exit statuses: 0 done, 1 failed or
stopped itself, 2 usage, configuration or set-up.
"""

from __future__ import annotations

import datetime as dt
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import msgspec

from orderlib.errors import ConfigurationError, OrderlibError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_SETUP = 2

#: Who wrote the line, and nothing else of logging's own bookkeeping.
_FIELDS = "fields"

log = logging.getLogger("orderlib")


def event(name: str, level: int = logging.INFO, **fields: object) -> None:
    """Log a fixed event with its fields. Fields carry positions, order_uids, counts and codes; never personal data."""
    log.log(level, name, extra={_FIELDS: fields})


class _Lines(logging.Formatter):
    """One line an event."""

    def __init__(self, *, for_person: bool) -> None:
        super().__init__()
        self._for_person = for_person

    def format(self, record: logging.LogRecord) -> str:
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
        message = record.getMessage()
        if record.exc_info:
            fields = {**fields, "traceback": self.formatException(record.exc_info)}
        if self._for_person:
            shown = " ".join(f"{name}={value}" for name, value in fields.items())
            return f"{moment:%H:%M:%S} {record.levelname.lower():7} {message} {shown}".rstrip()
        line = {"time": moment, "level": record.levelname.lower(), "event": message, **fields}
        return msgspec.json.encode(line, enc_hook=str).decode()


def set_up_logging(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send our events, and warnings of the libraries, to a stream (stderr)."""
    _set_up_streams()
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines(for_person=stream.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level)


def _set_up_streams() -> None:
    """Write UTF-8 in every locale, and to nowhere where the caller closed stdout or stderr (Python has None there)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  a device; never closed
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def run(main: Callable[[], int]) -> int:
    """The exit status of a program: what it returns, or the one its error stands for, with one line on stderr."""
    try:
        status = main()
        sys.stdout.flush()
    except ConfigurationError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_SETUP
    except OrderlibError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output has enough.
        _drop_output()
        return EXIT_FAILED
    except OSError as exc:
        _drop_output()
        print(f"error: {exc.strerror or exc}", file=sys.stderr)
        return EXIT_FAILED
    else:
        return status


def _drop_output() -> None:
    """What is still to be written to stdout goes nowhere: Python would try again at its end, and complain again."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  a device
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
