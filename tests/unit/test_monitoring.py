"""Dashboard, alerts and docs name every metric that the programs export, and no other."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from http import HTTPMethod, HTTPStatus
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs
import falcon.inspect
import pytest
import yaml

from orderlib.errors import OrderlibError, RejectedError
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.repository import Outcome
from services.admin.__main__ import make_parser
from services.api import metrics
from services.api.app import ROUTES, ApiRepository, create_app, create_metrics_app
from services.api.request_metrics import RequestMetricsMiddleware
from services.consumer.metrics import ConsumerMetrics
from services.settings import Address, ApiSettings

C = TypeVar("C")

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
RUNBOOK = ROOT / "docs" / "runbook.md"
METRICS_TABLE = ROOT / "docs" / "metrics.md"
DOCS = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]

DASHBOARD = json.loads((MONITORING / "grafana" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
SCRAPES = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

#: The series of Prometheus and of the probe, and the labels that Prometheus adds to every series.
FOREIGN = {
    "up": frozenset[str](),
    "probe_success": frozenset[str](),
    "ALERTS": frozenset({"alertname", "alertstate", "severity"}),
}
EVERYWHERE = frozenset({"job", "instance", "service"})

#: Words of PromQL that can be in the place of a metric.
WORDS = {"and", "or", "unless", "offset", "bool", "on", "ignoring", "by", "without", "group_left", "group_right"}


@attrs.frozen
class Exported:
    """A metric that a program exports."""

    name: str
    kind: str
    labels: frozenset[str]

    @property
    def series(self) -> dict[str, frozenset[str]]:
        """The names that an expression may use, each with its labels."""
        if self.kind != "histogram":
            return {self.name: self.labels}
        return {
            f"{self.name}_bucket": self.labels | {"le"},
            f"{self.name}_sum": self.labels,
            f"{self.name}_count": self.labels,
        }


def exported() -> Iterator[Exported]:
    """Every metric in the registries of the consumer and of the API."""
    for registry in (ConsumerMetrics().registry, metrics.ApiMetrics(ROUTES).registry):
        for collector in registry._collector_to_names:
            for family in collector.collect():
                labels = frozenset([*getattr(collector, "_labelnames", ()), *getattr(family, "_labelnames", ())])
                name = f"{family.name}_total" if family.type == "counter" else family.name
                yield Exported(name, family.type, labels)


METRICS = {metric.name: metric for metric in exported()}
EXPORTED_SERIES = {name: labels for metric in METRICS.values() for name, labels in metric.series.items()}
SERIES = EXPORTED_SERIES | FOREIGN


def subclasses(cls: type[C]) -> Iterator[type[C]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def routes() -> set[str]:
    """The routes of the API, and its labels for paths without a route."""
    settings = ApiSettings(
        reader_url="",
        bind=Address(host="127.0.0.1", port=0),
        metrics_bind=Address(host="127.0.0.1", port=0),
        tokens={},
    )
    request_metrics = RequestMetricsMiddleware(metrics.ApiMetrics(ROUTES), make_id=str)
    repository = cast("ApiRepository", None)
    apps = create_app(repository, settings, request_metrics), create_metrics_app(repository, request_metrics)
    return {route.path for app in apps for route in falcon.inspect.inspect_routes(app)} | {
        metrics.UNMATCHED,
        metrics.UNREADABLE,
    }


#: The possible values of the labels whose values are known.
VALUES: dict[str, set[str]] = {
    "outcome": set(Outcome),
    "code": {cls.code for cls in subclasses(RejectedError)},
    "step": set(re.findall(r'\blap\("(\w+)"\)', inspect.getsource(ConsumerStore.write))),
    "cause": {cls.__name__ for cls in subclasses(OrderlibError)},
    "route": routes(),
    "method": {*HTTPMethod, "other"},
    "status": {str(int(status)) for status in HTTPStatus},
    "job": {scrape["job_name"] for scrape in SCRAPES},
    "service": {static["labels"]["service"] for scrape in SCRAPES for static in scrape["static_configs"]},
    "alertstate": {"pending", "firing"},
}

EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in ALERTS] + [
    (panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]
]
each_expression = pytest.mark.parametrize("expression", [pytest.param(text, id=where) for where, text in EXPRESSIONS])
each_alert = pytest.mark.parametrize("alert", [pytest.param(rule, id=rule["alert"]) for rule in ALERTS])
each_panel = pytest.mark.parametrize("panel", [pytest.param(panel, id=panel["title"]) for panel in PANELS])

GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SELECTOR = re.compile(r'(\w+)\s*\{((?:[^{}"]|"[^"]*")*)\}')
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^{}]*\}|\[[^\]]*\]", "", GROUPING.sub("", bare))
    functions = re.findall(r"\b([a-z_]+)\s*(?=\()", bare)
    aggregations = re.findall(r"\b([a-z]+)\s+by\b", expression)
    return set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", bare)) - {*functions, *aggregations} - WORDS


def rows(text: str, columns: int) -> list[list[str]]:
    """The rows of a page's tables with this number of columns, without the headings."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in cells if len(row) == columns and row[0].startswith("`")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@each_expression
def test_an_expression_reads_exported_metrics(expression: str) -> None:
    found = metrics_in(expression)
    assert found
    assert found <= SERIES.keys()


@each_expression
def test_an_expression_selects_labels_and_values_that_exist(expression: str) -> None:
    for name, matchers in SELECTOR.findall(expression):
        for label, operator, value in MATCHER.findall(matchers):
            assert label in SERIES[name] | EVERYWHERE
            for pattern in value.split("|") if "~" in operator else [re.escape(value)]:
                assert any(re.fullmatch(pattern, possible) for possible in VALUES[label]), pattern
    known = EVERYWHERE.union(*(SERIES[name] for name in metrics_in(expression)))
    for grouping in GROUPING.findall(expression):
        assert set(re.findall(r"\w+", grouping)) <= known


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    used = {name for _, expression in EXPRESSIONS for name in metrics_in(expression)}
    assert {metric.name for metric in METRICS.values() if not used & metric.series.keys()} == set()


def test_the_docs_list_every_metric_with_its_kind_and_labels() -> None:
    table = [
        (quoted(name), kind, frozenset(quoted(labels))) for name, kind, labels, *_ in rows(METRICS_TABLE.read_text(), 6)
    ]
    assert sorted(name for [name], _, _ in table) == sorted(METRICS)
    for [name], kind, labels in table:
        assert METRICS[name] == Exported(name, kind, labels)


def test_the_docs_list_every_label_with_its_values() -> None:
    table = {quoted(label)[0]: set(quoted(values)) for label, values in rows(METRICS_TABLE.read_text(), 2)}
    assert table.keys() == {label for metric in METRICS.values() for label in metric.labels}
    for label in ("outcome", "code", "step", "route"):
        assert table[label] == VALUES[label]
    for label in ("cause", "method", "status"):
        assert table[label] <= VALUES[label]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in DOCS])
def test_a_page_names_only_exported_metrics(page: Path) -> None:
    names = METRICS.keys() | EXPORTED_SERIES.keys()
    endings = "|".join({name.rpartition("_")[2] for name in names})
    assert set(re.findall(rf"\borders_(?:\w+_)?(?:{endings})\b", page.read_text())) <= names


def test_no_two_alerts_have_the_same_name() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert len(names) == len(set(names))


@each_alert
def test_an_alert_has_a_severity_a_summary_and_a_section_in_the_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"]["summary"]
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert ROOT / page == RUNBOOK
    assert anchor in anchors(RUNBOOK)


@each_alert
def test_a_summary_uses_only_labels_that_its_expression_keeps(alert: dict[str, Any]) -> None:
    named = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
    kept = {label for labels in GROUPING.findall(alert["expr"]) for label in re.findall(r"\w+", labels)}
    assert named <= (kept if re.search(r"\bsum\b", alert["expr"]) else kept | EVERYWHERE)


def test_the_runbook_has_a_section_for_each_alert_and_for_nothing_else() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in ALERTS]


def test_the_dashboard_has_every_panel_that_the_runbook_names() -> None:
    """The runbook has the titles of panels in italics."""
    named = set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", RUNBOOK.read_text(encoding="utf-8")))
    assert named
    assert named <= {panel["title"] for panel in PANELS}


@pytest.mark.parametrize("page", [RUNBOOK, METRICS_TABLE], ids=["runbook", "metrics"])
def test_every_link_has_a_target(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists()
        assert not anchor or anchor in anchors(target)


def test_admin_accepts_every_command_of_the_runbook() -> None:
    commands = re.findall(r"run --rm admin ([^`#\n]+)", RUNBOOK.read_text())
    assert commands
    for command in commands:
        examples = {"TOPIC/PARTITION/OFFSET": "orders/0/1", "CODE": "too_large", "N": "3", "OFFSET": "7"}
        make_parser().parse_args([examples.get(word, word) for word in command.split()])


def test_panels_have_different_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    taken = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


@each_panel
def test_a_panel_has_a_description_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]


@each_panel
def test_a_panel_uses_the_provisioned_data_source(panel: dict[str, Any]) -> None:
    [source] = yaml.safe_load((MONITORING / "grafana" / "datasource.yml").read_text())["datasources"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}


def test_prometheus_scrapes_the_addresses_that_the_programs_listen_on_in_compose() -> None:
    scraped = {target for scrape in SCRAPES for static in scrape["static_configs"] for target in static["targets"]}
    listening = set()
    for program in ("consumer", "api"):
        for variable, form in (("ORDERS_METRICS_BIND", "{}:{}"), ("ORDERS_API_BIND", "http://{}:{}/readyz")):
            if bind := COMPOSE[program]["environment"].get(variable):
                host, _, port = bind.rpartition(":")
                assert host == "0.0.0.0"  # noqa: S104 - within the network of compose
                listening.add(form.format(program, port))
    assert scraped == listening | {"http://consumer:9101/readyz"}


def test_monitoring_services_are_optional_and_restricted_like_the_programs() -> None:
    monitoring = {name: service for name, service in COMPOSE.items() if "monitoring" in service.get("profiles", ())}
    assert monitoring.keys() == {"prometheus", "probe", "grafana"}
    for service in monitoring.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert not service["user"].startswith(("0", "root"))
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"])
        assert service["healthcheck"]["test"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for volume in service.get("volumes", ()):
            source, _, rest = volume.partition(":")
            assert not source.startswith(".") or ((ROOT / source).is_file() and rest.endswith(":ro"))


def promtool(*arguments: str) -> None:
    if not shutil.which("promtool"):
        pytest.skip("no promtool on this machine")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


def test_promtool_accepts_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, (_, expression) in enumerate(EXPRESSIONS)
    ]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yml"))


def test_alerts_fire_only_in_the_cases_in_which_they_should() -> None:
    promtool("test", "rules", str(MONITORING / "alerts_test.yml"))


def test_every_alert_fires_in_a_case() -> None:
    cases = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}
