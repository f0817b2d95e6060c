"""``docker compose up`` on a real engine: it works, each container has minimal privileges and recovers from a crash."""

from __future__ import annotations

import json

import pytest

import orderlib
from orderlib.testing import SAMPLE
from tests.compose.engine import docker
from tests.compose.system import PROGRAMS, RECOVERY_TIMEOUT_S, SERVICES, System
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(600)

ORDER = orderlib.decode_order(SAMPLE)


def send_sample(system: System) -> None:
    done = system.run("sender", "python", "-m", "services.sender", "--file", "-", stdin=SAMPLE.strip())
    assert done.returncode == 0, done.stderr


def stored_sample(system: System) -> orderlib.Order | None:
    status, body = system.get(f"/orders/{ORDER.order_uid}", system.token)
    return orderlib.decode_order(body) if status == 200 else None


def reconciled(system: System) -> bool:
    """Whether the lag is 0. If it is, ``reconcile`` must account for every record."""
    lag = system.run("admin", "lag", "--json")
    if lag.returncode or any(row["lag"] for row in json.loads(lag.stdout)):
        return False
    done = system.run("admin", "reconcile")
    assert done.returncode == 0, done.stdout
    return True


def test_every_sent_record_is_accounted_for(running: System) -> None:
    assert "acknowledged 1,000, failed 0" in running.compose("logs", "--no-log-prefix", "sender")
    assert wait_for(lambda: reconciled(running))


def test_a_sent_order_is_read_back_equal(running: System) -> None:
    send_sample(running)
    assert wait_for(lambda: stored_sample(running)) == ORDER


@pytest.mark.parametrize("token", [None, "development0token"])
def test_an_order_cannot_be_read_without_the_token_of_the_settings(running: System, token: str | None) -> None:
    assert running.get("/orders", token)[0] == 401


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
def test_kafka_accepts_records_in_every_compression(running: System, compression: str) -> None:
    option = f"--env=ORDERS_KAFKA_COMPRESSION_TYPE={compression}"
    done = running.run(option, "sender", "python", "-m", "services.sender", "--count", "100")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("service", [*PROGRAMS, "postgres", "kafka"])
def test_a_container_has_no_unneeded_privileges(running: System, service: str) -> None:
    found = running.inspect(service)
    host = found["HostConfig"]
    assert found["Config"]["User"] not in {"", "0", "root", "0:0"}
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert 0 < host["Memory"] <= 1024**3
    assert host["PidsLimit"] > 0
    published = [binding for bindings in (host["PortBindings"] or {}).values() for binding in bindings]
    assert {binding["HostIp"] for binding in published} <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("service", "roles"),
    [
        ("bootstrap", {"POSTGRES", "MIGRATOR", "WRITER", "READER"}),
        ("migrate", {"MIGRATOR"}),
        ("topics", set()),
        ("sender", set()),
        ("consumer", {"WRITER"}),
        ("api", {"READER"}),
        ("kafka", set()),
    ],
)
def test_a_container_has_only_the_passwords_that_it_needs(running: System, service: str, roles: set[str]) -> None:
    environ = "\n".join(running.inspect(service)["Config"]["Env"])
    every_role = {"POSTGRES", "MIGRATOR", "WRITER", "READER"}
    assert {role for role in every_role if running.settings[f"{role}_PASSWORD"] in environ} == roles


def test_the_image_contains_only_the_programs_and_no_settings(running: System) -> None:
    assert running.state("api")["Status"] == "running"
    assert sorted(docker("run", "--rm", "orderlib", "ls", "-A", "/opt/app").split()) == ["orderlib", "services"]
    environ = docker("run", "--rm", "orderlib", "env")
    assert "ORDERS_" not in environ
    assert "PASSWORD" not in environ


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_restarts_and_no_record_is_lost(running: System, service: str) -> None:
    restarts = running.inspect(service)["RestartCount"]
    with running.running("sender", "python", "-m", "services.sender", "--count", "3000", "--rate", "200"):
        stored = running.run("admin", "lag", "--json").stdout
        wait_for(lambda: running.run("admin", "lag", "--json").stdout != stored)
        running.kill(service)
        wait_for(lambda: running.inspect(service)["RestartCount"] > restarts)
        wait_for(lambda: all(map(running.is_healthy, SERVICES)), RECOVERY_TIMEOUT_S)
    assert wait_for(lambda: reconciled(running), RECOVERY_TIMEOUT_S)


def test_every_order_is_still_stored_after_a_stop_and_a_start(running: System) -> None:
    send_sample(running)
    wait_for(lambda: stored_sample(running))
    running.compose("stop")
    assert {service: running.state(service)["ExitCode"] for service in ("postgres", "consumer", "api")} == {
        "postgres": 0,
        "consumer": 0,
        "api": 0,
    }
    assert running.state("kafka")["ExitCode"] == 143
    running.compose("up", "--detach")
    running.wait_until_up()
    assert stored_sample(running) == ORDER
    assert wait_for(lambda: reconciled(running))
