"""Measure ``decode_order`` beside bare msgspec, cattrs and pydantic: ``python -m bench.decode``.

Every decoder gets the same records and fills the same fields. Bare msgspec checks only types, cattrs nothing, pydantic
the same rules as ``decode_order``. Their classes are generated from the rules of ``Order``.
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
from services.sender.generate import generate_order

Decoder = Callable[[bytes], object]


def plain_type(rule: Type, part: Callable[[DataclassType], type]) -> Any:
    """Return the Python type of a rule, without its bounds."""
    match rule:
        case DataclassType():
            return part(rule)
        case VarTupleType(item_type=item):
            return list[plain_type(item, part)]  # type: ignore[misc] # a type made at runtime
        case StrType():
            return str
        case IntType():
            return int
        case DateTimeType():
            return dt.datetime
    raise NotImplementedError(f"no type for {rule}")


def as_struct(rule: DataclassType) -> type:
    """Return a msgspec struct with the same fields, without bounds."""
    fields = [(field.name, plain_type(rule_of(field), as_struct)) for field in rule.fields]
    return msgspec.defstruct(rule.cls.__name__, fields)


def as_attrs(rule: DataclassType) -> type:
    """Return an attrs class with the same fields, without bounds."""
    fields = {field.name: attrs.field(type=plain_type(rule_of(field), as_attrs)) for field in rule.fields}
    return attrs.make_class(rule.cls.__name__, fields, frozen=True, slots=True)


def as_pydantic(rule: DataclassType) -> type[pydantic.BaseModel]:
    """Return a strict pydantic model with the same fields and bounds."""

    def bounded(rule: Type) -> Any:
        match rule:
            case VarTupleType(item_type=item, min_length=least, max_length=most):
                limits = pydantic.Field(min_length=least, max_length=most)
                return Annotated[list[bounded(item)], limits]  # type: ignore[misc] # a type made at runtime
            case StrType(min_length=least, max_length=most, pattern=pattern):
                return Annotated[str, pydantic.Field(min_length=least, max_length=most, pattern=pattern)]
            case IntType(ge=least, le=most):
                return Annotated[int, pydantic.Field(ge=least, le=most)]
            case DateTimeType():
                return pydantic.AwareDatetime
            case _:
                return plain_type(rule, as_pydantic)

    # The regex engine that pydantic uses by default has no look-ahead.
    config = pydantic.ConfigDict(strict=True, frozen=True, regex_engine="python-re")
    fields: dict[str, Any] = {field.name: (bounded(rule_of(field)), ...) for field in rule.fields}
    return pydantic.create_model(rule.cls.__name__, __config__=config, **fields)


def make_decoders() -> dict[str, Decoder]:
    """Return ``decode_order`` and the decoders that it is compared with, by name."""
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


def measure_us(decoders: Mapping[str, Decoder], records: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Measure microseconds of CPU per record: for each decoder, one value per round. Each round runs every decoder."""
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
    """Return the median over the rounds of one decoder's time divided by the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def worst_record() -> bytes:
    """Return the sample order with a fault in every value."""

    def broken(value: object) -> object:
        match value:
            case dict():
                return {name: broken(part) for name, part in value.items()}
            case list():
                return [broken(part) for part in value]
            case _:
                return 7 if isinstance(value, str) else "seven"

    return json.dumps(broken(json.loads(SAMPLE))).encode()


def count_faults(data: bytes) -> int:
    """Return the number of faults of the record."""
    try:
        decode_order(data)
    except InvalidOrder as error:
        return error.total
    return 0


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds of the measurement (%(default)s)")
    add_write_option(parser)
    options = parser.parse_args()
    rounds = options.rounds
    rng, now = Random(1), dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    decoders = make_decoders()
    figures = []
    # Exclude the objects that exist already from the collections below, which would scan them each time.
    gc.freeze()
    for name, records in (
        ("sample order", [SAMPLE] * 200),
        ("generated orders", [encode_order(generate_order(rng, lambda: now)) for _ in range(200)]),
    ):
        times = measure_us(decoders, records, rounds)
        figures += [
            Figure(f"{name}: {decoder}", statistics.median(round_us), "µs") for decoder, round_us in times.items()
        ]
        limit, goal = (3.0, 2.0) if name == "sample order" else (None, None)
        figures.append(
            Figure(
                f"{name}: decode_order ÷ bare msgspec",
                ratio(times, "decode_order", "bare msgspec"),
                "×",
                at_most=limit,
                goal=goal,
            )
        )
        for decoder in ("cattrs", "pydantic"):
            figures.append(Figure(f"{name}: {decoder} ÷ decode_order", ratio(times, decoder, "decode_order"), "×"))
    worst = worst_record()
    [fault_report_us] = measure_us({"count_faults": count_faults}, [worst] * 20, rounds).values()
    figures.append(
        Figure(
            f"fault report of the sample order, {count_faults(worst)} faults",
            statistics.median(fault_report_us) / 1e3,
            "ms",
            at_most=1.0,
        )
    )
    publish("decode", figures, write=options.write)


if __name__ == "__main__":
    main()
