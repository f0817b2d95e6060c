"""What must agree with ``docker-compose.yml``, and with whom. ``make test-compose`` runs it on a real engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def test_the_example_of_settings_names_them_all_with_their_defaults() -> None:
    used = re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE)
    example = re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert len(example) == len(dict(example))
    assert set(used) == set(example)
    assert not re.search(r"\$\{\w+\}", COMPOSE), "a setting without a default"


def test_kafka_is_of_the_version_that_the_sandbox_runs() -> None:
    [image] = re.findall(r"image: apache/kafka:(\S+)", COMPOSE)
    [jar] = re.findall(r"org\.apache\.kafka:kafka_2\.13:(\S+)", (ROOT / "sandbox" / "jars.lock").read_text())
    assert image == jar


def test_every_setting_given_to_a_program_is_one_that_it_reads() -> None:
    given = set(re.findall(r"^ +(ORDERS_\w+):", COMPOSE, re.MULTILINE))
    known = set(re.findall(r"ORDERS_\w+", (ROOT / "services" / "settings.py").read_text()))
    known |= {"ORDERS_BOOTSTRAP_URL", "ORDERS_MIGRATOR_URL"}  # named where the admin's commands ask for them
    assert given <= known


def test_compose_takes_the_file() -> None:
    compose = ["docker", "compose", "--file", str(ROOT / "docker-compose.yml")]
    if not shutil.which("docker") or subprocess.run([*compose, "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose on this machine")
    done = subprocess.run([*compose, "config", "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
