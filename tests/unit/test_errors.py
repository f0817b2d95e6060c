"""Errors can be copied and pickled without loss, as process pools and queues do."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from pathlib import Path

import pytest

import orderlib
import services
from orderlib.errors import (
    REJECT_CODES,
    Fault,
    FenceLost,
    OrderlibError,
    OrderNotFound,
    RefusedByDatabase,
    RejectedError,
)

_FAULTS = [Fault(path=f"$.items[{n}].sale", expected="an integer from 0 to 100", found="null") for n in range(3)]


class OfAUser(OrderNotFound):
    """An error of a user of the library, with its own parameters and attributes."""

    def __init__(self, shop: str, *, attempts: int) -> None:
        super().__init__(f"{shop}-1")
        self.shop = shop
        self.attempts = attempts


def _subclasses(cls: type[OrderlibError]) -> Iterator[type[OrderlibError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def _all_error_classes() -> list[type[OrderlibError]]:
    for package in (orderlib, services):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return sorted(set(_subclasses(OrderlibError)), key=lambda cls: cls.__name__)


def _example(cls: type[OrderlibError]) -> OrderlibError:
    match cls:
        case _ if cls is OfAUser:
            return OfAUser("shop", attempts=3)
        case _ if issubclass(cls, RefusedByDatabase):
            return cls("22001", "uid-1")
        case _ if issubclass(cls, RejectedError) and cls is not RejectedError:
            return cls(_FAULTS, 250)
        case _ if issubclass(cls, OrderNotFound):
            return cls("uid-1")
        case _ if issubclass(cls, FenceLost):
            return FenceLost([("orders", 2), ("orders", 1)], {("orders", 1): 10, ("orders", 2): 20})
        case _:
            return cls("some words")


_CLASSES = [cls for cls in _all_error_classes() if cls is not RejectedError]

_WAYS: dict[str, Callable[[OrderlibError], OrderlibError]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),  # noqa: S301  our own
    "oldest pickle": lambda error: pickle.loads(pickle.dumps(error, 0)),  # noqa: S301  our own
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def test_the_errors_of_every_module_are_tested() -> None:
    assert {"TopicRecreated", "BreakerTripped", "RefusedByDatabase", "FenceLost", "OfAUser"} <= {
        cls.__name__ for cls in _CLASSES
    }


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("cls", _CLASSES, ids=lambda cls: cls.__name__)
def test_a_copy_of_an_error_equals_it(cls: type[OrderlibError], way: str) -> None:
    error = _example(cls)
    error.add_note("a note")
    copied = _WAYS[way](error)
    assert copied is not error
    assert type(copied) is cls
    assert str(copied) == str(error)
    assert repr(copied) == repr(error)
    assert copied.args == error.args
    assert vars(copied) == vars(error)


def test_every_rejected_error_has_its_code_in_the_list() -> None:
    assert tuple(cls.code for cls in RejectedError.__subclasses__()) == REJECT_CODES
    assert len(set(REJECT_CODES)) == len(REJECT_CODES)


def test_the_migrations_and_the_documentation_list_the_same_codes() -> None:
    migrations = resources.files("orderlib.postgres") / "migrations"
    sql = "\n".join(path.read_text() for path in sorted(migrations.iterdir(), key=lambda path: path.name))
    checks = re.findall(r"CHECK \(code IN \((.*?)\)\)", sql)
    assert checks[-1] == ", ".join(f"'{code}'" for code in REJECT_CODES)
    metrics = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert f"| `code` | {', '.join(f'`{code}`' for code in REJECT_CODES)} |" in metrics


def _fail() -> None:
    raise OrderNotFound("uid-1")


def test_an_error_crosses_a_process_pool_unchanged() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(OrderNotFound) as caught:
        pool.submit(_fail).result(60)
    assert str(caught.value) == "no order 'uid-1'"
    assert caught.value.order_uid == "uid-1"
