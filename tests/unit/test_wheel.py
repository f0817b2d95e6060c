"""``pip install .`` installs only the library: a test builds the wheel and imports it in a clean environment."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.programs import run as run_program
from tests.support.wheel import PIP, Environment, build_wheel, make_environment, run

ROOT = Path(__file__).parents[2]

#: The modules that programs, sandbox and tests need, and a user of the library does not.
NOT_OF_THE_LIBRARY = (
    *("confluent_kafka", "falcon", "gunicorn", "jinja2", "prometheus_client", "structlog", "hypothesis", "pytest"),
    *("services", "sandbox", "tests", "bench", "docs"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(wheel, tmp_path_factory.mktemp("environment"))


def test_the_wheel_contains_exactly_the_files_of_the_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "orderlib").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {
        "orderlib/py.typed",
        "orderlib/testing/sample.json",
        "orderlib/postgres/migrations/0001_orders.sql",
    } <= packed


def test_the_library_works_with_its_declared_dependencies_only(environment: Environment) -> None:
    run(*PIP, "--python", environment.python, "check")
    output = environment.run(
        """
import orderlib, orderlib.testing
from orderlib.postgres.schema import LATEST_MIGRATION
order = orderlib.decode_order(orderlib.testing.SAMPLE)
print(orderlib.__file__, order.order_uid, LATEST_MIGRATION >= 2)
"""
    )
    path, order_uid, has_migrations = output.split()
    assert Path(path).is_relative_to(environment.site_packages)
    assert (order_uid, has_migrations) == ("b563feb7b2b84b6test", "True")


def test_the_wheel_does_not_install_what_only_programs_need(environment: Environment) -> None:
    assert environment.can_import("msgspec")
    assert [module for module in NOT_OF_THE_LIBRARY if environment.can_import(module)] == []


def test_the_wheel_has_no_extra_for_a_program_that_it_does_not_contain(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        [metadata] = [opened.read(name).decode() for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
    assert re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE) == ["testing"]


def test_the_group_of_the_programs_has_exactly_what_they_import() -> None:
    """They run from a checkout or an image; see the Dockerfile."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    declared = {Requirement(line).name.replace("-", "_") for line in groups["services"]}
    imported = {name for source in (ROOT / "services").rglob("*.py") for name in imported_by(source)}
    assert imported & set(NOT_OF_THE_LIBRARY) - {"services"} == declared


@pytest.mark.parametrize(
    ("arguments", "environ", "status", "output"),
    [
        (["--help"], {}, 0, r"usage: python -m orderlib .*bootstrap.*migrate.*"),
        (["migrate", "--help"], {}, 0, r"usage: python -m orderlib migrate .*ORDERS_MIGRATOR_URL.*"),
        ([], {}, 2, r"usage: .*"),
        (["migrate"], {}, 2, r"error: ORDERS_MIGRATOR_URL is not set\n"),
        (
            ["migrate"],
            {"ORDERS_MIGRATOR_URL": "mysql://"},
            2,
            r"error: ORDERS_MIGRATOR_URL: the database URL is not .*\n",
        ),
        (["bootstrap"], {}, 2, r"error: ORDERS_MIGRATOR_URL is not set\n"),
    ],
)
def test_the_commands_name_what_is_wrong_in_one_line(
    arguments: list[str], environ: dict[str, str], status: int, output: str
) -> None:
    done = run_program(" ".join(["orderlib", *arguments]), environ)
    assert done.returncode == status, done.stderr
    assert re.fullmatch(output, done.stdout + done.stderr, re.DOTALL), done
    assert status == 0 or not arguments or done.stderr.count("\n") == 1


def test_the_tables_are_created_from_the_wheel_alone(environment: Environment) -> None:
    """Here up to the connection; tests/integration/test_set_up.py has what follows."""
    done = subprocess.run(
        [environment.python, "-W", "error", "-m", "orderlib", "migrate"],
        cwd="/",
        env={"ORDERS_MIGRATOR_URL": "postgresql://127.0.0.1:1/orders"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: .*127\.0\.0\.1.*\n", done.stderr), done


def imported_by(source: Path) -> set[str]:
    """The modules that a file imports, and the packages they are in."""
    names = re.findall(r"^ *(?:from|import) ([\w.]+)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return {*names, *(name.partition(".")[0] for name in names)}
