"""Logs of the programs, and how those with librdkafka end.

Logs go to stderr, one event per line: JSON, or a readable format on a terminal.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import logging
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor

from orderlib.entry_point import run, set_up_streams
from services.settings import misspelt_settings

#: The level, name and fields of an event.
Event = tuple[int, str, Mapping[str, object]]


def _write_with_structlog(events: Iterable[Event]) -> None:
    for level, name, fields in events:
        structlog.get_logger().log(level, name, **fields)


#: Writes events. ``set_up_logging`` chooses it.
_write: Callable[[Iterable[Event]], None] = _write_with_structlog

_encoder = msgspec.json.Encoder(enc_hook=str)


def event(name: str, level: int = logging.INFO, **fields: object) -> None:
    """Log a fixed event with its fields. Fields carry positions, order_uids, counts and codes; never personal data."""
    _write([(level, name, fields)])


def log_events(events: Iterable[Event]) -> None:
    """Log several events at once, which takes less time than one after another."""
    _write(events)


class _LineHandler(logging.StreamHandler[TextIO]):
    """Write the lines of events and of `logging` to one stream, under one lock.

    A line that cannot be written is lost, as in `logging`: a full disk must not stop a program. structlog's own loggers
    raise instead, and do not renew their lock after a fork.
    """

    def write_line(self, line: str) -> None:
        self._write_texts([f"{line}\n"])

    def write_lines(self, lines: Iterable[bytes]) -> None:
        """Write lines of UTF-8, several at once if a pipe takes them without lines of other processes in between."""
        self._write_texts(text.decode() for text in _join_lines(lines, select.PIPE_BUF))

    def _write_texts(self, texts: Iterable[str]) -> None:
        self.acquire()
        try:
            for text in texts:
                with contextlib.suppress(OSError, ValueError):
                    self.stream.write(text)
                    self.stream.flush()
        finally:
            self.release()

    debug = info = warning = error = critical = write_line


def set_up_program(environ: Mapping[str, str]) -> None:
    """Set up logs, and warn of misspelt settings. Call this once, when a program starts."""
    set_up_logging()
    for variable, nearest in sorted(misspelt_settings(environ).items()):
        event("unknown_setting", logging.WARNING, variable=variable, nearest=nearest)


def run_with_kafka(main: Callable[[], int]) -> NoReturn:
    """Run a program that uses librdkafka, and end the process with its exit status.

    librdkafka's threads may still wait for a network. Python's own end would wait for them, or crash under them.
    """
    status = run(main)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def set_up_logging(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send events, and the warnings of libraries, to a stream (stderr)."""
    global _write  # noqa: PLW0603 - the program has one log
    set_up_streams(_lost_lines)
    stream = stream or sys.stderr
    first: list[Processor] = [structlog.processors.format_exc_info]
    render: Processor = _render_json
    if stream.isatty():
        first += [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("%H:%M:%S", utc=True, key="time"),
        ]
        render = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=20, sort_keys=False, timestamp_key="time")
    handler = _LineHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=first, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    if stream.isatty():
        structlog.configure(
            processors=[*first, render],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda *_: handler,
        )
        _write = _write_with_structlog
    else:
        _write = _json_writer(handler, level)


def _json_writer(handler: _LineHandler, min_level: int) -> Callable[[Iterable[Event]], None]:
    """Return what writes events as lines of JSON. structlog takes twice as long, and the API logs each request."""

    def write(events: Iterable[Event]) -> None:
        now = dt.datetime.now(dt.UTC)
        handler.write_lines(
            _json_line(now, _level_name(level), name, fields) for level, name, fields in events if level >= min_level
        )

    return write


def _lost_lines(count: int) -> bytes:
    """Return the event that lines of the log were lost, because stderr could not take them."""
    return _json_line(dt.datetime.now(dt.UTC), "warning", "log_lines_lost", {"lines": count}) + b"\n"


@functools.cache
def _level_name(level: int) -> str:
    return logging.getLevelName(level).lower()


def _join_lines(lines: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield the lines, joined to texts of at most ``max_bytes``. A longer line is a text of its own."""
    joined: list[bytes] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if joined and size > max_bytes:
            yield b"\n".join(joined) + b"\n"
            joined, size = [], len(line) + 1
        joined.append(line)
    if joined:
        yield b"\n".join(joined) + b"\n"


def _render_json(_logger: object, level_name: str, fields: EventDict) -> str:
    """Render a line of ``logging``, as a processor of structlog."""
    return _json_line(dt.datetime.now(dt.UTC), level_name, fields.pop("event"), fields).decode()


def _json_line(time: dt.datetime, level_name: str, name: object, fields: Mapping[str, object]) -> bytes:
    return _encoder.encode({"time": time, "level": level_name, "event": name, **fields})
