"""The rules of the contract, read from the types of the models: validation, fault report, JSON Schema.

Each rule is written once, as an ``Annotated`` type with ``msgspec.Meta`` on a model. msgspec enforces the rules in C
while it decodes. All other code reads them here. Two rules hold for every text and every time, so they are not written
on each field: a text has no U+0000 and no lone surrogate, and a time in UTC is in years 0001 to 9999. PostgreSQL could
not store the other texts, and Python could not read back the other times.
"""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
import msgspec
from msgspec.inspect import DataclassType, DateTimeType, Field, IntType, StrType, Type, VarTupleType

from orderlib.errors import MAX_FAULTS, Fault, InvalidOrder

M = TypeVar("M", bound=attrs.AttrsInstance)

#: The largest values of PostgreSQL's ``bigint`` and ``integer``.
BIGINT_MAX = 2**63 - 1
INTEGER_MAX = 2**31 - 1


@attrs.frozen(kw_only=True)
class TextForm:
    """The form of a text, for each reader of the contract."""

    #: For the decoder and PostgreSQL. It ends with a look-ahead, because in Python ``$`` also matches before a final
    #: newline.
    pattern: str
    #: For JSON Schema: without look-aheads, because RE2 has none.
    portable_pattern: str
    #: For people. ``{length}`` stands for the minimum and maximum length.
    words: str

    def json_schema(self) -> dict[str, Any]:
        """Return the keywords of JSON Schema. They mean the same in RE2, ECMAScript and Python."""
        return {"pattern": self.portable_pattern, "not": {"pattern": r"\n"}}


#: Letters, digits and ``. _ : -``, but not ``.`` or ``..``, which clients remove from the path of a URL.
ORDER_UID_FORM = TextForm(
    pattern=r"^(?!\.{1,2}$)[A-Za-z0-9._:-]+$(?!\n)",
    portable_pattern=r"^(\.{0,2}[A-Za-z0-9_:-][A-Za-z0-9._:-]*|\.{3}[A-Za-z0-9._:-]*)$",
    words="{length} of the characters A-Z a-z 0-9 . _ : - but not . or .. alone",
)

#: The form of ISO 4217. orderlib does not check which codes exist.
CURRENCY_FORM = TextForm(
    pattern=r"^[A-Z]{3}$(?!\n)", portable_pattern=r"^[A-Z]{3}$", words="three capital letters (ISO 4217)"
)

_FORMS = {form.pattern: form for form in (ORDER_UID_FORM, CURRENCY_FORM)}

#: A missing value, as opposed to null.
_MISSING = object()


def text(min_chars: int, max_chars: int, form: TextForm | None = None) -> msgspec.Meta:
    """Return the rule of a text: its minimum and maximum number of code points, and its form."""
    return msgspec.Meta(min_length=min_chars, max_length=max_chars, pattern=form.pattern if form else None)


def integer(minimum: int, maximum: int = BIGINT_MAX) -> msgspec.Meta:
    """Return the rule of an integer: its minimum and maximum."""
    return msgspec.Meta(ge=minimum, le=maximum)


def validated(cls: type[M]) -> type[M]:
    """Make an attrs class validate its values, and make it final. Goes above ``attrs.frozen(repr=False)``.

    ``__init__`` and ``attrs.evolve`` raise InvalidOrder for invalid values. msgspec and ``unchecked`` do not call
    ``__init__``: msgspec has validated the values already. Subclassing raises TypeError, because the fields of a
    subclass would be neither validated nor stored. The repr of an instance shows no value.
    """
    assign = cls.__init__

    @functools.wraps(assign)
    def assign_and_validate(self: attrs.AttrsInstance, *args: Any, **kwargs: Any) -> None:
        assign(self, *args, **kwargs)
        _validate_model(self)

    # mypy allows no assignment to a method of a class, nor a new attribute: the reason of the next four ignores.
    cls.__init__ = assign_and_validate  # type: ignore[method-assign, assignment]
    cls.__unchecked_init__ = assign  # type: ignore[attr-defined]
    cls.__init_subclass__ = classmethod(_refuse_subclass)  # type: ignore[method-assign, assignment]
    if "__repr__" not in vars(cls):
        cls.__repr__ = repr_without_values  # type: ignore[method-assign]
    return cls


def _refuse_subclass(cls: type, /, **_arguments: object) -> None:
    raise TypeError(
        f"{cls.__name__} cannot be a subclass: an order and its parts are final, because the fields of a subclass "
        "would be neither validated nor stored; wrap the order instead"
    )


def repr_without_values(self: object) -> str:
    """Return the name of the class only: an order is personal data."""
    return f"{type(self).__name__}(…)"


def unchecked(cls: type[M], **fields: object) -> M:
    """Return an instance of a ``validated`` class without validation, from values that are known to be valid."""
    instance = cls.__new__(cls)
    instance.__unchecked_init__(**fields)  # type: ignore[attr-defined]  # added by ``validated``
    return instance


@functools.cache
def rules_of(cls: Hashable) -> DataclassType:
    """Return the rules on the fields of a class, in its field order."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, DataclassType)
    return info


def defaults_of(cls: Hashable) -> dict[str, Any]:
    """Return the default of each optional field of a class."""
    return {field.name: field.default for field in rules_of(cls).fields if not field.required}


def model_of(rule: Type) -> type | None:
    """Return the model of a value or, for an array, of its elements; ``None`` for other values."""
    part = rule.item_type if isinstance(rule, VarTupleType) else rule
    return part.cls if isinstance(part, DataclassType) else None


def rule_of(field: Field) -> Type:
    """Return the rule on a field, without the wrapper that msgspec puts around a type with a description."""
    rule = field.type
    return rule.type if isinstance(rule, msgspec.inspect.Metadata) else rule


def field_rules(cls: Hashable) -> dict[str, Type]:
    """Return the rule on each field of a class by the field's name, in its field order."""
    return {field.name: rule_of(field) for field in rules_of(cls).fields}


def fits_postgres(value: str) -> bool:
    """Return whether PostgreSQL can store this text: no U+0000, and no lone surrogate, which UTF-8 cannot encode."""
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


#: An instance, because freezegun replaces the class wherever a module has a name for it.
_SOME_TIME = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def datetime_class() -> type[dt.datetime]:
    """Return the class ``datetime`` itself, also while a test replaces it to choose the time."""
    return type(_SOME_TIME)


def plain_time(time: dt.datetime) -> dt.datetime:
    """Return an instance of a subclass of ``datetime`` as an equal plain one. Validators refuse other values."""
    datetime = datetime_class()
    if type(time) is datetime or not isinstance(time, datetime):
        return time
    return datetime.combine(datetime.date(time), datetime.timetz(time))


def within_utc_years(value: dt.datetime) -> bool:
    """Return whether a time with an offset is in years 0001 to 9999 in UTC."""
    try:
        value.astimezone(dt.UTC)
    except OverflowError:
        return False
    return True


def _validate_model(model: attrs.AttrsInstance) -> None:
    """Raise InvalidOrder with every fault of a model made in Python. Parts that are models are valid already."""
    shallow = {field.name: getattr(model, field.name) for field in attrs.fields(type(model))}
    validator = _ModelValidator()
    validator.validate_fields(shallow, rules_of(type(model)), "$")
    validator.raise_faults()


def _as_is(value: object, _rule: Type) -> object:
    return value


class Validator:
    """Validates one value: collects every fault, and returns the value as plain data.

    ``open_lazily`` opens a value one level deep before it is compared with its rule. With it a caller can validate JSON
    text without building the unknown parts.
    """

    def __init__(self, open_lazily: Callable[[object, Type], object] = _as_is) -> None:
        self._open_lazily = open_lazily
        self._faults: list[Fault] = []
        self._total = 0

    def raise_faults(self) -> None:
        """Raise InvalidOrder if any fault was found."""
        if self._total:
            raise InvalidOrder(self._faults, self._total)

    def validate(self, value: object, rule: Type, path: str) -> object:
        """Validate a value of any kind. Return it as plain data; after a fault the result has no meaning."""
        if value is _MISSING:
            return self._fault(path, rule, "no value")
        value = self._open_lazily(value, rule)
        match rule:
            case DataclassType():
                return self._object(value, rule, path)
            case VarTupleType():
                return self._array(value, rule, path)
            case StrType():
                return self._text(value, rule, path)
            case IntType():
                return self._integer(value, rule, path)
            case DateTimeType():
                return self._time(value, rule, path)
            case _:
                raise NotImplementedError(f"the contract has no rule of kind {rule}")

    def validate_fields(self, value: Mapping[str, object], rule: DataclassType, path: str) -> object:
        """Validate the known fields of an object in its own order, then the missing ones. Ignore unknown fields.

        An optional field that is missing stays missing: its value is the default.
        """
        known = {field.encode_name: field for field in rule.fields}
        plain = {
            name: self.validate(part, rule_of(known[name]), f"{path}.{name}")
            for name, part in value.items()
            if name in known
        }
        for name, field in known.items():
            if field.required and name not in plain:
                self.validate(_MISSING, rule_of(field), f"{path}.{name}")
        return plain

    def _object(self, value: object, rule: DataclassType, path: str) -> object:
        if type(value) is rule.cls:
            return value
        if not isinstance(value, Mapping):
            return self._fault(path, rule, kind_of(value))
        return self.validate_fields(value, rule, path)

    def _array(self, value: object, rule: VarTupleType, path: str) -> object:
        if not isinstance(value, list | tuple):
            return self._fault(path, rule, kind_of(value))
        if len(value) > (rule.max_length or len(value)):
            return self._fault(path, rule, f"an array of more than {rule.max_length:,} values")
        if len(value) < (rule.min_length or 0):
            return self._fault(path, rule, f"an array of {_count_of(len(value), 'value')}")
        return [self.validate(part, rule.item_type, f"{path}[{index}]") for index, part in enumerate(value)]

    def _text(self, value: object, rule: StrType, path: str) -> object:
        if type(value) is not str:
            return self._fault(path, rule, kind_of(value))
        if not (rule.min_length or 0) <= len(value) <= (rule.max_length or len(value)):
            return self._fault(path, rule, f"a string of {_count_of(len(value), 'character')}")
        if not fits_postgres(value):
            return self._fault(path, rule, "a string with U+0000 or a lone surrogate")
        if rule.pattern is not None and re.search(rule.pattern, value) is None:
            return self._fault(path, rule, "a string of another form")
        return value

    def _integer(self, value: object, rule: IntType, path: str) -> object:
        if type(value) is not int:
            return self._fault(path, rule, kind_of(value))
        if rule.ge is not None and value < rule.ge:
            return self._fault(path, rule, "a smaller integer")
        if rule.le is not None and value > rule.le:
            return self._fault(path, rule, "a greater integer")
        return value

    def _time(self, value: object, rule: DateTimeType, path: str) -> object:
        if type(value) is str:
            if not fits_postgres(value):
                return self._fault(path, rule, "a string with U+0000 or a lone surrogate")
            try:
                value = msgspec.convert(value, datetime_class())
            except msgspec.ValidationError:
                return self._fault(path, rule, "a string of another form")
        if not isinstance(value, datetime_class()):
            return self._fault(path, rule, kind_of(value))
        value = plain_time(value)
        if value.utcoffset() is None:
            return self._fault(path, rule, "a time without an offset")
        if not within_utc_years(value):
            return self._fault(path, rule, "a time outside these years")
        return value

    def _fault(self, path: str, rule: Type, found: str) -> object:
        self._total += 1
        if self._total <= MAX_FAULTS:
            self._faults.append(Fault(path=path, expected=describe(rule), found=found))
        return None


class _ModelValidator(Validator):
    """Validates a model made in Python: its parts must be models and its time a datetime, not plain data."""

    def _object(self, value: object, rule: DataclassType, path: str) -> object:
        if type(value) is rule.cls:
            return value
        return self._fault(path, rule, f"a Python {type(value).__name__}")

    def _time(self, value: object, rule: DateTimeType, path: str) -> object:
        if type(value) is str:
            return self._fault(path, rule, kind_of(value))
        return super()._time(value, rule, path)


def describe(rule: Type) -> str:
    """Return a rule in words, for fault reports and documentation."""
    match rule:
        case DataclassType():
            return "an object"
        case VarTupleType(min_length=minimum, max_length=maximum):
            return f"an array of {minimum} to {maximum:,} values"
        case StrType(min_length=minimum, max_length=maximum, pattern=str(pattern)):
            return _FORMS[pattern].words.format(length=f"{minimum} to {maximum}")
        case StrType(min_length=minimum, max_length=maximum):
            length = f"{minimum} to {maximum:,}" if minimum else f"at most {maximum:,}"
            return f"a string of {length} characters"
        case IntType(ge=minimum, le=maximum):
            return f"an integer from {minimum} to {maximum}"
        case DateTimeType():
            return "an RFC 3339 time with an offset, in UTC in years 0001 to 9999"
        case _:
            raise NotImplementedError(f"the contract has no rule of kind {rule}")


def _count_of(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number that is not an integer",
    str: "a string",
    list: "an array",
    tuple: "an array",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return the kind of a value in the words of JSON, or its Python type; never the value."""
    return _KINDS.get(type(value)) or f"a Python {type(value).__name__}"


def column_type(rule: Type) -> str:
    """Return the PostgreSQL type that stores a scalar of this rule."""
    match rule:
        case StrType():
            return "text"
        case IntType(le=maximum):
            return "integer" if maximum is not None and maximum <= INTEGER_MAX else "bigint"
        case DateTimeType():
            return "timestamptz"
        case _:
            raise NotImplementedError(f"no column type for a rule of kind {rule}")


def model_schemas(
    *classes: type, ref_template: str = "#/components/schemas/{name}"
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Return the JSON Schemas (2020-12) of the classes, and the components that they refer to by ``ref_template``."""
    schemas, components = msgspec.json.schema_components(classes, ref_template=ref_template)
    for model in {part for cls in classes for part in _parts(cls)}:
        component = components[model.__name__]
        component["description"], fields = read_docstring(model)
        for name, schema in component["properties"].items():
            schema["description"] = fields[name]
            if schema.get("type") == "string" and "format" not in schema:
                form = _FORMS.get(schema.get("pattern"))
                schema.update(form.json_schema() if form else {"pattern": r"^[^\x00]*$"})
    return schemas, components


def _parts(model: type) -> Iterator[type]:
    """Yield a model and the models in its fields."""
    yield model
    for field in rules_of(model).fields:
        if (part := model_of(rule_of(field))) is not None:
            yield from _parts(part)


#: A line of the ``Attributes`` section of a docstring, with the lines that continue it.
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def read_docstring(model: type) -> tuple[str, dict[str, str]]:
    """Return what a model is, and what each of its fields is, from its docstring."""
    summary, _, attributes = inspect.cleandoc(model.__doc__ or "").partition("\n\nAttributes:\n")
    return summary, {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(attributes)}
