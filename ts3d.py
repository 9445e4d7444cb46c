#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the ts3d authors. The licence's text is at the end of this file.
# /// script
# requires-python = ">=3.11"
# dependencies = ["boto3>=1.26"]
# ///
"""ts3d archives Threat Stack's alerts in AWS S3.

The HTTP server (`Handler`) compares a webhook's token, reads it and checks each alert in it.
`Queue.put` writes the alerts to SQLite and syncs the disk; only then does the answer, 200,
acknowledge them. The `Archiver`'s worker threads put each alert into S3, get its detail from the
Threat Stack API, put that into S3 too, and delete the job. A `CircuitBreaker` for each of the two
upstreams stops calls during an outage. ts3d is crash-only: after an error that it cannot handle
the process ends, and a restart continues with the queue. Delivery is at-least-once and idempotent.

The sections follow an alert: configuration, log, metrics, webhook, queue, circuit breaker, Threat
Stack, S3, archiver, HTTP server, systemd, commands. README.md is the administrator's manual.
"""

import configparser
import fcntl
import hmac
import itertools
import logging
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import textwrap
import traceback
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from base64 import b64encode
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from hashlib import sha256
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from importlib.metadata import PackageNotFoundError, version
from json import JSONDecoder, dumps, loads
from math import inf
from os import environ
from os.path import dirname, exists, join
from queue import SimpleQueue
from re import fullmatch
from sqlite3 import Connection
from threading import Event, Lock, RLock, Semaphore, Thread, current_thread
from time import monotonic, sleep, time
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.parse import parse_qs, quote, urljoin, urlsplit
from urllib.request import (
    HTTPErrorProcessor,
    HTTPSHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

VERSION = "0.2.0"
log = logging.getLogger("ts3d")


# --------------------------------------------------------------------------------------------------
# Configuration: one table of options; defaults, validation and messages come from it


class ConfigError(RuntimeError):
    """A configuration that cannot be used: where, why and what to do. Exit code 78."""


Json = dict[str, Any]
PORT = "([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
KINDS = {  # by kind of value: the pattern that it matches, and how an error names it
    "boolean": ("(?i)yes|no|true|false|on|off|1|0", "yes or no"),
    "address": (
        rf"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):{PORT}",
        "an address. Write HOST:PORT, or [::1]:PORT for IPv6",
    ),
    "url": (
        r"https?://([A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*|\[[0-9A-Fa-f:.]+\])"
        rf"(:{PORT})?(/[!-\"$->@-~]*)?",
        "a URL of the form https://HOST/PATH",
    ),
    "token": (
        r"\s*[A-Za-z0-9._~+/=-]{16,}(\s+[A-Za-z0-9._~+/=-]{16,})*\s*",
        "a token. It needs at least 16 characters, only of A-Z a-z 0-9 - . _ ~ + / =, because it "
        "must fit into a URL as it is (RFC 6750). Write one a line. Create one: openssl rand "
        "-hex 32",
    ),
    "word": ("[!-~]+", "one word of visible ASCII characters"),
    "path": ("(?s).*", "a path"),
    "level": ("(?i)DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"),
    "auth": ("key|hawk", "key or hawk"),
    "bucket": (
        "[A-Za-z0-9._-]{3,255}|arn:[A-Za-z0-9:/._-]+",
        "a bucket. Write its name alone, without s3:// and without a path",
    ),
    "prefix": (
        r"[^/\x00-\x1f\x7f]+(/[^/\x00-\x1f\x7f]+)*",
        "a key prefix. Write it without a slash at either end, empty parts and control characters",
    ),
}
UNITS = {  # by kind of number
    "seconds": {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400},
    "bytes": {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40},
    "count": {"": 1},
}
# Section and name, default, kind and limits, and the meaning, which is also in ts3d.conf. A secret
# is never shown, and NAME_file may name a file that holds it.
Option = namedtuple("Option", "section name default secret kind low high meaning")
OPTIONS = [
    Option(*row)
    for row in re.findall(
        r"(?m)^(\w+)\.(\w+) = ?(\S*) +(secret )?(\w+)(?: (\S+) to (\S+))? {2,}(.+)$",
        """
server.listen = 127.0.0.1:8080     address                HOST:PORT or [::1]:PORT to listen on
server.webhook_token =             secret token           secret that a webhook must present
server.metrics_token =             secret token           secret for /metrics
server.wait = 2                    seconds 0 to 30        seconds an answer may wait for S3
server.max_body = 8M               bytes 1 to 64M         bytes of one webhook
server.request_timeout = 10        seconds 0.1 to 3600    seconds for one request
server.keepalive_timeout = 5m      seconds 0.1 to 86400   seconds kept idle
server.max_connections = 1024      count 1 to 65536       connections held at once
server.tls_certificate =           path                   PEM file: the certificate chain for HTTPS
server.tls_key =                   path                   PEM file: the certificate's private key
threatstack.auth = key             auth                   API v1 or v2
threatstack.base_url =             url                    the API's URL; the default depends on auth
threatstack.api_key =              secret word            the API key
threatstack.user_id =              secret word            Hawk's id
threatstack.organization_id =      word                   Hawk's ext, or Organization header
threatstack.events = yes           boolean                with Hawk, archive contributing events too
threatstack.timeout = 30           seconds 0.1 to 3600    seconds for one call
s3.bucket =                        bucket                 the bucket
s3.prefix =                        prefix                 prefix of every key
s3.region =                        word                   AWS region; by default boto3's
s3.endpoint_url =                  url                    S3 endpoint; by default boto3's
queue.path =                       path                   the SQLite file
queue.max_size = 1G                bytes 1 to 1024T       bytes of queued alerts
archive.workers = 16               count 0 to 1024        alerts archived at once
archive.give_up_after = 7d         seconds 0 to 11575d    time an alert may fail
log.level = INFO                   level                  lowest level that is logged
""",
    )
]
PUT_OBJECT = "s3:put_object"  # its options are parameters of boto3's put_object
OWN_PARAMETERS = re.compile("Bucket|Key|Body|Content(Type|Length|MD5)|Checksum.*")
ENVIRONMENT = {  # the tutorial's variables, by the option that each overrides
    "base_url": "THREATSTACK_BASE_URL",
    "api_key": "THREATSTACK_API_KEY",
    "bucket": "TS_AWS_S3_BUCKET",
    "prefix": "TS_AWS_S3_PREFIX",
}
BASE_URLS = {"key": "https://app.threatstack.com/api/v1", "hawk": "https://api.threatstack.com/v2"}
CONFIG_FILES = ("/etc/ts3d/ts3d.conf", join(dirname(os.path.realpath(__file__)), "ts3d.conf"))
SECRETS: list[str] = []  # what `printable` removes
# The options' values by name. Also `file` (path of ts3d.conf), `secrets` (the secrets' folder),
# `put_object` (texts by parameter), `tls` (an SSLContext or None) and `changed` (options that are
# not at their default, environment variables in effect).
Config = SimpleNamespace


def parse(kind: str, text: str, low: str = "0", high: str = "0") -> Any:
    """Return a text's value; a number must be from `low` to `high`. Raises ValueError."""
    if units := UNITS.get(kind):
        value = amount(text, units)
        if not amount(low, units) <= value <= amount(high, units):
            raise ValueError(f"not within {low} to {high}")
        return value if kind == "seconds" else int(value)
    pattern, meaning = KINDS[kind]
    if not fullmatch(pattern, text):
        raise ValueError(f"not {meaning}")
    return bool(fullmatch("(?i)yes|true|on|1", text)) if kind == "boolean" else text


def amount(text: str, units: dict[str, int]) -> float:
    """Return a number, multiplied by its unit. Raises ValueError."""
    match = fullmatch(r"(-?[0-9]{1,12}(?:\.[0-9]{1,6})?)([A-Za-z]?)", text)
    if not match or match[2] not in units:
        raise ValueError(f"not a number. Units: {' '.join(units).strip() or 'none'}")
    return float(match[1]) * units[match[2]]


def nearest(name: str, known: Any) -> str:
    """Return `. Did you mean …?` with the known name that is most like this one, or nothing."""
    import difflib  # only a misspelt option needs it, and its import is slow

    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f". Did you mean {close[0]}?" if close else ""


def load_config(path: str) -> Config:
    """Read and check the configuration file and the environment. Raises ConfigError."""
    sections, folder = read_ini(path), dirname(os.path.abspath(path))
    put_object = sections.pop(PUT_OBJECT, {})
    for name in filter(OWN_PARAMETERS.fullmatch, put_object):
        raise ConfigError(f"{path}: [{PUT_OBJECT}] {name}: ts3d sets this itself. Remove it")
    config = Config(file=path, tls=None, changed=[], put_object=put_object)
    config.secrets = join(folder, environ.get("CREDENTIALS_DIRECTORY") or "secrets")
    for option in OPTIONS:
        load_option(config, option, sections.get(option.section, {}))
    refuse_unknown(path, sections)
    config.base_url = (config.base_url or BASE_URLS[config.auth]).rstrip("/")
    state = environ.get("STATE_DIRECTORY", "")
    config.path = join(folder, config.path or join(state, "queue.db"))
    if config.tls_certificate or config.tls_key:
        load_tls(config)
    return config


def read_ini(path: str) -> Json:
    """Return the file's options by section. Raises ConfigError."""
    # No interpolation: keys contain `%`. No default section: its options would be in all others.
    parser = configparser.RawConfigParser(default_section="", empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keep upper case
    try:
        parser.read_string(read_text(path, path))
    except configparser.Error as error:
        # Its own text may quote the line, and so a secret.
        lines = ", ".join(re.findall("line[: ]+([0-9]+)", str(error)))
        raise ConfigError(
            f"{path}: line {lines}: write each `option = value` once, below a [section]"
        ) from None
    return {section: dict(parser[section]) for section in parser.sections()}


def read_text(path: str, where: str) -> str:
    """Return a file's text; `where` is what names the file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: {error}. Create {path} in UTF-8, or name another file, or run this as root"
        ) from None


def load_option(config: Config, option: Any, section: Json) -> None:
    """Set an option from environment, section (which loses it) or default. Raises ConfigError."""
    where = f"[{option.section}] {option.name}"
    variable = ENVIRONMENT.get(option.name, "")
    text = section.pop(option.name, None)
    file = section.pop(f"{option.name}_file", None) if option.secret else None
    if environ.get(variable):
        text, where = environ[variable], f"{where} (from {variable})"
    elif file is not None:
        if text is not None:
            raise ConfigError(
                f"{config.file}: {where} and {option.name}_file are both set. Remove one"
            )
        where = f"{where}_file = {file!r}"
        path = join(config.secrets, file)
        text = read_text(path, f"{config.file}: {where}").strip("\n")
    if option.name == "webhook_token" and text == "":  # every client would be admitted
        raise ConfigError(f"{config.file}: {where}: empty. Write a token there, or remove the line")
    if text and text != option.default:
        config.changed.append(where)
    value = text or option.default
    try:
        if value:
            refuse_quotes(value)
            value = parse(option.kind, value, option.low, option.high)
    except ValueError as error:
        shown = "" if option.secret else f" = {value!r}"
        raise ConfigError(f"{config.file}: {where}{shown}: {error}") from None
    setattr(config, option.name, value)
    if option.secret:  # a shorter one would match by chance, and so be revealed
        SECRETS.extend(re.findall(r"\S{8,}", value))


def refuse_quotes(text: str) -> None:
    """Raise ValueError for quotes and comments, which an INI file takes for parts of the value."""
    if fullmatch(r"(?s)\s*([\"']).*\1\s*|.*\s[#;].*", text):
        raise ValueError("a value has no quotes around it and no comment after it. Remove them")


def refuse_unknown(path: str, sections: Json) -> None:
    """Raise ConfigError for an unknown section or option: `load_option` has left none but those."""
    for section, names in sections.items():
        known = {option.name: option.section for option in OPTIONS}
        if section not in known.values():
            likely = nearest(section, [PUT_OBJECT, *known.values()])
            raise ConfigError(f"{path}: unknown section [{section}]{likely}")
        for name in names:
            likely = nearest(name, known)
            # What does not look like a name may be a secret's second line that is not indented.
            if not fullmatch("[A-Za-z_]{1,30}", name):
                name = "in a line that is not indented, or misspelt. Correct it"
            raise ConfigError(f"{path}: [{section}] unknown option {name}{likely}")


def require(config: Config, *names: str) -> None:
    """Raise ConfigError for the first of these options that is not set."""
    for option in OPTIONS:
        if option.name in names and not getattr(config, option.name):
            text = f"{config.file}: [{option.section}] {option.name} is not set. Set it there"
            if option.secret:
                text += f", or name a file in {config.secrets}: {option.name}_file = {option.name}"
            raise ConfigError(text)


def load_tls(config: Config) -> None:
    """Make `tls`, the context for tls_certificate and tls_key. Raises ConfigError."""
    require(config, "tls_certificate", "tls_key")
    certificate = join(config.secrets, config.tls_certificate)
    key = join(config.secrets, config.tls_key)
    config.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    config.tls.minimum_version = ssl.TLSVersion.TLSv1_2
    # After a connection's reading end was shut down, an answer can still be sent (OpenSSL 3).
    config.tls.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        # With a password an encrypted key fails, instead of asking the terminal for one.
        config.tls.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.file}: [server] tls_certificate = {certificate}, tls_key = {key}: {error}. "
            "Both must be PEM files: the certificate chain, and its key without a password"
        ) from None


# --------------------------------------------------------------------------------------------------
# Log

# The priorities in sd-daemon(3) for DEBUG (10) to CRITICAL (50), which journald reads
PRIORITIES = "?76432"


def start_log(lowest: str) -> None:
    """Log to standard error, from this level on."""
    handler = logging.StreamHandler()
    handler.format = log_line  # type: ignore[method-assign]
    # If the log cannot be written, the process must go on.
    logging.raiseExceptions = False
    # Other libraries from WARNING on: botocore's DEBUG lines have signatures and bodies.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(lowest.upper())


def log_line(record: logging.LogRecord) -> str:
    """Return a record as one line."""
    text = printable(record.getMessage())
    if in_journal():
        return f"<{PRIORITIES[record.levelno // 10]}>{text}"  # journald adds the time itself
    return f"{logging.Formatter().formatTime(record)} {record.levelname} {text}"


def printable(text: str) -> str:
    """Return `text` without secrets, which others may quote, and control characters."""
    for secret in sorted(SECRETS, key=len, reverse=True):  # one may contain another
        text = text.replace(secret, "***")
    control = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
    return re.sub(control, lambda match: f"\\x{ord(match[0]):02x}", text)


def in_journal() -> bool:
    """Return whether standard error is the journal. Source: systemd.exec(5), $JOURNAL_STREAM."""
    stat = os.fstat(2)
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def log_event(severity: int, message: str, **fields: Any) -> None:
    """Log a message and its fields, as `key=value` (logfmt); empty fields are left out."""
    for name, value in fields.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if re.search(r'[\s"=]', text):
            text = dumps(text, ensure_ascii=False)
        if value not in (None, ""):
            message += f" {name}={text}"
    log.log(severity, message)


debug = partial(log_event, logging.DEBUG)
info = partial(log_event, logging.INFO)
warning = partial(log_event, logging.WARNING)
log_error = partial(log_event, logging.ERROR)


def explain(error: BaseException) -> str:
    """Return an error in words; of an unexpected error also its lines in this file."""
    if isinstance(error, RuntimeError | ArgumentTypeError | OSError):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
    return f"internal error: {error!r} (lines {lines}). Report it"


# --------------------------------------------------------------------------------------------------
# Metrics: counted where it happens, shown by GET /metrics

# Name, type and help of each metric. Source: https://prometheus.io/docs/practices/naming/
METRICS = """\
ts3d_build_info gauge Always 1; the labels name versions.
ts3d_webhooks_total counter Webhooks answered, by HTTP status.
ts3d_alerts_received_total counter Alerts that came by webhook and were queued.
ts3d_alerts_archived_total counter Alerts archived in S3.
ts3d_alerts_rejected_total counter Invalid alerts in webhooks.
ts3d_alerts_failed_total counter Alerts marked failed.
ts3d_acknowledgement_seconds summary From a webhook's first byte until it is queued.
ts3d_archive_seconds summary From an alert's arrival until it is archived.
ts3d_retries_total counter Failed tries after which an alert is retried.
ts3d_upstream_unavailable gauge 1 while the upstream's circuit breaker is open.
ts3d_queue_depth gauge Alerts queued.
ts3d_queue_failed gauge Alerts marked failed and not retried yet.
ts3d_queue_oldest_age_seconds gauge Age of the oldest queued alert.
ts3d_queue_size_bytes gauge Bytes that queued and failed alerts take.
ts3d_queue_max_size_bytes gauge [queue] max_size.
ts3d_queue_disk_free_bytes gauge Free bytes for the queue; 503 below 16M.
process_start_time_seconds gauge Start time of the process since the epoch.
"""
QUEUE_METRICS = re.findall(r"(?m)^ts3d_queue\w+", METRICS)  # in the order of Queue.facts
STATUSES = "200 400 401 404 405 408 413 415 431 500 503".split()
# Values by sample, and by labels as Prometheus writes them.
METRIC_VALUES: Json = defaultdict(lambda: defaultdict(float))
METRICS_LOCK = Lock()


def add(name: str, amount: float = 1, label: str = "") -> None:
    """Add to a counter; `label` as Prometheus writes it."""
    with METRICS_LOCK:
        METRIC_VALUES[name][label] += amount


for code in STATUSES:  # a rate needs the 0 before the 1
    add("ts3d_webhooks_total", 0, f'{{status="{code}"}}')
for upstream in ("s3", "threatstack"):
    add("ts3d_retries_total", 0, f'{{upstream="{upstream}"}}')
add("ts3d_build_info", 1, f'{{version="{VERSION}",python="{sys.version.split()[0]}"}}')
add("process_start_time_seconds", time())


def metrics_text() -> str:
    """Return all metrics. Source: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    lines = []
    for line in METRICS.splitlines():
        name, kind, explanation = line.split(" ", 2)
        lines += [f"# HELP {name} {explanation}\n# TYPE {name} {kind}\n"]
        samples = [f"{name}_sum", f"{name}_count"] if kind == "summary" else [name]
        for sample in samples:
            values = METRIC_VALUES[sample] or {"": 0}
            for label, value in list(values.items()):
                lines.append(f"{sample}{label} {value:.15g}\n")
    return "".join(lines)


# --------------------------------------------------------------------------------------------------
# Webhook: from a body to jobs, each with its alert's own bytes


class Malformed(Exception):
    """A text that is not what was expected: member or place, and cause."""


@dataclass
class Job:
    """An alert to archive, or a rejected body. An invalid alert has an error.

    `minute` is YYYY/MM/DD/HH/MM in UTC. `source` says which objects it consists of, `step` which of
    them is next. `due` and `failed_at` are times of the monotonic clock, `received` and
    `error_since` seconds since the epoch. `failing` is seconds that count towards give_up_after. A
    job has no `body` once it is in the queue.
    """

    id: str
    minute: str
    source: str
    step: str
    body: bytes = b""
    number: int = 0
    received: float = 0
    due: float = 0
    tries: int = 0
    failing: float = 0
    failed_at: float = 0
    error_type: str | None = None
    error_message: str | None = None
    error_since: float | None = None
    failed: bool = False
    done: bool = False  # archived: delete it
    probe: bool = False  # it may call an upstream whose circuit breaker is open

    @property
    def lane(self) -> str:
        """Return what the column `lane` says: jobs of one lane are taken in the order of `due`."""
        if self.step in ("webhooks", "rejected"):
            return "store"
        return "backfill" if self.source == "backfill" else "detail"


def refuse_constant(name: str) -> None:
    """Refuse NaN, Infinity and -Infinity, which Python's parser accepts."""
    raise ValueError(f"{name} is not a JSON number (RFC 8259, section 6)")


# An object becomes a tuple of its members: a dict would hide a member that is there twice. Numbers
# become floats: int() of 100,000 digits takes long.
JSON = JSONDecoder(object_pairs_hook=tuple, parse_int=float, parse_constant=refuse_constant)
# Between the values of a text that is known to be JSON.
SEPARATORS = re.compile(r"[ \t\n\r,:]*")
CONSTANT = re.compile(r'"([^"\\]{1,60})"[ \t\r\n]{0,9}:[ \t\r\n]{0,9}(?:NaN|-?Infinity)')
PARSING = Lock()  # one text at a time: hostile JSON takes 25 times its size
MAX_ALERTS = 10_000  # in one webhook: each takes memory, and a place in the answer
ALERT_ID = re.compile(r"[A-Za-z0-9_-]{4,128}")
# A smaller `created_at` is seconds, not milliseconds: 10^11 ms is in 1973.
SECONDS_BELOW = 10**11
YEAR_10000 = 253_402_300_800  # seconds


def read_json(body: bytes) -> tuple[str, Any]:
    """Return a JSON text (RFC 8259), stripped, and its value. Raises Malformed."""
    try:
        text = body.decode()
        return text.strip(" \t\n\r"), JSON.decode(text)
    except UnicodeDecodeError as error:
        raise Malformed(f"not JSON: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise Malformed("not JSON that ts3d reads: nested too deeply") from None
    except ValueError as error:
        match = CONSTANT.search(text)
        member = f"{match[1]}: " if match else ""
        raise Malformed(f"not JSON: {member}{error}") from None


def literals(text: str) -> Iterator[tuple[Any, str]]:
    """Yield value and literal text of each element of an array, or name and value of an object.

    `text` is known to be JSON. The json module returns values, but not where they were.
    """
    end = 1
    while text[at := SEPARATORS.match(text, end).end()] not in "]}":  # type: ignore[union-attr]
        value, end = JSON.raw_decode(text, at)
        yield value, text[at:end]


def literal_of(text: str, wanted: str) -> str:
    """Return the literal text of a member's value; the object is known to have the member."""
    parts = literals(text)  # names and values in turn
    pairs = zip(parts, parts, strict=True)
    return next(literal for (name, _), (_, literal) in pairs if name == wanted)


def read_webhook(body: bytes) -> list[Job]:
    """Read `{"alerts": [ALERT, …]}` or one bare ALERT, each alert by itself. Raises Malformed."""
    text, value = read_json(body)
    if not isinstance(value, tuple):
        raise Malformed("neither an object with `alerts` nor an alert")
    names, members = [name for name, _ in value], dict(value)
    try:
        if "alerts" not in names:
            return [read_alert(text, value)]
        if "id" in names and "created_at" in names:
            raise Malformed("alerts: beside id and created_at. Send one alert, or a list")
        if not isinstance(members["alerts"], list):
            raise Malformed("alerts: not a list")
        if len(members["alerts"]) > MAX_ALERTS:
            raise Malformed(f"alerts: over {MAX_ALERTS}. Send fewer at once")
        if names.count("alerts") > 1:
            raise Malformed("alerts: there twice")
        return [
            read_alert(literal, alert, f"alerts[{i}]")
            for i, (alert, literal) in enumerate(literals(literal_of(text, "alerts")))
        ]
    # At one exact depth the whole can be read, and its parts cannot.
    except RecursionError:
        raise Malformed("not JSON that ts3d reads: nested too deeply") from None


def read_alert(
    text: str, alert: Any, place: str = "", time_name: str = "created_at", source: str = "webhooks"
) -> Job:
    """Return the job of one alert, given as text and value; if it is invalid, with an error.

    `place` says where it is, `time_name` names the member with its time.
    """
    job = Job("", "", source, source, text.encode())
    job.error_type, job.error_message = "invalid_alert", f"{place}: not an object"
    if not isinstance(alert, tuple):
        return job
    names, members, cause = [name for name, _ in alert], dict(alert), ""
    if isinstance(members.get("id"), str):
        job.id = members["id"][:200]
    for name in ("id", time_name):
        try:
            if names.count(name) != 1:
                cause = "there twice" if name in names else "missing"
            elif name == time_name:
                job.minute = minute_of(read_time(members[name]))
            elif not ALERT_ID.fullmatch(job.id):
                raise ValueError("is not 4 to 128 of A-Z a-z 0-9 _ -")
        except ValueError as error:
            cause = f"{printable(literal_of(text, name)[:60])} {error}"
        if cause:
            job.error_message = f"{place}.{name}: {cause}".lstrip(".")
            return job
    job.error_type = job.error_message = None
    return job


def read_time(value: Any) -> float:
    """Return the seconds since the epoch that `created_at` says. Raises ValueError.

    It is a number or a string of digits, in milliseconds or, below 10^11, in seconds; or an ISO
    8601 time, which is UTC if it names no zone.
    """
    if isinstance(value, str) and fullmatch("[0-9]+", value):
        value = float(value)
    if isinstance(value, float) and value >= SECONDS_BELOW:
        value /= 1000
    if isinstance(value, str) and re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}.", value):
        # RFC 3339, 5.7: a leap second
        text = re.sub("(:[0-9]{2}):60", r"\1:59", value.upper())
        with suppress(ValueError):
            moment = datetime.fromisoformat(text)
            value = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    if not isinstance(value, float):
        raise ValueError("is not an ISO 8601 time such as 2026-11-24T18:00:07Z")
    if not 0 <= value < YEAR_10000:
        raise ValueError("is not within the years 1970 to 9999")
    return value


def minute_of(moment: float) -> str:
    """Return YYYY/MM/DD/HH/MM in UTC, of seconds since the epoch."""
    return f"{datetime.fromtimestamp(moment // 60 * 60, UTC):%Y/%m/%d/%H/%M}"


# --------------------------------------------------------------------------------------------------
# Queue: what was acknowledged and is not archived yet, in one SQLite file

MIN_DISK_FREE = 16 << 20  # bytes that webhooks leave free: room to drain the queue
WAL_SIZE = 4 << 20  # bytes of write-ahead log after which it is copied into the file
LOCK_TIMEOUT = 5.0  # seconds to wait for another process's transaction
MAX_TAKEN = 10_000  # jobs whose outcome is not on disk, after which no more are taken
KNOWN_FAILURES = {  # text and type of a QueueError, by SQLite's name
    "SQLITE_BUSY": (
        "another program holds the queue's lock. Find it with fuser -v and end it",
        "queue_locked",
    ),
    "SQLITE_FULL": (
        "the queue's disk has less than 16M free; webhooks get 503. Free some space",
        "disk_full",
    ),
}
Write = Callable[[Connection], Any]  # a part of a transaction; returns its result


class QueueError(RuntimeError):
    """The queue cannot be read or written now; `type` is that of the problem in `status`."""

    def __init__(self, text: str, type_: str = "queue_unwritable"):
        super().__init__(text)
        self.type = type_


class Queue:
    """Jobs in a SQLite file.

    `put` and `retry` return once their change is on disk: after the commit, with `synchronous =
    FULL`. A job's outcome (`settle`) stays in memory, where `take` finds the job, until a commit
    succeeds. So a full disk stops the archive only after MAX_TAKEN jobs. One thread writes
    (`_write_all`): waiting writes share a transaction and an fsync. Dispatcher, workers and HTTP
    threads read, by `read`; so do commands, which have a writer of their own. A taken job is only
    remembered in memory: after a crash it is due again.

    `facts` for `status --json`, /healthz and /metrics are of the last look, at most a second ago.
    """

    SCHEMA = """
        CREATE TABLE jobs (
            number INTEGER PRIMARY KEY AUTOINCREMENT, -- order of arrival, never used again
            id TEXT NOT NULL,
            minute TEXT NOT NULL,
            source TEXT NOT NULL,
            step TEXT NOT NULL,
            received REAL NOT NULL,
            due REAL NOT NULL DEFAULT 0,
            tries INTEGER NOT NULL DEFAULT 0,
            failing REAL NOT NULL DEFAULT 0,
            failed_at REAL NOT NULL DEFAULT 0,
            failed INTEGER NOT NULL DEFAULT 0,
            error_type TEXT,
            error_message TEXT,
            error_since REAL,
            lane TEXT AS (CASE WHEN step IN ('webhooks', 'rejected') THEN 'store'
                WHEN source = 'backfill' THEN 'backfill' ELSE 'detail' END),
            body BLOB NOT NULL);
        CREATE INDEX jobs_by_id ON jobs (id);
        CREATE INDEX jobs_by_lane ON jobs (lane, due) WHERE failed = 0;
        CREATE INDEX jobs_by_age ON jobs (received) WHERE failed = 0;
        CREATE INDEX jobs_by_error ON jobs (error_type, failed) WHERE error_type IS NOT NULL;
        CREATE TABLE counts (queued INTEGER NOT NULL, failed INTEGER NOT NULL);
        INSERT INTO counts VALUES (0, 0);
        CREATE TRIGGER jobs_insert AFTER INSERT ON jobs BEGIN
            UPDATE counts SET queued = queued + 1 - new.failed, failed = failed + new.failed; END;
        CREATE TRIGGER jobs_delete AFTER DELETE ON jobs BEGIN
            UPDATE counts SET queued = queued - 1 + old.failed, failed = failed - old.failed; END;
        CREATE TRIGGER jobs_update AFTER UPDATE OF failed ON jobs WHEN old.failed <> new.failed
        BEGIN
            UPDATE counts SET queued = queued + old.failed - new.failed,
                failed = failed + new.failed - old.failed; END;
        CREATE TABLE notes (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
        PRAGMA user_version = 2;"""
    # The monotonic clock of an earlier process means nothing. If the bucket or prefix has changed,
    # each queued alert is archived there as a whole, not split between the two.
    START = """
        UPDATE jobs SET due = 0, failed_at = 0 WHERE failed = 0 AND due > 0;
        UPDATE jobs SET step = source
            WHERE :place <> (SELECT value FROM notes WHERE name = 'place');
        INSERT OR REPLACE INTO notes VALUES ('place', :place)"""
    # The file's free pages are room: it does not shrink when the queue has been drained.
    LOOK = """SELECT queued, failed, round(max(0, :now - coalesce(
            (SELECT min(received) FROM jobs WHERE failed = 0), :now)), 3) AS oldest_seconds,
        (page_count - freelist_count) * page_size + :excess AS queue_bytes,
        :max_size AS max_bytes, :disk + freelist_count * page_size AS disk_free_bytes
        FROM counts, pragma_page_count, pragma_freelist_count, pragma_page_size"""
    WRITE_A_PAGE = "PRAGMA user_version = 2"  # shows whether the disk takes writes
    # Only the newest job of an id: of the bodies A, B, A the last A must come last.
    SAME = """SELECT number FROM jobs WHERE id = :id AND (:source = 'backfill' OR (body = :body
        AND number = (SELECT max(number) FROM jobs WHERE id = :id)))"""
    INSERT = """INSERT INTO jobs (id, minute, source, step, received, body)
        VALUES (:id, :minute, :source, :step, :received, :body)"""
    UPDATE = """UPDATE jobs SET step = :step, due = :due, tries = :tries, failing = :failing,
        failed_at = :failed_at, failed = :failed, error_type = :error_type,
        error_message = :error_message, error_since = :error_since WHERE number = :number"""
    RETRY = """UPDATE jobs SET failed = 0, due = 0, tries = 0, failing = 0,
        failed_at = 0, error_type = NULL WHERE failed = 1 AND (id = :id OR :id = '')"""
    # Of two jobs with one id at one step the later waits, so that the later body overwrites.
    TAKE = """SELECT number, id, minute, source, step, received, due, tries, failing,
        failed_at, error_type, error_message, error_since FROM jobs
        WHERE failed = 0 AND lane = ? AND due <= ?
        AND number NOT IN (SELECT value FROM json_each(?)) AND NOT EXISTS (
            SELECT 1 FROM jobs AS other WHERE other.id = jobs.id AND other.failed = 0
            AND other.step = jobs.step AND other.number < jobs.number)
        ORDER BY due, number LIMIT ?"""
    DELETE = "DELETE FROM jobs WHERE number = :number"
    ERRORS = """SELECT number, error_type, error_message, 0 AS done FROM jobs
        WHERE number IN (SELECT value FROM json_each(?))"""
    QUEUED = "SELECT id FROM jobs WHERE failed = 0 AND id = ?"
    # SQLite takes the bare columns from the row that min() finds.
    PROBLEMS = """SELECT error_type AS type, error_message AS message,
        strftime('%Y-%m-%dT%H:%M:%fZ', min(error_since), 'unixepoch') AS since,
        sum(failed = 0) AS queued, sum(failed) AS failed, id AS alert FROM jobs
        WHERE error_type IS NOT NULL GROUP BY error_type"""
    FAILED = """SELECT json_object('id', id,
        'received', strftime('%Y-%m-%dT%H:%M:%fZ', received, 'unixepoch'), 'tries', tries,
        'error', json_object('type', error_type, 'message', error_message,
            'since', strftime('%Y-%m-%dT%H:%M:%fZ', error_since, 'unixepoch')))
        FROM jobs WHERE failed = 1 ORDER BY number"""
    # Errors from which SQLite recovers by itself. Any other ends the process; so does a failed
    # unlock: until the file is closed, SQLite believes that it holds the lock.
    RECOVERABLE = re.compile(
        "SQLITE_(FULL|BUSY|LOCKED|CANTOPEN|NOMEM|READONLY(?!_DBMOVED)|IOERR(?!_UNLOCK|_CORRUPTFS))"
        "|OSError"
    )

    def __init__(self, path: str, max_size: int, place: str = ""):
        """Open the queue; with `place` (the daemon) create it and keep other daemons out.

        `place` is where alerts are archived. Raises ConfigError if the queue cannot be opened.
        """
        self.path, self.max_size, self.place = path, max_size, place
        self.error: QueueError | None = None  # why the last transaction failed
        self._lock = RLock()  # for _reader and _taken
        # Jobs whose state is not on disk, by number: None while a worker has the job, then its
        # outcome.
        self._taken: dict[int, Job | None] = {}
        self._inbox: deque[tuple[Write, Future[Any]]] = deque()
        self._wake = Event()
        self._closing = False
        self._proved_at = -inf  # when a request was written last, monotonic clock
        self._inodes: list[int] = []
        try:
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"[queue] path = {path} cannot be written: {error}. If there is no queue yet, "
                "start the daemon to create it. Or name a file that this user may write, on a "
                "local disk with 16M free"
            ) from None
        self.writer = start_thread("queue", self._write_all)

    def _open(self) -> None:
        """Open the connections. Raises ConfigError, OSError, sqlite3.Error."""
        if self.place:
            # Not SQLite's file: closing any descriptor of that would drop SQLite's locks.
            self._lock_file = create_file(self.path + ".lock")
            deadline = monotonic() + 1  # `running` of another process holds it briefly
            while not try_lock(self._lock_file, fcntl.LOCK_EX):
                if monotonic() > deadline:
                    text = "another `ts3d serve` uses this queue. Stop that one first"
                    raise ConfigError(f"[queue] path = {self.path}: {text}")
                sleep(0.01)
            create_file(self.path).close()
            self._recover()
        self._db = connect(self.path)
        version, tables = self._db.execute(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        ).fetchone()
        if version != 2 and (version or tables or not self.place):
            raise ConfigError(
                f"[queue] path = {self.path} is not ts3d's, or has another version ({version}, not "
                "2). Name another, or drain this one with the ts3d that made it, then remove it"
            )
        if self.place:
            self._db.execute("PRAGMA journal_mode = WAL").close()
            if not tables:
                self._db.executescript(f"BEGIN; {self.SCHEMA} COMMIT;")
            for statement in self.START.split(";"):
                self._db.execute(statement, {"place": self.place})
        self._reader, self._checkpointer = connect(self.path), connect(self.path)
        self._look()

    def _recover(self) -> None:
        """Move a malformed file aside. Raises OSError, sqlite3.Error."""
        problem = quick_check(self.path)
        if problem:
            # A disk that fails may look like a malformed file. So each byte must be readable.
            with open(self.path, "rb") as file:
                while file.read(1 << 20):
                    pass
            problem = quick_check(self.path)
        if not problem:
            return
        kept = f"{self.path}.malformed-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        # The -wal first: after a crash in between a new file must not meet an old log.
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                os.rename(self.path + suffix, kept + suffix)
        create_file(self.path).close()
        log_event(
            logging.CRITICAL,
            "the queue was malformed and was moved aside; alerts in it are not archived. Read them "
            "with `sqlite3 FILE .dump`, then run `ts3d backfill`",
            file=kept,
            cause=problem,
        )

    # Writing --------------------------------------------------------------------------------------

    def put(self, jobs: list[Job]) -> None:
        """Queue these durably, all or none; set their `number` and drop `body`. Raises QueueError.

        The same id with the same bytes is one job; if that failed, it is retried. What backfill
        found is not queued beside a job of the same id.
        """
        length = sum(len(job.body) for job in jobs)

        def write(db: Connection) -> None:
            self._require_room(length)
            self.facts["queue_bytes"] += length
            for job in jobs:
                job.received = time()
                same = db.execute(self.SAME, vars(job)).fetchone()
                new = db.execute(self.RETRY if same else self.INSERT, vars(job))
                job.number, job.body = int(same[0] if same else new.lastrowid or 0), b""

        self._write(write)

    def retry(self, id_: str = "") -> int:
        """Retry the failed alerts of this id, or all; return how many. Raises QueueError."""
        return int(self._write(lambda db: db.execute(self.RETRY, {"id": id_}).rowcount))

    def backfilled(self, until: float = 0.0) -> float:
        """Return or set the time until which backfill is done (0: never). Raises QueueError."""
        if until:
            note = "INSERT OR REPLACE INTO notes VALUES ('backfilled', ?)"
            self._write(lambda db: db.execute(note, (until,)))
        rows = self.read("SELECT value FROM notes WHERE name = 'backfilled'")
        return float(rows[0]["value"] if rows else 0)

    def settle(self, job: Job) -> None:
        """Write a taken job's outcome with the next commit. Does not wait for that commit."""
        with self._lock:
            self._taken[job.number] = job
        if len(self._taken) >= 100:
            self._wake.set()

    def require_writable(self) -> None:
        """Write a page, at most once a second. Raises QueueError if webhooks are refused."""
        self._require_room(0)
        if error := self.error:
            raise QueueError(str(error), error.type)
        if monotonic() - self._proved_at > 1:
            self._write(lambda db: db.execute(self.WRITE_A_PAGE))

    def _require_room(self, length: int) -> None:
        """Raise QueueError unless there is room for `length` bytes."""
        size, hint = self.facts["queue_bytes"], ""
        if self._wal > 2 * WAL_SIZE:
            hint = (
                ". Another program reads the queue and so keeps its write-ahead log of "
                f"{self._wal} bytes from being emptied. End that program"
            )
        if size + max(length, min(64 << 10, self.max_size // 16)) > self.max_size:
            raise QueueError(
                f"the queue is full: {size} of [queue] max_size = {self.max_size} bytes. Correct "
                f"what ts3d status shows, or raise max_size{hint}",
                "queue_full",
            )
        if self.facts["disk_free_bytes"] < MIN_DISK_FREE + length:
            raise QueueError(*KNOWN_FAILURES["SQLITE_FULL"])

    def _write(self, write: Write) -> Any:
        """Have `write` take part in the next transaction; return its result. Raises QueueError."""
        future: Future[Any] = Future()
        self._inbox.append((write, future))
        self._wake.set()
        return future.result()

    def _write_all(self) -> None:
        """Commit what waits, until the queue is closed. The writer thread."""
        closing = False
        while not closing:
            expect_progress_within(LONGEST_TURN)
            self._wake.wait(0.25)
            self._wake.clear()
            closing = self._closing  # read first: what came before `close` is written
            requests = []
            while self._inbox:
                requests.append(self._inbox.popleft())
            # Without them it looks at the disk, and at what other processes wrote.
            if requests or self._taken or not closing:
                self._commit(requests)
        with self._lock:
            for db in (self._reader, self._checkpointer, self._db):
                db.close()

    def _commit(self, requests: list[tuple[Write, Future[Any]]]) -> None:
        """Write all outcomes and requests in one transaction."""
        with self._lock:
            outcomes = [job for job in self._taken.values() if job]
        results = []
        try:
            self._begin()
            with self._db:  # commits, or rolls back
                for job in outcomes:
                    self._db.execute(self.DELETE if job.done else self.UPDATE, vars(job))
                for write, future in requests:
                    try:
                        results.append((future, write(self._db)))
                    except QueueError as error:  # refused before it changed anything
                        future.set_exception(error)
                # After an error this shows whether it has passed; after a checkpoint it begins the
                # log anew, or a queue that is full because of its log would stay full.
                if self.error or self._wal > WAL_SIZE:
                    self._db.execute(self.WRITE_A_PAGE)
            self._look()
            with self._lock:
                for job in outcomes:
                    if self._taken[job.number] is job:  # not taken again meanwhile
                        del self._taken[job.number]
            if self.error:
                warning("queue recovered")
            self.error = None
            for future, result in results:
                future.set_result(result)
            self._checkpoint()
        except Exception as error:  # whatever it is, the requests must learn of it
            failure = self._failure(error)
            for _, future in requests:
                if not future.done():  # an exception of its own for each thread
                    future.set_exception(QueueError(str(failure), failure.type))
        if requests:
            self._proved_at = monotonic()

    def _begin(self) -> None:
        """Begin a transaction that writes, once no other process is in one. Raises sqlite3.Error.

        SQLite's own busy handler waited 7.4 s beside a process that commits without a pause.
        """
        deadline = monotonic() + LOCK_TIMEOUT
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY" or monotonic() > deadline:
                    raise
            sleep(random.uniform(0.0005, 0.003))

    def _checkpoint(self) -> None:
        """Copy a large write-ahead log into the file. Raises sqlite3.Error.

        Only the daemon does, while it holds the write lock: SQLite before 3.51.3 can lose a commit
        that races with another process's checkpoint. https://sqlite.org/wal.html#walresetbug
        """
        if self.place and self._wal > WAL_SIZE:
            self._begin()
            with self._db:
                self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").close()

    def _failure(self, error: Exception) -> QueueError:
        """Note and log an error of SQLite or the disk, and return it as QueueError."""
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        text = f"the queue cannot be written: {error} ({name}). Check its disk"
        failure = QueueError(*KNOWN_FAILURES.get(name, (text,)))
        if not self.RECOVERABLE.match(name):
            FATAL.append(failure)
        if not self.error:
            log_error("queue unavailable, webhooks get 503", error=failure)
        self.error = failure
        return failure

    def _look(self) -> None:
        """Read counts and sizes. Raises QueueError, OSError, sqlite3.Error."""
        inodes = [os.stat(self.path + suffix).st_ino for suffix in ("", "-wal", "-shm")]
        self._inodes = self._inodes or inodes
        # An open file outlives its name: after a restart nothing would find what is in it.
        if inodes != self._inodes:
            raise QueueError(
                f"{self.path}, or its -wal or -shm, was replaced. Find the program that did it"
            )
        self._wal = os.path.getsize(self.path + "-wal")
        values = {
            "now": time(),
            "excess": max(0, self._wal - 2 * WAL_SIZE),
            "max_size": self.max_size,
            "disk": shutil.disk_usage(self.path).free,
        }
        self.facts: dict[str, float] = dict(self._db.execute(self.LOOK, values).fetchone())

    # Reading --------------------------------------------------------------------------------------

    def read(self, sql: str, *values: Any) -> list[Any]:
        """Return all rows: an unfinished statement would stop checkpoints. Raises QueueError."""
        with self._lock:
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._failure(error) from None

    def take(self, lane: str, n: int) -> list[Job]:
        """Take up to `n` jobs that are due, in the order of `due`. Raises QueueError.

        Jobs whose last outcome is not on disk yet come last.
        """
        with self._lock:
            now, jobs = monotonic(), []
            if len(self._taken) < MAX_TAKEN:
                rows = self.read(self.TAKE, lane, now, dumps(list(self._taken)), n)
                jobs = [Job(**row) for row in rows]
            jobs += [
                replace(job, probe=False)
                for job in self._taken.values()
                if job and job.lane == lane and job.due <= now and not (job.done or job.failed)
            ]
            for job in jobs[:n]:
                self._taken[job.number] = None
            return jobs[:n]

    def refresh(self, jobs: list[Job]) -> None:
        """Set `done` and the last error of jobs that were put. Raises QueueError."""
        with self._lock:
            rows = self.read(self.ERRORS, dumps([job.number for job in jobs]))
            queued = {row["number"]: SimpleNamespace(**row) for row in rows}
            for job in jobs:
                now = self._taken.get(job.number) or queued.get(job.number)
                job.done = not now or now.done
                if now:
                    job.error_type, job.error_message = now.error_type, now.error_message

    def problems(self) -> list[Json]:
        """Return current problems: `type`, `message`, `since`, `queued`, `failed`, `alert`.

        They come from the jobs' last errors, and from a test of room and lock. Raises QueueError.
        """
        found = []
        if not running(self.path):
            text = "the daemon is not running. Run systemctl start ts3d.socket ts3d.service"
            found.append({"type": "not_running", "message": text})
        try:
            self.require_writable()
        except QueueError as error:
            found.append({"type": error.type, "message": str(error)})
        return found + [dict(row) for row in self.read(self.PROBLEMS)]

    def close(self) -> None:
        """Write what waits, and close."""
        self._closing = True
        self._wake.set()
        # A disk that hangs is left alone: what was acknowledged is on it.
        self.writer.join(3)


def connect(path: str) -> Connection:
    """Open a connection to an existing file. Raises sqlite3.Error."""
    uri = f"file:{quote(path)}?mode=rw"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0)
    db.row_factory = sqlite3.Row
    # A commit is on disk when it returns. `_checkpoint` does what SQLite would do by itself. The
    # SELECT opens the write-ahead log: without it a connection's checkpoint does nothing.
    db.executescript(
        "PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0; "
        f"PRAGMA journal_size_limit = {WAL_SIZE}; SELECT count(*) FROM sqlite_master;"
    )
    return db


def quick_check(path: str) -> str:
    """Return what SQLite finds malformed, or nothing. Raises sqlite3.Error for anything else."""
    try:
        with closing(connect(path)) as db:
            (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
            return str(result).removeprefix("ok")
    except sqlite3.Error as error:
        if re.match("SQLITE_(CORRUPT|NOTADB)", error.sqlite_errorname):
            return str(error)
        raise


def running(path: str) -> bool:
    """Return whether a daemon uses the queue with this path."""
    with suppress(OSError), open(path + ".lock", "rb") as file:
        return not try_lock(file, fcntl.LOCK_SH)
    return False


def try_lock(file: Any, how: int) -> bool:
    """Lock a file as flock(2) does, and return whether that worked. Raises OSError."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def create_file(path: str) -> Any:
    """Create a file of the queue if it is missing, for its owner alone; open it. Raises OSError.

    If root creates it, it is given to the folder's owner, the service's user. SQLite gives its
    -wal and -shm the same owner.
    """
    with suppress(FileExistsError):  # O_EXCL follows no link that the owner could make
        file = os.open(path, os.O_CREAT | os.O_EXCL, 0o600)
        folder = os.stat(dirname(path))
        if os.geteuid() == 0:
            os.chown(file, folder.st_uid, folder.st_gid)
        os.close(file)
    return open(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "rb")


# --------------------------------------------------------------------------------------------------
# Circuit breaker: what an error says of its upstream, and what follows

MAX_PROBE_PAUSE = 8.0  # seconds at most between probes of an unavailable upstream
MAX_RETRY_PAUSE = 15 * 60.0  # seconds at most between tries of an alert
MAX_RETRY_AFTER = 3600.0  # seconds for which Retry-After is believed
SLOW_CALL = 5.0  # seconds: a name may have several addresses, and the first be dead
TITLES = {"s3": "S3", "threatstack": "Threat Stack"}
# Types of errors, as regular expressions: after these it is unknown whether the upstream works.
UNKNOWN = (
    "threatstack_(timeout|broken_off|bad_answer)|s3_(ReadTimeoutError|ConnectionClosedError|"
    "RequestTimeout|ResponseStreamingError|IncompleteReadError|ResponseParserError|BadDigest|"
    "bad_answer)"
)
CREDENTIALS = (
    "s3_(NoCredentialsError|PartialCredentialsError|CredentialRetrievalError|ProfileNotFound|"
    "ConfigParseError|InvalidConfigError|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|"
    "ExpiredToken|InvalidClientTokenId|MetadataRetrievalError)"
)
# What to do, by a regular expression for type and text of an error; the first that matches counts.
ADVICE = re.findall(
    r"(?m)^(\S+)\n +(.+(?:\n +.+)*)",
    f"""
s3_.*CERTIFICATE_VERIFY_FAILED
    Check this machine's clock. For a private CA name its PEM file in AWS_CA_BUNDLE
.*CERTIFICATE_VERIFY_FAILED
    Check this machine's clock. For a private CA name its PEM file in SSL_CERT_FILE
{CREDENTIALS}
    Check the AWS credentials: the instance's role, or secrets/aws_credentials. For a role
    behind a proxy set NO_PROXY=169.254.169.254
threatstack_unauthorized
    Check [threatstack] api_key, then restart ts3d; for a v2 key set auth = hawk, user_id and
    organization_id, and check this machine's clock
threatstack_forbidden
    Allow [threatstack] api_key to read alerts
threatstack_(not_found|wrong_detail|bad_answer)
    The API may lag. If every alert fails, check [threatstack] base_url
threatstack_rate_limited
    No action needed: ts3d waits as long as the API asks
s3_403
    Check [s3] endpoint_url. Allow s3:PutObject and, for backfill, s3:GetObject and
    s3:ListBucket; see README.md
s3_AccessDenied
    Allow s3:PutObject on the bucket's objects, and its KMS key; see README.md
s3_(NoSuchBucket|InvalidBucketName)
    Correct [s3] bucket
s3_RequestTimeTooSkewed
    Set this machine's clock: timedatectl set-ntp yes
s3_NotImplemented
    Use a store that accepts SHA-256 checksums (x-amz-checksum-sha256)
s3_KMS
    Check SSEKMSKeyId and its key policy: an enabled symmetric key in the same region
s3_(InvalidRequest|InvalidArgument|InvalidStorageClass)
    Check [s3:put_object]; for Object Lock prefer the bucket's default retention
.*Proxy|[a-z0-9]+_407
    Check the proxy that HTTPS_PROXY or HTTP_PROXY names
{UNKNOWN}|[a-z0-9]+_(5..|SlowDown|InternalError|ServiceUnavailable)
    No action needed: ts3d retries. If it lasts, check the network, [s3] endpoint_url and
    [threatstack] base_url
s3_
    Check [s3] endpoint_url and region, DNS, firewall and proxy
threatstack_
    Check [threatstack] base_url, DNS, firewall and proxy
""",
)


def kind_of_error(type_: str, status: int) -> str:
    """Return what an upstream's error says; `status` is HTTP's, 0 if there was no answer.

    | kind        | errors                                     | what follows                     |
    |-------------|--------------------------------------------|----------------------------------|
    | unavailable | no connection, 401, 403, 407, 429; of S3   | the circuit breaker opens        |
    |             | every refusal but those below              |                                  |
    | failing     | 408, 5xx, time-outs, answers that break    | the second in a row, of whatever |
    |             | off, redirects of Threat Stack             | alert, opens it                  |
    | alert       | other 4xx and bad answers of Threat Stack; | this alert waits; the upstream   |
    |             | 409 of S3 (a conflict on one key)          | works                            |
    """
    s3 = type_.startswith("s3_")
    if s3 and status == 409:
        return "alert"
    if status >= 500 or status == 408 or re.match(UNKNOWN, type_):
        return "failing"
    if s3 or status in (0, 401, 403, 407, 429):
        return "unavailable"
    return "failing" if 300 <= status < 400 else "alert"


def advice(error: str) -> str:
    """Return what an administrator should do about an upstream's error, given type and text."""
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        file = environ.get(name, "")
        if file and (not exists(file) or "X509" in error):
            return f"{name} names {file}, which is missing or has no certificate. Correct it"
    advised = [text for pattern, text in ADVICE if re.match(pattern, error, re.DOTALL)]
    return " ".join(advised[0].split())


class UpstreamError(RuntimeError):
    """A failed call: `type`, `kind`, `retry_after` (seconds), and a text with an instruction."""

    def __init__(self, upstream: str, cause: Any, text: str, status: int = 0, headers: Any = None):
        self.type = f"{upstream}_{re.sub('[^A-Za-z0-9]', '_', str(cause))[:60]}"
        self.upstream, self.status = upstream, status
        self.kind = kind_of_error(self.type, status)
        self.retry_after = retry_after(headers or {})
        # A secret that is cut before it is found would show its beginning.
        what = printable(text)[:400].rstrip(".")
        super().__init__(f"{TITLES[upstream]}: {what}. {advice(f'{self.type} {text}')}")


def retry_after(headers: Any) -> float:
    """Return seconds from Retry-After (RFC 9110, 10.2.3), or x-rate-limit-reset (milliseconds)."""
    after, reset = headers.get("retry-after", ""), headers.get("x-rate-limit-reset", "")
    pauses = [0.0, -(skew_of(after) or 0.0)]
    for text, unit in ((after, 1), (reset, 1000)):
        if fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", text):
            pauses.append(float(text) / unit)
    return min(max(pauses), MAX_RETRY_AFTER)


def skew_of(date: str | None) -> float | None:
    """Return the seconds by which this clock is ahead of an HTTP date (RFC 9110, 5.6.7)."""
    with suppress(ValueError, TypeError, OverflowError):
        moment = parsedate_to_datetime(date or "")
        return time() - moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    return None


def proxy_of(target: str) -> str:
    """Return ` through proxy URL`, without a password, if the environment names one for a URL."""
    parts = urlsplit(target)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname or ""):
        return ""
    return " through proxy " + re.sub("//[^/]*@", "//", proxy)


def backoff(tries: int, low: float, high: float) -> float:
    """Return seconds until the next try: exponential with full jitter, from `low` to `high`.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return random.uniform(low, min(high, 2.0 ** min(tries, 20)))


class CircuitBreaker:
    """Decides whether an upstream may be called: closed, open, or half-open (one call probes).

    `kind_of_error` says which errors open it. While it is open, one job may call the upstream every
    1 to 8 s, or after Retry-After: the probe. It is the job that is due first, and a job that
    failed is due later than others. So one alert that always fails cannot stop the others. A probe
    of S3 is one put, at most two requests. If only jobs of the detail pool are due, a call to the
    API precedes it.
    """

    name = "upstream"

    def __init__(self, config: Config):
        self.config = config
        self.date: str | None = None  # HTTP's Date of the last answer
        self.error = partial(UpstreamError, self.name)
        # The error that opened it; None while it is closed.
        self.open_for: UpstreamError | None = None
        # Times of the monotonic clock.
        self.probe_at = self.worked_at = self._retry_at = 0.0
        self._opened_at = 0.0  # 0: closed
        self._failures = 0  # in a row; while open, failed probes
        self._breaker_lock = Lock()

    def allowance(self, n: int) -> int:
        """Return how many of `n` calls may begin now."""
        if not self.open_for:
            return n
        return min(n, int(monotonic() >= self.probe_at))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function`, and learn from the result. Raises UpstreamError."""
        started = monotonic()
        try:
            result = function(*args)
        except UpstreamError as error:
            self.failure(error, started)
            raise
        self.success(started)
        took = monotonic() - started
        debug(f"{self.name} {function.__name__}", of=args[0], seconds=took)
        if took > SLOW_CALL:
            warning(f"{self.name} is slow. Check that every address of its host name answers")
        return result

    def success(self, started: float) -> None:
        """Learn that a call succeeded that began at `started` (monotonic clock)."""
        with self._breaker_lock:
            self.worked_at = monotonic()
            # A call that began before the opening says nothing: a rate limit may have struck since.
            if started < self._opened_at:
                return
            opened_at, self._opened_at = self._opened_at, 0.0
            self.open_for, self._failures = None, 0
        if opened_at:
            warning(f"{self.name} recovered after {self.worked_at - opened_at:.0f} s")

    def failure(self, error: UpstreamError, started: float) -> None:
        """Learn that a call failed that began at `started` (monotonic clock)."""
        if error.kind == "alert":
            return self.success(started)
        now = monotonic()
        with self._breaker_lock:
            self._retry_at = max(self._retry_at, now + error.retry_after)
            self.probe_at = max(self.probe_at, self._retry_at)
            if started < self._opened_at:
                return
            self._failures += 1
            opens = not self.open_for
            if opens and error.kind == "failing" and self._failures < 2:
                return
            if opens:
                self._opened_at, self._failures = now, 0
            pause = backoff(self._failures, 1, MAX_PROBE_PAUSE)
            self.open_for, self.probe_at = error, max(now + pause, self._retry_at)
        if opens:
            warning(f"{self.name} unavailable: {error}")
        else:
            debug(f"{self.name} still unavailable: {error}")


# --------------------------------------------------------------------------------------------------
# Threat Stack


class AnyStatus(HTTPErrorProcessor):
    """Returns answers of any status. So it follows no redirect: the key would go along."""

    def http_response(self, request: Any, response: Any) -> Any:
        """Return the answer as it is."""
        return response

    https_response = http_response


def hawk(config: Config, target: str) -> str:
    """Return one GET's `Authorization`. Source: https://github.com/mozilla/hawk/blob/main/API.md"""
    parts = urlsplit(target)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    path = target.split("/", 3)[3]
    now, nonce, ext = int(time()), secrets.token_urlsafe(9), config.organization_id
    text = f"hawk.1.header\n{now}\n{nonce}\nGET\n/{path}\n{parts.hostname}\n{port}\n\n{ext}\n"
    mac = b64encode(hmac.digest(config.api_key.encode(), text.encode(), "sha256")).decode()
    return f'Hawk id="{config.user_id}", ts="{now}", nonce="{nonce}", ext="{ext}", mac="{mac}"'


def is_expected(body: bytes, path: str, id_: str | None) -> bool:
    """Return whether a body is what `path` returns; with `id_` that alert's. Raises Malformed."""
    _, value = read_json(body)
    if isinstance(value, list):
        return id_ is None
    members = dict(value) if isinstance(value, tuple) else {}
    if path.endswith("/events") and members.get("token"):
        warning("there are more events than the API returns at once", path=path)
    if "id" in members:
        return id_ in (None, members["id"])
    return bool(members) and not members.get("errors") and members.get("status") != "error"


class ThreatStack(CircuitBreaker):
    """Threat Stack's API, v1 or v2. Methods are thread-safe. https://apidocs.threatstack.com"""

    name = "threatstack"
    MAX_BODY = 8 << 20  # bytes of an answer
    CAUSES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 429: "rate_limited"}

    def __init__(self, config: Config):
        super().__init__(config)
        # Proxies are those of the environment. This reads the system's certificates.
        https = HTTPSHandler(context=ssl.create_default_context())
        self._opener = build_opener(https, AnyStatus)

    def get(self, path: str, id_: str | None = None) -> bytes:
        """GET `path`; return its JSON, which is that of alert `id_`. Raises UpstreamError."""
        body = self._fetch(self.config.base_url + path)
        try:
            with PARSING:
                expected = is_expected(body, path, id_)
        except Malformed as error:
            raise self.error("bad_answer", f"the answer is {error}") from None
        if not expected:
            text = "the answer is an error with status 200, or not this alert's detail"
            raise self.error("wrong_detail" if id_ else "bad_answer", text, 200)
        return body

    def _fetch(self, target: str) -> bytes:
        """Return the body of the 200 to GET `target`. Raises UpstreamError."""
        limit = self.config.timeout
        headers = {"User-Agent": f"ts3d/{VERSION}", "Authorization": self.config.api_key}
        if self.config.auth == "hawk":
            headers["Authorization"] = hawk(self.config, target)
        elif self.config.organization_id:
            headers["Organization"] = self.config.organization_id
        request = Request(target, headers=headers)
        deadline = monotonic() + limit
        # A third of it for each address of the name, or at least 10 s.
        pause = max(limit / 3, min(limit, 10.0))
        try:
            with self._opener.open(request, timeout=pause) as response:
                body = self._read(response, deadline)
        except URLError as error:
            text = f"{target} cannot be reached{proxy_of(target)}: {error.reason}"
            raise self.error("unreachable", text) from None
        except TimeoutError:
            text = f"no whole answer within [threatstack] timeout = {limit:g} s"
            raise self.error("timeout", text) from None
        except (OSError, HTTPException, ValueError) as error:
            raise self.error("broken_off", f"the answer broke off: {error!r}") from None
        self.date, status = response.headers.get("Date"), response.status
        if status != 200:
            said = body[:1000].decode(errors="replace")
            text = f"{status} {response.reason}{proxy_of(target)} {said}"
            cause = self.CAUSES.get(status, status)
            raise self.error(cause, text, status, response.headers)
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":  # none was asked for
            raise self.error("bad_answer", f"Content-Encoding: {coding}")
        return body

    def _read(self, response: Any, deadline: float) -> bytes:
        """Return the body, read until `deadline`. Raises UpstreamError, OSError, HTTPException."""
        body = bytearray()
        while piece := response.read1(65536):
            body += piece
            if len(body) > self.MAX_BODY:
                raise self.error("bad_answer", f"the answer is over {self.MAX_BODY} bytes")
            if monotonic() > deadline:
                raise TimeoutError
        if response.length:
            raise self.error("broken_off", f"the answer lacks {response.length} bytes")
        return bytes(body)

    def list(self, path: str) -> tuple[str, str]:
        """Return a page of alerts, a JSON list, and the next page's token. Raises UpstreamError."""
        v2, token = self.config.auth == "hawk", ""
        try:
            text, value = read_json(self.get(path))
        except UpstreamError as error:
            if v2 and error.status == 404:  # its empty list
                return "[]", ""
            raise
        if v2:
            members = dict(value) if isinstance(value, tuple) else {}
            token, value = members.get("token") or "", members.get("alerts", "")
        if not isinstance(value, list | None):
            raise self.error("bad_answer", "the list of alerts is not a list")
        if not value:
            text = "[]"
        elif v2:
            text = literal_of(text, "alerts")
        return text, f"{token:.0f}" if isinstance(token, float) else token

    def check(self) -> str:
        """Make the cheapest calls that prove the key; say so. Raises UpstreamError."""
        base = self.config.base_url
        if self.config.auth == "hawk":
            self._fetch(urljoin(base, "/help/hawk/self-test"))
            # That was at the host's root; this tests the path.
            now = time()
            day = f"&from={rfc_3339(now - 86400)}&until={rfc_3339(now)}"
            self.list(f"/alerts?status=active{day}")
        else:
            self.get("/alerts?count=1")
        return f"{base} accepts the key{proxy_of(base)}"


# --------------------------------------------------------------------------------------------------
# S3


def without_expect(request: Any, **_: Any) -> None:
    """Remove `Expect: 100-continue` from a request of botocore."""
    del request.headers["Expect"]


class S3(CircuitBreaker):
    """AWS S3, or a store that speaks its protocol, through boto3. Methods are thread-safe.

    Source: https://boto3.amazonaws.com/v1/documentation/api/latest/reference/services/s3/client/
    """

    name = "s3"

    def __init__(self, config: Config):
        super().__init__(config)
        self.endpoint = config.endpoint_url or "https://s3.amazonaws.com"
        self._client: Any = None
        self._connecting = Lock()

    def client(self) -> Any:
        """Return the one client and [s3:put_object]. Raises ConfigError, UpstreamError."""
        with self._connecting:  # making a client is not thread-safe, using it is
            if not self._client:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        """Return a new client and [s3:put_object]. Raises ConfigError, UpstreamError."""
        try:
            import boto3
            import botocore.config

            options = botocore.config.Config(
                max_pool_connections=10 + 2 * self.config.workers,
                connect_timeout=5,
                read_timeout=10,
                # Jobs are retried by the queue.
                retries={"mode": "standard", "total_max_attempts": 2},
            )
            session = boto3.session.Session(region_name=self.config.region or None)
            client = session.client(
                "s3", endpoint_url=self.config.endpoint_url or None, config=options
            )
        except (AttributeError, ImportError, ValueError) as error:
            # Not an outage: what was imported by half stays so until a restart.
            text = f"{self.config.file}: [s3]: {error}. Correct it. For boto3 see README.md"
            raise ConfigError(text) from None
        except Exception as error:  # boto3's exceptions have no common class
            raise self._failure(error) from None
        self.endpoint = client.meta.endpoint_url.rstrip("/")
        # If the endpoint contained the bucket's name, keys would begin with it. But a private host
        # may be named like its bucket.
        name = re.escape(self.config.bucket)
        pattern = rf"(?<=://){name}\.(?=.*(s3|spaces|storage))|/{name}$"
        right = re.sub(pattern, "", self.endpoint)
        if right != self.endpoint:
            raise ConfigError(
                f"{self.config.file}: [s3] endpoint_url = {self.endpoint} has the bucket's name "
                f"in it. Set endpoint_url = {right}"
            )
        # Expect costs a round trip, and a second with a server that ignores it. It is not signed.
        client.meta.events.register("before-sign.s3.PutObject", without_expect)
        return client, self._parameters(client)

    def _parameters(self, client: Any) -> Json:
        """Return [s3:put_object] with the types of botocore's model. Raises ConfigError."""
        from botocore.validate import ParamValidationError, validate_parameters

        shape = client.meta.service_model.operation_model("PutObject").input_shape
        parsers: Json = {"boolean": partial(parse, "boolean"), "integer": int, "map": loads}
        extra: Json = {}
        for name, text in self.config.put_object.items():
            where = f"{self.config.file}: [{PUT_OBJECT}] {name}"
            if name not in shape.members:
                likely = nearest(name, shape.members)
                raise ConfigError(f"{where}: unknown to this boto3{likely}")
            kind = shape.members[name].type_name
            try:
                if kind != "map":  # JSON has quotes
                    refuse_quotes(text)
                extra[name] = parsers.get(kind, str)(text)
                validate_parameters({"Bucket": "b", "Key": "k", name: extra[name]}, shape)
            except (ValueError, ParamValidationError) as error:
                text = f"{where} = {text!r}: {error}. Its type is {kind}"
                raise ConfigError(" ".join(text.split())) from None
        return extra

    def key(self, name: str) -> str:
        """Return the key of an object, under the prefix."""
        return f"{self.config.prefix}/{name}".lstrip("/")

    def put(self, name: str, body: bytes) -> None:
        """Put an object. Raises ConfigError, UpstreamError.

        With `IfNoneMatch = *` an object that exists stays as it is.
        """
        client, parameters = self.client()
        kind = "octet-stream" if name.startswith("rejected/") else "json"
        answer = self._call(
            client.put_object,
            412 if "IfNoneMatch" in parameters else None,
            Key=self.key(name),
            Body=body,
            ContentType=f"application/{kind}",
            ChecksumAlgorithm="SHA256",  # Object Lock demands this header too
            ChecksumSHA256=b64encode(sha256(body).digest()).decode(),
            **parameters,
        )
        # botocore takes any 200 for success, also a proxy's page.
        if answer is not None and not answer.get("ETag"):
            text = f"a 200 without an ETag is not S3's answer{proxy_of(self.endpoint)}"
            raise self.error("bad_answer", text)

    def exists(self, name: str) -> bool:
        """Return whether an object exists. Raises ConfigError, UpstreamError."""
        client, parameters = self.client()
        # A customer's key (SSE-C) is needed for reading too.
        keys = {part: parameters[part] for part in parameters if "SSECustomer" in part}
        return self._call(client.head_object, 404, Key=self.key(name), **keys) is not None

    def _call(self, function: Any, expected: int | None, **parameters: Any) -> Any:
        """Call boto3; return the answer, or None for an expected status. Raises UpstreamError."""
        try:
            answer = function(Bucket=self.config.bucket, **parameters)
        except Exception as error:  # boto3's exceptions have no common class
            failure = self._failure(error)
            if failure.status == expected:
                return None
            raise failure from None
        self.date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return answer

    def _failure(self, error: Exception) -> UpstreamError:
        """Return an exception of boto3 as an UpstreamError."""
        answer = getattr(error, "response", None) or {}
        metadata, problem = answer.get("ResponseMetadata", {}), answer.get("Error", {})
        status = metadata.get("HTTPStatusCode", 0)
        headers = metadata.get("HTTPHeaders", {})
        cause = str(problem.get("Code") or status or type(error).__name__)
        self.date = headers.get("date")
        detail = getattr(error, "kwargs", {}).get("error", "")  # why, of a botocore exception
        if cause == "ConfigParseError":  # that quotes a line of the file, perhaps a secret
            detail = ""
        text = f"{problem.get('Message') or error} ({cause}) {detail}".strip()
        text = re.sub("<[^<>]* object at 0x[0-9a-f]+>[:,] ", "", text)
        # botocore follows a redirect that names no region until the stack is used up.
        if "maximum recursion depth" in text:
            cause, status, text = "PermanentRedirect", 301, "redirects have no end"
        if cause == "NoSuchBucket":
            text = f"bucket {self.config.bucket} does not exist ({cause})"
        region = headers.get("x-amz-bucket-region") or problem.get("Region")
        if region and status in (301, 400):
            text += f". The bucket is in {region}: set [s3] region = {region}"
        failure = self.error(cause, text + proxy_of(self.endpoint), status, headers)
        if re.match(CREDENTIALS, failure.type):
            self._client = None  # botocore reads a credentials file only once
        return failure

    def credentials(self) -> str:
        """Say where boto3 finds the credentials. Raises ConfigError, UpstreamError."""
        try:
            import boto3

            found = boto3.session.Session().get_credentials()
            if found:
                found.get_frozen_credentials()  # this may ask AWS
        except Exception as error:  # boto3's exceptions have no common class
            raise self._failure(error) from None
        if not found:
            proxy = proxy_of("http://169.254.169.254")
            raise self.error("NoCredentialsError", f"boto3 finds no credentials{proxy}")
        text = f"boto3 finds them: {found.method}"
        if found.method == "custom-process":
            text += ". The service runs programs below /usr only: put credential_process there"
        return text

    def check(self) -> str:
        """Put an object that is always the same; say so. Raises ConfigError, UpstreamError."""
        self.put("ts3d-check", b'{"written by": "ts3d check"}\n')
        place = f"s3://{self.config.bucket}/{self.key('ts3d-check')}"
        return f"{place} was written{proxy_of(self.endpoint)}"


# --------------------------------------------------------------------------------------------------
# Archiver: takes jobs from the queue and puts their objects into S3

NOT_FOUND = "threatstack_not_found"
NOT_FOUND_LIMIT = 3600.0  # seconds for which the API may lag behind the webhook


def name_of(kind: str, job: Job) -> str:
    """Return the name of one of a job's objects: its key without the prefix."""
    if kind in ("events", "alerts"):
        return f"{kind}/{job.id[0:2]}/{job.id[2:4]}/{job.id}"
    return f"{kind}/{job.minute}/{job.id}"


# Threads with a name, lanes of jobs that they take in this order, the upstreams that they need,
# their number, and the jobs that were taken for them.
Pool = namedtuple("Pool", "name lanes upstreams size jobs")


def is_low(pool: Pool) -> bool:
    """Return whether a pool is to get jobs: they are taken in batches."""
    return bool(2 * pool.jobs.qsize() <= pool.size)


class Archiver:
    """Two pools of worker threads, and a dispatcher that gives them jobs.

    At first a job's step is its source: the store pool puts what arrived. That needs S3 alone, so
    an API that hangs does not hold up webhooks. The detail pool, which needs both upstreams, does
    the next steps: "events" (only with Hawk) and "alerts", the detail. Then the job is done, and
    is deleted. `_archive` sets the step, `Queue.settle` records it, and the dispatcher takes
    the job again for the pool of its new lane (`Job.lane`, also a column). A new kind of object is
    put by `_archive` before the detail, under a key of `name_of`.

    After an error `_put_off` retries the job later. If, while others succeed, an alert has 404 for
    an hour, or any error for give_up_after, it is marked failed. It stays in the queue, and
    `ts3d retry` retries it.
    """

    def __init__(self, config: Config, queue_: Queue):
        self.config, self.queue = config, queue_
        self.threatstack, self.s3 = ThreatStack(config), S3(config)
        self.upstreams = (self.s3, self.threatstack)
        n = config.workers
        self.pools = (
            Pool("store", ["store"], [self.s3], -(-n // 4), SimpleQueue()),
            Pool("detail", ["detail", "backfill"], self.upstreams, n, SimpleQueue()),
        )
        self.wake = Event()  # there may be a job to dispatch
        self.stopping = False
        self.threads: list[Thread] = []
        self._waiting: dict[int, Future[None]] = {}  # by job for which answers wait

    def start(self) -> None:
        """Start the threads, unless there are to be none."""
        if self.config.workers:
            self.threads.append(start_thread("dispatcher", self._dispatch))
        for pool in self.pools:
            for i in range(pool.size):
                self.threads.append(start_thread(f"{pool.name}-{i + 1}", self._work, pool))

    def stop(self, deadline: float) -> None:
        """Wait until `deadline` (monotonic clock) for jobs that are at work."""
        self.wake.set()
        for pool in self.pools:
            for _ in range(pool.size):
                pool.jobs.put(None)
        for thread in self.threads:
            thread.join(max(0.0, deadline - monotonic()))

    def wait_until_archived(self, jobs: list[Job]) -> None:
        """Wait for these jobs, at most [server] wait; set `done`, or the error that delays them.

        Waits no longer once an upstream is unavailable.
        """
        # A dict's methods are atomic. A future that was taken out is resolved once.
        waiting = {job.number: self._waiting.setdefault(job.number, Future()) for job in jobs}
        with suppress(QueueError):  # they are on disk: that is what the answer says
            self.queue.refresh(jobs)  # some may be archived already
            if self.config.workers and not self.stopping and not self.problem():
                wait([waiting[job.number] for job in jobs if not job.done], self.config.wait)
                self.queue.refresh(jobs)
        problem = self.problem()
        for job in jobs:
            self._waiting.pop(job.number, None)
            if problem and not job.error_type:
                job.error_type, job.error_message = problem.type, str(problem)

    def stop_waiting(self, *numbers: int) -> None:
        """Have answers wait no longer for these jobs, or for any."""
        for number in numbers or list(self._waiting):
            if waiting := self._waiting.pop(number, None):
                waiting.set_result(None)

    def problem(self) -> UpstreamError | None:
        """Return the error of an unavailable upstream, if there is one."""
        return self.s3.open_for or self.threatstack.open_for

    def _dispatch(self) -> None:
        """Give due jobs to the pools. The dispatcher thread."""
        expect_progress_within(LONGEST_CALL)  # credentials may come from another server
        with suppress(UpstreamError):  # the first job finds it again
            self.s3.client()  # imports boto3, while webhooks are answered already
        while not self.stopping:
            expect_progress_within(LONGEST_TURN)
            self.wake.clear()
            # The store pool first: its probe of S3 needs no call to the API.
            for pool in filter(is_low, self.pools):
                for lane in pool.lanes:
                    with suppress(QueueError):  # logged
                        self._fill(pool, lane)
            self.wake.wait(0.25)  # jobs become due, and other processes queue some

    def _fill(self, pool: Any, lane: str) -> None:
        """Have as many jobs wait as the pool has threads: a worker should find the next there."""
        n = pool.size - pool.jobs.qsize()
        for upstream in pool.upstreams:
            n = upstream.allowance(n)
        for job in self.queue.take(lane, n) if n > 0 else ():
            for upstream in pool.upstreams:
                if upstream.open_for:
                    job.probe = True
                    # A probe that hangs is followed by another.
                    upstream.probe_at = monotonic() + MAX_PROBE_PAUSE
            pool.jobs.put(job)

    def _work(self, pool: Any) -> None:
        """Archive the pool's jobs. A worker thread."""
        while (job := pool.jobs.get()) and not self.stopping:
            expect_progress_within(self.config.timeout + LONGEST_CALL)
            try:
                if job.probe or not any(upstream.open_for for upstream in pool.upstreams):
                    self._archive(job)
            except ConfigError:  # no retry helps: it ends the process
                raise
            except UpstreamError as error:
                self._put_off(job, error)
            except Exception as error:  # a bug, or a disk that fails; this thread goes on
                job.due, job.error_since = monotonic() + 10, time()
                job.error_type, job.error_message = "internal", explain(error)
                log_error("alert will be retried", id=job.id, error=job.error_message)
            self.queue.settle(job)
            if job.done:
                self.stop_waiting(job.number)
            if is_low(pool) or is_low(self.pools[-1]):  # which may get the next step
                self.wake.set()
            expect_progress_within(inf)  # until the next job

    def _archive(self, job: Job) -> None:
        """Put the objects of the job's next steps into S3, as far as its pool does them.

        The detail comes last: if it exists, all of its alert does. Raises ConfigError,
        UpstreamError, QueueError.
        """
        get = partial(self.threatstack.call, self.threatstack.get)
        put = partial(self.s3.call, self.s3.put)
        kinds, rejected = [job.source], job.source == "rejected"
        if job.step == job.source:
            (row,) = self.queue.read("SELECT body FROM jobs WHERE number = ?", job.number)
            put(name_of(job.source, job), row["body"])
            job.step, job.error_type = "events", None
            if not rejected:
                return
        else:
            if job.step == "events" and self.config.auth == "hawk" and self.config.events:
                try:
                    put(name_of("events", job), get(f"/alerts/{job.id}/events"))
                    job.step, job.error_type = "alerts", None
                except UpstreamError as error:
                    if error.type != NOT_FOUND:
                        raise
                    # If the API lags, the detail is missing too, and both are asked for again.
                    warning("the API has no events of this alert", id=job.id)
            put(name_of("alerts", job), get(f"/alerts/{job.id}", job.id))
            kinds += ["events", "alerts"] if job.step == "alerts" else ["alerts"]
        job.done = True
        age = max(0.0, time() - job.received)
        if not rejected:
            add("ts3d_alerts_archived_total")
            add("ts3d_archive_seconds_sum", age)
            add("ts3d_archive_seconds_count")
        keys = ",".join(self.s3.key(name_of(kind, job)) for kind in kinds)
        info("archived", id=job.id, tries=job.tries + 1, seconds=age, keys=keys)

    def _put_off(self, job: Job, error: UpstreamError) -> None:
        """Have a job retried later, or mark it failed."""
        upstream = self.s3 if error.upstream == "s3" else self.threatstack
        failed_before, job.failed_at = job.failed_at, monotonic()
        if job.error_type != error.type:
            job.error_since = time()
            if error.type == NOT_FOUND:  # the hour is for 404s
                failed_before = job.failing = 0.0
        job.error_type, job.error_message = error.type, str(error)
        add("ts3d_retries_total", label=f'{{upstream="{error.upstream}"}}')
        if upstream.open_for:
            self.stop_waiting()
            job.due = upstream.probe_at
            return debug("alert waits for the upstream", id=job.id, error=error)
        # Time counts only if the upstream has worked since this alert failed before. An outage in
        # between must not count either, so no interval counts for longer than a pause.
        if 0 < failed_before < upstream.worked_at:
            job.failing += min(job.failed_at - failed_before, MAX_RETRY_PAUSE)
        limit = self.config.give_up_after
        if error.type == NOT_FOUND:
            limit = min(limit, NOT_FOUND_LIMIT)
        job.tries += 1
        if job.failing > limit:
            job.failed = True
            add("ts3d_alerts_failed_total")
            return log_error("alert marked failed", id=job.id, tries=job.tries, error=error)
        pause = max(backoff(job.tries - 1, 0, MAX_RETRY_PAUSE), error.retry_after)
        job.due = job.failed_at + pause
        warning(
            "alert failed, will be retried",
            id=job.id,
            tries=job.tries,
            retry_seconds=pause,
            error=error,
        )


# --------------------------------------------------------------------------------------------------
# HTTP server

WEBHOOKS = "/api/v1/s3/alert"
SMALL_BODY = 64 << 10  # bytes; of other bodies at most eight are read and parsed at once
LARGE_BODIES = Semaphore(8)

HEAD_BYTES = 64 << 10
LINE_BYTES = HEAD_BYTES // 100  # each line counts as so many at least: 100 lines at most
NAME = "[!#$%&'*+.^_`|~0-9A-Za-z-]"
REQUEST_LINE = re.compile(rf"({NAME}{{1,64}}) ([\x21-\x7e]+) HTTP/1\.([0-9])\r\n")
# RFC 9112, 5.1 and 5.2: no folded line and no blank before the colon matches.
FIELD_LINE = re.compile(rf"(?:({NAME}+):([\t\x20-\x7e\x80-\xff]*))?\r\n")
EMPTY_LINE = re.compile("\r\n")
CHUNK_LINE = re.compile(r"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
HOST = re.compile(r"[]!$%&'()*+,.:;=[_~0-9A-Za-z-]*")
KEPT = "The body is kept in S3 under rejected/"
INVALID = (
    "{}. Send an id (4 to 128 of A-Z a-z 0-9 _ -) and created_at (milliseconds or ISO 8601). "
    f"{KEPT}"
)


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, type, text, further header lines."""


def shut_down(connection: socket.socket, how: int) -> None:
    """Shut down a connection that may be gone, or in use by another thread."""
    with suppress(OSError):
        # SSLSocket's own method would end TLS: what follows would be sent as plain text.
        socket.socket.shutdown(connection, how)


class Server:
    """Accepts connections from listening sockets, limits them, runs a Handler in a thread for each.

    A connection's phase is "idle", "receiving" (a request or a TLS handshake), or "answering".

    Memory is bounded: max_connections, with 64K of headers each; eight bodies over 64K at once,
    parsed in turn, with MAX_ALERTS. An answer that waits for S3 keeps no body. In the archiver each
    worker has one body. The API's answers have MAX_BODY and are parsed in turn. The queue keeps
    MAX_TAKEN jobs in memory.
    """

    def __init__(self, config: Config, archiver: Archiver):
        self.config, self.archiver, self.queue = config, archiver, archiver.queue
        self.stopping = False
        self._phases: dict[Any, tuple[str, float]] = {}  # by connection; since when
        self._lock = Lock()
        self._limits = {  # seconds that a phase may take
            "idle": config.keepalive_timeout,
            "receiving": config.request_timeout,
            "answering": inf,
        }

    def accept(self, listener: socket.socket) -> None:
        """Accept a listening socket's connections. An acceptor thread."""
        listener.settimeout(0.25)
        while not self.stopping:
            expect_progress_within(LONGEST_TURN)
            self._limit()
            connection: Any = None
            try:
                connection, address = listener.accept()
                # It is counted here: `stop` must not miss one whose thread has yet to begin.
                self.enter(connection, "receiving")
                client = "local"
                if isinstance(address, tuple):  # not a Unix socket's
                    client = address[0]
                    # Or an answer waits until TLS's session tickets are acknowledged: 44 ms.
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                start_thread("connection", self._serve, connection, client)
            except TimeoutError:  # no connection came: look at the limits again
                pass
            except (OSError, RuntimeError) as error:  # no client, file, memory or thread
                debug("connection not accepted", error=error)
                if connection:
                    self._close(connection)
                sleep(0.002)  # the socket may stay readable: this loop must not spin
        with suppress(OSError):
            listener.close()

    def _serve(self, connection: Any, client: str) -> None:
        """Serve a connection until it is closed. A connection's thread."""
        try:
            if self.config.tls:
                connection.do_handshake()
            self.enter(connection, "idle")
            Handler(connection, client, self)  # type: ignore[arg-type]
        except OSError as error:  # the client's doing: gone, or no TLS handshake
            debug("connection closed", client=client, error=error)
        except Exception as error:  # a bug must not end more than this connection
            log_error(explain(error), client=client)
        self._close(connection)

    def _close(self, connection: Any) -> None:
        """Close a connection and count it no longer."""
        with self._lock:
            self._phases.pop(connection, None)
        shut_down(connection, socket.SHUT_WR)  # before a reset, if the client sent more
        with suppress(OSError):
            connection.close()

    def enter(self, connection: Any, phase: str) -> None:
        """Note what a connection does now."""
        with self._lock:
            self._phases.pop(connection, None)  # the order is that of waiting
            self._phases[connection] = (phase, monotonic())

    def _limit(self) -> None:
        """End phases that take too long, and connections beyond max_connections.

        It first closes connections that were idle or slow for longest. A late request is read no
        further, so that it can be answered.
        """
        with self._lock:
            for connection, (phase, since) in list(self._phases.items()):
                if phase != "answering" and len(self._phases) > self.config.max_connections:
                    del self._phases[connection]
                    shut_down(connection, socket.SHUT_RDWR)
                    debug("connection closed: more than [server] max_connections")
                elif monotonic() - since > self._limits[phase]:
                    shut_down(connection, socket.SHUT_RD)

    def stop(self, deadline: float) -> None:
        """Wait until `deadline` (monotonic clock) for requests that are being answered."""
        # A request may be on its way on a connection that has just become idle.
        self._limits["idle"] = 0.3
        while self._phases and monotonic() < deadline:
            self._limit()
            sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests strictly as RFC 9112 defines them, and answers in JSON.

    http.server's own parser takes `+4` for a length, and ignores Transfer-Encoding.
    `client_address` is an IP address, or `local` for a Unix socket.
    """

    server: Server  # type: ignore[assignment]
    rfile: Any
    client_address: Any

    def handle_one_request(self) -> None:
        """Read a request, do what it asks, log it, answer it. Raises OSError."""
        functions = {WEBHOOKS: self.webhook, "/healthz": self.health, "/metrics": self.metrics}
        self.close_connection = self.unread = True  # more of this request may come
        self.command = self.path = self.target = "-"
        self.fields: Json = defaultdict(str)
        self.notes: Json = {}  # for the log
        self.payload: Any = {}  # the answer: text, or members beside `success`
        if not self.rfile.peek(1):
            return
        self.id, self.started = secrets.token_hex(8), monotonic()
        self.server.enter(self.request, "receiving")
        status, headers = 200, [""]
        try:
            self.read_head()
            if self.target not in functions:
                raise Refusal(404, "not_found", f"wrong path. Send webhooks to {WEBHOOKS}")
            allow = "POST" if self.target == WEBHOOKS else "GET, HEAD"
            if self.command not in allow.split(", "):
                text = f"wrong method. Use {allow}"
                raise Refusal(405, "method_not_allowed", text, f"Allow: {allow}\r\n")
            functions[self.target]()
        except Exception as error:  # also a bug is answered
            status, type_, text, *headers = self.refusal(error).args
            self.payload["error"] = {"type": type_, "message": text}
            self.notes["error"] = text
        self.log_answer(status)
        if status:
            self.answer(status, *headers)

    def refusal(self, error: Exception) -> Refusal:
        """Return how a request is refused after an error; status 0: the client is gone."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, QueueError):  # the alerts may not be on disk, and must come again
            return Refusal(503, "queue_unavailable", str(error), "Retry-After: 10\r\n")
        if not isinstance(error, OSError):
            # A bug too is answered, and the daemon goes on.
            log_error(explain(error), request=self.id)
            return Refusal(
                500, "internal", f"internal error. Search the log for {self.id}, report it"
            )
        if monotonic() - self.started > self.server.config.request_timeout:
            text = "the request did not arrive within [server] request_timeout. Send it faster"
            return Refusal(408, "timeout", text)
        self.close_connection = True
        return Refusal(0, "gone", str(error))

    def log_answer(self, status: int) -> None:
        """Log and count an answer, before it is sent: its reader must find it in the log."""
        lost = self.command == "POST" and status == 404  # a wrong URL loses every webhook
        if status and (lost or self.target == WEBHOOKS):
            add("ts3d_webhooks_total", label=f'{{status="{status}"}}')
        severity = logging.WARNING if lost or status >= 500 else logging.INFO
        if status == 200 and self.target != WEBHOOKS:
            severity = logging.DEBUG
        if is_local(self.client_address):
            forwarded = self.fields["x-forwarded-for"].rpartition(",")[2].strip()
            self.notes["forwarded_for"] = forwarded
        path = self.path.partition("?")[0][:200]  # the query may have the token
        log_event(
            severity,
            f"{self.command} {path} {status or '-'}",
            request=self.id,
            client=self.client_address,
            **self.notes,
            seconds=monotonic() - self.started,
        )

    # Reading --------------------------------------------------------------------------------------

    def read_head(self) -> None:
        """Read the request line and the headers. Raises Refusal, OSError."""
        self.left = HEAD_BYTES
        if self.rfile.peek(1)[:1] == b"\r":  # RFC 9112, 2.2: ignore one empty line
            self.read_line(EMPTY_LINE, "the request line")
        self.command, self.path, minor = self.read_line(REQUEST_LINE, "the request line")
        # Without scheme and host (RFC 9112, 3.2.2), a slash at its end, and the query.
        self.target = re.sub(r"(?i)^https?://[^/?]*|/?(\?.*)?$", "", self.path)
        fields = self.fields = self.read_fields()
        if ("host" not in fields and minor > "0") or not HOST.fullmatch(fields["host"]):
            raise self.malformed("there must be one valid Host header")
        length = fields.get("content-length", "0")
        self.chunked = "transfer-encoding" in fields
        wrong = minor == "0" or "content-length" in fields
        if self.chunked and (wrong or fields["transfer-encoding"].lower() != "chunked"):
            raise self.malformed("Transfer-Encoding must be `chunked`, without Content-Length")
        if not fullmatch("[0-9]{1,15}", length):
            raise self.malformed("Content-Length must be one number")
        self.length = int(length)
        self.unread = self.chunked or self.length > 0
        self.close_connection = minor == "0" or "close" in fields["connection"].lower()
        # RFC 9110, 10.1.1: not in HTTP/1.0
        self.expects = minor > "0" and "100-continue" in fields["expect"].lower()

    def malformed(self, text: str) -> Refusal:
        """Return the refusal of a request that is not HTTP/1.1 as RFC 9112 defines it."""
        return Refusal(400, "malformed_request", f"{text}. Correct the client (RFC 9112)")

    def read_fields(self) -> Json:
        """Read headers or trailers; of one name the values are joined. Raises Refusal, OSError."""
        fields: Json = defaultdict(str)
        while True:
            name, value = self.read_line(FIELD_LINE, "a header")
            if not name:
                return fields
            name, value = name.lower(), value.strip(" \t")
            fields[name] = f"{fields[name]}, {value}" if name in fields else value

    def read_line(self, pattern: re.Pattern[str], what: str) -> Any:
        """Read a line within `left` bytes, return the pattern's groups. Raises Refusal, OSError."""
        line = self.rfile.readline(self.left)
        self.left -= max(len(line), LINE_BYTES)
        if self.left <= 0:
            raise Refusal(
                431,
                "head_too_large",
                f"over {HEAD_BYTES} bytes or 100 lines of headers. Send fewer",
            )
        if match := pattern.fullmatch(line.decode("latin-1")):
            return match.groups()
        if line.endswith(b"\n"):
            raise self.malformed(f"{what} is malformed, or a line does not end with CRLF")
        raise ConnectionResetError("closed in the middle of a request")

    def read_body(self) -> bytes:
        """Read the body. Raises Refusal, OSError."""
        limit, received, pieces = self.server.config.max_body, 0, list[bytes]()
        if self.expects and self.length <= limit:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            n = self.length - received
            if self.chunked:
                self.left = HEAD_BYTES
                n = int(self.read_line(CHUNK_LINE, "a chunk's size")[0], 16)
            if not n:
                break
            received += n
            if received > limit:
                text = f"the body is over [server] max_body = {limit} bytes. Send less, or raise it"
                raise Refusal(413, "too_large", text)
            pieces.append(self.rfile.read(n))
            if len(pieces[-1]) < n:
                raise ConnectionResetError("closed in the middle of a body")
            if self.chunked:
                self.read_line(EMPTY_LINE, "a chunk's end")
        if self.chunked:
            self.read_fields()  # trailers
        self.unread = False
        self.server.enter(self.request, "answering")
        return b"".join(pieces)  # of one piece this is no copy

    # Answering ------------------------------------------------------------------------------------

    def authorize(self, option: str) -> None:
        """Raise Refusal unless the request presents one of these tokens. Source: RFC 6750."""
        query = self.path.partition("?")[2].replace("+", "%2B")  # a token may contain `+`
        presented = parse_qs(query).get("token", [])
        presented += re.findall("(?i)^bearer +(.*)", self.fields["authorization"])
        tokens = getattr(self.server.config, option).split()
        pairs = itertools.product(tokens, presented)  # all are compared, in constant time
        if not any([hmac.compare_digest(a.encode(), b.encode()) for a, b in pairs]):
            text = f"present [server] {option} as Authorization: Bearer TOKEN or as ?token=TOKEN"
            raise Refusal(401, "unauthorized", text, 'WWW-Authenticate: Bearer realm="ts3d"\r\n')

    def webhook(self) -> None:
        """Queue a webhook's alerts; answer their states. Raises Refusal, QueueError, OSError."""
        if self.server.config.webhook_token:
            self.authorize("webhook_token")
        large = self.chunked or self.length > SMALL_BODY
        with LARGE_BODIES if large else nullcontext():
            alerts, refusal = self.acknowledge()  # they have no bodies while they wait for S3
        self.server.archiver.wait_until_archived([alert for alert in alerts if alert.number])
        self.payload["alerts"] = [state_of(alert) for alert in alerts]
        if refusal:
            raise refusal

    def acknowledge(self) -> tuple[list[Job], Refusal | None]:
        """Put a webhook on disk; return alerts and refusal. Raises Refusal, QueueError, OSError."""
        body, refusal = self.read_body(), None
        alerts: list[Job] = []
        coding = self.fields["content-encoding"].lower()
        if coding in ("", "identity"):
            try:
                with PARSING:
                    alerts = read_webhook(body)
            except Malformed as error:
                text = f'{error}. Send {{"alerts": [ALERT, …]}}. {KEPT}'
                refusal = Refusal(400, "malformed_webhook", text)
        else:
            text = f"Content-Encoding: {coding} is not supported. Send the body as it is. {KEPT}"
            refusal = Refusal(415, "unsupported_encoding", text)
        jobs = [alert for alert in alerts if not alert.error_type]
        accepted, rejected = len(jobs), len(alerts) - len(jobs)
        self.notes |= {"bytes": len(body), "alerts": accepted, "rejected": rejected}
        for alert in alerts:
            if alert.error_type:
                alert.body, alert.error_message = b"", INVALID.format(alert.error_message)
                self.notes["error"] = alert.error_message
        if rejected and not jobs:
            refusal = Refusal(400, "invalid_alert", alerts[0].error_message)
        if refusal or rejected:  # nothing that presented the token is lost
            digest = self.notes["kept"] = sha256(body).hexdigest()
            jobs.append(Job(digest, minute_of(time()), "rejected", "rejected", body))
        self.server.queue.put(jobs)
        self.server.archiver.wake.set()
        add("ts3d_acknowledgement_seconds_sum", monotonic() - self.started)
        add("ts3d_acknowledgement_seconds_count")
        add("ts3d_alerts_received_total", accepted)
        add("ts3d_alerts_rejected_total", rejected)
        return alerts, refusal

    def metrics(self) -> None:
        """Answer Prometheus's metrics, for this machine or with the token. Raises Refusal."""
        if self.server.config.metrics_token or not is_local(self.client_address):
            self.authorize("metrics_token")
        for upstream in self.server.archiver.upstreams:
            label = f'{{upstream="{upstream.name}"}}'
            METRIC_VALUES["ts3d_upstream_unavailable"][label] = bool(upstream.open_for)
        values = self.server.queue.facts.values()
        for name, value in zip(QUEUE_METRICS, values, strict=True):
            METRIC_VALUES[name][""] = value
        self.payload = metrics_text()

    def health(self) -> None:
        """Answer what is queued. Raises QueueError unless the queue takes writes."""
        sleep(0.05)  # it needs no token: a client that asks without a pause gets 20 a second
        for name in ("queued", "failed", "oldest_seconds"):
            self.payload[name] = self.server.queue.facts[name]
        self.server.queue.require_writable()

    def answer(self, status: int, headers: str = "") -> None:
        """Send the answer; let a client that is still sending read it first. Raises OSError."""
        kind, text = "text/plain; version=0.0.4; charset=utf-8", self.payload
        if not isinstance(text, str):
            kind, text = "application/json", dumps({"success": status == 200, **text})
        self.close_connection |= self.unread or self.server.stopping
        if self.close_connection:
            headers += "Connection: close\r\n"
        body = text.encode()
        head = (
            f"HTTP/1.1 {status} {self.responses[status][0]}\r\nServer: ts3d\r\n"
            f"Date: {self.date_time_string()}\r\nX-Request-Id: {self.id}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        )
        if self.command == "HEAD":
            body = b""
        # From here on it is idle: the client may read the answer before this thread's next line.
        self.server.enter(self.request, "receiving" if self.unread else "idle")
        self.request.sendall(head.encode() + body)
        if self.unread:
            # RFC 9112, 9.6: or a reset would reach the client before it has read the answer.
            shut_down(self.request, socket.SHUT_WR)
            while self.rfile.read1(65536):
                pass


def state_of(alert: Job) -> Json:
    """Return an alert's state for the answer."""
    state: Json = {"id": alert.id or None, "state": "queued" if alert.number else "rejected"}
    if alert.done:
        state["state"] = "archived"
    elif alert.error_type:
        state["error"] = {"type": alert.error_type, "message": alert.error_message}
    return state


def is_local(ip: str) -> bool:
    """Return whether a client is on this machine: a Unix socket's (`local`), or by loopback."""
    return bool(re.match(r"local$|127\.|::1$|::ffff:127\.", ip))


def listen(config: Config) -> list[socket.socket]:
    """Return systemd's sockets (sd_listen_fds(3)), or else a new one. Raises ConfigError."""
    where = f"{config.file}: [server] listen = {config.listen}"
    host, _, port = config.listen.rpartition(":")
    ipv6, passed = ":" in host, 0
    if environ.get("LISTEN_PID") == str(os.getpid()):
        passed = int(environ["LISTEN_FDS"])
    try:
        sockets = [socket.socket(fileno=number) for number in range(3, 3 + passed)]
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        name = (host.strip("*[]"), int(port))
        sockets = sockets or [  # [::] takes IPv4 too
            socket.create_server(name, family=family, backlog=1024, dualstack_ipv6=ipv6)
        ]
    except (OSError, ValueError) as error:
        text = "Name a free address of this machine. If ts3d.socket has this one, start ts3d"
        raise ConfigError(f"{where}: {error}. {text}") from None
    for sock in sockets:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError("systemd's socket does not listen. Use ListenStream= and Accept=no")
        local = sock.family == socket.AF_UNIX or is_local(sock.getsockname()[0])
        if not (local or config.webhook_token):
            raise ConfigError(
                f"{where}, in fact {url_of(sock, 'tcp')}: other machines can connect. Set [server] "
                "webhook_token, or listen on a loopback address"
            )
    if config.tls:  # an accepted connection shakes hands in its own thread
        sockets = [
            config.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            for sock in sockets
        ]
    return sockets


def url_of(sock: socket.socket, scheme: str) -> str:
    """Return the URL on which a socket listens; of a Unix socket `unix:PATH`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return "unix:" + os.fsdecode(name).replace("\0", "@")
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{scheme}://{host}:{name[1]}"


# --------------------------------------------------------------------------------------------------
# Threads and systemd

LONGEST_TURN = 20.0  # seconds of a thread's turn without a call to an upstream
LONGEST_CALL = 600.0  # seconds of a turn with calls, plus [threatstack] timeout
# By thread: when it makes progress at the latest (monotonic clock).
PROGRESS_BY: dict[str, float] = {}
FATAL: list[Exception] = []  # errors that end the process


def expect_progress_within(limit: float) -> None:
    """Declare that this thread calls this again within `limit` seconds, for the watchdog."""
    PROGRESS_BY[current_thread().name] = monotonic() + limit


def start_thread(name: str, target: Callable[..., None], *args: Any) -> Thread:
    """Start a daemon thread. If an error ends the thread, `supervise` ends the process."""

    def run() -> None:
        try:
            target(*args)
        except Exception as error:  # of any kind: this thread's work is not done any more
            FATAL.append(error)
        except BaseException as error:  # nothing else watches this thread
            text = f"thread {name} ended: {error!r}. A restart continues its work"
            FATAL.append(RuntimeError(text))

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def notify(text: str) -> None:
    """Tell systemd, if it started this process. Source: sd_notify(3)."""
    if target := environ.get("NOTIFY_SOCKET"):
        address = re.sub("^@", "\0", target)  # @: an abstract address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(text.encode(), address)


# --------------------------------------------------------------------------------------------------
# Commands

BACKFILL_QUEUED = 1000  # queued alerts with which backfill waits
BACKFILL_PATIENCE = 600.0  # seconds without progress after which backfill ends
SUMMARY = (
    "{listed} listed, {archived} archived already, {waiting} queued already, {queued} queued, "
    "{invalid} invalid and not archived"
)


def require_upstreams(config: Config) -> None:
    """Check and set what all commands that archive need. Raises ConfigError."""
    require(config, "bucket", "api_key")
    if config.auth == "hawk":
        require(config, "user_id", "organization_id")
    file = join(config.secrets, "aws_credentials")
    # Even if it is empty: commands run by hand must find no other credentials than the service.
    if exists(file):
        environ.setdefault("AWS_SHARED_CREDENTIALS_FILE", file)
        environ.setdefault("AWS_CONFIG_FILE", file)


def open_queue(config: Config) -> closing[Queue]:
    """Return the queue, for a `with` statement. Raises ConfigError."""
    return closing(Queue(config.path, config.max_size))


def serve(config: Config) -> int:
    """Run the daemon, the default command: listen, queue, archive, until SIGTERM or SIGINT.

    A stop finishes requests, then jobs, within 7 s. Example: ts3d serve. Exit codes: 0 stopped, 1
    failed, 2 wrong usage, 78 wrong configuration.
    """
    if config.workers:
        require_upstreams(config)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A handler may run while any lock is held: it sets a flag and nothing else.
        signal.signal(number, lambda received, _: signals.append(received))
    # Threads that take turns at the GIL on several processors archive a quarter less (tests/bench).
    with suppress(OSError):  # a sandbox may forbid it
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # A connection takes a file, and so do the queue and calls.
    config.max_connections = min(config.max_connections, files // 2)
    place = f"{config.endpoint_url} {config.bucket}/{config.prefix}"
    queue_ = Queue(config.path, config.max_size, place)
    archiver = Archiver(config, queue_)
    server, threads, urls = Server(config, archiver), [], []
    for sock in listen(config):
        threads.append(start_thread(f"acceptor-{sock.fileno()}", server.accept, sock))
        urls.append(url_of(sock, "https" if config.tls else "http"))
    info(f"ts3d {VERSION} listens on {','.join(urls)}", queue=config.path, bucket=config.bucket)
    if not config.webhook_token:
        warning("[server] webhook_token is not set: every local user can post alerts")
    notify("READY=1")  # before boto3 is imported, which takes longer than all the rest
    archiver.start()
    try:
        supervise(signals, queue_, archiver)
    finally:
        deadline = monotonic() + 7  # a stop takes 10 s at most
        server.stopping = archiver.stopping = True
        archiver.stop_waiting()
        notify("STOPPING=1\nSTATUS=stopping")
        info("stopping")
        for thread in threads:
            thread.join(1)  # an acceptor may have accepted one more connection
        server.stop(deadline)
        archiver.stop(deadline)
        queue_.close()
    return 0


def supervise(signals: list[int], queue_: Queue, archiver: Archiver) -> None:
    """Watch the other threads until a signal ends the daemon. Raises what else ends it.

    systemd ends it if it misses `WATCHDOG=1` for WatchdogSec=. Source: sd_watchdog_enabled(3).
    """
    late_before: list[str] = []
    while True:
        sleep(0.5)
        while signals:
            if signals.pop() != signal.SIGHUP:
                return
            warning("SIGHUP ignored: there is no reload. Use systemctl restart ts3d")
        if FATAL:
            raise FATAL[0]
        now = monotonic()
        late = [name for name, by in PROGRESS_BY.copy().items() if by < now]
        if late != late_before:
            log_error("threads without progress", threads=late)
        late_before = late
        text = f"STATUS={queue_.facts['queued']} queued, {queue_.facts['failed']} failed"
        for error in (queue_.error, archiver.problem()):
            if error:
                text += f"; {error}"
        notify(text)
        if not late:
            notify("WATCHDOG=1")


def check(path: str) -> int:
    """Test configuration, queue, credentials, S3, Threat Stack and clock: a line each.

    Example: ts3d check. Exit codes: 0 all is well, 1 a test failed, 2 wrong usage (other commands:
    78 wrong configuration).
    """
    if not passes("configuration", check_configuration, path):
        return 1
    config = load_config(path)
    s3, threatstack = S3(config), ThreatStack(config)
    tests = [
        passes("listen", check_listen, config),
        passes("queue", check_queue, config),
        passes("credentials", s3.credentials),
        passes("s3", s3.check),
        passes("threatstack", threatstack.check),
        passes("clock", lambda: check_clock(s3.date, threatstack.date)),
    ]
    return int(not all(tests))


def passes(name: str, test: Callable[..., str], *args: Any) -> bool:
    """Return whether a test of `check` raises nothing. Prints its line."""
    try:
        verdict, text = "ok", test(*args)
    except Exception as error:  # the other tests must run
        verdict, text = "FAIL", explain(error)
    print(f"{verdict:6}{name:14}{printable(text)}")
    return verdict == "ok"


def check_configuration(path: str) -> str:
    """Say what is configured. Raises ConfigError."""
    config = load_config(path)
    start_log(config.level)
    require_upstreams(config)
    return f"{path}; not at their defaults: {', '.join(config.changed)}"


def check_listen(config: Config) -> str:
    """Bind the address, unless a daemon runs. Raises ConfigError."""
    if running(config.path):
        return "the daemon is running"
    for sock in listen(config):
        sock.close()
    return f"{config.listen} is free"


def check_queue(config: Config) -> str:
    """Say what is queued, or that the daemon can create a queue. Raises ConfigError, QueueError."""
    if not exists(config.path):
        with suppress(OSError):  # else `open_queue` says why
            create_file(config.path).close()
            os.remove(config.path)
            return f"{config.path} can be created"
    with open_queue(config) as queue_:
        queue_.require_writable()
        return f"{config.path}: {queue_.facts['queued']} queued, {queue_.facts['failed']} failed"


def check_clock(*dates: str | None) -> str:
    """Say by how much this machine's clock differs from the upstreams'. Raises ConfigError."""
    skews = [skew for skew in map(skew_of, dates) if skew is not None]
    shown = ", ".join(f"{skew:.0f}" for skew in skews) or "unknown, since neither answered"
    text = f"seconds ahead of S3 and Threat Stack: {shown}"
    if any(abs(skew) > 60 for skew in skews):  # what Hawk allows
        raise ConfigError(f"{text}. Set this machine's clock: timedatectl set-ntp yes")
    return text


def rfc_3339(moment: float) -> str:
    """Return a time in UTC, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat("T", "milliseconds")[:-6] + "Z"


def status(config: Config, failed: bool, as_json: bool) -> int:
    """Show queued and failed alerts, and current problems: the last errors of jobs in the queue.

    It reads the queue's file and calls no upstream. An outage shows once a job's try has failed.

    Example: ts3d status --failed. Exit codes: 0 no problem, 1 a problem, 2 wrong usage, 78 wrong
    configuration.
    """
    with open_queue(config) as queue_:
        report: Json = {"running": running(config.path), "causes": queue_.problems()}
        report |= queue_.facts
        if failed:
            report["failures"] = [loads(row[0]) for row in queue_.read(Queue.FAILED)]
    if as_json:
        print(dumps(report))
    elif failed:
        for alert in report["failures"]:
            say("{id} received {received}, {tries} tries".format_map(alert))
            say("    {type}: {message}".format_map(alert["error"]))
    else:
        show_status(report, config.path)
    return int(bool(report["causes"]))


def show_status(report: Json, path: str) -> None:
    """Print the status for people."""
    daemon = "running" if report["running"] else "not running"
    oldest, hint = "", ""
    if report["queued"]:
        oldest = f", oldest {timedelta(seconds=int(report['oldest_seconds']))}"
    if report["failed"]:
        hint = ": `ts3d status --failed` lists them, `ts3d retry` retries them"
    sizes = ("queue_bytes", "max_bytes", "disk_free_bytes")
    used, limit, free = (f"{report[name] >> 20}M" for name in sizes)
    say(f"daemon   {daemon}")
    say(f"queued   {report['queued']}{oldest}")
    say(f"failed   {report['failed']}{hint}")
    say(f"disk     {used} of {limit} used, {free} free: {path}")
    print("\nCurrent problems:" if report["causes"] else "\nNo current problems.")
    for problem in report["causes"]:
        text = "{type} since {since}: {queued} queued, {failed} failed, such as {alert}"
        say(text.format_map(problem) if "since" in problem else problem["type"])
        say(f"    {problem['message']}")


def say(text: str) -> None:
    """Print for people, in lines of 79 columns that break between words."""
    form: Json = {"break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(printable(text), 79, subsequent_indent="    ", **form))


def retry(config: Config, ids: list[str]) -> int:
    """Put failed alerts back into the queue: those named, or all.

    Example: ts3d retry 587c0159a907346eccb84004. Exit codes: 0 done, 1 a named alert has not
    failed, 2 wrong usage, 78 wrong configuration.
    """
    with open_queue(config) as queue_:
        counts = {id_: queue_.retry(id_) for id_ in set(ids) or [""]}
    print(f"{sum(counts.values())} queued again")
    if missing := [id_ for id_ in ids if not counts[id_]]:
        raise QueueError(f"no alert {' '.join(missing)} has failed. Check: ts3d status --failed")
    return 0


def time_argument(text: str) -> float:
    """Return the seconds since the epoch of a time, date or age. Raises ArgumentTypeError."""
    if match := fullmatch("([0-9]{1,5})([smhd])", text):
        return time() - int(match[1]) * UNITS["seconds"][match[2]]
    try:
        if "-" not in text:
            raise ValueError("is not a time such as 2026-11-24T18:00:00Z")
        return read_time(re.sub("^[0-9]{4}-[0-9]{2}-[0-9]{2}$", r"\g<0>T00:00:00Z", text))
    except ValueError as error:
        raise ArgumentTypeError(
            f"{text!r} {error}, nor a date such as 2026-11-24, nor an age such as 2h"
        ) from None


def backfill(config: Config, since: float | None, until: float | None) -> int:
    """Queue alerts of a time range that the Threat Stack API lists and S3 lacks.

    Example: ts3d backfill --from 2h. Exit codes: 0 done, 1 failed, 2 wrong usage, 78 wrong
    configuration, 130 stopped.
    """
    require_upstreams(config)
    # A run that is stopped loses nothing: its alerts are on disk; the next run finds the rest.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threatstack, s3 = ThreatStack(config), S3(config)
    counts, how = Counter[str](), " failed"
    now = time()
    begin, end = since, min(until or now, now)  # one end for all pages
    try:
        with open_queue(config) as queue_:
            if begin is None:
                done = queue_.backfilled()
                # A time in the future was noted by a clock that was wrong.
                begin = done - 3600 if 0 < done <= now else end - 86400
            if begin >= end:
                raise ArgumentTypeError(
                    f"--from {rfc_3339(begin)} is not before --until {rfc_3339(end)}"
                )
            for page in list_pages(threatstack, rfc_3339(begin), rfc_3339(end)):
                wait_for_room(queue_)
                queue_missing(page, queue_, s3, counts)
                show_progress(SUMMARY.format_map(counts))
            if since is None:
                queue_.backfilled(end)
        how = ""
    finally:
        show_progress("")
        print(f"backfill{how}: {SUMMARY.format_map(counts)}")
    return min(counts["invalid"], 1)


def list_pages(threatstack: ThreatStack, since: str, until: str) -> Iterator[str]:
    """Yield the list of alerts, page by page, as a JSON list. Raises UpstreamError."""
    hawk = threatstack.config.auth == "hawk"
    lists = [f"/alerts?start={since}&end={until}&count=100"]
    if hawk:
        # In this order: an alert that is dismissed meanwhile is in the second list.
        kinds = ("active", "dismissed")
        lists = [f"/alerts?status={kind}&from={since}&until={until}" for kind in kinds]
    for path in lists:
        answer, more = ("", ""), ""
        for number in itertools.count(1):
            before, answer = answer, insist(threatstack.list, path + more)
            if answer == before:
                raise threatstack.error("bad_answer", "the list of alerts has no end", 200)
            page, token = answer
            yield page
            if not token and (hawk or page == "[]"):
                break
            more = f"&token={quote(token)}" if hawk else f"&page={number}"


def insist(call: Callable[[str], Any], name: str) -> Any:
    """Call an upstream until it answers; return the answer. Raises UpstreamError.

    An error that no retry can help is raised at once, any other after BACKFILL_PATIENCE.
    """
    deadline = monotonic() + BACKFILL_PATIENCE
    for tries in itertools.count():
        try:
            return call(name)
        except UpstreamError as error:
            pause = error.retry_after or backoff(tries, 0, 30)
            lasts = re.match(CREDENTIALS, error.type)
            refused = 300 <= error.status < 500 and error.status not in (408, 429)
            if lasts or refused or monotonic() + pause > deadline:
                raise
            show_progress(f"waiting: {error}")
            sleep(pause)


def wait_for_room(queue_: Queue) -> None:
    """Wait while BACKFILL_QUEUED alerts are queued. Raises QueueError if they get no fewer."""
    fewest, deadline = inf, 0.0
    while (queued := queue_.facts["queued"]) >= BACKFILL_QUEUED:
        if queued < fewest:
            fewest, deadline = queued, monotonic() + BACKFILL_PATIENCE
        if monotonic() > deadline:
            raise QueueError(f"{BACKFILL_QUEUED} alerts are queued. Check: ts3d status")
        sleep(1)


def queue_missing(page: str, queue_: Queue, s3: S3, counts: Counter[str]) -> None:
    """Queue those of a page's alerts that S3 lacks. Raises QueueError, UpstreamError."""
    alerts, missing = list(enumerate(literals(page), counts["listed"])), {}
    counts["listed"] += len(alerts)
    time_name = "createdAt" if s3.config.auth == "hawk" else "created_at"
    for i, (value, literal) in alerts:
        job = read_alert(literal, value, f"alerts[{i}]", time_name, "backfill")
        if job.error_type:
            log_error("backfill: invalid alert", id=job.id, error=job.error_message)
            job.minute = minute_of(time())  # if only its time is invalid, it is queued
        # In this order: an alert that leaves the queue in between is in S3.
        if not ALERT_ID.fullmatch(job.id):
            counts["invalid"] += 1
        elif queue_.read(Queue.QUEUED, job.id):
            counts["waiting"] += 1
        elif insist(s3.exists, name_of("alerts", job)):
            counts["archived"] += 1
        else:
            missing[job.id] = job
    queue_.put(list(missing.values()))
    counts["queued"] += len(missing)


def show_progress(text: str) -> None:
    """Show the progress on a terminal, in one line that the next text replaces."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r\x1b[K{printable(text)[:79]}", end="\r", file=sys.stderr)


COMMANDS = (serve, check, status, retry, backfill)
DESCRIPTION = """Archives Threat Stack's alerts in AWS S3.

Exit codes: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration."""
BACKFILL_FROM = """a time (RFC 3339), a date (UTC) or an age such as 2h; default: an hour before the
end of the last complete run, or else 24 hours ago"""


def parse_arguments(arguments: list[str] | None) -> Json:
    """Return the command, the configuration's path, and the command's own arguments."""
    option = ArgumentParser(add_help=False)  # before the command and after it
    text = "configuration file; default: /etc/ts3d/ts3d.conf, else ts3d.conf beside the program"
    option.add_argument("-c", "--config", metavar="FILE", default=SUPPRESS, help=text)
    parser = ArgumentParser("ts3d", description=DESCRIPTION, parents=[option])
    boto3 = "missing"
    with suppress(PackageNotFoundError):
        boto3 = version("boto3")
    text = f"ts3d {VERSION}, boto3 {boto3}, SQLite {sqlite3.sqlite_version}, Python {sys.version}"
    parser.add_argument("--version", action="version", version=text)
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    for run in COMMANDS:
        text = str(run.__doc__)
        command = commands.add_parser(
            run.__name__, parents=[option], help=text.split(".")[0], description=text
        )
        command.set_defaults(run=run)
        add = command.add_argument
        if run is status:
            add("--failed", action="store_true", help="list failed alerts and errors")
            add("--json", dest="as_json", action="store_true", help="print JSON")
        if run is retry:
            add("ids", metavar="ID", nargs="*", help="default: all failed alerts")
        if run is backfill:
            add("--from", dest="since", metavar="T", type=time_argument, help=BACKFILL_FROM)
            add("--until", metavar="T", type=time_argument, help="the same; default: now")
    return vars(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; return its exit code."""
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # else the next file that is opened would take the place of, say, standard error
    with suppress(AttributeError):  # upstreams' texts may exceed the locale
        sys.stdout.reconfigure(  # type: ignore[union-attr]
            errors="backslashreplace", line_buffering=True
        )
    chosen = parse_arguments(arguments)
    run = chosen.pop("run")
    path = chosen.pop("config", next(filter(exists, CONFIG_FILES), CONFIG_FILES[1]))
    try:
        if run == check:
            return check(path)
        config = load_config(path)
        start_log(config.level)
        return int(run(config, **chosen))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ts3d status | head`
        os._exit(1)  # at an orderly exit Python would complain of it
    except Exception as error:  # a bug too: a traceback is no use to an administrator
        line, priority = printable(explain(error)), "<3>" if in_journal() else ""
        notify(f"STATUS={line}")
        print(f"{priority}ts3d: {line}", file=sys.stderr)
        return {ConfigError: 78, ArgumentTypeError: 2}.get(type(error), 1)


if __name__ == "__main__":
    sys.exit(main())

# MIT License
#
# Copyright (c) 2026 the ts3d authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
