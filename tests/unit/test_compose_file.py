"""``docker-compose.yml`` agrees with the other files. ``make test-compose`` runs it on a real engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from services.settings import API_METRICS_BIND, CONSUMER_METRICS_BIND, DEFAULTS

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def test_env_example_lists_every_variable_with_its_default() -> None:
    used = re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE)
    example = re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert len(example) == len(dict(example))
    assert set(used) == set(example)
    assert not re.search(r"\$\{\w+\}", COMPOSE), "a setting without a default"


def test_env_example_has_the_defaults_of_the_programs() -> None:
    """Only the tokens differ: the programs have no default for them."""
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    expected = {
        "API_PORT": DEFAULTS["ORDERS_API_BIND"].rpartition(":")[2],
        "CONSUMER_METRICS_PORT": CONSUMER_METRICS_BIND.rpartition(":")[2],
        "API_METRICS_PORT": API_METRICS_BIND.rpartition(":")[2],
        **{name: DEFAULTS[name] for name in example if DEFAULTS.get(name)},
    }
    assert "ORDERS_API_KEEPALIVE_S" in expected
    assert {name: example[name] for name in expected} == expected


def test_kafka_has_the_version_of_the_sandbox() -> None:
    [image] = re.findall(r"image: apache/kafka:(\S+)", COMPOSE)
    [jar] = re.findall(r"org\.apache\.kafka:kafka_2\.13:(\S+)", (ROOT / "sandbox" / "jars.lock").read_text())
    assert image == jar


def test_every_setting_of_a_program_exists() -> None:
    given = set(re.findall(r"^ +(ORDERS_\w+):", COMPOSE, re.MULTILINE))
    assert given <= DEFAULTS.keys()


def test_compose_accepts_the_file() -> None:
    compose = ["docker", "compose", "--file", str(ROOT / "docker-compose.yml")]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose on this machine")
    done = subprocess.run([*compose, "config", "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
