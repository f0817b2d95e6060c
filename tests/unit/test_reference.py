"""docs/reference.md is what the docstrings say, about every public name."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from docs.reference import MODULES, PAGE, make_page, public_names
from orderlib import errors


def test_the_reference_is_as_the_docstrings_make_it() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run `make docs`"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(module: ModuleType) -> None:
    entries = re.findall(r"^### (\w+)$", make_page(), re.MULTILINE)
    assert public_names(module)
    assert set(public_names(module)) <= set(entries)
    assert len(entries) == len(set(entries))


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    of_ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert of_ours <= set(public_names(MODULES[0]))
    assert set(re.findall(r"^[ │]*(?:[├└]── )?(\w+) *(?:  .*)?$", errors.__doc__ or "", re.MULTILINE)) >= of_ours


def test_a_public_name_that_promises_nothing_makes_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.TooLarge, "__doc__", None)
    with pytest.raises(LookupError, match="TooLarge"):
        make_page()
