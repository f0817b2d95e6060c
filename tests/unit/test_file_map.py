"""The file map of DESIGN.md lists the modules and folders that exist, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Folders whose modules are listed one by one. Of the tests, only the folders are.
MAPPED = ("orderlib", "services", "sandbox", "bench", "docs")


def listed() -> Iterator[tuple[str, str]]:
    """Yield the path and the description of each line of the map."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^## File map\n.*?^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    folders: list[str] = []
    for line in block.splitlines():
        [(indent, name, description)] = re.findall(r"^( *)(\S+) *(.*)$", line)
        del folders[len(indent) // 2 :]
        yield "".join(folders) + name, description
        if name.endswith("/"):
            folders.append(name)


def existing() -> set[str]:
    """Return the modules of MAPPED, the packages of the tests, and the folders of both."""
    modules = {path.relative_to(ROOT) for folder in MAPPED for path in (ROOT / folder).rglob("*.py")}
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").glob("*/__init__.py")}
    folders = {path.parent for path in modules} | packages | {Path("tests"), Path("monitoring"), Path("examples")}
    return {path.as_posix() for path in modules} | {f"{path.as_posix()}/" for path in folders}


def test_the_map_lists_exactly_the_modules_that_exist() -> None:
    paths = [path for path, _ in listed()]
    assert len(paths) == len(set(paths))
    assert set(paths) - existing() == set(), "remove these lines from the file map in DESIGN.md"
    assert existing() - set(paths) == set(), "add these to the file map in DESIGN.md"


def test_each_module_has_a_description() -> None:
    undescribed = {path for path, description in listed() if not description}
    assert {path for path in undescribed if path.endswith(".py") and not path.endswith("/__init__.py")} == set()
