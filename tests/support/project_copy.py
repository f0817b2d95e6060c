"""A copy of the project with a change, as its next release."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from orderlib.postgres.schema import LATEST_MIGRATION
from tests.support import ROOT

#: What tests and programs need.
_COPIED = ("orderlib", "services", "sandbox", "tests", "pyproject.toml")

_DIFF = re.compile(r"^```diff\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEW_FILE = re.compile(r"^--- (?:a/|/dev/null).*\n\+\+\+ b/(.+)\n", re.MULTILINE)


def diff_in_contributing() -> str:
    """Return the diff of CONTRIBUTING.md that adds fields."""
    [diff] = _DIFF.findall((ROOT / "CONTRIBUTING.md").read_text())
    return str(diff)


def copy_project(folder: Path, diff: str) -> Path:
    """Copy the project into an empty folder, apply a diff, and return the folder.

    Each hunk must fit exactly one place. ``NNNN`` in the name of a file is the number of the next migration.
    """
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    _, *files = _NEW_FILE.split(diff)
    for name, hunks in zip(files[::2], files[1::2], strict=True):
        path = folder / name.replace("NNNN", f"{LATEST_MIGRATION + 1:04}")
        text = path.read_text() if path.exists() else ""
        for before, after in _hunks(hunks):
            assert text.count(before) == 1 or not text, f"{name}: a hunk fits {text.count(before)} places:\n{before}"
            text = text.replace(before, after) if text else after
        path.write_text(text)
    return folder


def _hunks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text that each hunk replaces, and the text that it puts there."""
    for hunk in re.split(r"^@@.*\n", text, flags=re.MULTILINE)[1:]:
        lines = [line or " " for line in hunk.splitlines()]
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
        yield before, after
