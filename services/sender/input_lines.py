"""Read the lines of a file, and warn of those that are not orders."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterable, Iterator

from orderlib.codecs import decode_order
from orderlib.errors import ConfigurationError, RejectedError

_READ_BYTES = 1024 * 1024

#: The largest ``message.max.bytes`` that librdkafka accepts.
MAX_LINE_BYTES = 1_000_000_000

#: How many lines that are not orders get a warning. The others are only counted.
MAX_WARNINGS = 100


def lines(file: int, idle_s: float) -> Iterator[bytes | None]:
    r"""Yield the lines of an open file unchanged, without their ``\n``; ``None`` if no data came for ``idle_s``.

    The last line may lack its ``\n``. Nothing else ends a line, and an empty line counts as a line. ``None`` is also
    yielded after each part of a long line, so that the caller can stop. Raises ConfigurationError for a line that is
    longer than any record may be.
    """
    parts: list[bytes] = []
    length = 0
    while True:
        if not select.select([file], [], [], idle_s)[0]:
            yield None
            continue
        read = os.read(file, _READ_BYTES)
        if not read:
            break
        first, *others = read.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > MAX_LINE_BYTES:
            raise ConfigurationError(
                f"a line of the input is longer than {MAX_LINE_BYTES:,} bytes, the limit of a record"
            )
        if others:
            yield b"".join(parts)
            *complete, rest = others
            yield from complete
            parts, length = [rest], len(rest)
        else:
            yield None
    if length:
        yield b"".join(parts)


def warn_about_invalid(values: Iterable[bytes | None], source: str) -> Iterator[bytes | None]:
    """Yield the lines of ``source`` unchanged, and warn about at most 100 of those that are not orders.

    Raises ConfigurationError if the first line is not an order, because the file probably has another format.
    """
    number = invalid = 0
    for value in values:
        if value is not None:
            number += 1
            try:
                decode_order(value)
            except RejectedError as error:
                if number == 1:
                    raise ConfigurationError(
                        f"{source}: line 1 is not an order ({error}); an order must be on one line (`jq -c .` puts "
                        "it there), and --any sends lines that are not orders"
                    ) from error
                invalid += 1
                if invalid <= MAX_WARNINGS:
                    print(f"warning: {source}: line {number:,} is not an order ({error})", file=sys.stderr)
        yield value
    if invalid > MAX_WARNINGS:
        message = f"{invalid:,} lines are not orders; the first {MAX_WARNINGS} are listed above"
        print(f"warning: {source}: {message}", file=sys.stderr)
