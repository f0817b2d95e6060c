"""The sender as a command, with a real broker."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition

from orderlib.testing import SAMPLE
from sandbox import Sandbox
from tests.support import ROOT
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.fork_server import start
from tests.support.programs import events, run, running, succeed
from tests.support.waiting import wait_for

#: What Kafka's Java client computes for these keys: UtilsTest.testMurmur2 of org.apache.kafka.common.utils.
MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


def records(environ: Mapping[str, str]) -> list[Message]:
    """Return every record of the topic, ordered by partition and offset."""
    topic = environ["ORDERS_TOPIC"]
    consumer = Consumer(
        {
            "bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": "test",
            "enable.auto.commit": False,
        }
    )
    try:
        places = [
            TopicPartition(topic, partition, OFFSET_BEGINNING)
            for partition in consumer.list_topics(topic).topics[topic].partitions
        ]
        expected = sum(consumer.get_watermark_offsets(place, timeout=10)[1] for place in places)
        consumer.assign(places)
        found: list[Message] = []
        wait_for(lambda: len(found.__iadd__(consumer.consume(1000, 0.1))) >= expected)
    finally:
        consumer.close()
    assert all(message.error() is None for message in found)
    return sorted(found, key=lambda message: (message.partition(), message.offset()))


def values(environ: Mapping[str, str]) -> list[bytes]:
    return [message.value() or b"" for message in records(environ)]


def lines_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_bytes().splitlines()]


def has_lines(manifest: Path, count: int) -> bool:
    return manifest.exists() and len(lines_of(manifest)) == count


@pytest.fixture
def one_partition(environ: dict[str, str], make_topic: Callable[..., str]) -> dict[str, str]:
    """Settings with a topic of one partition, in which the order of records is known."""
    return {**environ, "ORDERS_TOPIC": make_topic(partitions=1)}


@contextlib.contextmanager
def frozen(sandbox: Sandbox) -> Iterator[None]:
    """Freeze Kafka: it accepts connections and does not answer."""
    os.kill(sandbox.kafka.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(sandbox.kafka.pid, signal.SIGCONT)


def test_the_manifest_lists_every_record_with_its_digest(environ: dict[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    out = succeed(f"sender --count 2000 --bad-rate 0.2 --manifest {manifest}", environ)
    assert out.startswith("sent 2,000 in ")
    assert out.endswith("acknowledged 2,000, failed 0\n")
    expected = [
        {
            "topic": environ["ORDERS_TOPIC"],
            "partition": message.partition(),
            "offset": message.offset(),
            "order_uid": (message.key() or b"").decode() or None,
            "sha256": hashlib.sha256(message.value() or b"").hexdigest(),
        }
        for message in records(environ)
    ]
    assert sorted(lines_of(manifest), key=lambda line: (line["partition"], line["offset"])) == expected
    assert 50 < sum(line["order_uid"] is None for line in expected) < 400


def test_the_default_is_a_thousand_orders_and_only_the_summary_is_printed(
    environ: dict[str, str],
) -> None:
    done = run("sender", environ)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert len(records(environ)) == 1000


def test_the_same_seed_sends_the_same_values(one_partition: dict[str, str]) -> None:
    for _ in range(2):
        succeed("sender --count 100 --seed spring --bad-rate 0.3", one_partition)
    sent = values(one_partition)
    assert sent[:100] == sent[100:]


@pytest.mark.parametrize("through_stdin", [False, True], ids=["file", "stdin"])
def test_the_lines_of_a_file_are_sent_unchanged(
    one_partition: dict[str, str], tmp_path: Path, *, through_stdin: bool
) -> None:
    sent = [
        SAMPLE.strip(),
        b"",
        b'{"order_uid": "windows"}\r',
        b"\xff\xfe\0 not JSON \x85\x0c",
        b'{"order_uid":"last one"}',
        b"x",
    ]
    file = tmp_path / "orders.jsonl"
    file.write_bytes(b"\n".join(sent))
    if through_stdin:
        succeed("sender --file - --any", one_partition, stdin=file.read_bytes())
    else:
        succeed(f"sender --file {file} --any", one_partition)
    found = records(one_partition)
    assert [message.value() for message in found] == sent
    assert [message.key() for message in found] == [b"b563feb7b2b84b6test", None, b"windows", None, None, None]


def test_an_order_gets_the_partition_that_a_java_client_would_choose(environ: dict[str, str]) -> None:
    lines = b"".join(b'{"order_uid":"%b"}\n' % key.encode() for key in MURMUR2)
    succeed("sender --file - --any", environ, stdin=lines)
    found = {(message.key() or b"").decode(): message.partition() for message in records(environ)}
    assert found == {key: (value & 0x7FFFFFFF) % 3 for key, value in MURMUR2.items()}


def test_records_that_the_broker_refuses_are_counted_and_fail_the_sender(
    environ: dict[str, str], make_topic: Callable[..., str], tmp_path: Path
) -> None:
    environ = {**environ, "ORDERS_TOPIC": make_topic(max_message_bytes="1048588")}
    too_large = Random(1).randbytes(2_000_000).hex().encode()
    manifest = tmp_path / "manifest"
    lines = [b'{"order_uid":"%d"}' % number for number in range(200)]
    lines[50:50] = lines[150:150] = [too_large]
    done = run(f"sender --file - --any --manifest {manifest}", environ, stdin=b"\n".join(lines))
    assert done.returncode == 1
    assert done.stdout.endswith("acknowledged 200, failed 2\n")
    assert "error: 2 of 202 records not acknowledged" in done.stderr
    assert "MSG_SIZE_TOO_LARGE" in done.stderr
    uids = [line["order_uid"] for line in lines_of(manifest)]
    assert sorted(uids, key=int) == [str(number) for number in range(200)]
    assert len(records(environ)) == 200


def test_records_that_time_out_fail_the_sender_and_later_records_are_sent(
    environ: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    environ["ORDERS_KAFKA_MESSAGE_TIMEOUT_MS"] = "1500"
    manifest, log = tmp_path / "manifest", tmp_path / "log"
    with running(f"sender --count 100000 --rate 200 --manifest {manifest}", environ, log) as process:
        wait_for(lambda: manifest.exists() and lines_of(manifest))
        with frozen(sandbox):
            [failure] = wait_for(lambda: events(log.read_text()))
        known = len(lines_of(manifest))
        wait_for(lambda: len(lines_of(manifest)) > known + 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 1
    assert failure["event"] == "delivery_failed"
    assert re.search(rf"acknowledged {len(lines_of(manifest)):,}, failed [1-9]", log.read_text())
    assert "records not acknowledged" in log.read_text()
    held = {(message.partition(), message.offset()) for message in records(environ)}
    assert {(line["partition"], line["offset"]) for line in lines_of(manifest)} <= held


def test_the_sender_waits_for_a_full_queue(environ: dict[str, str]) -> None:
    environ["ORDERS_KAFKA_QUEUE_BUFFERING_MAX_MESSAGES"] = "10"
    assert succeed("sender --count 1000", environ).endswith("acknowledged 1,000, failed 0\n")
    assert len(records(environ)) == 1000


def test_a_value_larger_than_the_queue_counts_as_failed(environ: dict[str, str]) -> None:
    environ["ORDERS_KAFKA_QUEUE_BUFFERING_MAX_KBYTES"] = "100"
    large = json.dumps({**json.loads(SAMPLE), "note": "x" * 200_000}).encode()
    done = run("sender --file -", environ, stdin=b"\n".join([SAMPLE.strip(), large, SAMPLE.strip()]))
    assert done.returncode == 1
    assert done.stdout.endswith("acknowledged 2, failed 1\n")
    assert "ORDERS_KAFKA_QUEUE_BUFFERING_MAX_KBYTES" in done.stderr.splitlines()[-1]


def test_the_rate_is_even(environ: dict[str, str]) -> None:
    began_s = time.monotonic()
    succeed("sender --count 300 --rate 100", environ)
    assert time.monotonic() - began_s >= 2.9
    times_ms = [message.timestamp()[1] for message in records(environ)]
    tenths = Counter((time_ms - min(times_ms)) // 500 for time_ms in times_ms)
    assert all(count <= 100 for count in tenths.values()), tenths


def test_sigterm_is_no_failure_and_loses_no_record(environ: dict[str, str], tmp_path: Path) -> None:
    manifest, log = tmp_path / "manifest", tmp_path / "log"
    with running(f"sender --count 100000 --rate 500 --manifest {manifest}", environ, log) as process:
        wait_for(lambda: manifest.exists() and len(manifest.read_bytes().splitlines()) > 200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    sent = len(lines_of(manifest))
    assert f"acknowledged {sent:,}, failed 0" in log.read_text()
    assert len(records(environ)) == sent


def test_a_second_ctrl_c_does_not_cut_the_report_short(
    environ: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    manifest, log = tmp_path / "manifest", tmp_path / "log"
    with running(f"sender --count 100000 --rate 100 --manifest {manifest}", environ, log) as process:
        wait_for(lambda: manifest.exists() and lines_of(manifest))
        with frozen(sandbox):
            began_s = time.monotonic()
            while process.poll() is None and time.monotonic() - began_s < 15:
                if time.monotonic() - began_s > 1:
                    process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            assert 5 < time.monotonic() - began_s < 12
    assert process.returncode == 1
    assert f"acknowledged {len(lines_of(manifest)):,}, failed" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_late_lines_are_sent_at_once_and_are_in_the_manifest(environ: dict[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    process = subprocess.Popen(
        [sys.executable, "-m", "services.sender", "--file", "-", "--any", "--manifest", str(manifest)],
        env=environ,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    try:
        for number in range(1, 4):
            process.stdin.write(SAMPLE.strip() + b"\n")
            process.stdin.flush()
            wait_for(functools.partial(has_lines, manifest, number))
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_a_terminal_sees_progress(environ: dict[str, str]) -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "services.sender", "--count", "300", "--rate", "200"]
    done = subprocess.run(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=side, check=True, timeout=60)
    os.close(side)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert shown.count("acknowledged") >= 3
    assert done.stdout.endswith(b"acknowledged 300, failed 0\n")


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_the_error_for_a_missing_topic_names_the_command_that_creates_it(environ: dict[str, str]) -> None:
    done = run("sender", {**environ, "ORDERS_TOPIC": "no-such-topic"})
    assert done.returncode == 2
    assert_one_line(done, "no-such-topic", "python -m services.admin topics")


def test_the_error_for_an_unknown_property_names_it_without_its_value(environ: dict[str, str]) -> None:
    done = run("sender", {**environ, "ORDERS_KAFKA_NO_SUCH_PROPERTY": "secret"})
    assert done.returncode == 2
    assert_one_line(done, "no.such.property")
    assert "secret" not in done.stderr


def test_a_manifest_that_cannot_be_written_stops_the_sender_after_the_acknowledgements(environ: dict[str, str]) -> None:
    done = run("sender --count 100000 --rate 2000 --manifest /dev/full", environ)
    assert done.returncode == 2
    assert done.stderr == "error: the manifest cannot be written: No space left on device\n"
    found = re.fullmatch(r"sent (\S+) in .*, acknowledged (\S+), failed 0\n", done.stdout)
    assert found is not None
    assert found[1] == found[2] == f"{len(records(environ)):,}"


@pytest.mark.parametrize("stderr", ["a full disk", "a pipe without a reader"])
def test_a_warning_that_cannot_be_written_is_lost_and_every_line_is_sent(
    environ: dict[str, str], tmp_path: Path, stderr: str
) -> None:
    if stderr == "a full disk":
        unwritable = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, unwritable = os.pipe()
        os.close(reading)
    file, manifest, out = tmp_path / "orders.jsonl", tmp_path / "manifest", tmp_path / "out"
    file.write_bytes((SAMPLE.strip() + b"\n") * 100 + b"{}\n" + (SAMPLE.strip() + b"\n") * 100)
    try:
        with out.open("wb") as stdout:
            process = start(
                ["sender", "--file", str(file), "--manifest", str(manifest)],
                environ,
                stdout=stdout.fileno(),
                stderr=unwritable,
            )
            assert process.wait(60) == 0
    finally:
        os.close(unwritable)
    assert out.read_text().endswith("acknowledged 201, failed 0\n")
    assert len(lines_of(manifest)) == len(records(environ)) == 201


def test_wait_reports_the_outcome_of_every_record(environ: dict[str, str], database: Database, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    with consuming(environ):
        out = succeed(f"sender --count 600 --bad-rate 0.1 --seed wait --wait --manifest {manifest}", environ)
    _, summary, *named, more = out.splitlines()
    with psycopg.connect(database.superuser_url) as connection:
        rejects = connection.execute(
            "SELECT partition, record_offset, code, faults -> 'first' -> 0 ->> 'path' FROM rejects"
        ).fetchall()
    codes = Counter(code for _, _, code, _ in rejects)
    by_code = ", ".join(f"{code} {number}" for code, number in sorted(codes.items()))
    handled = f"{600 - len(rejects)}"
    assert len(rejects) > 30
    assert summary == f"handled {handled}, rejected {len(rejects)} ({by_code}), waiting 0"
    topic = environ["ORDERS_TOPIC"]
    known = {f"rejected {topic}/{partition}/{offset}: {code} at {path}" for partition, offset, code, path in rejects}
    assert len(set(named) & known) == len(named) == 10
    assert more == f"and {len(rejects) - 10} more rejected records"


def test_wait_names_what_was_not_handled(environ: dict[str, str], tmp_path: Path) -> None:
    """Without a consumer; a signal ends the wait sooner than its limit."""

    def are_sent() -> bool:
        # The new topic may have no leader yet.
        with contextlib.suppress(KafkaException):
            return len(records(environ)) == 50
        return False

    with running("sender --count 50 --wait", environ, tmp_path / "log") as sender:
        wait_for(are_sent)
        time.sleep(1)
        assert sender.poll() is None
        sender.send_signal(signal.SIGTERM)
        assert sender.wait(10) == 1
    log = (tmp_path / "log").read_text()
    assert "handled 0, rejected 0, waiting 50\n" in log
    assert "error: 50 of 50 records not handled; a signal ended the wait\n" in log
