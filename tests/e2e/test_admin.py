"""The admin command: what it prints, what it changes, and when it asks for confirmation."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

import orderlib
from orderlib.testing import SAMPLE
from services.admin.rejects import SHOWN_BYTES
from tests.support import ROOT
from tests.support.databases import Database
from tests.support.programs import peak_bytes, run, running, succeed
from tests.support.waiting import wait_for


def rows(command: str, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the JSON rows of a command."""
    found: list[dict[str, Any]] = json.loads(succeed(f"admin {command} --json", environ))
    return found


def publish(environ: Mapping[str, str], *values: bytes, partition: int = 0, timestamp_ms: int = 0) -> None:
    """Send records to one partition."""
    settings = {"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], "message.max.bytes": 9_000_000}
    producer = Producer(settings)
    for value in values:
        producer.produce(environ["ORDERS_TOPIC"], value, partition=partition, timestamp=timestamp_ms)
    assert producer.flush(30) == 0


def run_on_a_terminal(command: str, environ: Mapping[str, str], typed: str) -> subprocess.CompletedProcess[str]:
    """Run a command on a terminal, with this line as its input."""
    controller, terminal = pty.openpty()
    try:
        os.write(controller, f"{typed}\n".encode())
        return run(f"admin {command}", environ, stdin=terminal)
    finally:
        os.close(controller)
        os.close(terminal)


def test_reset_moves_the_offsets_to_the_requested_position(environ: dict[str, str]) -> None:
    for minute in range(4):
        publish(environ, SAMPLE, timestamp_ms=1_700_000_000_000 + minute * 60_000)
    publish(environ, SAMPLE, partition=1, timestamp_ms=1_700_000_000_000)
    succeed("consumer --exit-at-end", environ)

    def moved(arguments: str) -> dict[int, int]:
        succeed(f"admin offsets reset {arguments} --execute --yes", environ)
        return {row["partition"]: row["next_offset"] for row in rows("offsets show", environ)}

    assert moved("--to-offset 1 --partition 0") == {0: 1, 1: 1, 2: 0}
    assert moved("--to-time 2023-11-14T22:15:00Z") == {0: 2, 1: 1, 2: 0}
    assert moved("--to-earliest --partition 0") == {0: 0, 1: 1, 2: 0}
    assert moved("--to-latest") == {0: 4, 1: 1, 2: 0}


def test_reset_without_execute_shows_the_change_and_makes_none(environ: dict[str, str]) -> None:
    publish(environ, SAMPLE, SAMPLE)
    succeed("consumer --exit-at-end", environ)
    done = run("admin offsets reset --to-earliest --partition 0", environ)
    names, values = (line.split() for line in done.stdout.splitlines())
    assert dict(zip(names, values, strict=True)) == {
        "partition": "0",
        "next_offset": "2",
        "new_next_offset": "0",
        "replayed": "2",
        "skipped": "0",
    }
    assert "--execute" in done.stderr
    assert rows("offsets show", environ)[0]["next_offset"] == 2


def test_a_rewind_warns_that_orders_of_several_sources_may_go_back_to_older_versions(environ: dict[str, str]) -> None:
    order = attrs.evolve(orderlib.decode_order(SAMPLE), locale="v1")
    several, python = attrs.evolve(order, order_uid="several"), attrs.evolve(order, order_uid="python")
    publish(environ, orderlib.encode_order(several), orderlib.encode_order(python))
    succeed("consumer --exit-at-end", environ)
    publish(environ, orderlib.encode_order(attrs.evolve(several, locale="v2")), partition=1)
    succeed("consumer --exit-at-end", environ)
    with orderlib.connect(environ["ORDERS_DATABASE_URL"]) as repository:
        repository.save(attrs.evolve(python, locale="v2"))

        def locales() -> set[str]:
            return {found.locale for found in repository.get_many(["several", "python"]).values()}

        def reset(options: str) -> list[str]:
            done = run(f"admin offsets reset --partition 0 {options}", environ)
            assert done.returncode == 0
            return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]

        warning = "warning: orders that were saved from Python or have records in several partitions may go back to "
        assert reset("--to-earliest") == reset("--to-earliest --execute --yes") == [f"{warning}older versions"]
        assert reset("--to-latest") == []
        assert locales() == {"v2"}
        succeed("consumer --exit-at-end", environ)
        assert locales() == {"v1"}


def test_reset_refuses_an_invalid_target(environ: dict[str, str]) -> None:
    publish(environ, SAMPLE, SAMPLE)
    succeed("consumer --exit-at-end", environ)
    for arguments, message in (
        ("--to-offset 3 --partition 0", "from 0 to 2"),
        ("--to-offset 0", "needs --partition"),
        ("--to-earliest --partition 77", "[77]"),
        ("--to-time yesterday", "such as 2026-01-31T12:00:00Z"),
        ("--to-time 2026-01-31T12:00:00", "offset, such as Z"),
    ):
        done = run(f"admin offsets reset {arguments} --execute --yes", environ)
        assert done.returncode == 2
        assert message in done.stderr
    assert rows("offsets show", environ)[0]["next_offset"] == 2


def test_reset_names_the_offsets_of_an_earlier_topic_of_the_same_name(
    environ: dict[str, str], database: Database
) -> None:
    publish(environ, SAMPLE)
    succeed("consumer --exit-at-end", environ)
    topic_id = rows("offsets show", environ)[0]["topic_id"]
    with psycopg.connect(database.superuser_url) as connection:
        connection.execute("UPDATE consumer_offsets SET topic_id = 'earlier'")
    for options in ("", "--partition 0"):
        done = run(f"admin offsets reset --to-earliest {options}", environ)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: no offsets of topic {environ['ORDERS_TOPIC']} with id {topic_id} are stored; those of id earlier "
            "belong to an earlier topic of that name\n"
        )


def test_on_a_terminal_only_yes_confirms(environ: dict[str, str]) -> None:
    publish(environ, SAMPLE)
    succeed("consumer --exit-at-end", environ)
    uid = json.loads(SAMPLE)["order_uid"]
    for typed in ("", "n", "what?"):
        refused = run_on_a_terminal(f"forget {uid}", environ, typed)
        assert refused.returncode == 1
        assert "permanently? [y/N]" in refused.stderr
        succeed(f"admin get {uid}", environ)
    assert "erased 1 order and 0 rejects;" in run_on_a_terminal(f"forget {uid}", environ, "y").stdout
    succeed("admin offsets reset --to-earliest --execute --yes", environ)
    succeed("consumer --exit-at-end", environ)
    assert run(f"admin get {uid}", environ).returncode == 1, "a rewind does not bring it back"
    forgotten = run_on_a_terminal(f"forget {uid} --json", environ, "y")
    assert json.loads(forgotten.stdout) == {"order_uids": 0, "orders": 0, "rejects": 0, "unchecked_rejects": 0}


def test_rejects_are_listed_redriven_and_purged_as_the_options_select(environ: dict[str, str]) -> None:
    publish(environ, b"no JSON", SAMPLE.replace(b'"USD"', b'"usd"'), b"nor this")
    succeed("consumer --exit-at-end", environ)
    topic = environ["ORDERS_TOPIC"]

    def positions(arguments: str) -> list[str]:
        return [row["position"] for row in rows(f"rejects list {arguments}", environ)]

    assert positions("--oldest") == [f"{topic}/0/{offset}" for offset in range(3)]
    assert positions("") == [f"{topic}/0/{offset}" for offset in (2, 1, 0)]
    assert positions("--code malformed_json") == [f"{topic}/0/2", f"{topic}/0/0"]
    assert positions("--limit 1") == [f"{topic}/0/2"]
    assert succeed("admin rejects list --limit 2 --code malformed_json", environ).endswith("\n2 of 2 rejects\n")
    assert succeed("admin rejects list --limit 1", environ).endswith("\n1 of 3 rejects\n")
    assert positions("--since 2100-01-01T00:00:00Z") == positions("--key nobody") == []
    assert len(positions("--since 2020-01-01T00:00:00Z")) == 3
    with psycopg.connect(environ["ORDERS_BOOTSTRAP_URL"]) as connection:
        connection.execute("UPDATE rejects SET key = convert_to('Ключ', 'UTF8') WHERE record_offset = 1")
    assert positions("--key Ключ") == [f"{topic}/0/1"]
    [one] = rows(f"rejects redrive {topic}/0/1", environ)
    assert (one["rejected"], sum(one.values())) == (1, 1)
    assert positions("--not-redriven") == [f"{topic}/0/2", f"{topic}/0/0"]
    assert positions("--open") == positions("")
    assert rows("rejects summary", environ) == [
        {"rejects": 2, "code": "malformed_json", "first_path": "$"},
        {"rejects": 1, "code": "invalid_order", "first_path": "$.payment.currency"},
    ]
    [others] = rows("rejects redrive --all", environ)
    assert sum(others.values()) == others["rejected"]
    missing = run(f"admin rejects show {topic}/0/9", environ)
    assert missing.returncode == 1
    assert f"no reject '{topic}/0/9'" in missing.stderr
    assert "order" not in missing.stderr.replace(topic, "")

    assert json.loads(succeed("admin rejects purge --older-than 1h --json", environ)) == {"rejects": 0}
    asked = run("admin rejects purge --older-than 0m", environ)
    assert (asked.returncode, len(positions(""))) == (1, 3)
    assert "add --yes" in asked.stderr
    assert json.loads(succeed("admin rejects purge --older-than 0m --yes --json", environ)) == {"rejects": 3}
    assert positions("") == []


def test_a_reject_without_an_order_uid_is_named_and_purged_by_its_position(environ: dict[str, str]) -> None:
    publish(environ, b"no JSON", b"nor this")
    succeed("consumer --exit-at-end", environ)
    first, second = (f"{environ['ORDERS_TOPIC']}/0/{offset}" for offset in range(2))

    def unchecked() -> list[str]:
        return [row["position"] for row in rows("rejects list --without-order-uid --oldest", environ)]

    assert "not checked: 2 rejects without an order_uid" in run("admin forget someone --yes", environ).stderr
    assert json.loads(succeed("admin forget someone --yes --json", environ))["unchecked_rejects"] == 2
    assert unchecked() == [first, second]
    asked = run(f"admin rejects purge {first}", environ)
    assert (asked.returncode, f"delete 1 reject at {first} permanently" in asked.stderr) == (1, True)
    assert unchecked() == [first, second]
    assert json.loads(succeed(f"admin rejects purge {first} --yes --json", environ)) == {"rejects": 1}
    assert unchecked() == [second]
    missing = run(f"admin rejects purge {first} --yes", environ)
    assert (missing.returncode, missing.stderr) == (1, f"error: no reject '{first}'\n")
    proof = run("admin reconcile --json", environ)
    [finding] = json.loads(proof.stdout)["findings"]
    assert (proof.returncode, finding["partition"], finding["offset"]) == (1, 0, 0)
    assert "but not stored as a reject" in finding["what"]
    succeed(f"admin rejects purge {second} --yes", environ)
    assert run("admin forget someone --yes", environ).stderr == ""


def test_state_says_what_became_of_an_order_uid(environ: dict[str, str], database: Database) -> None:
    topic, time = environ["ORDERS_TOPIC"], r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
    producer = Producer({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})

    def order(uid: str, sm_id: int = 1) -> bytes:
        return orderlib.encode_order(attrs.evolve(orderlib.decode_order(SAMPLE), order_uid=uid, sm_id=sm_id))

    for key, value in (
        *(("kept", value) for value in (order("kept"), b"[", b'{"order_uid": "kept"}')),
        *(("gone", value) for value in (order("gone"), None)),
        ("secret", order("secret")),
        ("many", b"["),
    ):
        producer.produce(topic, value, key, 0)
    assert producer.flush(30) == 0
    succeed("consumer --exit-at-end", {**environ, "ORDERS_TOMBSTONES": "erase", "ORDERS_BREAKER_FRACTION": "0"})
    succeed("admin rejects redrive --code invalid_order", environ)
    succeed("admin forget secret --yes", environ)
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute(
            "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, key, code, faults) SELECT "
            "topic_id, 1, n, topic, record_time, key, code, faults FROM rejects, generate_series(1, 100) n "
            "WHERE key = 'many'"
        )
    assert re.fullmatch(
        rf"stored: version 1, at {time}\n"
        r"2 rejects with this key:\n"
        rf"  {topic}/0/2  invalid_order, redriven: rejected\n"
        rf"  {topic}/0/1  malformed_json\n",
        succeed("admin state kept", environ),
    )
    assert re.fullmatch(rf"erased by the tombstone {topic}/0/4, at {time}\n", succeed("admin state gone", environ))
    forgotten = rf"forgotten at {time}: no later record stores it again\n"
    assert re.fullmatch(forgotten, succeed("admin state secret", environ))
    many = succeed("admin state many", environ).splitlines()
    assert (many[0], len(many), many[-1]) == ("101 rejects with this key:", 102, "  … and 1 more")
    unknown = run("admin state nobody", environ)
    assert (unknown.returncode, unknown.stdout) == (1, "nothing is known of this order_uid\n")


def test_a_purged_reject_that_a_redrive_has_solved_is_no_discrepancy(environ: dict[str, str]) -> None:
    publish(environ, SAMPLE)
    succeed("consumer --exit-at-end", {**environ, "ORDERS_MAX_RECORD_BYTES": "1000", "ORDERS_BREAKER_FRACTION": "0"})
    [redriven] = rows("rejects redrive --all", environ)
    assert redriven["stored"] == 1
    succeed(f"admin rejects purge {environ['ORDERS_TOPIC']}/0/0 --yes", environ)
    succeed("admin reconcile", environ)


def test_open_rejects_are_those_that_the_next_redrive_takes(environ: dict[str, str], database: Database) -> None:
    before, between, after = SAMPLE.split(b'"price":453')
    prices = ((b"-1", b"453"), (b"453", b"-1"))
    publish(environ, b"no JSON", *(b'%b"price":%b%b"price":%b%b' % (before, a, between, b, after) for a, b in prices))
    succeed("consumer --exit-at-end", environ)
    succeed("admin rejects redrive --all", environ)
    with psycopg.connect(database.superuser_url) as connection:
        connection.execute("UPDATE rejects SET redrive_outcome = 'superseded' WHERE record_offset = 0")
    assert rows("rejects list --not-redriven", environ) == []
    opened = [row["position"] for row in rows("rejects list --open --oldest", environ)]
    assert opened == [f"{environ['ORDERS_TOPIC']}/0/{offset}" for offset in (1, 2)]
    [redriven] = rows("rejects redrive --all", environ)
    assert sum(redriven.values()) == len(opened)
    summary = [{"rejects": 2, "code": "invalid_order", "first_path": "$.items[*].price"}]
    assert rows("rejects summary --open", environ) == summary
    solved = {"rejects": 1, "code": "malformed_json", "first_path": "$"}
    assert rows("rejects summary", environ) == [*summary, solved]


def add_reject(database: Database, topic: str, offset: int, value: str, headers: str = "NULL") -> None:
    """Store a reject; value and headers are SQL expressions."""
    with psycopg.connect(database.superuser_url) as connection:
        connection.execute(
            "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, value, headers, code, faults)"
            f" VALUES ('id', 0, {offset}, '{topic}', now(), {value}, {headers}, 'malformed_json',"
            """ '{"total": 1, "first": [{"path": "$", "expected": "x", "found": "y"}]}')"""
        )


@functools.cache
def peak_of_help() -> int:
    """Return the peak size of a command that reads nothing."""
    return peak_bytes("admin --help", os.environ, Path(os.devnull))


def test_show_prints_the_first_bytes_of_a_huge_reject_in_little_memory(
    environ: dict[str, str], database: Database, tmp_path: Path
) -> None:
    topic, whole_bytes = environ["ORDERS_TOPIC"], 50 * 2**20
    headers = """json_build_array(json_build_object('key', repeat('k', 30000000), 'value', NULL))"""
    add_reject(database, topic, 0, f"convert_to('x' || repeat('я', {whole_bytes // 2}), 'UTF8')", headers)
    small = peak_bytes("admin rejects list", environ, tmp_path / "list")
    peak = peak_bytes(f"admin rejects show {topic}/0/0", environ, tmp_path / "shown")
    shown = json.loads((tmp_path / "shown").read_text())
    assert shown["value"]["size_bytes"] == whole_bytes + 1
    assert shown["value"]["shown_bytes"] == SHOWN_BYTES
    assert set(shown["value"]["text"]) == {"x", "я"}
    assert shown["headers"]["size_bytes"] > 30_000_000
    assert peak - small < 150 * 2**20


def test_ctrl_c_during_a_redrive_prints_the_outcomes_until_then(environ: dict[str, str], database: Database) -> None:
    topic = environ["ORDERS_TOPIC"]
    for offset in range(1, 101):
        add_reject(database, topic, offset, "'['")
    add_reject(database, topic, 101, f"convert_to('{SAMPLE.decode()}', 'UTF8')")
    with orderlib.connect(database.writer_url) as repository:
        repository.save(attrs.evolve(orderlib.decode_order(SAMPLE), locale="older"))
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "services.admin", "rejects", "redrive", "--all", "--json"]
    try:
        with (
            psycopg.connect(database.superuser_url) as holder,
            psycopg.connect(database.superuser_url, autocommit=True) as observer,
        ):
            # The first transaction takes 100 rejects. The second one waits for this lock, in the middle of a pipeline.
            holder.execute(
                "UPDATE orders SET source_topic_id = 'id', source_partition = 0, source_offset = 0, source_time = now()"
            )
            holder.commit()
            holder.execute("SELECT FROM orders FOR UPDATE")
            with subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal) as process:
                waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                wait_for(lambda: observer.execute(waiting).fetchall())
                process.send_signal(signal.SIGINT)
                assert process.stdout is not None
                [outcomes] = json.loads(process.stdout.read())
        shown = os.read(controller, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(controller)
        os.close(terminal)
    assert process.returncode == 1
    assert {name: number for name, number in outcomes.items() if number} == {"rejected": 100}
    *progress, last, end = shown.split("\n")
    assert (last, end) == ("interrupted", "")
    assert progress == ["\r100 rejects redriven" * 2, "not complete: run it again to continue"]


def test_many_huge_rejects_are_redriven_in_little_memory(
    environ: dict[str, str], database: Database, tmp_path: Path
) -> None:
    topic = environ["ORDERS_TOPIC"]
    for offset in range(8):
        add_reject(database, topic, offset, "convert_to('\"' || repeat('x', 6000000), 'UTF8')")
    add_reject(database, topic, 8, "convert_to(repeat('x', 30000000), 'UTF8')")
    add_reject(database, topic, 9, f"convert_to('{SAMPLE.decode()}', 'UTF8')")
    small = peak_of_help()
    peak = peak_bytes("admin rejects redrive --all --json", environ, tmp_path / "redriven")
    [outcomes] = json.loads((tmp_path / "redriven").read_text())
    assert (outcomes["rejected"], outcomes["stored"]) == (9, 1)
    assert peak - small < 60 * 2**20


def test_backfill_stores_what_its_dry_run_counts_and_names_what_it_refuses(
    environ: dict[str, str], database: Database
) -> None:
    with orderlib.connect(database.writer_url) as repository:
        for uid in ("changed", "current", "invalid"):
            order = attrs.evolve(orderlib.decode_order(SAMPLE), order_uid=uid)
            repository.save(order, original=orderlib.encode_order(order)[:-1] + b',"later":1}')
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        # As if an earlier release had stored it, which did not know these fields.
        superuser.execute("UPDATE orders SET sm_id = 0, content_sha256 = sha256('') WHERE order_uid = 'changed'")
        superuser.execute("UPDATE order_originals SET value = '{}' WHERE order_uid = 'invalid'")
    counts = dict.fromkeys(orderlib.Outcome, 0) | {"originals": 3, "stored": 1, "duplicate": 1, "rejected": 1}
    refused = [{"order_uid": "invalid", "code": "invalid_order", "path": "$.order_uid"}]

    dry = run("admin backfill --dry-run --json", environ)
    assert (dry.returncode, dry.stderr) == (1, "")
    assert json.loads(dry.stdout) == {
        "dry_run": True,
        "complete": True,
        "last": "invalid",
        **counts,
        "rejected_originals": refused,
    }
    done = run("admin backfill", environ)
    assert (done.returncode, done.stderr) == (1, "")
    header, numbers, named = done.stdout.splitlines()
    assert dict(zip(header.split(), map(int, numbers.split()), strict=True)) == counts
    assert named.startswith("invalid: invalid_order: $.order_uid:")
    assert json.loads(succeed("admin get changed", environ))["sm_id"] == orderlib.decode_order(SAMPLE).sm_id
    assert json.loads(succeed("admin backfill --after=invalid --json", environ))["originals"] == 0


def test_reconcile_reads_large_records_in_little_memory(environ: dict[str, str], tmp_path: Path) -> None:
    small = peak_of_help()
    for _ in range(2):
        publish(environ, *[b"x" * 8_000_000] * 5)
    succeed("consumer --exit-at-end", environ)
    peak = peak_bytes("admin reconcile --json", environ, tmp_path / "proof")
    assert json.loads((tmp_path / "proof").read_text())["counts"]["rejects"] == 10
    assert peak - small < 80 * 2**20


def test_nothing_in_a_reject_reaches_the_terminal_as_a_control_character(environ: dict[str, str]) -> None:
    hostile = "\x1b]0;title\x07\x9b31m\x7f\u202e\u2066\u200b\u2028\ufeff\U000e0041é\n\t"
    producer = Producer({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    producer.produce(environ["ORDERS_TOPIC"], hostile.encode(), hostile.encode(), 0, headers={hostile: b"1"})
    assert producer.flush(30) == 0
    succeed("consumer --exit-at-end", environ)
    shown = succeed(f"admin rejects show {environ['ORDERS_TOPIC']}/0/0", environ)
    assert {char for char in shown if not char.isprintable()} == {"\n"}
    reject = json.loads(shown)
    assert reject["value"] == reject["key"] == {"text": hostile}
    assert reject["headers"][0]["key"] == hostile


def test_get_escapes_control_characters_on_a_terminal_only(environ: dict[str, str]) -> None:
    publish(environ, SAMPLE.replace(b"Test Testov", "\x9b31m\u202e".encode()))
    succeed("consumer --exit-at-end", environ)
    command = f"get {json.loads(SAMPLE)['order_uid']}"
    assert "\x9b31m\u202e" in succeed(f"admin {command}", environ)
    controller, terminal = pty.openpty()
    try:
        command_line = [sys.executable, "-m", "services.admin", *command.split()]
        subprocess.run(command_line, env=environ, cwd=ROOT, stdout=terminal, timeout=60, check=True)
        shown = os.read(controller, 65536).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert {char for char in shown if not char.isprintable()} <= {"\r", "\n"}
    assert json.loads(shown)["delivery"]["name"] == "\x9b31m\u202e"


def test_reconcile_with_a_manifest_names_the_ranges_that_it_did_not_read(
    environ: dict[str, str], tmp_path: Path
) -> None:
    succeed("sender --count 40", environ)
    manifest = tmp_path / "manifest"
    succeed(f"sender --count 40 --manifest {manifest}", environ)
    succeed("consumer --exit-at-end", environ)
    proof = json.loads(succeed(f"admin reconcile --manifest {manifest} --json", environ))
    counts = [proof["counts"][what] for what in ("records", "orders", "lines of the manifest")]
    assert (proof["holds"], counts) == (True, [40, 80, 40])
    assert sum(gap["next"] - gap["first"] for gap in proof["not_read"]) == 40
    assert "before the records of the manifest" in succeed(f"admin reconcile --manifest {manifest}", environ)
    # A sender that lost a broker may not know where its record is.
    first, *others = manifest.read_text().splitlines()
    manifest.write_text("\n".join([json.dumps({**json.loads(first), "offset": None}), *others]))
    out = succeed(f"admin reconcile --manifest {manifest}", environ)
    assert "not proved, 1: acknowledged, but the sender could not know its offset" in out
    of_another_topic = json.dumps({**json.loads(first), "topic": "another"})
    manifest.write_text("\n".join([of_another_topic, *others]))
    out = succeed(f"admin reconcile --manifest {manifest}", environ)
    assert "lines of the manifest: 39" in out
    assert "not proved, 1: lines of the manifest that are of other topics" in out
    manifest.write_text(of_another_topic)
    done = run(f"admin reconcile --manifest {manifest}", environ)
    assert (done.returncode, "none of its lines is of topic" in done.stderr) == (2, True)
    assert "not proved" not in succeed("admin reconcile", environ)


def test_topics_creates_the_topic_once_and_then_reports_it(environ: dict[str, str]) -> None:
    new = {**environ, "ORDERS_TOPIC": environ["ORDERS_TOPIC"] + "-new"}
    assert f"created topic {new['ORDERS_TOPIC']}: 2 partitions" in succeed("admin topics --partitions 2", new)
    assert "exists: 2 partitions" in succeed("admin topics --partitions 3", new)
    assert run("admin topics --partitions 0", new).returncode == 2


@pytest.mark.parametrize("program", ["admin topics", "admin lag", "consumer --exit-at-end", "sender --count 1"])
def test_an_invalid_topic_name_is_a_configuration_error(environ: dict[str, str], program: str) -> None:
    done = run(program, {**environ, "ORDERS_TOPIC": "no such name"})
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_set_group_renames_the_group_after_its_consumers_stopped(environ: dict[str, str], tmp_path: Path) -> None:
    succeed("sender --count 20", environ)
    renamed = {**environ, "ORDERS_CONSUMER_GROUP": "renamed"}
    with running("consumer", environ, tmp_path / "log"):
        wait_for(lambda: sum(row["lag"] for row in json.loads(succeed("admin lag --json", environ))) == 0)
        done = run("admin offsets set-group renamed --execute --yes", environ)
        assert (done.returncode, "stop them first" in done.stderr) == (2, True)
    done = run("consumer --exit-at-end", renamed)
    assert done.returncode == 2
    assert "belongs to consumer group 'order-consumer', not 'renamed'" in done.stderr

    def plan(options: str) -> object:
        return json.loads(succeed(f"admin offsets set-group renamed --json {options}", environ))

    assert plan("") == [{"group": "order-consumer", "new_group": "renamed"}]
    # Kafka may take the session timeout to notice that the consumer was killed.
    wait_for(lambda: run("admin offsets set-group renamed --execute --yes", environ).returncode == 0)
    assert plan("") == [{"group": "renamed", "new_group": "renamed"}]
    succeed("sender --count 20 --seed 2", environ)
    succeed("consumer --exit-at-end", renamed)
    rows = json.loads(succeed("admin offsets show --json", environ))
    assert {row["group"] for row in rows} == {"renamed"}
    assert sum(row["next_offset"] for row in rows) == 40
    succeed("admin reconcile", renamed)


def config_of(environ: Mapping[str, str], kind: ResourceType, name: str, key: str = "max.message.bytes") -> int:
    admin = AdminClient({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    resource = ConfigResource(kind, name)
    return int(admin.describe_configs([resource])[resource].result(30)[key].value)


def set_config(environ: Mapping[str, str], kind: ResourceType, name: str, key: str, value: int | None) -> None:
    admin = AdminClient({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    operation = AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET
    entry = ConfigEntry(key, None if value is None else str(value), incremental_operation=operation)
    resource = ConfigResource(kind, name, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result(30)
    if kind is ResourceType.TOPIC and value is not None:
        # The controller has it; the broker that is asked may not have it yet.
        wait_for(lambda: config_of(environ, kind, name, key) == value)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (1_000_000, 9_437_184, "max.message.bytes raised from 1,000,000 to 9,437,184"),
        (9_437_183, 9_437_184, "max.message.bytes raised from 9,437,183 to 9,437,184"),
        (9_437_184, 9_437_184, "max.message.bytes 9,437,184, unchanged"),
        (100_000_000, 100_000_000, "max.message.bytes 100,000,000, unchanged"),
    ],
)
def test_topics_only_raises_the_limit_of_a_topic(environ: dict[str, str], before: int, after: int, words: str) -> None:
    topic = environ["ORDERS_TOPIC"]
    set_config(environ, ResourceType.TOPIC, topic, "max.message.bytes", before)
    assert words in succeed("admin topics", environ)
    wait_for(lambda: config_of(environ, ResourceType.TOPIC, topic) == after)


def test_topics_does_not_lower_a_limit_that_is_inherited_from_the_brokers(environ: dict[str, str]) -> None:
    topic, new = environ["ORDERS_TOPIC"], environ["ORDERS_TOPIC"] + "-inheriting"
    set_config(environ, ResourceType.TOPIC, topic, "max.message.bytes", None)
    set_config(environ, ResourceType.BROKER, "1", "message.max.bytes", 20_000_000)
    try:
        wait_for(lambda: config_of(environ, ResourceType.TOPIC, topic) == 20_000_000)
        for name, what in ((topic, "exists: 3 partitions"), (new, f"created topic {new}: 1 partition")):
            printed = succeed("admin topics --partitions 1", {**environ, "ORDERS_TOPIC": name})
            assert f"{what}, max.message.bytes 20,000,000, unchanged" in printed
            assert config_of(environ, ResourceType.TOPIC, name) == 20_000_000
    finally:
        set_config(environ, ResourceType.BROKER, "1", "message.max.bytes", None)


@pytest.mark.parametrize(
    ("time", "offset"),
    [
        ("1969-12-31T23:59:59.999Z", 0),
        ("1969-12-31T23:59:59.998Z", 0),
        ("1969-12-31T23:59:59.9995Z", 0),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00+02:00", 0),
        ("0001-01-01T00:00:00+14:00", 0),
        ("2023-11-14T22:13:20Z", 1),
        ("2023-11-14T22:13:20.0001Z", 2),
        ("9999-12-31T23:59:59.999999-14:00", 2),
    ],
)
def test_reset_to_a_time_accepts_every_representable_time(environ: dict[str, str], time: str, offset: int) -> None:
    publish(environ, SAMPLE, timestamp_ms=1)
    publish(environ, SAMPLE, timestamp_ms=1_700_000_000_000)
    succeed("consumer --exit-at-end", environ)
    [moved] = rows(f"offsets reset --to-time {time} --partition 0", environ)
    assert moved["new_next_offset"] == offset


def test_unknown_fields_are_kept_named_and_proved(environ: dict[str, str]) -> None:
    secret = b'{"card": "4111"}'
    text = SAMPLE.strip().replace(b'"sm_id"', b'"gift wrap\\u001b": %b, "sm_id"' % secret)
    text = text.replace(b'"chrt_id"', b'"colour" : 1e400, "chrt_id"')
    publish(environ, text, SAMPLE.replace(b"b563feb7b2b84b6test", b"plain"))
    succeed("consumer --exit-at-end", environ)
    assert succeed("admin original b563feb7b2b84b6test", environ) == text.decode()
    missing = run("admin original plain", environ)
    assert (missing.returncode, missing.stdout, "no unknown fields" in missing.stderr) == (1, "", True)
    found = {row["path"]: row["orders"] for row in rows("drift", environ)}
    assert found == {'$["gift wrap\\u001b"]': 1, "$.items[*].colour": 1}
    shown = run("admin drift", environ)
    assert "4111" not in shown.stdout
    assert "\x1b" not in shown.stdout
    reconciled = json.loads(succeed("admin reconcile --json", environ))
    assert (reconciled["holds"], reconciled["not_proved"], reconciled["counts"]["originals"]) == (True, [], 1)
    succeed("admin forget b563feb7b2b84b6test --yes", environ)
    assert rows("drift", environ) == []
