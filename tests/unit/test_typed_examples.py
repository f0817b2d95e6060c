"""mypy and pyright, both strict, accept every example that users copy: those of README.md, docs/ and examples/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/use-the-library.md")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one program per page, and the examples."""
    folder = tmp_path_factory.mktemp("programs")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        assert blocks, page
        name = Path(page).stem.lower().replace("-", "_")
        (folder / f"{name}.py").write_text("\n".join(blocks), encoding="utf-8")
    for example in (ROOT / "examples").rglob("*.py"):
        (folder / example.name).write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(
        '{"typeCheckingMode": "strict", "reportMissingTypeStubs": false}', encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize(
    "command",
    [
        # `make check` runs mypy on the examples in files.
        pytest.param(
            ("mypy", "--strict", "--config-file=", "--follow-imports=silent", "."), id="mypy", marks=pytest.mark.faults
        ),
        pytest.param(("pyright", f"--pythonpath={sys.executable}"), id="pyright"),
    ],
)
def test_a_strict_type_checker_accepts_the_examples(programs: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=programs,
        env={"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
