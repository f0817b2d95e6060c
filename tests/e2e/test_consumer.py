"""The consumer without faults: its start, log, metrics, stored data and exit."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from orderlib.testing import SAMPLE
from sandbox import Sandbox
from tests.support.accounting import assert_all_accounted_for, next_offsets, stored_rejects, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.locking import TABLE, locked
from tests.support.programs import run, succeed
from tests.support.sending import Sender, order, uids
from tests.support.waiting import wait_for


@pytest.fixture
def sender(sandbox: Sandbox, topic: str) -> Sender:
    return Sender(sandbox.kafka.bootstrap_servers, topic)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ORDERS_DATABASE_URL": "no url"}, "database URL"),
        ({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": ""}, "ORDERS_KAFKA_BOOTSTRAP_SERVERS is not set"),
        ({"ORDERS_MAX_RECORD_BYTES": "many"}, "ORDERS_MAX_RECORD_BYTES"),
        ({"ORDERS_BREAKER_FRACTION": "2"}, "ORDERS_BREAKER_FRACTION"),
    ],
)
def test_a_wrong_setting_ends_it_with_2_and_one_line_that_names_it(
    environ: dict[str, str], changed: dict[str, str], named: str
) -> None:
    done = run("consumer", {**environ, **changed})
    assert done.returncode == 2
    [error] = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert error.startswith("error: ")
    assert named in error


def test_a_role_that_may_not_write_ends_it_with_2_and_one_line(environ: dict[str, str], database: Database) -> None:
    done = run("consumer", {**environ, "ORDERS_DATABASE_URL": database.reader_url})
    assert done.returncode == 2
    [error] = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert error.startswith("error: ")
    assert "orders_reader" in error


def test_an_address_in_use_ends_it_with_2_and_one_line(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("consumer", {**environ, "ORDERS_METRICS_BIND": f"127.0.0.1:{taken.getsockname()[1]}"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ORDERS_METRICS_BIND")
    assert len(done.stderr.splitlines()) == 1


def test_a_database_refuses_a_second_consumer_group(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(["order"])
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    stood = next_offsets(database)
    done = run("consumer", {**environ, "ORDERS_CONSUMER_GROUP": "another"})
    assert done.returncode == 2
    assert "'order-consumer', not 'another'" in done.stderr
    assert next_offsets(database) == stood


def test_exit_at_end_stops_it_once_everything_is_stored(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    for version in (1, 2, 3):
        sender.send_orders(uids("order", 2000), version)
    sender.send_good(SAMPLE, key=b"anything")
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=30) == 0
    assert_all_accounted_for(sender.manifest, database, environ)


def test_exit_at_end_stops_it_on_an_empty_topic(environ: dict[str, str]) -> None:
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=15) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_0(
    number: signal.Signals, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 100))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        consumer.process.send_signal(number)
        assert consumer.status(within_s=10) == 0
        assert [event["event"] for event in consumer.events()][-3:] == ["stopping", "summary_of_all", "exited"]
        assert "Traceback" not in consumer.stderr.read_text()


def test_a_privilege_that_is_revoked_stops_it_with_1_and_a_reason(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 100))
    with consuming(environ) as consumer, psycopg.connect(database.superuser_url, autocommit=True) as administrator:
        wait_until_handled(sender.manifest, database)
        # There are more records than one batch takes, so it fetches while its transaction fails.
        with locked(database, TABLE):
            sender.send_orders(uids("order", 4_000), version=2)
            administrator.execute("REVOKE INSERT ON items FROM orders_writer")
        try:
            assert consumer.status(within_s=20) == 1
        finally:
            administrator.execute("GRANT INSERT ON items TO orders_writer")
        stopped, exited = consumer.events()[-2:]
        assert (stopped["event"], exited["event"]) == ("stopped", "exited")
        assert "permission denied" in stopped["reason"]
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=30) == 0
        summary, *end = consumer.events()[-3:]
        assert [event["event"] for event in end] == ["end_reached", "exited"]
        assert summary["event"] == "summary_of_all"
        assert 0 < summary["records"] == summary["stored"] <= 4_000
        assert (summary["lag"], summary["records_per_second"] > 0, summary["seconds"] > 0) == (0, True, True)
    assert_all_accounted_for(sender.manifest, database, environ)


@pytest.mark.parametrize("kafka_went_back", [False, True])
def test_offsets_that_kafka_does_not_have_are_named_by_lag_and_consumer_with_the_command_that_helps(
    environ: dict[str, str], database: Database, sender: Sender, *, kafka_went_back: bool
) -> None:
    sender.send_orders(uids("order", 30))
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=30) == 0
    [partition, *_] = stood = next_offsets(database)
    stored = stood[partition]
    if kafka_went_back:
        with psycopg.connect(database.superuser_url) as superuser:
            superuser.execute(
                "UPDATE consumer_offsets SET next_offset = next_offset + 1000 WHERE partition = %s", [partition]
            )
        problem = f"the stored next_offset {stored + 1000} is after Kafka's log end {stored}: Kafka has lost records"
        reason = f"next offset {stored + 1000}, Kafka's earliest 0, its log end {stored}): Kafka has lost records"
    else:
        while (end := max((r.offset + 1 for r in sender.manifest if r.partition == partition), default=0)) < stored + 9:
            sender.send_orders(uids("lost", 30))
        admin = AdminClient({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
        for deleted in admin.delete_records([TopicPartition(sender.topic, partition, stored + 7)]).values():
            deleted.result(30)
        problem = f"up to 7 records before Kafka's earliest offset {stored + 7} were never handled and are gone"
        reason = f"next offset {stored}, Kafka's earliest {stored + 7}, its log end {end}): records were lost"
    shown = run("admin lag", environ)
    assert (shown.returncode, shown.stderr) == (0, f"warning: {sender.topic}[{partition}]: {problem}\n")
    with consuming(environ) as consumer:
        assert consumer.status(within_s=30) == 1
        [stopped] = consumer.events("stopped")
    assert f"{sender.topic}[{partition}]" in stopped["reason"]
    assert reason in stopped["reason"]
    [command] = re.findall("`python -m services.(admin offsets reset [^`]+)`", stopped["reason"])
    succeed(f"{command} --yes", environ)
    assert run("admin lag", environ).stderr == ""
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=30) == 0


def test_silent_clients_of_its_health_server_delay_neither_probes_nor_its_exit(environ: dict[str, str]) -> None:
    with consuming(environ) as consumer:
        host, _, port = consumer.events("started")[0]["metrics"].rpartition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(20)]
        began_s = time.monotonic()
        assert consumer.live
        assert time.monotonic() - began_s < 2
        assert consumer.stop() == 0
        assert time.monotonic() - began_s < 5
        for connection in silent:
            connection.close()


def test_records_without_a_key_or_in_another_partition_than_their_key_are_stored(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    for number, partition in enumerate([0, 1, 2, 1, 0]):
        sender.send_good(order(f"unkeyed-{number}"), key=None, partition=partition)
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert_all_accounted_for(sender.manifest, database, environ)


def test_a_reject_has_its_reasons_and_no_value_in_log_and_faults(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    secret = "Secret-Street-7"
    content = json.loads(SAMPLE)
    content["delivery"]["address"] = secret
    content["payment"]["amount"] = -1
    del content["locale"]
    sender.send_bad(json.dumps(content).encode(), headers=[("trace", secret.encode())])
    sender.send_bad(f'{{"address": "{secret}'.encode())
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
        log = consumer.stderr.read_text()
        rejected = consumer.events("rejected")
    assert secret not in log
    assert {event["code"] for event in rejected} == {"invalid_order", "malformed_json"}
    assert {event["partition"] for event in rejected} == {record.partition for record in sender.manifest}
    with psycopg.connect(database.superuser_url) as connection:
        faults: dict[str, Any] = dict(connection.execute("SELECT code, faults FROM rejects").fetchall())
    assert secret not in str(faults)
    assert {fault["path"] for fault in faults["invalid_order"]["first"]} == {"$.locale", "$.payment.amount"}
    assert faults["invalid_order"]["total"] == 2
    assert len(stored_rejects(database)) == 2


def test_it_counts_the_outcome_of_each_record(environ: dict[str, str], database: Database, sender: Sender) -> None:
    sender.send_orders(uids("order", 100))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        sender.send_orders(uids("order", 40))
        sender.send_orders(uids("order", 10), version=2)
        sender.send_bad(b"{")
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: consumer.metric("orders_batch_records_sum") == 151, 20)
        kinds = ("stored", "duplicate", "superseded", "rejected")
        counts = {kind: consumer.metric(f'orders_records_total{{outcome="{kind}"}}') for kind in kinds}
        assert sum(counts.values()) == 151
        assert counts["rejected"] == consumer.metric('orders_rejects_total{code="malformed_json"}') == 1
        assert consumer.metric("orders_end_to_end_seconds_count") == 151
        assert consumer.metric('orders_batch_seconds_count{step="commit"}') >= 2
        wait_for(lambda: consumer.ready, 20)
        assert consumer.get("/nothing")[0] == 404
        assert consumer.stop() == 0


def test_its_lag_is_counted_for_each_partition(environ: dict[str, str], database: Database, sender: Sender) -> None:
    sender.send_orders(uids("order", 60))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        lags = [f'orders_lag_records{{partition="{partition}"}}' for partition in range(3)]
        wait_for(lambda: all(f"{lag} 0.0" in consumer.get("/metrics")[1] for lag in lags), 15)
        with psycopg.connect(database.superuser_url) as stranger:
            stranger.execute("LOCK TABLE orders")
            sender.send_orders(uids("order", 60), version=2)
            wait_for(lambda: sum(map(consumer.metric, lags)) == 60, 15)
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: sum(map(consumer.metric, lags)) == 0, 15)
        assert consumer.stop() == 0


def test_consumer_and_lag_advise_once_the_indexes_have_outgrown_shared_buffers(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 1))
    before = run("consumer --exit-at-end", environ), run("admin lag", environ)
    assert all(done.returncode == 0 and "shared_buffers" not in done.stderr for done in before)
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        # VACUUM counts the pages. 100,000 of 8 KiB are more than the default of 128 MB.
        superuser.execute("UPDATE pg_class SET relpages = 100000 WHERE relname = 'orders_newest'")
    sender.send_orders(uids("another", 1))
    after = run("consumer --exit-at-end", environ), run("admin lag", environ)
    for done in after:
        assert done.returncode == 0
        [line] = [line for line in done.stderr.splitlines() if "shared_buffers" in line]
        # Autovacuum may count the pages of the other indexes meanwhile.
        assert re.search(r"78\d MB, more than PostgreSQL's shared_buffers \(128MB\)", line)


def test_a_flood_of_slow_connections_and_a_lost_session_delay_neither_health_nor_orders(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 30))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with consuming(environ) as consumer, ExitStack() as stack:
        wait_until_handled(sender.manifest, database)
        psutil.Process(consumer.process.pid).rlimit(resource.RLIMIT_NOFILE, (1024, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        host, _, port = consumer.events("started")[0]["metrics"].rpartition(":")
        for _ in range(1010):
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            with suppress(OSError):
                client.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        # Each connection has a thread. The oldest are closed at once, long before their time is over.
        wait_for(lambda: psutil.Process(consumer.process.pid).num_threads() < 100, 2)
        with psycopg.connect(database.superuser_url) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'orderlib-consumer' AND datname = current_database()"
            )
        sender.send_orders(uids("order", 30), version=2)

        def is_soon_live() -> bool:
            began_s = time.monotonic()
            return consumer.live and time.monotonic() - began_s < 1

        assert any(is_soon_live() for _ in range(3))
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: consumer.ready, 10)
        assert consumer.stop() == 0


def test_a_member_without_partitions_is_ready(environ: dict[str, str], make_topic: Callable[..., str]) -> None:
    environ = {**environ, "ORDERS_TOPIC": make_topic(1)}
    with consuming(environ) as owner, consuming(environ) as spare:
        wait_for(lambda: any(each.events("partitions_assigned") for each in (owner, spare)), 10)
        wait_for(lambda: owner.ready and spare.ready, 10)
        assert sum(len(consumer.events("partitions_assigned")) for consumer in (owner, spare)) == 1
        assert owner.stop() == spare.stop() == 0


def test_too_many_rejects_in_a_row_stop_it_with_the_batch_rolled_back(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 10))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        stood = next_offsets(database)
        for number in range(1200):
            sender.produce_bad(f"not an order {number}".encode())
        sender.flush()
        assert consumer.status(within_s=20) == 1
        assert "were rejected" in consumer.events("stopped")[0]["reason"]
    handled = sum(next_offsets(database).values()) - sum(stood.values())
    assert len(stored_rejects(database)) == handled < 1000
    with consuming({**environ, "ORDERS_BREAKER_FRACTION": "0"}, "--exit-at-end") as stubborn:
        assert stubborn.status(within_s=20) == 0
    assert len(stored_rejects(database)) == 1200


def test_a_breaker_tripped_by_the_database_names_the_sqlstate(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with psycopg.connect(database.superuser_url) as connection:
        connection.execute("ALTER TABLE orders ADD CONSTRAINT impossible CHECK (sm_id < 0)")
    sender.send_orders(uids("order", 1100))
    with consuming(environ) as consumer:
        assert consumer.status(within_s=40) == 1
        reason = consumer.events("stopped")[0]["reason"]
    assert "SQLSTATE 23514" in reason
    assert "order-" not in reason


def test_the_settings_that_the_breaker_names_are_enough(environ: dict[str, str], database: Database) -> None:
    lines = b"\n".join([b"{}"] * 2_500 + [SAMPLE])
    succeed("sender --file - --any", environ, stdin=lines)
    ended = [run("consumer --exit-at-end", environ) for _ in range(2)]
    assert [done.returncode for done in ended] == [1, 1]
    [(name, value, option)] = {
        found for done in ended for found in re.findall(r"with (ORDERS_\w+)=(\S+) and (--[\w-]+)", done.stderr)
    }
    succeed(f"consumer {option}", {**environ, name: value})
    assert json.loads(succeed("admin get b563feb7b2b84b6test", environ))["order_uid"] == "b563feb7b2b84b6test"
    assert run("consumer --exit-at-end", environ).returncode == 0
    with psycopg.connect(database.superuser_url) as connection:
        assert connection.execute("SELECT count(*) FROM rejects").fetchone() == (2_500,)
