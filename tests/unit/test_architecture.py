"""Imports point one way, and each foreign library is imported only in its places. The sources are parsed, not run."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import orderlib
import orderlib.models
import orderlib.testing
import orderlib.testing.strategies

ROOT = Path(__file__).parents[2]

#: What each module or package of the library may import of the library. A new one must be listed here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "contract": {"errors"},
    "models": {"contract", "errors"},
    "codecs": {"models", "contract", "errors"},
    "search": {"contract"},
    "repository": {"search", "models", "contract", "errors"},
    "ingestion": {"codecs", "repository", "models", "errors"},
    "postgres": {"ingestion", "codecs", "repository", "search", "models", "contract", "errors"},
    "testing": {"ingestion", "codecs", "repository", "search", "models", "contract", "errors"},
    # What programs start with, and `python -m orderlib`.
    "entry_point": {"errors"},
    "commands": {"entry_point", "postgres", "errors"},
    "__main__": {"commands", "entry_point"},
    # The package itself: the public names.
    "": {"postgres", "codecs", "repository", "search", "models", "errors"},
}

#: Foreign libraries, and the only places that may import them.
PLACES = {
    "psycopg": ("orderlib/postgres/", "sandbox/postgres.py"),
    "confluent_kafka": (
        *("services/kafka.py", "services/kafka_errors.py", "services/kafka_listener.py"),
        *("services/consumer/kafka_consumer.py", "services/sender/", "sandbox/kafka.py"),
        *("services/admin/topic_reader.py", "services/admin/topics.py", "services/admin/offsets.py"),
    ),
    "falcon": ("services/api/",),
    "gunicorn": ("services/api/",),
    "jinja2": ("services/api/",),
    "prometheus_client": ("services/",),
    "cattrs": ("orderlib/codecs.py",),
    "hypothesis": ("orderlib/testing/strategies.py",),
    "tests": (),
    "sandbox": ("sandbox/",),
    "services": ("services/",),
}

#: The only places that may read the environment: where a program starts.
STARTS = re.compile(r"orderlib/__main__\.py|services/\w+/__main__\.py|sandbox/\w+\.py")

SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("orderlib", "services", "sandbox") for path in (ROOT / folder).rglob("*.py")
)


def imports_of(path: Path) -> Iterator[str]:
    """The full names that a file imports, wherever in the file."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> str:
    """Which module or package of the library an imported name belongs to; empty for the package itself."""
    layer = name.split(".")[1] if "." in name else ""
    return layer if layer in MAY_IMPORT else ""


def test_imports_within_the_library_point_one_way() -> None:
    """What ``MAY_IMPORT`` allows has no cycle."""
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "orderlib"], ids=str)
def test_a_module_of_the_library_imports_only_what_it_may(path: Path) -> None:
    inside = path.relative_to("orderlib").with_suffix("").parts
    layer = "" if inside == ("__init__",) else inside[0]
    assert layer in MAY_IMPORT, f"say in MAY_IMPORT what {path} may import"
    imported = {layer_of(name) for name in imports_of(path) if name.partition(".")[0] == "orderlib"}
    assert imported - {layer} <= MAY_IMPORT[layer]


def test_foreign_libraries_are_imported_only_where_they_belong() -> None:
    for path in SOURCES:
        for name in imports_of(path):
            places = PLACES.get(name.partition(".")[0])
            assert places is None or path.as_posix().startswith(places), f"{path} imports {name}"


def test_programs_do_not_import_each_other() -> None:
    of_programs = [path for path in SOURCES if path.parts[0] == "services" and len(path.parts) > 2]
    programs = {path.parts[1] for path in of_programs}
    assert programs >= {"admin", "api", "consumer", "sender"}
    for path in of_programs:
        imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("services.")}
        assert imported & programs <= {path.parts[1]}, path


def test_only_where_a_program_starts_is_the_environment_read() -> None:
    for path in SOURCES:
        if STARTS.fullmatch(path.as_posix()):
            continue
        assert not {"os.environ", "os.getenv"} & set(imports_of(path)), path
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.environb", "os.getenv"}:
                pytest.fail(f"{path} reads the environment in line {node.lineno}")


def test_importing_the_library_brings_in_neither_hypothesis_nor_what_only_programs_need() -> None:
    process = subprocess.run(
        [sys.executable, "-c", "import orderlib, orderlib.testing, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {
        "hypothesis",
        "confluent_kafka",
        "falcon",
        "gunicorn",
        "jinja2",
        "prometheus_client",
        "services",
        "sandbox",
    }
    assert not heavy & set(process.stdout.split())


@pytest.mark.parametrize("module", [orderlib, orderlib.testing])
def test_every_public_name_is_listed_and_no_other(module: ModuleType) -> None:
    public = {
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - {"annotations", "resources"} == set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))


def public_names() -> Iterator[tuple[str, object]]:
    """Every public name of the library's public modules, and the public parts of its classes."""
    for module in (orderlib, orderlib.testing, orderlib.testing.strategies):
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            value = getattr(module, name)
            if not callable(value) or getattr(value, "__module__", "").split(".")[0] != "orderlib":
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for part, member in vars(value).items():
                    if not part.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                        yield f"{module.__name__}.{name}.{part}", getattr(value, part)


def test_every_public_name_says_what_it_promises() -> None:
    assert [name for name, value in public_names() if not inspect.getdoc(value)] == []
