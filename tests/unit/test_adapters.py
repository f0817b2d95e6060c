"""The adapters of orderlib are those that psycopg has after its import."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import psycopg
from psycopg.adapt import AdaptersMap
from orderlib.postgres.adapters import ADAPTERS

def contents(adapters):
    maps = [*adapters._loaders, *adapters._dumpers.values(), *adapters._dumpers_by_oid]
    return [{key: getattr(adapter, "__name__", adapter) for key, adapter in each.items()} for each in maps]

own, theirs = contents(ADAPTERS), contents(psycopg.adapters)
changed = set()
for ours, others in zip(own, theirs, strict=True):
    assert ours.keys() == others.keys()
    changed |= {others[key] for key in ours if ours[key] != others[key]}
print(sorted(changed))
assert {t.name for t in ADAPTERS.types} == {t.name for t in psycopg.adapters.types}
"""


def test_only_the_loaders_of_json_differ() -> None:
    """In another process: other tests may have registered adapters."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['JsonBinaryLoader', 'JsonLoader', 'JsonbBinaryLoader', 'JsonbLoader']\n"
