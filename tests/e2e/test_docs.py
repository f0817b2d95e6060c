"""What the documents show is run, and what they list is complete."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from orderlib import config
from tests.programs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_in_five_lines_runs_as_shown(environ: dict[str, str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['b563feb7b2b84b6test']\n"


def test_every_setting_that_is_read_is_in_the_readme_and_the_other_way_round() -> None:
    sources = [ROOT / "orderlib" / "config.py", *(ROOT / "services").rglob("*.py")]
    read = {
        name
        for source in sources
        for name in re.findall(r"\bORDERS_[A-Z_]+[A-Z]\b", source.read_text(encoding="utf-8"))
        if not name.startswith("ORDERS_KAFKA_") or name == "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
    }
    listed = set(re.findall(r"^\| `(ORDERS_[A-Z_]+)`", README, re.MULTILINE))
    assert listed - {"ORDERS_KAFKA_X_Y"} == read
    assert config.RESERVED_KAFKA_PROPERTIES


@pytest.mark.parametrize("program", ["sender", "consumer", "api", "admin"])
def test_every_program_has_help(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"services.{program}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")


def test_every_admin_command_is_in_the_readme() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.admin", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = set(re.findall(r"^    ([a-z]+)(?: |$)", done.stdout, re.MULTILINE))
    [line] = [line for line in README.splitlines() if "services.admin`" in line]
    assert set(re.findall(r"`([a-z]+)`", line)) == commands


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    explained = set(re.findall(r'@echo "make ([a-z-]+)', makefile))
    assert explained == set(phony.split())


@pytest.mark.parametrize("document", ["README.md", "DESIGN.md"])
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:orderlib|services|sandbox|tests|bench|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
