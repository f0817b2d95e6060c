"""``python -m docs.reference``: writes docs/reference.md, the library's reference, from its docstrings.

It reads with ``inspect``. pdoc and Sphinx write HTML, griffe only collects, and none of them knows the contract's rule
on each field, so with any of them most of this module would remain.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

import orderlib
import orderlib.testing
import orderlib.testing.strategies
from orderlib.contract import describe, read_docstring, rule_of, rules_of

PAGE = Path(__file__).with_name("reference.md")
MODULES = (orderlib, orderlib.testing, orderlib.testing.strategies)
INTRODUCTION = """\
# Reference of the library

Made by `make docs` from the docstrings; never edited. [Use the library](use-the-library.md) shows the names at work.
"""

_MODELS = (orderlib.Order, orderlib.Delivery, orderlib.Payment, orderlib.Item)
#: ``#:`` lines, and the name below them with its type.
_COMMENT = re.compile(r"((?:^ *#: .*\n)+) *(?:self\.)?((\w+)(?:: .+?)?)(?: = .*)?$", re.MULTILINE)
#: The fields of a model follow, with their rules.
_ATTRIBUTES = "\n\nAttributes:\n"
_SAME_PROMISE = re.compile(r"See ``(\w+)\.\w+``\.")
#: Longer signatures are broken; ruff allows 120, and four more may stand before one.
_LINE_CHARS = 116


def public_names(module: ModuleType) -> list[str]:
    """The public names of a module: its ``__all__``, or what it defines."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", [name for name in defined if not name.startswith("_")]))


def make_page() -> str:
    """Return the page. Raises LookupError for a public name, method or field without a docstring."""
    parts = [INTRODUCTION]
    for module in MODULES:
        places = sorted((*_place(module, name), name) for name in public_names(module))
        for defined_in, group in itertools.groupby(places, key=lambda place: place[0]):
            title, _, text = _promise(defined_in, importlib.import_module(defined_in)).partition("\n")
            parts.append(f"## {title.rstrip('.')}\n\nIn `{module.__name__}`.\n\n{text}".rstrip() + "\n")
            for _, _, name in group:
                parts += [f"### {name}\n", *_entry(module, name)]
    return "\n".join(parts)


def _place(module: ModuleType, name: str) -> tuple[str, int]:
    """Where a name is defined: in which module, and in which line."""
    value = getattr(module, name)
    return (value.__module__, inspect.getsourcelines(value)[1]) if callable(value) else (module.__name__, 0)


def _entry(module: ModuleType, name: str) -> Iterator[str]:
    value = getattr(module, name)
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        own_init = "def __init__" in inspect.getsource(value)
        made = "\n" + textwrap.indent(_signature("__init__", value.__init__), "    ") if own_init else " ..."
        yield _code(f"class {name}({bases}):{made}" if bases else f"class {name}:{made}")
        yield f"{_promise(name, value).partition(_ATTRIBUTES)[0]}\n"
        yield from _fields(value)
        yield from _methods(value)
    elif callable(value):
        yield _code(_signature(name, value))
        yield f"{_promise(name, value)}\n"
    else:
        promise, typed = _comments(module)[name]
        yield _code(typed)
        yield f"{promise}\n"


def _fields(cls: type) -> Iterator[str]:
    comments = _comments(cls)
    if issubclass(cls, enum.Enum):
        lines = [f"- `{member.name}`: {comments[member.name][0]}" for member in cls if comments]
        lines = lines or [", ".join(f"`{member.name}`" for member in cls)]
    elif cls in _MODELS:
        _, texts = read_docstring(cls)
        rules = {field.name: rule_of(field) for field in rules_of(cls).fields}
        lines = [f"- `{name}`, `{describe(rule)}`: {texts[name]}" for name, rule in rules.items()]
    else:
        names = [field.name for field in attrs.fields(cls)] if attrs.has(cls) else list(comments)
        lines = [f"- `{comments[name][1]}`: {comments[name][0]}" for name in names if not name.startswith("_")]
    if lines:
        yield "\n".join(lines) + "\n"


def _methods(cls: type) -> Iterator[str]:
    """What a class promises by its public methods and properties; those that keep another's promises by name alone."""
    kept: dict[str, list[str]] = {}
    for name, member in vars(cls).items():
        if name.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        promise = _promise(f"{cls.__name__}.{name}", member)
        if same := _SAME_PROMISE.fullmatch(promise):
            kept.setdefault(same[1], []).append(f"`{name}`")
            continue
        yield f"#### {cls.__name__}.{name}\n"
        yield _code(_signature(name, getattr(cls, name)))
        yield f"{promise}\n"
    for protocol, names in kept.items():
        yield f"As in `{protocol}`: {', '.join(names)}.\n"


def _comments(source: type | ModuleType) -> dict[str, tuple[str, str]]:
    """By name: what its ``#:`` lines say, and the name with its type."""
    return {
        name: (" ".join(line.strip().removeprefix("#: ") for line in lines.splitlines()).replace("``", "`"), typed)
        for lines, typed, name in _COMMENT.findall(inspect.getsource(source))
    }


def _promise(name: str, value: object) -> str:
    """A docstring as Markdown."""
    if not value.__doc__:
        raise LookupError(f"{name} has no docstring")
    text = inspect.cleandoc(value.__doc__)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return text.replace("::\n\n", "")


def _signature(name: str, value: Callable[..., Any] | property) -> str:
    """A ``def``, broken as ruff breaks it."""
    if isinstance(value, property):
        assert value.fget is not None
        return f"@property\n{_signature(name, value.fget)}"
    signature = inspect.signature(value)
    parameters: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in parameters):
            parameters.append("*")
        annotation = f": {parameter.annotation}" if parameter.annotation is not parameter.empty else ""
        shown = getattr(parameter.default, "__name__", repr(parameter.default).replace("'", '"'))
        default = "" if parameter.default is parameter.empty else f" = {shown}"
        stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) or "**" * (parameter.kind is parameter.VAR_KEYWORD)
        parameters.append(f"{stars}{parameter.name}{annotation}{default}")
    head = f"{'async ' * inspect.iscoroutinefunction(value)}def {name}("
    tail = f") -> {signature.return_annotation}: ..."
    line = f"{head}{', '.join(parameters)}{tail}"
    return line if len(line) <= _LINE_CHARS else "".join([head, *(f"\n    {part}," for part in parameters), "\n", tail])


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m docs.reference", description=__doc__).parse_args()
    PAGE.write_text(make_page(), encoding="utf-8")
