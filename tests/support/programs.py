"""Run the programs as processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import psutil

from tests.support import ROOT
from tests.support.fork_server import Process, start

T = TypeVar("T")

PROGRAM_WITHIN_S = 60.0


def run(
    program: str, environ: Mapping[str, str], *, stdin: bytes | int = b"", checkout: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run ``services.PROGRAM ARGUMENTS`` to its end. ``stdin`` is its input, or a file descriptor."""
    with TemporaryFile() as source, TemporaryFile() as stdout, TemporaryFile() as stderr:
        if isinstance(stdin, bytes):
            source.write(stdin)
            source.seek(0)
            stdin = source.fileno()
        streams = {"stdin": stdin, "stdout": stdout.fileno(), "stderr": stderr.fileno()}
        process = start(program.split(), environ, **streams, checkout=checkout)
        try:
            status = process.wait(PROGRAM_WITHIN_S)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(program, status, stdout.read().decode(), stderr.read().decode())


def succeed(program: str, environ: Mapping[str, str], *, stdin: bytes | int = b"", checkout: Path = ROOT) -> str:
    """Run a program like ``run``, and return its stdout. Fail unless it exits with 0."""
    done = run(program, environ, stdin=stdin, checkout=checkout)
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def peak_bytes(program: str, environ: Mapping[str, str], stdout: Path) -> int:
    """Run ``services.PROGRAM`` to its end with status 0 and its output in a file. Return its peak resident size."""
    name, *arguments = program.split()
    with stdout.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}", *arguments], env=dict(environ), cwd=ROOT, stdout=output
        )
    this, largest = psutil.Process(process.pid), 0
    deadline_s = time.monotonic() + PROGRAM_WITHIN_S
    while process.poll() is None:
        assert time.monotonic() < deadline_s, f"{program} did not end within {PROGRAM_WITHIN_S:g} s"
        with suppress(psutil.Error):
            largest = max(largest, this.memory_info().rss)
        time.sleep(0.005)
    assert process.returncode == 0
    return largest


@contextmanager
def running(program: str, environ: Mapping[str, str], log_path: Path, *, checkout: Path = ROOT) -> Iterator[Process]:
    """Run ``services.PROGRAM`` during the block, with its log in a file. Kill it at the end if it still runs."""
    with log_path.open("ab") as log:
        process = start(program.split(), environ, stdout=log.fileno(), stderr=log.fileno(), checkout=checkout)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def events(log: str) -> list[dict[str, Any]]:
    """Return the events in a log of JSON lines."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]
