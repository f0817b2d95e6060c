"""How fast a record becomes an order: beside bare msgspec, cattrs and pydantic, in one run.

``python -m bench.decode``. Every rival decodes the same records into the same fields; bare msgspec checks types, cattrs
nothing, pydantic the same rules as we. All of their classes are made from ours.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Annotated, Any

import attrs
import cattrs
import msgspec
import pydantic
from msgspec.inspect import DataclassType, DateTimeType, IntType, StrType, Type, VarTupleType

from bench.report import Figure, add_write_option, publish
from orderlib import InvalidOrder, Order, decode_order, encode_order
from orderlib.contract import rule_of, rules_of
from orderlib.testing import SAMPLE
from services.sender.generate import make_order

Decode = Callable[[bytes], object]


def plain_type(rule: Type, part: Callable[[DataclassType], type]) -> Any:
    """The type that a rule is about, without the rule."""
    match rule:
        case DataclassType():
            return part(rule)
        case VarTupleType(item_type=item):
            return list[plain_type(item, part)]  # type: ignore[misc]
        case StrType():
            return str
        case IntType():
            return int
        case DateTimeType():
            return dt.datetime
    raise NotImplementedError(f"no type for {rule}")


def as_struct(rule: DataclassType) -> type:
    """A msgspec struct of the same shape, without rules."""
    fields = [(field.name, plain_type(rule_of(field), as_struct)) for field in rule.fields]
    return msgspec.defstruct(rule.cls.__name__, fields)


def as_attrs(rule: DataclassType) -> type:
    """An attrs class of the same shape, without rules."""
    fields = {field.name: attrs.field(type=plain_type(rule_of(field), as_attrs)) for field in rule.fields}
    return attrs.make_class(rule.cls.__name__, fields, frozen=True, slots=True)


def as_pydantic(rule: DataclassType) -> type[pydantic.BaseModel]:
    """A strict pydantic model with the same rules."""

    def ruled(rule: Type) -> Any:
        match rule:
            case VarTupleType(item_type=item, min_length=least, max_length=most):
                return Annotated[list[ruled(item)], pydantic.Field(min_length=least, max_length=most)]  # type: ignore[misc]
            case StrType(min_length=least, max_length=most, pattern=pattern):
                return Annotated[str, pydantic.Field(min_length=least, max_length=most, pattern=pattern)]
            case IntType(ge=least, le=most):
                return Annotated[int, pydantic.Field(ge=least, le=most)]
            case DateTimeType():
                return pydantic.AwareDatetime
            case _:
                return plain_type(rule, as_pydantic)

    # pydantic's own engine for patterns knows no look-ahead.
    config = pydantic.ConfigDict(strict=True, frozen=True, regex_engine="python-re")
    fields: dict[str, Any] = {field.name: (ruled(rule_of(field)), ...) for field in rule.fields}
    return pydantic.create_model(rule.cls.__name__, __config__=config, **fields)


def rivals() -> dict[str, Decode]:
    """Ours, and the others."""
    rule = rules_of(Order)
    converter = cattrs.Converter()
    converter.register_structure_hook(dt.datetime, lambda text, _: dt.datetime.fromisoformat(text))
    plain_class = as_attrs(rule)
    return {
        "decode_order": decode_order,
        "bare msgspec": msgspec.json.Decoder(as_struct(rule)).decode,
        "cattrs": lambda data: converter.structure(json.loads(data), plain_class),
        "pydantic": as_pydantic(rule).model_validate_json,
    }


def measured_us(decoders: Mapping[str, Decode], records: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU a record, by decoder, in each round; all take turns in every round, with the same records."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            gc.collect()
            began = time.process_time()
            for record in records:
                decode(record)
            times[name].append((time.process_time() - began) / len(records) * 1e6)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    """How many times longer one takes than the other, by the median round."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def worst_record() -> bytes:
    """The sample with a fault in every value."""

    def broken(value: object) -> object:
        match value:
            case dict():
                return {name: broken(part) for name, part in value.items()}
            case list():
                return [broken(part) for part in value]
            case _:
                return 7 if isinstance(value, str) else "seven"

    return json.dumps(broken(json.loads(SAMPLE))).encode()


def report(data: bytes) -> int:
    """How many faults the record has."""
    try:
        decode_order(data)
    except InvalidOrder as refusal:
        return refusal.total
    return 0


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    add_write_option(parser)
    options = parser.parse_args()
    rounds = options.rounds
    rng, now = Random(1), dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    decoders = rivals()
    figures = []
    # What is there already shall not be looked through again before each turn.
    gc.freeze()
    for name, records in (
        ("the sample", [SAMPLE] * 200),
        ("made orders", [encode_order(make_order(rng, lambda: now)) for _ in range(200)]),
    ):
        times = measured_us(decoders, records, rounds)
        figures += [Figure(f"{name}: {rival}", statistics.median(taken), "µs") for rival, taken in times.items()]
        limit = 3.0 if name == "the sample" else None
        figures.append(
            Figure(
                f"{name}: decode_order ÷ bare msgspec", ratio(times, "decode_order", "bare msgspec"), "×", at_most=limit
            )
        )
        for rival in ("cattrs", "pydantic"):
            figures.append(Figure(f"{name}: {rival} ÷ decode_order", ratio(times, rival, "decode_order"), "×"))
    worst = worst_record()
    [report_us] = measured_us({"report": report}, [worst] * 20, rounds).values()
    figures.append(
        Figure(
            f"a report of {report(worst)} faults in the sample", statistics.median(report_us) / 1e3, "ms", at_most=1.0
        )
    )
    publish("decode", figures, write=options.write)


if __name__ == "__main__":
    main()
