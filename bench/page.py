"""The page docs/bench/README.md and its plots, from the JSON files beside it: ratios, plots, then every figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import attrs

from bench.report import RESULTS, Figure, number, table

#: A JSON file of figures.
Result = Mapping[str, Any]

README = RESULTS.parent.parent / "README.md"
#: Where README.md has its table.
MARKED = re.compile(r"(<!-- python -m bench writes this table -->\n).*?(\n<!-- end of the table -->)", re.DOTALL)

#: The files of figures, and what each measures. A file that does not exist is left out.
TOPICS = {
    "ingest": "Ingest: from Kafka to PostgreSQL",
    "parts": "What PostgreSQL does for an order",
    "api": "Reads: the API",
    "decode": "Decode and validate",
    "go": "Beside a service in Go",
    "growth": "Growth: from 100,000 to 10,000,000 orders",
}

HEAD = """\
# Figures

Generated from the JSON files in this folder; do not edit it. `make bench` and, for growth, `make bench-growth` measure
the same on your machine. `python -m bench --write` replaces this page and all figures except those of growth; for
growth, run `python -m bench.growth --write`, then `python -m bench --page`. Everything ran on one machine at the same
time, PostgreSQL and Kafka included, and its speed varies. So compare ratios: both sides of a ratio were measured in
turns, in one run. A ratio is the median of the ratios of all turns, so it may differ from the ratio of the two
figures. *Limit* is what orderlib should reach, *goal* what would be better.
"""

WORDS = """\
- *Raw COPY*: binary COPY of the same rows, prepared in advance, into the same tables, with the same batches and
  durability.
- *One INSERT per row*: one transaction for each order.
- *Four SELECTs* or *four queries*: an order read with one query for each table, by the same server, through psycopg's
  pool; with *orderlib's driver*, through the connections of orderlib. orderlib's own reads are one JOIN and one query
  for the items.
- *Bare msgspec*: decodes the same JSON and checks the types, but none of the rules.
- *The Go way*: a service in Go (`bench/go_way/`) with one INSERT per row and four SELECTs. It uses all cores, so beside
  it the API has a worker for each core; elsewhere it has one.
- *Uncached*: each request asks for a random order, without `If-None-Match`. All orders fit into `shared_buffers`.
- *Fixed body*: the same server returns a constant response without a database.
- *Handled*: orders handled per second: those of the load, and the single ones whose latency is measured (20 to 40 a
  second; at 1 order/s only these).
- *Full speed*: for latency, 4,000 orders (two full batches) always wait in Kafka, and each order waits for those before
  it. For *store*, the complete topic waits, and in the time that is missing to 100 % the store waits for Python.
- *Of that for …*: the difference to a database without this part. A negative value is noise. This was another run than
  raw COPY under *Ingest*; do not compare the two.
- *Smallest share*: how many orders the least busy consumer handled, compared with an even share.
- *p50*, *p99*: 50 % or 99 % of the values are not greater; p50 is the median.
- *Settings for the memory*: those of PostgreSQL that [Tune](../tune.md#postgresql) recommends, with
  `wal_compression` off, because the PostgreSQL of the benchmarks has no lz4.
- *Growth*: order_uids, track numbers and rids are random. Before orders are read, all tables and primary keys are
  loaded into memory, as far as they fit.
"""


@attrs.frozen
class Headline:
    """A figure at the top of the page."""

    topic: str
    #: The name of the figure; ``*`` is any text.
    figure: str
    text: str


HEADLINES = (
    Headline("ingest", "ingest / raw COPY", "Orders per second, one consumer ÷ raw COPY"),
    Headline("ingest", "ingest / one INSERT per row", "Orders per second, one consumer ÷ one INSERT per row"),
    Headline("go", "ingest / the Go way", "Orders per second, one consumer ÷ the Go way"),
    Headline(
        "api", "GET, uncached / four queries, 16 connections", "Requests per second, GET ÷ four SELECTs, 16 connections"
    ),
    Headline("api", "time of a 304 / of a GET, uncached, 16 connections", "Time of a 304 ÷ of a GET, 16 connections"),
    Headline(
        "api",
        "CPU of log, metrics and access check / of a GET, uncached, 16 connections",
        "CPU of log, metrics and access check ÷ of a GET",
    ),
    Headline("go", "GET / the Go way, 16 connections", "Requests per second, GET ÷ the Go way, 16 connections"),
    Headline("go", "GET / the Go way, 64 connections", "Requests per second, GET ÷ the Go way, 64 connections"),
    Headline("decode", "sample order: decode_order ÷ bare msgspec", "CPU time to decode and validate ÷ bare msgspec"),
    Headline("decode", "sample order: pydantic ÷ decode_order", "CPU time of pydantic ÷ orderlib, same rules"),
    Headline(
        "growth", "ingest, * orders, settings for the memory", "Orders per second, largest tables ÷ 100,000 orders"
    ),
    Headline("growth", "GET p99, * orders, settings for the memory", "GET p99, largest tables ÷ 100,000 orders"),
    Headline("ingest", "1,000 orders/s: sent to readable, median", "Sent to readable at 1,000 orders/s, median"),
    Headline("ingest", "1,000 orders/s: sent to readable, p99", "Sent to readable at 1,000 orders/s, p99"),
    Headline("ingest", "resident memory at a lag of 1,000,000", "Memory of a consumer with 1,000,000 records of lag"),
)


@attrs.frozen
class Plot:
    """A bar chart: ``docs/bench/NAME.svg``."""

    name: str
    topic: str
    title: str
    #: For each colour, the label of each bar and its figure. Bars with the same label stand side by side.
    series: Mapping[str, Mapping[str, str]]
    logarithmic: bool = False


_SIZES = ("100,000", "300,000", "1,000,000", "3,000,000", "10,000,000")
_LOADS = {
    "1 order/s": "1 orders/s",
    "100 orders/s": "100 orders/s",
    "1,000 orders/s": "1,000 orders/s",
    "5,000 orders/s": "5,000 orders/s",
    "full speed": "full speed",
}

PLOTS = (
    Plot(
        "ingest",
        "ingest",
        "Ingest, orders per second",
        {
            "orders/s": {
                "all new": "ingest, Kafka to committed, all new",
                "half duplicates, a quarter changed": "ingest, half duplicates, a quarter changed",
                "all duplicates": "ingest, all duplicates",
                "raw COPY": "raw COPY",
                "one INSERT per row": "one INSERT per row",
            }
        },
    ),
    Plot(
        "latency",
        "ingest",
        "From sent to readable, by load, ms (logarithmic)",
        {
            which: {label: f"{load}: sent to readable, {which}" for label, load in _LOADS.items()}
            for which in ("median", "p99")
        },
        logarithmic=True,
    ),
    Plot(
        "reads",
        "api",
        "API at 16 connections, requests per second",
        {
            "requests/s": {
                "GET of an order": "GET, uncached, 16 connections",
                "GET of an order, four SELECTs": "GET, four queries, 16 connections",
                "304, not modified": "GET, 304, 16 connections",
                "list of 20 orders": "list of 20 orders, 16 connections",
                "fixed body, no database": "fixed body, 16 connections",
            }
        },
    ),
    Plot(
        "servers",
        "api",
        "GET of an order by server at 16 connections, requests per second",
        {
            "requests/s": {
                "gunicorn asgi (in use)": "GET, uncached, 16 connections",
                "gunicorn sync, WSGI": "GET, uncached, WSGI, gunicorn sync, 16 connections",
                "gunicorn gthread, WSGI": "GET, uncached, WSGI, gunicorn gthread, 16 connections",
                "granian, WSGI": "GET, uncached, WSGI, granian, 16 connections",
                "granian, ASGI": "GET, uncached, ASGI, granian, 16 connections",
            }
        },
    ),
    Plot(
        "decode",
        "decode",
        "Decode one order, µs of CPU time",
        {
            order: {
                decoder: f"{order}: {decoder}" for decoder in ("bare msgspec", "decode_order", "pydantic", "cattrs")
            }
            for order in ("sample order", "generated orders")
        },
    ),
    Plot(
        "parts",
        "parts",
        "Raw COPY of an order, and what its parts cost, µs",
        {
            "µs": {
                "everything": "raw COPY of an order",
                **{
                    part: f"of that for {part}"
                    for part in (
                        "foreign keys",
                        "CHECKs",
                        "index orders_newest",
                        "index orders_newest_of_customer",
                        "index orders_newest_of_track",
                        "index orders_by_lower_uid",
                        "index delivery_by_phone",
                        "index delivery_by_email",
                        "index items_by_rid",
                    )
                },
            }
        },
    ),
    *(
        Plot(
            name,
            "growth",
            title,
            {
                settings: {f"{size} orders": f"{size} orders, {settings}: {figure}" for size in _SIZES}
                for settings in ("default settings", "settings for the memory")
            },
        )
        for name, title, figure in (
            ("growth-ingest", "Ingest by number of stored orders, orders per second", "ingest"),
            ("growth-reads", "GET of an order by number of stored orders, p99 in ms", "GET p99"),
        )
    ),
)


def write_page() -> None:
    """Write the page, its plots and the table in README.md. Plots that the page no longer has are removed."""
    results = read_results()
    for old in RESULTS.glob("*.svg"):
        old.unlink()
    for plot in PLOTS:
        if plot.topic in results:
            draw(plot, _figures(results[plot.topic]))
    (RESULTS / "README.md").write_text(page(results), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKED.sub(lambda marks: f"{marks[1]}{readme_table(results)}{marks[2]}", text), encoding="utf-8")


def read_results() -> dict[str, Result]:
    """Return the published figures by topic."""
    paths = {topic: RESULTS / f"{topic}.json" for topic in TOPICS}
    return {topic: json.loads(path.read_text(encoding="utf-8")) for topic, path in paths.items() if path.exists()}


def page(results: Mapping[str, Result]) -> str:
    """Return the text of the page."""
    plots = [f"![{plot.title}]({plot.name}.svg)" for plot in PLOTS if plot.topic in results]
    sections = [
        HEAD,
        f"## Summary\n\n{table(headlines(results))}\n\n{WORDS}",
        "## Plots\n\n" + "\n".join(plots) + "\n",
        "## Every figure\n",
    ]
    sections += [
        f"### {TOPICS[topic]}\n\n{describe_machine(result)}\n\n{table(list(_figures(result).values()))}\n"
        for topic, result in results.items()
    ]
    return "\n".join(sections)


def readme_table(results: Mapping[str, Result]) -> str:
    """Return the table in README.md."""
    rows = [f"| {figure.name} | {number(figure.value)} {figure.unit} |" for figure in headlines(results)]
    return "\n".join(["| what | measured |", "|---|---:|", *rows])


def headlines(results: Mapping[str, Result]) -> list[Figure]:
    """Return the figures at the top of the page, with their texts as names."""
    figures = {topic: _figures(result) for topic, result in results.items()}
    return [
        attrs.evolve(figure, name=headline.text)
        for headline in HEADLINES
        for name, figure in figures.get(headline.topic, {}).items()
        if fnmatchcase(name, headline.figure)
    ]


def draw(plot: Plot, figures: Mapping[str, Figure]) -> None:
    """Draw a plot. A bar whose figure was not measured is left out."""
    import pygal  # noqa: PLC0415 - its import installs an import hook, which only a run that draws needs

    labels = [
        label
        for label in next(iter(plot.series.values()))
        if all(bars[label] in figures for bars in plot.series.values())
    ]
    # pygal draws the first bar at the bottom.
    labels.reverse()
    chart = pygal.HorizontalBar(
        title=plot.title,
        show_legend=len(plot.series) > 1,
        legend_at_bottom=True,
        print_values=True,
        logarithmic=plot.logarithmic,
        js=[],
        width=1000,
        height=140 + 36 * len(labels) * len(plot.series),
        formatter=number,
    )
    if plot.logarithmic:
        chart.zero = 1  # where the bars begin; otherwise at the smallest value
        chart.range = (1, max(figures[bars[label]].value for bars in plot.series.values() for label in labels))
    chart.uuid = plot.name  # otherwise a random one: the file would change each time
    chart.x_labels = labels
    for name, bars in plot.series.items():
        chart.add(name, [figures[bars[label]].value for label in labels])
    chart.render_to_file(str(RESULTS / f"{plot.name}.svg"))


def describe_machine(result: Result) -> str:
    """Return when and on which machine a topic was measured."""
    machine = result["machine"]
    return (
        f"Measured on {machine['measured_at'][:10]} with {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gib']} GiB of memory, {machine['system']}, Python {machine['python']}."
    )


def _figures(result: Result) -> dict[str, Figure]:
    figures = [
        Figure(**{name: value for name, value in entry.items() if name != "verdict"}) for entry in result["figures"]
    ]
    return {figure.name: figure for figure in figures}
