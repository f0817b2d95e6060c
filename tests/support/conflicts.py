"""Writes that conflict with another writer each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

import pytest

from orderlib.errors import TransactionConflict
from orderlib.ingestion import retry


@contextmanager
def given_up_after_conflicts(module: ModuleType) -> Iterator[None]:
    """Let each write of a module conflict, and check that the block gives up after its third transaction."""
    transactions = 0

    def conflict(*_: object) -> NoReturn:
        nonlocal transactions
        transactions += 1
        raise TransactionConflict("another writer")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "store", conflict)
        patched.setattr(retry, "_MAX_CONFLICTS", 2)
        with pytest.raises(TransactionConflict):
            yield
    assert transactions == 3
