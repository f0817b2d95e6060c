"""The sender's manifest: one JSON line for each acknowledged record."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orderlib.errors import ConfigurationError
from services.manifest_line import ManifestLine


class Manifest:
    """A file for the manifest, which keeps its old content until ``empty``.

    Raises OSError if the file cannot be opened, and ConfigurationError if writing to it would destroy the input
    (``source``, a file descriptor), the output, or a file that is not a manifest.
    """

    def __init__(self, path: str, source: int | None) -> None:
        _check(path, source)
        # Without O_TRUNC: the old content must stay until the first value is valid.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._emptied = False
        self._unwritten = bytearray()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def empty(self) -> None:
        """Empty the file at the first call. Raises ConfigurationError if that fails."""
        with _translate_errors():
            if not self._emptied and stat.S_ISREG(os.fstat(self._file).st_mode):
                os.ftruncate(self._file, 0)
        self._emptied = True

    def add(self, line: bytes) -> None:
        """Add a line for the next ``write``."""
        self._unwritten += line

    def write(self) -> None:
        """Append the added lines to the file. Raises ConfigurationError if that fails; the next call tries again."""
        if not self._unwritten:
            return
        self.empty()
        with _translate_errors():
            while self._unwritten:
                del self._unwritten[: os.write(self._file, self._unwritten)]


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(f"the manifest cannot be written: {exc.strerror}") from exc


def _check(path: str, source: int | None) -> None:
    try:
        found = os.stat(path)  # noqa: PTH116 - the message of os.stat has the path as the user wrote it
    except FileNotFoundError:
        return
    if source is not None and os.path.samestat(found, os.fstat(source)):
        raise ConfigurationError(f"{path}: --manifest and --file are the same file")
    if not stat.S_ISCHR(found.st_mode) and any(_is_open_as(found, number) for number in (0, 1, 2)):
        raise ConfigurationError(f"{path}: --manifest is also this program's standard input, output or error")
    if stat.S_ISREG(found.st_mode) and found.st_size and not _is_manifest(path):
        raise ConfigurationError(
            f"{path} exists and is not a manifest: choose another file for --manifest, or remove it"
        )


def _is_open_as(found: os.stat_result, number: int) -> bool:
    try:
        return os.path.samestat(found, os.fstat(number))
    except OSError:
        return False


def _is_manifest(path: str) -> bool:
    """Return whether the first line of the file is a line of a manifest."""
    with Path(path).open("rb") as file:
        line = file.readline(64 * 1024)
    try:
        ManifestLine.decode(line)
    except ValueError:
        return False
    return True
