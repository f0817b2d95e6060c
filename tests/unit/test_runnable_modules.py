"""Every module that can be run parses its arguments before anything else."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench.servers
from bench import report
from bench.report import Figure
from tests.support.programs import run

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "docs", "orderlib", "sandbox", "services", "tests")

_RUNNABLE = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)


def _sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _runnable() -> Iterator[str]:
    for path in sorted(_sources()):
        if path.suffix == ".py" and (path.name == "__main__.py" or _RUNNABLE.search(path.read_text(encoding="utf-8"))):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


MODULES = list(_runnable())


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A server to check that no client connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def _environ_of(server: socket.socket) -> dict[str, str]:
    host, port = server.getsockname()
    url = f"postgresql://postgres:secret@{host}:{port}/orders"
    names = ("BOOTSTRAP", "MIGRATOR", "DATABASE", "READER")
    return {
        **os.environ,
        **{f"ORDERS_{name}_URL": url for name in names},
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": f"{host}:{port}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _state() -> dict[Path, tuple[int, int]]:
    found = {}
    for path in _sources():
        status = path.stat()
        found[path] = (status.st_mtime_ns, status.st_size)
    return found


def test_the_list_of_modules_is_complete() -> None:
    assert {
        "bench",
        "bench.api",
        "bench.ingest",
        "docs.reference",
        "orderlib",
        "sandbox",
        "sandbox.demo",
        "services.admin",
        "services.api",
        "services.consumer",
        "services.sender",
        "tests.compose.stand_ins",
        "tests.simulation",
    } <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_help_and_a_wrong_argument_change_nothing_and_connect_to_nothing(module: str, server: socket.socket) -> None:
    before = _state()
    shown = run(f"{module.removeprefix('services.')} --help", _environ_of(server))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: python -m ")
    refused = run(f"{module.removeprefix('services.')} --no-such-option", _environ_of(server))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert _state() == before
    with pytest.raises(BlockingIOError):
        server.accept()


def test_benchmarks_use_only_the_servers_that_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def running_sandbox() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(environ={"ORDERS_BOOTSTRAP_URL": "postgresql://of-the-sandbox"})

    monkeypatch.setattr(bench.servers, "running_sandbox", running_sandbox)
    for name in ("BOOTSTRAP_URL", "DATABASE_URL", "KAFKA_SASL_MECHANISM", "TOPIC"):
        monkeypatch.setenv(f"ORDERS_{name}", "of the caller")
    with bench.servers.benchmark_servers() as environ:
        settings = {name: value for name, value in environ.items() if name.startswith("ORDERS_")}
    assert settings == {"ORDERS_BOOTSTRAP_URL": "postgresql://of-the-sandbox"}


def test_benchmarks_read_no_settings_from_the_environment() -> None:
    """``bench.api_server`` may: ``bench.api`` starts it with the environment of the benchmark's servers.

    ``bench.go`` passes the environment to the Go program, with all settings that this reads replaced.
    """
    reading = {
        path.name
        for path in (ROOT / "bench").glob("*.py")
        if "environ" in path.read_text() and "os.environ" in path.read_text()
    }
    assert reading == {"servers.py", "api_server.py", "go.py"}


def test_figures_are_published_only_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    figures = [Figure("a figure", 7.0, "ms")]
    report.publish("ingest", figures, write=False)
    assert "| a figure | 7 ms |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    report.publish("ingest", figures, write=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ingest.json"]
