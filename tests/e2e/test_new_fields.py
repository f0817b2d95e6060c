"""A new field takes one line on a model and one migration. The release that has it is a copy of the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sandbox import Sandbox
from tests.support import SHARED_SANDBOX
from tests.support.project_copy import copy_project, diff_in_contributing

#: A run from Kafka to the page, the round trips and the repository contract.
_SUITE = (
    "tests/new_fields",
    "tests/integration/test_contract.py",
    "tests/integration/test_postgres_repository.py::TestPostgresOrderRepository",
    "-knot very_large and not threads and not at_random",
)
_LONG_SUITE = (
    "tests/unit/test_codecs.py",
    "tests/unit/test_contract.py",
    "tests/unit/test_rows.py",
    "tests/unit/test_testing.py",
    "tests/unit/test_memory_repository.py",
    "tests/integration/test_contract.py",
    "tests/integration/test_postgres_repository.py",
)


@pytest.fixture(scope="module")
def next_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the new fields of CONTRIBUTING.md."""
    return copy_project(tmp_path_factory.mktemp("next_release"), diff_in_contributing())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("suite", [_SUITE, pytest.param(_LONG_SUITE, marks=pytest.mark.faults)], ids=["short", "long"])
def test_the_diff_of_contributing_adds_fields_everywhere(
    next_release: Path, sandbox: Sandbox, suite: Sequence[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suite],
        cwd=next_release,
        env={**os.environ, SHARED_SANDBOX: json.dumps(dict(sandbox.environ)), "PYTHONPATH": str(next_release)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
