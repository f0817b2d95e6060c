"""The wheel, and clean environments with it. Neither needs a package index."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import attrs
from packaging.requirements import Requirement

from tests.support import ROOT

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str | Path, environ: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a command, which must succeed, and return its stdout."""
    done = subprocess.run(
        command, env=None if environ is None else dict(environ), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the wheel in an empty folder. The development group contains the build backend."""
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
        """Return whether the environment has a module."""
        return self.run(f"import importlib.util as u; print(u.find_spec({module!r}) is not None)") == "True\n"


def make_environment(wheel: Path, folder: Path, *others: str) -> Environment:
    """Make an environment with the wheel and other distributions. All dependencies are links to the installed ones."""
    venv.create(folder, symlinks=True)
    created = Environment(
        python=folder / "bin" / "python",
        site_packages=folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages",
    )
    run(*PIP, "--python", created.python, "install", "--no-index", "--no-deps", wheel)
    [installed] = created.site_packages.glob("orderlib-*.dist-info")
    for package in _dependencies_of(PathDistribution(installed), set()):
        _link(package, created.site_packages)
    for name in others:
        for package in (distribution(name), *_dependencies_of(distribution(name), set())):
            _link(package, created.site_packages)
    return created


def _link(package: Distribution, site_packages: Path) -> None:
    for file in package.files or ():
        link = site_packages / file.parts[0]
        if ".." not in file.parts and not link.exists():
            link.symlink_to(Path(str(package.locate_file(file.parts[0]))))


def _dependencies_of(package: Distribution, extras: set[str]) -> Iterator[Distribution]:
    """Yield the installed distributions that a package with these extras needs, directly or indirectly."""
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
            found = distribution(requirement.name)
            yield found
            yield from _dependencies_of(found, requirement.extras)
