"""``make`` reports why the Python interpreter cannot be used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "words"),
    [(None, "there is no"), ("exit 3", "is older"), ("exit 1", "does not run")],
)
def test_the_error_names_the_interpreter_and_the_reason(script: str | None, words: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "dev.txt").touch()
    interpreter = tmp_path / "interpreter"
    if script is not None:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={interpreter}"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "orderlib needs Python 3.11 or newer" in done.stdout
    assert words in done.stdout
    assert not (tmp_path / ".venv").exists()
