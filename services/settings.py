"""Settings: frozen, made from a mapping, silent about secrets.

Each program makes its own from ``os.environ`` at its start, and nothing else reads the environment. A setting that is
missing or wrong raises ConfigurationError naming its variable, never its value: it may be a secret.
"""

from __future__ import annotations

import difflib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

import attrs

from orderlib.contract import fits_postgres
from orderlib.errors import ConfigurationError
from orderlib.ingestion.records import Tombstones
from orderlib.postgres.connections import check_url

#: Every setting with its default, as text; empty if it has none. ``ORDERS_KAFKA_X_Y`` is not listed.
DEFAULTS: Mapping[str, str] = {
    "ORDERS_BOOTSTRAP_URL": "",
    "ORDERS_MIGRATOR_URL": "",
    "ORDERS_DATABASE_URL": "",
    "ORDERS_READER_URL": "",
    "ORDERS_KAFKA_BOOTSTRAP_SERVERS": "",
    "ORDERS_TOPIC": "orders",
    "ORDERS_CONSUMER_GROUP": "order-consumer",
    "ORDERS_MAX_RECORD_BYTES": "8388608",
    "ORDERS_TOMBSTONES": "reject",
    "ORDERS_BREAKER_FRACTION": "0.95",
    "ORDERS_API_BIND": "127.0.0.1:8080",
    "ORDERS_API_TOKENS": "",
    "ORDERS_API_AUTH": "on",
    "ORDERS_API_KEEPALIVE_S": "75",
    "ORDERS_API_STATUS_WORDS": "",
    "ORDERS_METRICS_BIND": "",
}
#: The defaults of ``ORDERS_METRICS_BIND``.
CONSUMER_METRICS_BIND = "127.0.0.1:9101"
API_METRICS_BIND = "127.0.0.1:9102"

_KAFKA_PREFIX = "ORDERS_KAFKA_"

#: librdkafka properties that a promise depends on, with their aliases.
RESERVED_KAFKA_PROPERTIES = frozenset(
    {
        "acks",
        "allow.auto.create.topics",
        "auto.commit.enable",
        "auto.offset.reset",
        "default.topic.config",
        "delivery.report.only.error",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.gapless.guarantee",
        "enable.idempotence",
        "enable.partition.eof",
        "group.id",
        "group.protocol.type",
        "group.remote.assignor",
        "isolation.level",
        "metadata.broker.list",
        "offset.store.method",
        "partition.assignment.strategy",
        "partitioner",
        "produce.offset.report",
        "queuing.strategy",
        "request.required.acks",
        "topic.blacklist",
        "transactional.id",
    }
)

#: librdkafka properties that name a file, and those that may name a folder or be the word `probe` instead.
_KAFKA_FILES = (
    "sasl.oauthbearer.assertion.file",
    "sasl.oauthbearer.assertion.private.key.file",
    "ssl.certificate.location",
    "ssl.crl.location",
    "ssl.key.location",
    "ssl.keystore.location",
)
_KAFKA_AUTHORITIES = ("https.ca.location", "ssl.ca.location")

_KAFKA_SERVER = re.compile(
    r"(?:(?i:(?:sasl_)?(?:plaintext|ssl))://)?(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII
)
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):(?P<port>\d{1,5})")


def misspelt_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are probably meant to be a setting, each with the nearest setting.

    ``ORDERS_KAFKA_X_Y`` may be any property of librdkafka, so only a name close to that of the servers is one of them.
    """
    settings = {name.removeprefix("ORDERS_"): name for name in DEFAULTS}
    found = {}
    for name in environ:
        tail = re.sub("^ORDERS?_", "", name.upper())
        if name in DEFAULTS or tail == name.upper():
            continue
        similarity = 0.9 if name.startswith(_KAFKA_PREFIX) else 0.6
        for nearest in difflib.get_close_matches(tail, settings, 1, similarity):
            found[name] = settings[nearest]
    return found


def _text(environ: Mapping[str, str], name: str) -> str:
    """Return the value of a setting, or its default. An empty value counts as not set."""
    return _require_utf8(name, environ.get(name) or DEFAULTS[name])


def _require_utf8(name: str, value: str) -> str:
    """Return a value, or raise ConfigurationError if it is not UTF-8: Python then has lone surrogates in its place."""
    if not fits_postgres(value):
        raise ConfigurationError(f"{name} is not UTF-8")
    return value


def without_outer_space(name: str, value: str) -> str:
    """Return a value, or raise ConfigurationError if it is blank, or begins or ends with white space.

    librdkafka removes such space, and ends the process for a blank group.
    """
    if value != value.strip() or not value:
        raise ConfigurationError(f"{name} must not be blank, nor begin or end with white space")
    return value


def _name(environ: Mapping[str, str], name: str) -> str:
    return without_outer_space(name, _text(environ, name))


def _required(environ: Mapping[str, str], name: str) -> str:
    value = _text(environ, name)
    if not value.strip():
        raise ConfigurationError(f"{name} is not set")
    return value


def _integer(environ: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = _text(environ, name)
    number = int(text) if re.fullmatch(r"[0-9]{1,15}", text) else -1
    if number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{name} must be an integer {limits}")
    return number


def _fraction(environ: Mapping[str, str], name: str) -> float:
    text = _text(environ, name)
    if not re.fullmatch(r"(0|1|0?\.\d+|0\.\d*|1\.0*)", text):
        raise ConfigurationError(f"{name} must be a number from 0 to 1")
    return float(text)


#: The names of this machine under which the API may be used without tokens.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@attrs.frozen
class Address:
    """Where a program listens."""

    #: Host name or address, an IPv6 one in brackets.
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it, under one of the names that the API serves without tokens."""
        return self.host.lower() in LOCAL_HOSTS

    @classmethod
    def parse(cls, name: str, text: str) -> Address:
        """Parse ``host:port``, or raise ConfigurationError with the variable's name."""
        found = _HOST_AND_PORT.fullmatch(text)
        if not found or int(found["port"]) > 65535:
            raise ConfigurationError(f"{name} must be host:port")
        return cls(host=found["host"], port=int(found["port"]))


@attrs.frozen(kw_only=True)
class KafkaSettings:
    """How to reach Kafka, and which topic orders are in."""

    #: ``ORDERS_KAFKA_BOOTSTRAP_SERVERS``: host:port, several with commas.
    bootstrap_servers: str
    #: ``ORDERS_TOPIC``.
    topic: str
    #: ``ORDERS_KAFKA_X_Y``: librdkafka's property x.y, for TLS, SASL and tuning. May hold secrets.
    properties: Mapping[str, str] = attrs.field(repr=False)

    @classmethod
    def from_mapping(cls, environ: Mapping[str, str]) -> KafkaSettings:
        """Read the settings. Raises ConfigurationError, also for a property that a promise depends on."""
        properties = {
            name.removeprefix(_KAFKA_PREFIX).lower().replace("_", "."): _require_utf8(name, value)
            for name, value in environ.items()
            if value and name.startswith(_KAFKA_PREFIX) and name != "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
        }
        for reserved in sorted(RESERVED_KAFKA_PROPERTIES & properties.keys()):
            name = _KAFKA_PREFIX + reserved.upper().replace(".", "_")
            raise ConfigurationError(f"{name} cannot be set: orderlib depends on its own value of {reserved}")
        if (
            properties.get("sasl.mechanism", properties.get("sasl.mechanisms", "")).upper() == "OAUTHBEARER"
            and not {"sasl.oauthbearer.method", "enable.sasl.oauthbearer.unsecure.jwt"} & properties.keys()
        ):
            raise ConfigurationError("OAUTHBEARER needs ORDERS_KAFKA_SASL_OAUTHBEARER_METHOD=oidc")
        _require_files(properties)
        return cls(
            bootstrap_servers=_bootstrap_servers(environ),
            topic=_name(environ, "ORDERS_TOPIC"),
            properties=properties,
        )

    def client_properties(self) -> dict[str, str]:
        """Return the properties of every librdkafka client."""
        return {
            **self.properties,
            "bootstrap.servers": self.bootstrap_servers,
            # A misspelt topic must be reported, not created.
            "allow.auto.create.topics": "false",
        }


def _require_files(properties: Mapping[str, str]) -> None:
    """Raise ConfigurationError for a file that cannot be read. librdkafka would report it in OpenSSL's words only."""
    for name in (*_KAFKA_FILES, *_KAFKA_AUTHORITIES):
        path = properties.get(name)
        if path is None or (name in _KAFKA_AUTHORITIES and (path == "probe" or Path(path).is_dir())):
            continue
        try:
            with Path(path).open("rb"):
                pass
        except OSError as exc:
            variable = _KAFKA_PREFIX + name.upper().replace(".", "_")
            raise ConfigurationError(f"{variable} does not name a readable file: {exc.strerror}") from None


def _bootstrap_servers(environ: Mapping[str, str]) -> str:
    """Return the servers. librdkafka takes any text, and then waits for a host of that name as in an outage."""
    name = "ORDERS_KAFKA_BOOTSTRAP_SERVERS"
    servers = _required(environ, name)
    found = [_KAFKA_SERVER.fullmatch(server.strip()) for server in servers.split(",") if server.strip()]
    if not found or not all(server and 0 < int(server["port"] or 9092) <= 65535 for server in found):
        raise ConfigurationError(f"{name} must be host:port, several separated by commas")
    return servers


@attrs.frozen(kw_only=True)
class ConsumerSettings:
    """Settings of ``services.consumer``."""

    kafka: KafkaSettings
    #: ``ORDERS_DATABASE_URL``: PostgreSQL as the writer.
    database_url: str = attrs.field(repr=False)
    #: ``ORDERS_CONSUMER_GROUP``; one group per database.
    group: str
    #: ``ORDERS_MAX_RECORD_BYTES``: a longer value is rejected without being parsed.
    max_record_bytes: int
    #: ``ORDERS_TOMBSTONES``: what to do with a record that has an order_uid as key and no value: ``reject`` stores it
    #: as a reject, ``erase`` erases the order.
    tombstones: Tombstones
    #: ``ORDERS_METRICS_BIND``: /metrics, /livez, /readyz.
    metrics_bind: Address
    #: ``ORDERS_BREAKER_FRACTION``: stop if this fraction of the last 1,000 records was rejected; 0 = off.
    breaker_fraction: float

    @classmethod
    def from_mapping(cls, environ: Mapping[str, str]) -> ConsumerSettings:
        """Read the settings. Raises ConfigurationError."""
        return cls(
            kafka=KafkaSettings.from_mapping(environ),
            database_url=database_url(environ, "ORDERS_DATABASE_URL"),
            group=_name(environ, "ORDERS_CONSUMER_GROUP"),
            max_record_bytes=max_record_bytes(environ),
            tombstones=tombstones(environ),
            metrics_bind=Address.parse(
                "ORDERS_METRICS_BIND", environ.get("ORDERS_METRICS_BIND") or CONSUMER_METRICS_BIND
            ),
            breaker_fraction=_fraction(environ, "ORDERS_BREAKER_FRACTION"),
        )


@attrs.frozen(kw_only=True)
class ApiSettings:
    """Settings of ``services.api``."""

    #: ``ORDERS_READER_URL``: PostgreSQL as the reader.
    reader_url: str = attrs.field(repr=False)
    #: ``ORDERS_API_BIND``.
    bind: Address
    #: ``ORDERS_METRICS_BIND``: /metrics, /livez and /readyz.
    metrics_bind: Address
    #: ``ORDERS_API_KEEPALIVE_S``: how long an idle connection stays open. It must be longer than the idle timeout of
    #: a load balancer, which otherwise sends requests on connections that are being closed.
    keepalive_s: int = int(DEFAULTS["ORDERS_API_KEEPALIVE_S"])
    #: ``ORDERS_API_TOKENS``: name:token pairs, separated by commas. Logs show the name.
    #: Empty only with ``ORDERS_API_AUTH=off``, which serves localhost only.
    tokens: Mapping[str, str] = attrs.field(repr=False)
    #: ``ORDERS_API_STATUS_WORDS``: what the shop calls the status codes of items, such as ``202:accepted``, separated
    #: by commas. The pages show them beside the codes.
    status_words: Mapping[int, str] = attrs.field(factory=dict)

    @classmethod
    def from_mapping(cls, environ: Mapping[str, str]) -> ApiSettings:
        """Read the settings. Raises ConfigurationError, also if neither tokens nor ORDERS_API_AUTH=off are set."""
        bind = Address.parse("ORDERS_API_BIND", _text(environ, "ORDERS_API_BIND"))
        if _text(environ, "ORDERS_API_AUTH") == "off" and not bind.is_loopback:
            raise ConfigurationError("ORDERS_API_BIND must be localhost, 127.0.0.1 or [::1] if ORDERS_API_AUTH=off")
        return cls(
            reader_url=database_url(environ, "ORDERS_READER_URL"),
            bind=bind,
            metrics_bind=Address.parse("ORDERS_METRICS_BIND", environ.get("ORDERS_METRICS_BIND") or API_METRICS_BIND),
            keepalive_s=_integer(environ, "ORDERS_API_KEEPALIVE_S", 1, 3600),
            tokens=_tokens(environ),
            status_words=_status_words(environ),
        )

    def name_of(self, token: str) -> str | None:
        """Return the name of a token, or ``None`` if it is unknown. The comparison takes constant time."""
        found = None
        for name, known in self.tokens.items():
            if hmac.compare_digest(known.encode(), token.encode()):
                found = name
        return found


def _tokens(environ: Mapping[str, str]) -> dict[str, str]:
    auth = _text(environ, "ORDERS_API_AUTH")
    if auth not in {"on", "off"}:
        raise ConfigurationError("ORDERS_API_AUTH must be on or off")
    text = _text(environ, "ORDERS_API_TOKENS")
    if auth == "off":
        if text:
            raise ConfigurationError("ORDERS_API_TOKENS and ORDERS_API_AUTH=off contradict each other")
        return {}
    if not text:
        raise ConfigurationError(
            "ORDERS_API_TOKENS is not set (or set ORDERS_API_AUTH=off to serve localhost without tokens)"
        )
    tokens: dict[str, str] = {}
    for number, pair in enumerate(text.split(","), 1):
        name, colon, token = pair.strip().partition(":")
        # Without a colon, or with an empty name, the text may be a token, so no message quotes it.
        for is_wrong, reason in (
            (not pair.strip(), "is empty"),
            (not colon, "is not name:token"),
            (not name, "has no name"),
            (not token, "has no token"),
            (re.search(r"\s", name + token), "contains white space; separate tokens with commas"),
            (not re.fullmatch(r"[!-~]+", name + token), "must be printable ASCII"),
            (name in tokens, "has the same name as an earlier token"),
        ):
            if is_wrong:
                raise ConfigurationError(f"ORDERS_API_TOKENS: token {number} {reason}")
        tokens[name] = token
    return tokens


def _status_words(environ: Mapping[str, str]) -> dict[int, str]:
    words: dict[int, str] = {}
    for pair in filter(str.strip, _text(environ, "ORDERS_API_STATUS_WORDS").split(",")):
        code, _, word = pair.partition(":")
        if not (re.fullmatch(r"[0-9]{1,10}", code.strip()) and word.strip()):
            raise ConfigurationError("ORDERS_API_STATUS_WORDS must be code:word, several separated by commas")
        words[int(code)] = word.strip()
    return words


def max_record_bytes(environ: Mapping[str, str]) -> int:
    """Return ``ORDERS_MAX_RECORD_BYTES``. A longer value is rejected without being parsed."""
    return _integer(environ, "ORDERS_MAX_RECORD_BYTES", 1)


def tombstones(environ: Mapping[str, str]) -> Tombstones:
    """Return ``ORDERS_TOMBSTONES``: what to do with a record that has an order_uid as key and no value."""
    text = _text(environ, "ORDERS_TOMBSTONES")
    if text not in set(Tombstones):
        raise ConfigurationError(f"ORDERS_TOMBSTONES must be {' or '.join(Tombstones)}")
    return Tombstones(text)


def database_url(environ: Mapping[str, str], name: str) -> str:
    """Return the database URL in this variable. There is no fallback to another one.

    Raises ConfigurationError, naming the variable, if it is not set or not valid.
    """
    url = _required(environ, name)
    check_url(name, url)
    return url
