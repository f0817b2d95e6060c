"""``admin export``: every order, as lines that the sender can send again."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import pytest

import orderlib
from orderlib.testing import SAMPLE
from sandbox import Sandbox
from services.admin.output import count_of
from tests.support import ROOT
from tests.support.databases import Database, drop_database, make_database
from tests.support.programs import peak_bytes, run, succeed
from tests.support.waiting import wait_for

SAMPLE_ORDER = orderlib.decode_order(SAMPLE)


def save(database: Database, *orders: orderlib.Order) -> None:
    with orderlib.connect(database.writer_url, timeout_s=60) as repository:
        repository.save_many(orders)


def digests(database: Database) -> dict[str, bytes]:
    """Return the digest of every order, newest order first."""
    with orderlib.connect(database.reader_url) as repository:
        return {stored.order.order_uid: stored.content_sha256 for stored in repository.stream()}


def exported_uids(arguments: str, environ: Mapping[str, str]) -> list[str]:
    lines = succeed(f"admin export {arguments}", environ).splitlines()
    return [orderlib.decode_order(line.encode()).order_uid for line in lines]


@pytest.fixture
def other_database(sandbox: Sandbox, _template: str) -> Iterator[Database]:
    """A second migrated database."""
    database = make_database(sandbox, _template)
    yield database
    drop_database(sandbox, database)


def test_an_export_sent_to_a_new_topic_gives_an_empty_database_equal_content(
    environ: dict[str, str], database: Database, other_database: Database, make_topic: Callable[..., str]
) -> None:
    succeed("sender --count 700 --seed export", environ)
    succeed("consumer --exit-at-end", environ)
    strange = attrs.evolve(
        SAMPLE_ORDER, order_uid="strange", entry="\u2028\x85 \x0b\\n\U0001f600 line\nbreak", locale="\r"
    )
    save(database, strange)
    unknown = attrs.evolve(SAMPLE_ORDER, order_uid="unknown")
    with orderlib.connect(database.writer_url) as repository:
        original = orderlib.encode_order(unknown)[:-1] + b',\r\n"\\ud800 \\n":\n[\n1.0 ,\n"\\n"\n]\n}\n'
        repository.save(unknown, original=original)
    expected = digests(database)
    assert len(expected) == 702
    exported = succeed("admin export", environ)
    # One partition, so that the consumer stores the orders in the sequence of the lines.
    elsewhere = {**environ, **other_database.environ(), "ORDERS_TOPIC": make_topic(partitions=1)}
    lines = exported.encode().splitlines(keepends=True)
    assert len(lines) == 702
    sent = run("sender --file -", elsewhere, stdin=b"".join(reversed(lines)))
    assert (sent.returncode, sent.stderr) == (0, "")
    succeed("consumer --exit-at-end", elsewhere)
    assert digests(other_database) == expected
    # Equal bytes: the content is equal, not only its digest.
    again = succeed("admin export", elsewhere)
    assert sorted(again.splitlines()) == sorted(exported.splitlines())


def test_filters_select_orders_by_customer_and_by_the_time_of_their_last_change(
    environ: dict[str, str], database: Database
) -> None:
    before = {uid: attrs.evolve(SAMPLE_ORDER, order_uid=uid, customer_id=uid[0]) for uid in ("x1", "x2", "y1", "y2")}
    save(database, *before.values())
    with orderlib.connect(database.reader_url) as repository:
        since = repository.stats().asked_at.isoformat()
    save(
        database, before["x1"], attrs.evolve(before["y1"], entry="changed"), attrs.evolve(SAMPLE_ORDER, order_uid="new")
    )
    assert exported_uids("", environ) == ["new", "y2", "y1", "x2", "x1"]
    assert exported_uids("--customer y", environ) == ["y2", "y1"]
    assert exported_uids(f"--since {since}", environ) == ["new", "y1"]
    assert exported_uids(f"--since {since} --customer y", environ) == ["y1"]
    assert exported_uids("--customer nobody", environ) == []


def test_a_since_without_an_offset_is_a_usage_error(environ: dict[str, str]) -> None:
    done = run("admin export --since 2026-01-01T00:00:00", environ)
    assert done.returncode == 2
    assert "must have an offset" in done.stderr


def start(environ: Mapping[str, str], stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.admin", "export"],
        env=dict(environ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def save_many(database: Database, count: int) -> None:
    save(database, *(attrs.evolve(SAMPLE_ORDER, order_uid=f"order-{number}") for number in range(count)))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_signal_ends_the_export_after_a_complete_line(
    environ: dict[str, str], database: Database, number: signal.Signals
) -> None:
    # More than a pipe holds.
    save_many(database, 1_000)
    with start(environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(number)
        wait_for(lambda: is_caught_again(process.pid, number))
        rest = process.stdout.read()
        message = process.stderr.read().decode()
    lines = (first + rest).splitlines(keepends=True)
    assert all(line.endswith(b"\n") and orderlib.decode_order(line) for line in lines)
    assert 0 < len(lines) < 1_000
    assert message == f"error: interrupted: the export has only {count_of(len(lines), 'order')}\n"
    assert process.returncode == 1


def is_caught_again(pid: int, number: signal.Signals) -> bool:
    """Whether no signal is pending. The handler runs right after that."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return not any(mask & 1 << number - 1 for mask in pending)


def test_a_closed_pipe_ends_the_export_without_a_traceback(environ: dict[str, str], database: Database) -> None:
    save_many(database, 1_000)
    with start(environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""


def test_progress_is_shown_on_a_terminal_only(environ: dict[str, str], database: Database) -> None:
    save(database, SAMPLE_ORDER, attrs.evolve(SAMPLE_ORDER, order_uid="second"))
    assert run("admin export", environ).stderr == ""
    ours, theirs = pty.openpty()
    try:
        with start(environ, theirs) as process:
            assert process.stdout is not None
            assert process.stdout.read().count(b"\n") == 2
        # A slow run shows more often how far it is.
        assert os.read(ours, 1024).endswith(b"\r2 orders\r\n")
    finally:
        os.close(ours)
        os.close(theirs)


def test_memory_does_not_depend_on_the_number_of_orders(
    environ: dict[str, str], database: Database, tmp_path: Path
) -> None:
    save_many(database, 1_000)
    few = peak_bytes("admin export", environ, tmp_path / "few")
    save_many(database, 6_000)
    many = peak_bytes("admin export", environ, tmp_path / "many")
    assert (tmp_path / "many").read_bytes().count(b"\n") == 6_000
    assert (tmp_path / "many").stat().st_size > 5 * 1024 * 1024
    assert many < few + 8 * 1024 * 1024
