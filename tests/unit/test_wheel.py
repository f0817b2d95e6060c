"""``pip install .`` installs only the library: a test builds the wheel and imports it in a clean environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

#: The modules that programs, sandbox and tests need, and a user of the library does not.
NOT_OF_THE_LIBRARY = (
    *("confluent_kafka", "falcon", "gunicorn", "jinja2", "prometheus_client", "structlog", "hypothesis", "pytest"),
    *("services", "sandbox", "tests", "bench", "docs"),
)


def run(*command: str | Path) -> str:
    """Run a command, which must succeed, and return its stdout."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel. Building it needs no package index, because the development group contains the build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, ROOT)
    [built] = folder.iterdir()
    return built


@attrs.frozen
class Environment:
    """A virtual environment with the wheel and its dependencies only, without pip."""

    python: Path
    site_packages: Path

    def run(self, code: str) -> str:
        """Run a program in the environment, outside this checkout, and return its stdout."""
        return run(self.python, "-I", "-W", "error", "-c", f"import os; os.chdir('/')\n{code}")

    def can_import(self, module: str) -> bool:
        return self.run(f"import importlib.util as u; print(u.find_spec({module!r}) is not None)") == "True\n"


def dependencies_of(package: Distribution, extras: set[str]) -> Iterator[Distribution]:
    """Yield the installed distributions that a package with these extras needs, directly or indirectly."""
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
            found = distribution(requirement.name)
            yield found
            yield from dependencies_of(found, requirement.extras)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment made without a package index: the dependencies are links to the installed ones."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    created = Environment(
        python=folder / "bin" / "python",
        site_packages=folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages",
    )
    run(*PIP, "--python", created.python, "install", "--no-index", "--no-deps", wheel)
    [installed] = created.site_packages.glob("orderlib-*.dist-info")
    for package in dependencies_of(PathDistribution(installed), set()):
        for file in package.files or ():
            link = created.site_packages / file.parts[0]
            if ".." not in file.parts and not link.exists():
                link.symlink_to(Path(str(package.locate_file(file.parts[0]))))
    return created


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
from orderlib.postgres.migrate import LATEST_MIGRATION
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


def test_the_extra_of_each_program_declares_its_imports(wheel: Path) -> None:
    """The programs themselves run from a checkout or an image; see the Dockerfile."""
    with zipfile.ZipFile(wheel) as opened:
        [metadata] = [opened.read(name).decode() for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
    extras = re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE)
    declared: dict[str, set[str]] = {extra: set() for extra in extras}
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
        requirement = Requirement(line)
        for extra, names in declared.items():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                names.add(requirement.name.replace("-", "_"))
    written = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert declared.keys() == written.keys()
    shared = {f"services.{path.stem}": imported_by(path) for path in (ROOT / "services").glob("*.py")}
    for program in ("consumer", "api", "sender", "admin"):
        sources = list((ROOT / "services" / program).rglob("*.py"))
        imported = {name for source in sources for name in imported_by(source)}
        imported |= {name for module in sorted(shared.keys() & imported) for name in shared[module]}
        assert imported & set(NOT_OF_THE_LIBRARY) - {"services"} == declared[program], program


def imported_by(source: Path) -> set[str]:
    """The modules that a file imports, and the packages they are in."""
    names = re.findall(r"^ *(?:from|import) ([\w.]+)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return {*names, *(name.partition(".")[0] for name in names)}
