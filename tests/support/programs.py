"""Our programs, run as anybody would run them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PROGRAM_WITHIN_S = 60.0


def run(program: str, environ: Mapping[str, str], *, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``services.PROGRAM``, with its arguments after blanks, to its end."""
    name, *arguments = program.split()
    done = subprocess.run(
        [sys.executable, "-m", f"services.{name}", *arguments],
        env=dict(environ),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=PROGRAM_WITHIN_S,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def succeed(program: str, environ: Mapping[str, str], *, stdin: bytes | None = None) -> str:
    """As ``run``; its stdout, once it has ended with 0."""
    done = run(program, environ, stdin=stdin)
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
def running(program: str, environ: Mapping[str, str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``services.PROGRAM`` meanwhile, its log going to a file; killed at the end if it still runs."""
    name, *arguments = program.split()
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}", *arguments], env=dict(environ), cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def events(log: str) -> list[dict[str, Any]]:
    """The events in a log of JSON lines."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def wait_for(look: Callable[[], T | None], within_s: float = 30.0) -> T:
    """What ``look`` gives as soon as that is true. Fails after so many seconds."""
    deadline_s = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s"
        time.sleep(0.02)
    return found
