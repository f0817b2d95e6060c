"""docs/reference.md is what the docstrings say, about every public name."""

from __future__ import annotations

import functools
import pydoc
import re
from types import ModuleType

import attrs
import pytest

from docs import reference
from docs.reference import MODULES, PAGE, public_names
from orderlib import (
    Delivery,
    Item,
    Order,
    Payment,
    errors,
    json_schema,
)
from services.api.openapi import document

#: Made once, because it reads the source of every name.
make_page = functools.cache(reference.make_page)


def test_the_reference_is_as_the_docstrings_make_it() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run `make docs`"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(module: ModuleType) -> None:
    entries = re.findall(r"^### (\w+)$", make_page(), re.MULTILINE)
    assert public_names(module)
    assert set(public_names(module)) <= set(entries)
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_entry_shows_its_own_definition(module: ModuleType) -> None:
    """An alias would show another name, or a class where a function is promised."""
    page = make_page()
    for name in public_names(module):
        value = getattr(module, name)
        if callable(value):
            assert value.__name__ == name
            keyword = "class" if isinstance(value, type) else "def"
            assert re.search(rf"^### {name}\n\n```python\n{keyword} {name}\b", page, re.MULTILINE), name


#: The functions that a program begins with.
FUNCTIONS = ("migrate", "bootstrap", "connect", "connect_async", "using", "using_async")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_promised_function_has_an_entry_with_its_signature_and_its_promise(name: str) -> None:
    [signature, promise] = re.findall(
        rf"^### {name}\n\n```python\n(.*?)\n```\n\n(.*?)\n\n", make_page(), re.DOTALL | re.MULTILINE
    )[0]
    assert signature.startswith(f"def {name}(")
    assert "->" in signature
    assert promise.endswith(".")


@pytest.mark.parametrize("model", [Order, Delivery, Payment, Item], ids=lambda model: model.__name__)
def test_help_json_schema_and_openapi_say_what_every_field_is(model: type[attrs.AttrsInstance]) -> None:
    shown = " ".join(pydoc.render_doc(model, renderer=pydoc.plaintext).replace("|", " ").split())  # type: ignore[attr-defined]  # typeshed lacks it
    in_openapi = document()["components"]["schemas"][model.__name__]["properties"]
    in_json_schema = json_schema()["$defs"][model.__name__]["properties"]
    for field in attrs.fields(model):
        text = in_json_schema[field.name]["description"]
        assert len(text) > 3, field
        assert f"{field.name}: {text}" in shown
        assert in_openapi[field.name]["description"] == text


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    of_ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert of_ours <= set(public_names(MODULES[0]))
    assert set(re.findall(r"^[ │]*(?:[├└]── )?(\w+) *(?:  .*)?$", errors.__doc__ or "", re.MULTILINE)) >= of_ours


def test_a_public_name_that_promises_nothing_makes_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.TooLarge, "__doc__", None)
    with pytest.raises(LookupError, match="TooLarge"):
        reference.make_page()
