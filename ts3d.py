#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.26"]
# ///
"""ts3d archives Threat Stack's alerts in AWS S3.

It receives Threat Stack's webhooks, keeps each alert on disk before it answers, fetches the alert's detail from the
Threat Stack API, and puts both into S3. An alert is acknowledged (200) once it is on disk, archived once it is in S3,
and forgotten only then: whatever dies in between, an acknowledged alert reaches S3.

The file reads in the order in which an alert travels: configuration and log, webhook, queue, upstreams (Threat Stack
and S3), archiver, HTTP, systemd, commands. README.md is its manual.
"""

import argparse
import base64
import calendar
import configparser
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

VERSION = "0.1.0"
T = TypeVar("T")
Write = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]  # a part of a transaction, and what comes of it
Refused = tuple[str, str | None, str]
States = dict[int, tuple[str, str | None]]  # of queued jobs, by number: the step and the last error, which is JSON
log = logging.getLogger("ts3d")


def nap(seconds: float) -> None:
    """As time.sleep, but relative: under libfaketime time.sleep's absolute end may be before the clock's beginning."""
    select.select((), (), (), seconds)


LONGEST_TURN = 20.0  # seconds of a thread's turn that calls no upstream: the queue waits for other processes for 10
LONGEST_CALLS = 600.0  # seconds of one that does, beside Threat Stack's time-out: no dead upstream draws it out so far
MOVES_BY: dict[str, float] = {}  # by thread: the moment (monotonic clock) before which it moves again


def promise(seconds: float) -> None:
    """Say that this thread moves again within so many seconds: systemd's watchdog is not fed while one is late."""
    MOVES_BY[threading.current_thread().name] = time.monotonic() + seconds


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one table says what can be set; validation, messages and the test of ts3d.conf come from it
# ---------------------------------------------------------------------------------------------------------------------


class ConfigError(Exception):
    """A configuration that cannot be used; its text names file, option, value, cause and remedy. Exit code 78."""


def matching(pattern: str, meaning: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser of options: `convert`s text that matches, and raises ValueError for any other."""

    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"not {meaning}")
        return convert(text)

    return parse


def number(low: float, high: float, units: dict[str, int]) -> Callable[[str], Any]:
    """A parser of numbers with an optional unit, within low … high in the smallest one; raises ValueError."""
    kind, fraction, of = (float, r"(\.[0-9]{1,6})?", " seconds") if units is TIME else (int, "", "")

    def convert(text: str) -> Any:
        value = kind(text.rstrip("".join(units))) * units.get(text[-1], 1)
        if not low <= value <= high:
            raise ValueError(f"not within {low:g} to {high:g}{of}")
        return value

    example = f", or one with {' '.join(units)} behind it" if units else ""
    return matching(f"[0-9]{{1,12}}{fraction}({'|'.join(units)})?", f"a number{example}", convert)


TIME = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
whole = matching("[0-9]{1,12}", "a whole number", int)
boolean = matching("(?i:yes|no|true|false|on|off|1|0)", "yes or no", lambda t: t.lower() in ("yes", "true", "on", "1"))
address = matching(
    r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):[0-9]{1,5}",
    "an address: write HOST:PORT, or [::1]:PORT for IPv6",
    lambda text: (urllib.parse.urlsplit(f"//{text}").hostname, urllib.parse.urlsplit(f"//{text}").port),
)
url = matching(
    r"https?://([A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?(/[!-\"$->@-~]*)?",
    "a URL of the form https://HOST/PATH",
    lambda text: (text.rstrip("/"), urllib.parse.urlsplit(text).port)[0],  # .port raises ValueError over 65535
)
word = matching("[!-~]+", "one word of visible ASCII characters")
words = matching(r"\s*[!-~]+(\s*\n\s*[!-~]+)*\s*", "words of visible ASCII characters, one a line", str.split)
level = matching("(?i:DEBUG|INFO|WARNING|ERROR)", "DEBUG, INFO, WARNING or ERROR", str.upper)
key_prefix = matching(
    r"([^/\x00-\x1f\x7f]+(/[^/\x00-\x1f\x7f]+)*)?",
    "a key prefix: no slash at either end, no empty part, no control character",
)
bucket_name = matching(
    "[A-Za-z0-9._-]{3,255}|arn:[A-Za-z0-9:/_-]+", "a bucket: write its name alone, without s3:// and without a path"
)


class Option(NamedTuple):
    """One option of ts3d.conf: where it stands, how its text becomes a value, its default's text, what it means."""

    section: str
    name: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    secret: bool = False  # never shown, and NAME_file may name a file that holds it


OPTIONS = (
    Option("server", "listen", address, "127.0.0.1:8080", "HOST:PORT or [::1]:PORT to listen on"),
    Option("server", "webhook_token", words, None, "secret that a webhook must present; several, one a line", True),
    Option("server", "metrics_token", word, None, "secret for /metrics", True),
    Option("server", "wait", number(0, 30, TIME), "2", "seconds an answer waits for S3; 0: not at all"),
    Option("server", "max_body", number(1, 64 << 20, SIZE), "8M", "bytes of one webhook"),
    Option("server", "request_timeout", number(0.1, 3600, TIME), "10", "seconds for a whole request to arrive"),
    Option("server", "max_connections", number(1, 65536, {}), "1024", "connections held at once"),
    Option("server", "tls_certificate", str, None, "PEM file: serve HTTPS with this certificate chain"),
    Option("server", "tls_key", str, None, "PEM file: the certificate's key"),
    Option("threatstack", "auth", matching("key|hawk", "key or hawk"), "key", "key (API v1) or hawk (API v2)"),
    Option("threatstack", "base_url", url, None, "the API's URL; by default the one that goes with auth"),
    Option("threatstack", "api_key", word, None, "the API's key", True),
    Option("threatstack", "user_id", word, None, "Hawk's id", True),
    Option("threatstack", "organization_id", word, None, "Hawk's ext; with auth = key the Organization header"),
    Option("threatstack", "events", boolean, "yes", "with Hawk, archive contributing events too"),
    Option("threatstack", "timeout", number(0.1, 3600, TIME), "30", "seconds for one call, whole"),
    Option("s3", "bucket", bucket_name, None, "the bucket"),
    Option("s3", "prefix", key_prefix, "", "prefix of every key, without a slash at either end"),
    Option("s3", "region", word, None, "AWS region; by default where boto3 finds it"),
    Option("s3", "endpoint_url", url, None, "S3 endpoint; by default where boto3 finds it"),
    Option("queue", "path", str, None, "the SQLite file; by default in $STATE_DIRECTORY, else beside this file"),
    Option("queue", "max_size", number(1, 1 << 50, SIZE), "1G", "bytes that queued alerts may take"),
    Option("archive", "workers", number(0, 1024, {}), "16", "alerts archived at once; 0 only receives"),
    Option("archive", "give_up_after", number(0, 10**9, TIME), "7d", "time that an alert may fail"),
    Option("log", "level", level, "INFO", "least level that is logged"),
)
PUT_OBJECT = "s3:put_object"  # this section's options are put_object's own parameters, not ts3d's
OWN_PARAMETERS = re.compile("Bucket|Key|Body|Content(Type|Length|MD5)|Checksum.*")  # what ts3d sets itself
ENVIRONMENT = {  # the tutorial's variables, by the option that they override
    "base_url": "THREATSTACK_BASE_URL",
    "api_key": "THREATSTACK_API_KEY",
    "bucket": "TS_AWS_S3_BUCKET",
    "prefix": "TS_AWS_S3_PREFIX",
}
BASE_URLS = {"key": "https://app.threatstack.com/api/v1", "hawk": "https://api.threatstack.com/v2"}
CONFIG_FILES = ("/etc/ts3d/ts3d.conf", os.path.join(os.path.dirname(os.path.realpath(__file__)), "ts3d.conf"))
HOLD_BACK = 16 << 20  # bytes of disk that webhooks leave free, so that there is room to drain the queue
DISK_FULL = f"the queue's disk has less than {HOLD_BACK >> 20}M free"
SECRETS: list[str] = []  # what `redact` takes out of whatever is said


def redact(text: str) -> str:
    """`text` without any configured secret, also where another program quoted it in its error."""
    for secret in sorted(SECRETS, key=len, reverse=True):  # one may contain another
        text = text.replace(secret, "***")
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the known name that is most like this one, or nothing."""
    import difflib  # only a misspelt option needs it, and it is slow to import

    by_lower = {k.lower(): k for k in known}
    return "".join(f" (did you mean {by_lower[k]}?)" for k in difflib.get_close_matches(name.lower(), by_lower, 1, 0.5))


class Config(SimpleNamespace):
    """The options' values by name, and `file` (its path), `put_object` (texts by parameter), `credentials`, `tls` …"""

    def __repr__(self) -> str:
        """Without the values: some are secrets."""
        return f"Config({self.file!r})"

    def require(self, *names: str) -> None:
        """Raises ConfigError for the first of these options that is not set."""
        for name in names:
            if name in self.unset:
                raise ConfigError(self.unset[name])


def load_config(path: str) -> Config:
    """Read and check the configuration file and the environment. Raises ConfigError."""
    sections, folder = read_ini(path), os.path.dirname(os.path.abspath(path))
    config = Config(file=path, put_object=sections.get(PUT_OBJECT, {}), tls=None, certificate_ends=math.inf)
    config.credentials = os.path.join(folder, os.environ.get("CREDENTIALS_DIRECTORY") or "secrets")
    config.unset = {}  # what to say of options that are not set, where they are needed
    aws = os.path.join(config.credentials, "aws_credentials")
    # Also an empty one, and for ~/.aws/config too: commands run by hand are to find no others than the service finds.
    if os.path.exists(aws) and "AWS_SHARED_CREDENTIALS_FILE" not in os.environ:
        os.environ.update(AWS_SHARED_CREDENTIALS_FILE=aws, AWS_CONFIG_FILE=aws)
    for option in OPTIONS:
        section, variable = sections.get(option.section, {}), ENVIRONMENT.get(option.name, "")
        where, text = f"{path}: [{option.section}] {option.name}", section.get(option.name)
        unset = f"{where} is not set: write it there" + (f" or set {variable}" if variable else "")
        if os.environ.get(variable):
            where, text = variable, os.environ[variable]
        elif (name := section.get(f"{option.name}_file")) is not None:
            if text is not None:
                raise ConfigError(f"{where} and {option.name}_file are both set: keep one")
            # What LoadCredential took it from.
            unset = f"{where}: {os.path.join(folder, 'secrets', name)} is empty: write it there"
            where = f"{where}_file = {name!r}"
            file = os.path.join(config.credentials, name)
            try:
                with open(file, encoding="utf-8", newline="") as stream:
                    text = stream.read().removesuffix("\n").removesuffix("\r")
            except (OSError, UnicodeDecodeError) as error:
                cause = getattr(error, "strerror", "not UTF-8")
                raise ConfigError(f"{where}: cannot read {file}: {cause}") from None
        if option.name == "webhook_token" and text == "":  # it would open the door
            raise ConfigError(f"{where}: empty: write a secret there, or take the line away")
        if text is None or (text == "" and option.default is None):
            text = option.default
        try:
            setattr(config, option.name, None if text is None else option.parse(text))
        except ValueError as error:
            shown = "" if option.secret else f" = {text!r}"
            raise ConfigError(f"{where}{shown}: {error}") from None
        if not text:
            config.unset[option.name] = unset
        elif option.secret:
            SECRETS.extend(text.split())
    config.base_url = config.base_url or BASE_URLS[config.auth]
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    config.path = os.path.join(folder, config.path or os.path.join(state, "queue.db"))
    if config.tls_certificate or config.tls_key:
        load_tls(config)
    return config


def read_ini(path: str) -> dict[str, dict[str, str]]:
    """The file's sections and options, names checked against the table. Raises ConfigError."""
    # No interpolation: keys hold `%`. No default section: it would leak into all others. Names keep their case.
    parser = configparser.RawConfigParser(default_section="", empty_lines_in_values=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror} (-c FILE names another)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None
    except configparser.Error as error:  # its own text may quote the line, and that hold a secret
        line = getattr(error, "lineno", None) or getattr(error, "errors", [[1]])[0][0]
        what = "not `option = value` in a [section]"
        if section := getattr(error, "section", None):
            what = f"[{section}] {getattr(error, 'option', '')}".strip() + " is there twice"
        raise ConfigError(f"{path}: line {line}: {what}") from None
    sections = {section: dict(parser[section]) for section in parser.sections()}
    if own := next(filter(OWN_PARAMETERS.fullmatch, sections.get(PUT_OBJECT, ())), None):
        raise ConfigError(f"{path}: [{PUT_OBJECT}] {own}: ts3d sets this itself")
    for section, options in sections.items():
        known = [n for o in OPTIONS if o.section == section for n in (o.name, f"{o.name}_file")[: 1 + o.secret]]
        if not known and section != PUT_OBJECT:
            likely = nearest(section, [PUT_OBJECT, *(option.section for option in OPTIONS)])
            raise ConfigError(f"{path}: unknown section [{section}]{likely}")
        for name in options:
            if known and name not in known:
                # What looks like no name may be a line of a secret that is not indented.
                shown = name if re.fullmatch("[A-Za-z_]{1,30}", name) else "in a line that is not indented, or misspelt"
                raise ConfigError(f"{path}: [{section}] unknown option {shown}{nearest(name, known)}")
    return sections


def load_tls(config: Config) -> None:
    """Make `tls`, the context of tls_certificate and tls_key, and note when it ends. Raises ConfigError."""
    config.require("tls_certificate", "tls_key")
    files = [os.path.join(config.credentials, name) for name in (config.tls_certificate, config.tls_key)]
    config.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    config.tls.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        config.tls.load_cert_chain(files[0], files[1], password="")  # a key with a password fails, and asks for none
        config.certificate_ends = certificate_ends(files[0])
    except (ssl.SSLError, OSError) as error:
        cause = getattr(error, "reason", None) or error.strerror
        where = f"{config.file}: [server] tls_certificate, tls_key: {', '.join(files)}"
        raise ConfigError(f"{where}: no readable PEM pair: {cause}") from None


def certificate_ends(path: str) -> float:
    """When the first certificate of a PEM file ends (seconds since the epoch), NaN where it does not say.

    The ssl module tells that of others' certificates alone. Here is what DER makes of its validity: a sequence of two
    times, each with two or four digits for the year (RFC 5280, section 4.1.2.5). Raises OSError.
    """
    with open(path, encoding="latin-1") as file:
        pem = re.search("-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----", file.read())
    time_of = rb"(?:\x17\x0d|\x18\x0f([0-9]{2}))([0-9]{12})Z"
    found = pem and re.search(rb"\x30." + time_of + time_of, ssl.PEM_cert_to_DER_cert(pem[0]), re.DOTALL)
    if not found:
        return math.nan
    century = found[3] or (b"20" if found[4] < b"50" else b"19")
    return calendar.timegm(time.strptime((century + found[4]).decode(), "%Y%m%d%H%M%S"))


# ---------------------------------------------------------------------------------------------------------------------
# Log
# ---------------------------------------------------------------------------------------------------------------------


class LineFormatter(logging.Formatter):
    """One line a record: no secret, no traceback, no control character that would forge a line or drive a terminal."""

    # journald takes the time itself, and the level as sd-daemon(3)'s prefix
    PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        text = printable(redact(record.getMessage()))
        if in_journal():
            return f"<{self.PRIORITIES.get(record.levelname, 6)}>{text}"
        return f"{self.formatTime(record)} {record.levelname} {text}"


def printable(text: str) -> str:
    """`text` with control characters and line separators escaped."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: f"\\x{ord(match[0]):02x}", text)


def in_journal() -> bool:
    """Whether standard error is the journal: $JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    stat = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def start_log(level: str) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    # What no line says is not looked for (the logging HOWTO's "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.raiseExceptions = False  # a log that cannot be written must not end what is logged
    # Other libraries speak from WARNING on: botocore's DEBUG shows signatures and bodies.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level)


def describe(error: BaseException) -> str:
    """An exception in one line: its class, its text, which alone may be empty, and where in this file it passed."""
    lines = [str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
    return f"{type(error).__name__}: {error}" + (f" (ts3d.py:{'>'.join(lines)})" if lines else "")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: counted where it happens, shown by GET /metrics
# ---------------------------------------------------------------------------------------------------------------------

METRICS = {  # type and help, by name; https://prometheus.io/docs/practices/naming/
    "ts3d_build_info": ("gauge", "Always 1; the labels say what runs."),
    "ts3d_webhooks_total": ("counter", "Webhooks answered, by HTTP status."),
    "ts3d_alerts_received_total": ("counter", "Alerts that came by webhook and are on disk."),
    "ts3d_alerts_archived_total": ("counter", "Alerts of which all is in S3."),
    "ts3d_alerts_rejected_total": ("counter", "Alerts in webhooks that are not valid."),
    "ts3d_alerts_failed_total": ("counter", "Alerts set aside as failed."),
    "ts3d_acknowledgement_seconds": ("summary", "From a webhook's first byte until its alerts are on disk."),
    "ts3d_archive_seconds": ("summary", "From an alert's arrival until all of it is in S3."),
    "ts3d_retries_total": ("counter", "Failures after which an alert is tried again, by upstream and cause."),
    "ts3d_upstream_held": ("gauge", "1 while nothing but a probe is sent to the upstream, because it fails."),
    "ts3d_queue_depth": ("gauge", "Alerts queued."),
    "ts3d_queue_failed": ("gauge", "Alerts set aside as failed, until they are tried again."),
    "ts3d_queue_oldest_age_seconds": ("gauge", "Age of the oldest alert that is queued."),
    "ts3d_queue_size_bytes": ("gauge", "Disk that the queue takes."),
    "ts3d_queue_max_size_bytes": ("gauge", "Disk that the queue may take: [queue] max_size."),
    "ts3d_queue_disk_free_bytes": ("gauge", "Room on the queue's disk; webhooks are refused below 16M."),
    "ts3d_tls_certificate_end_timestamp_seconds": ("gauge", "When the certificate of [server] tls_certificate ends."),
    "process_start_time_seconds": ("gauge", "When the process started, in seconds since the epoch."),
}
Samples = dict[str, dict[str, float]]  # by a sample's name: values by labels, as Prometheus writes them


class Metrics:
    """What is counted since the start of the process."""

    MOST_LABELS = 200  # causes are other programs' words: more of them are counted as "other"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        build = labels_text(version=VERSION, python=sys.version.split()[0], sqlite=sqlite3.sqlite_version)
        self._samples: Samples = {"ts3d_build_info": {build: 1}, "process_start_time_seconds": {"": time.time()}}
        for name, (kind, _) in METRICS.items():  # a rate needs to see the 0 before the 1
            if kind == "summary":
                self.observe(name, 0, 0)
            elif name.startswith("ts3d_alerts_"):
                self.count(name, 0)
        for status in (200, 400, 401, 405, 408, 413, 431, 500, 503):
            self.count("ts3d_webhooks_total", 0, status=status)

    def count(self, name: str, amount: float = 1, **labels: Any) -> None:
        """Add to a counter."""
        with self._lock:
            values = self._samples.setdefault(name, {})
            if (text := labels_text(**labels)) not in values and len(values) >= self.MOST_LABELS:
                text = labels_text(**dict.fromkeys(labels, "other"))
            values[text] = values.get(text, 0) + amount

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        """Add to a summary."""
        self.count(f"{name}_sum", seconds)
        self.count(f"{name}_count", times)

    def show(self, gauges: Samples) -> str:
        """All metrics in Prometheus's text format, with these gauges.

        https://prometheus.io/docs/instrumenting/exposition_formats/
        """
        with self._lock:
            samples = {name: dict(values) for name, values in self._samples.items()} | gauges
        lines = []
        for name, (kind, help_) in METRICS.items():
            family = (name, f"{name}_sum", f"{name}_count")
            rows = [f"{n}{labels} {value:.15g}\n" for n in family for labels, value in samples.get(n, {}).items()]
            lines += [f"# HELP {name} {help_}\n", f"# TYPE {name} {kind}\n", *rows]
        return "".join(lines)


def labels_text(**labels: Any) -> str:
    """Labels as Prometheus writes them; the values hold nothing that would have to be escaped."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""


metrics = Metrics()


# ---------------------------------------------------------------------------------------------------------------------
# Webhook: from a body to alerts, each with its own bytes
# ---------------------------------------------------------------------------------------------------------------------


class Malformed(Exception):
    """A body that is no webhook; its text names the member or the place, and the cause."""


@dataclass
class Arrival:
    """What is to be archived: `step` names the first object to write, `minute` is UTC as YYYY/MM/DD/HH/MM."""

    id: str
    minute: str
    step: str
    body: bytes


@dataclass
class Rejected:
    """An alert of a webhook that is not to be archived; `id` is None where it has none."""

    id: str | None
    message: str


def no_constant(name: str) -> None:
    """Refuse what Python takes for a number and RFC 8259 does not: NaN, Infinity, -Infinity."""
    raise ValueError(f"{name} is no JSON number (RFC 8259, section 6)")


# An object is a tuple of its members, also of those that are there twice. int() of 100,000 digits would take long.
JSON = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float, parse_constant=no_constant)
BETWEEN = re.compile(r"[ \t\n\r,:]*")  # what stands between the values of a text that is known to be JSON
MAX_ALERTS = 10_000  # in one webhook: each costs memory here, and a place in the answer
ALERT_ID = re.compile(r"[A-Za-z0-9_-]{4,128}")
RFC_3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]((?:[01][0-9]|2[0-3]):[0-5][0-9]):(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
    r"(?:[Zz]|([+-](?:[01][0-9]|2[0-3]):[0-5][0-9]))"
)
YEAR_10000 = 253_402_300_800_000  # milliseconds


def read_json(body: bytes) -> tuple[str, Any]:
    """The text, bare of blanks, and the value (see `JSON`) of a JSON text as RFC 8259 has it. Raises Malformed."""
    try:
        text = body.decode()
        return text.strip(" \t\n\r"), JSON.decode(text)
    except UnicodeDecodeError as error:
        raise Malformed(f"not JSON: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise Malformed("not JSON that is read here: nested too deeply") from None
    except ValueError as error:
        member = re.search(r'"([^"\\]{1,60})"[ \t\r\n]{0,9}:[ \t\r\n]{0,9}(?:NaN|-?Infinity)', text)
        raise Malformed(f"not JSON: {member[1] + ': ' if member else ''}{error}") from None


def parts(text: str) -> Iterator[tuple[str, Any, str]]:
    """Name, value and literal text of each member of the object, or element of the array, that `text` is.

    The text is known to be valid JSON (`read_json`). The json module gives values, but not where they stood.
    """
    name, end = "", 1
    while text[at := BETWEEN.match(text, end).end()] not in "]}":  # type: ignore[union-attr]
        if text[0] == "{":
            name, end = JSON.raw_decode(text, at)
            at = BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        value, end = JSON.raw_decode(text, at)
        yield name, value, text[at:end]


def read_webhook(body: bytes) -> list[Arrival | Rejected]:
    """Each alert of `{"alerts": [ALERT, …]}`, or of one bare ALERT, judged by itself. Raises Malformed."""
    text, value = read_json(body)
    if not isinstance(value, tuple):
        raise Malformed("neither an object with `alerts` nor an alert")
    names = [name for name, _ in value]
    if "alerts" not in names:
        return [read_alert(text, value, "")]
    if "id" in names and "created_at" in names:
        raise Malformed("alerts: beside id and created_at: one alert, or many?")
    alerts = dict(value)["alerts"]
    if not isinstance(alerts, list):
        raise Malformed("alerts: not a list")
    if len(alerts) > MAX_ALERTS:
        raise Malformed(f"alerts: over {MAX_ALERTS}")
    if names.count("alerts") > 1:
        raise Malformed("alerts: there twice")
    found = enumerate(parts(literal_of(text, "alerts")))
    return [read_alert(literal, alert, f"alerts[{i}].") for i, (_, alert, literal) in found]


def read_alert(
    text: str, alert: Any, place: str, time_of: str = "created_at", step: str = "webhooks"
) -> Arrival | Rejected:
    """One alert, given its text and value, what comes before its members' names in messages, and its time's name."""
    if not isinstance(alert, tuple):
        return Rejected(None, f"{place.rstrip('.')}: not an object")
    ids, times = ([value for name, value in alert if name == wanted] for wanted in ("id", time_of))
    id_ = next((value[:200] for value in ids if isinstance(value, str)), None)
    for name, values in (("id", ids), (time_of, times)):
        if len(values) != 1:
            return Rejected(id_, f"{place}{name}: {'there twice' if values else 'missing'}")
    if id_ is None or not ALERT_ID.fullmatch(id_):
        return Rejected(id_, f"{place}id: {excerpt(text, 'id')} is not 4 to 128 of A-Z a-z 0-9 _ -")
    try:
        return Arrival(id_, minute_of(times[0]), step, text.encode())
    except (ValueError, OverflowError) as error:  # gmtime's, where 2038 is the end
        return Rejected(id_, f"{place}{time_of}: {excerpt(text, time_of)} {error}")


def literal_of(text: str, name: str) -> str:
    """The text of the value of an object's member."""
    return next(literal for found, _, literal in parts(text) if found == name)


def excerpt(text: str, name: str) -> str:
    """The value of an object's member as it was written, shortened for a message."""
    literal = literal_of(text, name)
    return printable(literal if len(literal) <= 60 else literal[:57] + "...")


def minute_of(value: Any) -> str:
    """`YYYY/MM/DD/HH/MM`, UTC, of milliseconds since the epoch or of an RFC 3339 time. Raises ValueError."""
    if isinstance(value, float) or (isinstance(value, str) and re.fullmatch("[0-9]+", value)):
        seconds = float(value) // 1000  # exact up to 2^53 ms, which is beyond the year 9999
    elif isinstance(value, str) and (match := RFC_3339.fullmatch(value)):
        # Without the seconds: a leap second's 60 (section 5.7) is unknown to datetime.
        seconds = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3] or '+00:00'}").timestamp()
    else:
        raise ValueError("is neither milliseconds since the epoch nor an RFC 3339 time")
    if not 0 <= seconds < YEAR_10000 / 1000:
        raise ValueError("is not within the years 1970 to 9999")
    return time.strftime("%Y/%m/%d/%H/%M", time.gmtime(seconds))


# ---------------------------------------------------------------------------------------------------------------------
# Queue: what was acknowledged and is not in S3 yet, in one SQLite file
# ---------------------------------------------------------------------------------------------------------------------


class QueueError(Exception):
    """The queue cannot take a write now: full, the disk full, or the disk failing."""


class QueueFull(QueueError):
    """There is no room in the queue, or on its disk."""


@dataclass
class Job:
    """A queued alert, without its body.

    `step` names the object to write next. `waited` is what counts towards giving up: the seconds that the job was
    put off for failures of its own. `due`, `error`, `failed` and `done` say what became of a job that is given back.
    `origin` is the step with which it came.
    """

    number: int
    id: str
    minute: str
    step: str
    received: float  # seconds since the epoch
    tries: int
    waited: float
    due: float = 0
    error: str | None = None  # JSON: type, message, `since` (when it was the same first), `at` (monotonic clock)
    origin: str = ""
    failed: bool = False
    done: bool = False
    probe: bool = False  # may call an upstream that is held
    seated: bool = False  # has one of Threat Stack's seats
    noted: bool = True  # what is on disk says the same


class Queue:
    """Jobs on disk: put, take, release, body, retry, done, wait, states, counts … close.

    One thread writes: what waits to be written at one moment is one transaction and one fsync. A job that was taken
    is remembered in memory only, so that after a crash it is due again at once. `due` is a time of the monotonic
    clock, which a clock that is set does not move, and which means nothing to the next process: there all are due.

    A disk that refuses writes refuses webhooks, but does not halt the archive: what became of a job stays in memory
    until a transaction succeeds, and the job goes on from there.
    """

    SCHEMA = """
        CREATE TABLE jobs (
            number   INTEGER PRIMARY KEY AUTOINCREMENT, -- order of arrival, never used again: answers wait for it
            id       TEXT NOT NULL,
            minute   TEXT NOT NULL,
            step     TEXT NOT NULL,
            received REAL NOT NULL,
            due      REAL NOT NULL DEFAULT 0,
            tries    INTEGER NOT NULL DEFAULT 0,
            waited   REAL NOT NULL DEFAULT 0,
            failed   INTEGER NOT NULL DEFAULT 0,
            error    TEXT, -- the last one: {"type": …, "message": …, "since": …, "at": …}
            body     BLOB NOT NULL);
        CREATE INDEX jobs_by_id ON jobs (id);
        CREATE INDEX jobs_by_due ON jobs (failed, step, due); -- and by number: no sorting
        PRAGMA user_version = 1;"""
    VERSION = 1
    # Made with the first thing to note, as `backfill` is, and the column at the start: a new version of the file would
    # keep older daemons out, which need none of them.
    OBSTACLES = "CREATE TABLE IF NOT EXISTS obstacles (error TEXT NOT NULL) -- what stands in the daemon's way"
    ORIGIN = "ALTER TABLE jobs ADD COLUMN origin TEXT"  # a job's, once it was given back
    ANEW = "UPDATE jobs SET failed = 0, due = 0, tries = 0, waited = 0, error = NULL WHERE failed = 1"
    DELETE = "DELETE FROM jobs WHERE number = :number"
    UPDATE = """
        UPDATE jobs SET step = :step, tries = :tries, waited = :waited, due = :due, error = :error, failed = :failed,
        origin = :origin WHERE number = :number"""
    WAL_PAGES = 4 << 20  # bytes of write-ahead log after which it is copied into the file
    OUTCOMES = 64  # that nobody waits for are written at once, fewer with the next webhook or `beat`
    MAX_OUTCOMES = 10_000  # that wait for the disk, before no more jobs are taken
    BUSY = 10.0  # seconds to wait for another process's transaction

    def __init__(self, path: str, max_size: int, create: bool = False) -> None:
        """Open the queue; `create` (the daemon) makes it where it is missing and keeps other daemons out.

        Raises ConfigError where there is none, or none that can be used.
        """
        self.path, self.max_size, self._create = path, max_size, create
        self._paths = (path, path + "-wal", path + "-shm")
        self.trouble: str | None = None  # why the last transaction failed
        self._suspect = False  # SQLite says that the file is malformed
        self._broken = True  # the connections are of no use
        self._closing = False
        self._open_files = contextlib.ExitStack()
        self._lock = threading.Condition()  # for _reader, _taken and _outcomes; notified of what answers wait for
        self._taken: set[int] = set()
        self._outcomes: dict[int, Job] = {}  # jobs given back that are not on disk yet; they are in _taken too
        self._awaited = 0  # answers that wait for outcomes
        self.refused: dict[str, Any] | None = None  # why webhooks are refused, as an error, with their `bytes`
        self.obstacles: list[str] = []  # what stands in the way, as JSON: written down for other processes
        self._noted: list[str] | None = None if create else []  # what is written down
        self._wal_stuck = False  # somebody reads what is in the write-ahead log, so that it grows
        self._checkpoint_at = min(self.WAL_PAGES, max_size // 4)
        try:
            self._open()
        except (QueueError, sqlite3.Error, OSError) as error:
            said = getattr(error, "strerror", error)
            with contextlib.suppress(OSError):
                said = f"{said}; {DISK_FULL}" if disk_free(path) < HOLD_BACK else said
            raise ConfigError(f"{path}: {said} ([queue] path)") from None
        self._inbox: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self.writer = threading.Thread(target=self._write_all, name="queue", daemon=True)
        self.writer.start()

    def _open(self) -> None:
        """Open the file, anew if it is open. The daemon makes it where it is missing, and moves a malformed one aside.

        Raises QueueError, OSError, sqlite3.Error.
        """
        self._broken = True  # until all of this has worked
        self._open_files.close()
        enter = self._open_files.enter_context
        if self._create:
            self._claim()
            make(self.path)
            # For a look at its bytes. It stays open: closing any descriptor of a file drops SQLite's locks (fcntl(2)).
            self._file = enter(open(self.path, "rb"))  # noqa: SIM115
            if damage := self._look_for_damage():
                self._move_aside(damage)
                return self._open()
        elif not os.access(self.path, os.R_OK):
            with contextlib.suppress(FileNotFoundError):
                os.stat(self.path)
                raise QueueError("this user may not read it")
            raise QueueError("there is no queue yet: `ts3d serve` makes it")
        self._db, self._reader = enter(contextlib.closing(self._connect())), enter(contextlib.closing(self._connect()))
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version > self.VERSION:
            raise QueueError(f"made by a newer ts3d (version {version})")
        if version == 0 and tables:
            raise QueueError("some other SQLite file")
        if self._create:
            if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise QueueError("this file system does not carry SQLite's WAL")
            if version == 0:
                self._db.executescript(f"BEGIN IMMEDIATE;{self.SCHEMA}COMMIT;")
            if not self._db.execute("SELECT 1 FROM pragma_table_info('jobs') WHERE name = 'origin'").fetchone():
                self._db.execute(self.ORIGIN)
            # A new process has a new monotonic clock, and what was taken by the old one is due again.
            self._db.execute("UPDATE jobs SET due = 0 WHERE failed = 0 AND due > 0")
        self._db.execute("PRAGMA busy_timeout = 0").close()  # _begin waits
        for db in (self._db, self._reader):
            db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
            # SQLite before 3.51.3 can lose a commit that races with a checkpoint ("the WAL-reset bug"), so only
            # _checkpoint does any.
            db.execute("PRAGMA wal_autocheckpoint = 0").close()
            db.execute(f"PRAGMA journal_size_limit = {self._checkpoint_at}").close()
        self._reader.execute("SELECT 1 FROM jobs LIMIT 1").close()  # opens the write-ahead log
        self._stats = {path: os.stat(path) for path in self._paths}
        self._broken = False

    def _claim(self) -> None:
        """Keep other daemons out, by a lock with a file of its own: SQLite's would be lost by closing.

        Raises QueueError, OSError.
        """
        make(self.path + ".lock")
        lock = os.fdopen(os.open(self.path + ".lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        self._open_files.enter_context(lock)
        deadline = time.monotonic() + 1  # `running` holds it for a moment
        while not locked(lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise QueueError("another `ts3d serve` works on this queue")
            nap(0.02)

    def _look_for_damage(self) -> str | None:
        """What SQLite finds malformed in the queue, None for nothing. Raises OSError, sqlite3.Error.

        A read that failed is damage to SQLite (SQLITE_IOERR_CORRUPTFS). So it is believed only where each byte of
        the file can be read, and where it says so twice.
        """
        damage = None
        for _ in range(2):
            at = 0
            while data := os.pread(self._file.fileno(), 1 << 20, at):
                at += len(data)
            try:
                with contextlib.closing(self._connect()) as db:
                    damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.DatabaseError as error:
                if not is_malformed(error):
                    raise
                damage = str(error)
            if damage == "ok":
                return None
        return " ".join(str(damage).split())

    def damage(self) -> str | None:
        """What is malformed in the queue, if SQLite said that anything is, and says it again."""
        if self._suspect:
            self._suspect = False
            with contextlib.suppress(OSError, ValueError, sqlite3.Error):  # ValueError: it is being opened anew
                return self._look_for_damage()
        return None

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{urllib.parse.quote(self.path)}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=self.BUSY, isolation_level=None, check_same_thread=False)

    def _move_aside(self, problem: str) -> None:
        kept = f"{self.path}.malformed-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, kept + path.removeprefix(self.path))
        log.critical(
            "the queue was malformed (%s). It is kept as %s, and a new one begins: alerts in it are not archived. "
            "`sqlite3 FILE .dump` shows what can still be read",
            problem,
            kept,
        )

    # Writing ---------------------------------------------------------------------------------------------------------

    def put(self, arrivals: list[Arrival]) -> list[int]:
        """Queue these durably, all or none, and return their jobs' numbers.

        The same id with the same bytes is one job; where that one had failed, it is tried anew. What backfill found is
        not queued beside any job of its id: that one writes the detail. Raises QueueError.
        """
        bytes_ = sum(len(arrival.body) for arrival in arrivals)

        def run(db: sqlite3.Connection) -> list[int]:
            try:
                # Of what can wait in Threat Stack's API, half of the room is kept free for what cannot.
                late = any(OBJECTS[arrival.step].late for arrival in arrivals)
                self._make_sure_of_room(db, bytes_, self.max_size // 2 if late else self.max_size)
            except QueueError as error:
                if not late and not self.refused:
                    log.error("%s; webhooks are answered 503", error)
                # What an empty queue would not take either says nothing of this one.
                if not late and bytes_ < self.max_size // 2:
                    since = (self.refused or {}).get("since", time.time())
                    kind = "disk_full" if str(error) == DISK_FULL else "queue_full"
                    self.refused = {"type": kind, "message": str(error), "since": since, "bytes": bytes_}
                raise
            return self._put(db, arrivals)

        return self._write(run)

    def _put(self, db: sqlite3.Connection, arrivals: list[Arrival]) -> list[int]:
        sql = "SELECT DISTINCT id FROM jobs WHERE id IN (SELECT value FROM json_each(?))"
        known = {row[0] for row in db.execute(sql, (json.dumps([new.id for new in arrivals]),))}  # seldom any
        numbers = []
        for new in arrivals:
            number = failed = 0
            if new.id in known:
                sql = "SELECT number, failed FROM jobs WHERE id = ? AND (body = ? OR ?) ORDER BY failed LIMIT 1"
                same = db.execute(sql, (new.id, new.body, new.step == "backfill")).fetchone()
                number, failed = same or (0, 0)
            if failed:
                db.execute(f"{self.ANEW} AND number = ?", (number,))
            elif not number:
                sql = "INSERT INTO jobs (id, minute, step, received, body) VALUES (?, ?, ?, ?, ?)"
                number = db.execute(sql, (new.id, new.minute, new.step, time.time(), new.body)).lastrowid or 0
                known.add(new.id)
            numbers.append(number)
        return numbers

    def done(self, job: Job) -> None:
        """Forget a job: all of it is in S3."""
        self._settle(replace(job, done=True))

    def retry(self, job: Job, due: float = 0, error: str | None = None, failed: bool = False) -> None:
        """Give back a job with its step, tries and `waited` noted, to be taken again from `due` (monotonic clock) on.

        `error` is what it failed for, None if it did not; `failed` sets it aside, until it is asked for again.
        """
        self._settle(replace(job, probe=False, seated=False, noted=False, due=due, error=error, failed=failed))

    def _settle(self, job: Job) -> None:
        """Have the next transaction write what became of the job. Until one succeeds it stays in memory."""
        with self._lock:
            self._outcomes[job.number] = job
        if self._awaited or len(self._outcomes) >= self.OUTCOMES:
            self.beat()

    def beat(self) -> None:
        """Wake the writer: it shows that it moves, and tries again what the disk refused. Waits for nothing."""
        if self._inbox.empty():
            self._inbox.put(None)

    def wait(self, numbers: list[int], seconds: float, hopeless: Callable[[], bool]) -> States:
        """Wait until these jobs are done, for `seconds` at most, or until it is `hopeless`; what `states` says then.

        Raises QueueError.
        """
        left = list(numbers)

        def over() -> bool:
            while not hopeless() and left and not self.states(left[-1:]):  # one look each time, however many there are
                left.pop()
            return not left or hopeless()

        with self._lock:
            self._awaited += 1
            try:
                if self._outcomes:  # of before this waited
                    self.beat()
                self._lock.wait_for(over, seconds)
            finally:
                self._awaited -= 1
            return self.states(left)

    def stir(self) -> None:
        """Have all that `wait` look whether it is hopeless now."""
        with self._lock:
            self._lock.notify_all()

    def prove_writable(self) -> None:
        """Commit something. Raises QueueError where a webhook would not be taken either."""

        def run(db: sqlite3.Connection) -> None:
            self._make_sure_of_room(db, (self.refused or {}).get("bytes", 0), self.max_size)
            # An UPDATE of nothing would write nothing: this writes a page as it was.
            db.execute(f"PRAGMA user_version = {self.VERSION}")

        self._write(run)

    def _make_sure_of_room(self, db: sqlite3.Connection, bytes_: int, limit: int) -> None:
        """Raises QueueError unless `bytes_` more leave the queue within `limit` and the disk its reserve."""
        if self._lost():
            raise QueueError(f"the queue's file is gone from {self.path}")
        used, free = self._space(db)
        if used + bytes_ > limit:
            raise QueueFull(f"the queue is full: [queue] max_size is {self.max_size} bytes")
        if free < HOLD_BACK + bytes_:
            raise QueueFull(DISK_FULL)

    def _space(self, db: sqlite3.Connection) -> tuple[int, int]:
        """Bytes that the queue takes of its disk, and bytes that are left to it. Raises OSError, sqlite3.Error."""
        pages, free, page = (
            db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_count", "freelist_count", "page_size")
        )
        wal = os.path.getsize(self._paths[1])
        if not self._wal_stuck:
            wal = min(wal, self._checkpoint_at)  # what is beyond was checkpointed, and the next commit cuts it off
        # The file's free pages are room too: it does not shrink when the queue has been drained.
        return (pages - free) * page + wal, disk_free(self.path) + free * page

    def _write(self, run: Callable[[sqlite3.Connection], T]) -> T:
        """Have `run` take part in the next transaction, and return its result. Raises QueueError."""
        future: Future[T] = Future()
        self._inbox.put((run, future))
        return future.result()

    def _write_all(self) -> None:
        """The writer thread: commit all that waits, until the queue is closed."""
        while not (self._closing and self._inbox.empty()):
            promise(LONGEST_TURN)
            writes = [self._inbox.get()]
            writes += [self._inbox.get() for _ in range(self._inbox.qsize())]
            if any(writes) or self._outcomes or self._broken or self.refused or self.obstacles != self._noted:
                self._commit([write for write in writes if write])

    def _commit(self, writes: list[Write]) -> None:
        results: list[Any] = []
        try:
            if self._broken or (self._lost() and not self._db.execute("SELECT 1 FROM jobs LIMIT 1").fetchone()):
                with self._lock:
                    self._open()
                log.warning("the queue was opened anew")
            with self._lock:
                outcomes = list(self._outcomes.values())
            obstacles = self.obstacles
            self._begin()
            if obstacles != self._noted:
                self._db.execute(self.OBSTACLES)
                self._db.execute("DELETE FROM obstacles")
                self._db.executemany("INSERT INTO obstacles VALUES (?)", [(obstacle,) for obstacle in obstacles])
            for job in outcomes:
                self._db.execute(self.DELETE if job.done else self.UPDATE, vars(job))
            for run, _ in writes:
                try:
                    results.append(run(self._db))
                except QueueError as error:  # refuses this one, before it changed anything
                    results.append(error)
            self._db.execute("COMMIT")
            self._noted = obstacles
            self._look_for_room()
            with self._lock:
                for job in outcomes:
                    if self._outcomes.get(job.number) is job:  # not taken again meanwhile
                        del self._outcomes[job.number]
                        self._taken.discard(job.number)
                if outcomes:
                    self._lock.notify_all()
            self._note_trouble(None)
        except Exception as error:  # whatever it is, it must reach those who wait, and the next transaction be tried
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self._note_trouble(error)
            results = [QueueError(f"the queue cannot be written: {error}") for _ in writes]
        for (_, future), result in zip(writes, results, strict=True):
            future.set_exception(result) if isinstance(result, QueueError) else future.set_result(result)
        self._checkpoint()

    def _look_for_room(self) -> None:
        """Whether there is room again for what was refused last."""
        if self.refused:
            with contextlib.suppress(QueueError, sqlite3.Error, OSError):
                self._make_sure_of_room(self._db, self.refused["bytes"], self.max_size)
                self.refused = None
                log.warning("the queue takes webhooks again")

    def _begin(self) -> None:
        """Begin a transaction that writes, once no other process is in one.

        SQLite's own waiting looks every 100 ms in the end, and would find the lock taken each time by a process that
        writes without a pause.
        """
        deadline = time.monotonic() + self.BUSY
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            nap(random.uniform(0.0005, 0.003))

    def _note_trouble(self, error: Exception | None) -> None:
        """Log once when the file begins to fail, and once when it works again."""
        if error and not self.trouble:
            log.error("the queue fails: %s; webhooks are answered 503", error)
        elif self.trouble and not error:
            log.warning("the queue works again")
        self.trouble = str(error) if error else None
        self._suspect = self._suspect or is_malformed(error)
        # An unlock that failed has left SQLite a lock in memory that nobody holds: only closing frees it.
        self._broken = self._broken or "locking protocol" in str(error)

    def _checkpoint(self) -> None:
        """Copy a write-ahead log that has grown into the file, while the write lock keeps others from committing."""
        try:
            if not self._create or self._lost() or os.path.getsize(self._paths[1]) <= self._checkpoint_at:
                return
            self._begin()
            try:
                with self._lock:
                    row = self._reader.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                self._wal_stuck = row[1] != row[2]  # pages in the log, pages copied
            finally:
                self._db.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            self._note_trouble(error)

    def _lost(self) -> bool:
        """Whether another file, or none, is where one of the open ones was.

        An open file outlives its name: what is in it is archived, but the next process would not find it.
        """
        try:
            return not all(os.path.samestat(os.stat(path), stat) for path, stat in self._stats.items())
        except OSError:
            return True

    # Reading ---------------------------------------------------------------------------------------------------------

    def _read(self, sql: str, *values: Any) -> list[Any]:
        """All rows at once: no read transaction outlives its statement, where it would hold up the checkpoint."""
        with self._lock:
            if self._broken:
                raise QueueError("the queue is being opened anew")
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                self._note_trouble(error)
                raise QueueError(f"the queue cannot be read: {error}") from error

    def take(self, steps: Iterable[str], n: int) -> list[Job]:
        """Up to `n` jobs that are at one of these steps and due, in the order of due time and arrival.

        They stay taken until they are given back. Raises QueueError.
        """
        sql = (
            "SELECT number, id, minute, step, received, tries, waited, due, error, ifnull(origin, step) FROM jobs "
            "WHERE failed = 0 AND step = ? AND due <= ? ORDER BY due, number LIMIT ?"
        )
        with self._lock:
            now, limit = time.monotonic(), n + len(self._taken)
            given_back = (job for job in self._outcomes.values() if not job.done and not job.failed)
            jobs = [job for job in given_back if job.step in steps and job.due <= now]
            if len(self._outcomes) < self.MAX_OUTCOMES:
                rows = [row for step in steps for row in self._read(sql, step, now, limit)]
                jobs += [Job(*row) for row in rows if row[0] not in self._taken]
            jobs = sorted(jobs, key=lambda job: (job.due, job.number))[:n]
            for job in jobs:
                self._taken.add(job.number)
                self._outcomes.pop(job.number, None)
        return jobs

    def busy(self) -> bool:
        """Whether webhooks wait for the disk."""
        return self._inbox.qsize() > 1

    def taken(self) -> int:
        """How many jobs are taken and not given back."""
        return len(self._taken) - len(self._outcomes)

    def release(self, job: Job) -> None:
        """Give back a job with which nothing was done."""
        if not job.noted:  # it was taken before what became of it last was on disk
            return self.retry(job, job.due, job.error)
        with self._lock:
            self._taken.discard(job.number)

    def body(self, job: Job) -> bytes:
        """The bytes that came with the job. Raises QueueError."""
        return bytes(self._read("SELECT body FROM jobs WHERE number = ?", job.number)[0][0])

    def states(self, numbers: Iterable[int]) -> States:
        """Step and last error of those of these jobs that are still queued. Raises QueueError."""
        sql = "SELECT number, step, error FROM jobs WHERE number IN (SELECT value FROM json_each(?))"
        return {row[0]: row[1:] for row in self._read(sql, json.dumps(list(numbers)))}

    def counts(self) -> tuple[int, int, float]:
        """Jobs queued, jobs failed, and the age of the oldest queued in seconds. Raises QueueError."""
        counts = dict(self._read("SELECT failed, count(*) FROM jobs GROUP BY failed"))
        oldest = self._read("SELECT received FROM jobs WHERE number = (SELECT min(number) FROM jobs WHERE failed = 0)")
        age = max(0.0, time.time() - oldest[0][0]) if oldest else 0.0
        return counts.get(0, 0), counts.get(1, 0), age

    def space(self) -> tuple[int, int]:
        """Bytes that the queue takes of its disk, and bytes that are left to it. Raises QueueError."""
        with self._lock:
            try:
                return self._space(self._reader)
            except (OSError, sqlite3.Error) as error:
                raise QueueError(f"the queue cannot be read: {error}") from error

    def running(self) -> bool:
        """Whether a daemon works on this queue."""
        with contextlib.suppress(FileNotFoundError), open(self.path + ".lock", "rb") as lock:
            return not locked(lock, fcntl.LOCK_SH)
        return False

    def causes(self) -> list[dict[str, Any]]:
        """What stands in the way: errors with `since`, and how many alerts are `queued` and `failed` because of each.

        First what the daemon says that runs, or ran last. Raises QueueError.
        """
        exists = self._read("SELECT 1 FROM sqlite_master WHERE name = 'obstacles'")
        noted = [json.loads(row[0]) for row in (self._read("SELECT error FROM obstacles") if exists else ())]
        found: dict[str, dict[str, Any]] = {error["type"]: error for error in noted}
        sql = (  # one message of many: with max(), SQLite takes it from that row
            "SELECT json_extract(error, '$.type') AS type, sum(failed = 0), sum(failed), max(number), "
            "json_extract(error, '$.message'), min(json_extract(error, '$.since')), id "
            "FROM jobs WHERE error IS NOT NULL GROUP BY type ORDER BY type"
        )
        for kind, queued, failed, _, message, since, id_ in self._read(sql):
            error = found.setdefault(kind, {"type": kind, "message": message, "since": since, "alert": id_})
            error.update(queued=queued, failed=failed)
        for error in noted:
            if "held" in error:  # also those wait that have not been tried
                error["queued"] = self.counts()[0]
        return list(found.values())

    def failed(self) -> Iterator[dict[str, Any]]:
        """Each failed alert: `id`, `received` (seconds since the epoch), `tries`, `error`. Raises QueueError."""
        sql = (
            "SELECT number, id, received, tries, error FROM jobs WHERE failed = 1 AND number > ? "
            "ORDER BY number LIMIT 1000"
        )
        number = 0
        while rows := self._read(sql, number):
            for number, id_, received, tries, error in rows:  # noqa: B007
                shown = {name: value for name, value in json.loads(error or "{}").items() if name != "at"}
                yield {"id": id_, "received": received, "tries": tries, "error": shown}

    def retry_failed(self, ids: list[str]) -> dict[str, int]:
        """Queue failed alerts again: those of these ids, or all; how many, by id. Raises QueueError."""

        def run(db: sqlite3.Connection) -> dict[str, int]:
            if not ids:
                return {"": db.execute(self.ANEW).rowcount}
            return {id_: db.execute(f"{self.ANEW} AND id = ?", (id_,)).rowcount for id_ in ids}

        return self._write(run)

    def queued(self, ids: Iterable[str]) -> set[str]:
        """Those of these ids that have a job that has not failed. Raises QueueError."""
        with self._lock:
            rows = [self._read("SELECT id FROM jobs WHERE id = ? AND failed = 0 LIMIT 1", id_) for id_ in ids]
        return {row[0][0] for row in rows if row}

    def backfilled(self, since: float = 0, until: float = 0) -> float | None:
        """Until when backfill has seen all alerts (seconds since the epoch), None where it has never run to its end.

        A run that saw those of `since` … `until` moves that, unless a gap would be left. Raises QueueError.
        """

        def run(db: sqlite3.Connection) -> float | None:
            db.execute("CREATE TABLE IF NOT EXISTS backfill (until REAL NOT NULL) -- one row, once a run was complete")
            row = db.execute("SELECT until FROM backfill").fetchone()
            # One beyond now was left by a clock that was wrong.
            known = row[0] if row and row[0] <= time.time() else None
            # The first run is to have seen a day, or more.
            if until and (since <= known < until if known is not None else since <= until - FIRST_TIME):
                db.execute("DELETE FROM backfill")
                db.execute("INSERT INTO backfill (until) VALUES (?)", (until,))
                return until
            return known

        return self._write(run)

    def close(self, seconds: float = 30) -> None:
        """Write what waits, for `seconds` at most, and close: the last to close empties the write-ahead log."""
        self._closing = True
        self._inbox.put(None)
        self.writer.join(seconds)
        if self.writer.is_alive():  # the disk hangs: all that was acknowledged is on it
            return
        with contextlib.suppress(sqlite3.Error, OSError):
            self._open_files.close()


def is_malformed(error: BaseException | None) -> bool:
    """Whether SQLite says that the file is no database or damaged: these two come as DatabaseError itself."""
    return type(error) is sqlite3.DatabaseError


def disk_free(path: str) -> int:
    """Bytes that are free where a file is, or is to be. Raises OSError."""
    disk = os.statvfs(os.path.dirname(path))
    return disk.f_bavail * disk.f_frsize


def locked(file: Any, how: int) -> bool:
    """Whether the lock of a file could be taken, as flock(2) has it. Raises OSError."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def make(path: str) -> None:
    """Make a file of the queue where it is missing. Root's belongs to the folder's owner: the service is to use it.

    SQLite does the same with its -wal and -shm. Raises OSError.
    """
    with contextlib.suppress(FileExistsError):  # O_EXCL follows no link: the owner could have laid one for root
        file = os.open(path, os.O_CREAT | os.O_EXCL, 0o600)
        if os.geteuid() == 0:
            folder = os.stat(os.path.dirname(path))
            os.chown(file, folder.st_uid, folder.st_gid)
        os.close(file)


# ---------------------------------------------------------------------------------------------------------------------
# Upstreams: Threat Stack and S3, and what it means when one of them fails
# ---------------------------------------------------------------------------------------------------------------------

PROBE_PAUSE = 8.0  # seconds at most between probes of an upstream that is held
LONGEST_PAUSE = 15 * 60.0  # seconds at most between tries of an alert that itself fails
LONGEST_RETRY_AFTER = 3600.0  # seconds for which an upstream's Retry-After is believed
NOT_FOUND_FOR = 3600.0  # seconds for which the API may lag behind the webhook


class UpstreamError(Exception):
    """A call that failed: `type` and text, for programs and people, and what follows from it.

    `scope`: "all" holds the upstream at once; "some" does when it strikes two different alerts; "alert" says that
    the upstream works and this alert is the trouble. `retry_after`: seconds. `longest` is filled in by Upstream.call:
    the longest pause in seconds before the alert's next try, None where the upstream is held.
    """

    longest: float | None = LONGEST_PAUSE
    status = 0  # HTTP's, 0 where there was no answer

    def __init__(self, upstream: str, cause: str, text: str, scope: str = "some", retry_after: float = 0) -> None:
        super().__init__(printable(redact(text))[:500])
        self.upstream, self.cause = upstream, re.sub("[^A-Za-z0-9]", "_", cause)[:60]
        self.type = f"{upstream}_{self.cause}"
        self.scope, self.retry_after = scope, min(retry_after, LONGEST_RETRY_AFTER)

    def as_json(self) -> dict[str, Any]:
        """The error as answers show it."""
        return {"type": self.type, "message": str(self)}


def backoff(tries: int, longest: float) -> float:
    """Seconds until the next try: exponential from 1 s on with full jitter.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return random.uniform(0, min(longest, 2.0 ** min(tries - 1, 20)))


@dataclass
class Hold:
    """An outage: since when and until which probe (monotonic clock), how many probes failed, and the last error.

    `began` is `since` in seconds since the epoch, for people.
    """

    since: float
    probe_at: float
    tries: int
    error: UpstreamError
    began: float


class Upstream:
    """What Threat Stack and S3 have in common: calls under way, and the hold that an outage puts on all of them."""

    name = title = "upstream"  # in types of errors and in the log; in messages
    # What is known of errors: a pattern of `cause: text`, a scope (None: as it would be), a hint. The first counts.
    REFUSALS: tuple[Refused, ...] = ()
    BAD_CERTIFICATE: tuple[Refused, ...] = (
        ("certificate has expired", None, "is this machine's clock right? If so, they have to renew their certificate"),
        ("not yet valid", None, "is this machine's clock right?"),
        ("CERTIFICATE_VERIFY_FAILED", None, "is it the right address, and does this machine trust its certificate?"),
    )
    clocks = (0.0, "")  # this machine's (seconds since the epoch) and the upstream's (HTTP's Date) at the last answer
    seats: int | None = None  # how many jobs may be at it at once

    def __init__(self) -> None:
        self.hold: Hold | None = None
        self._lock = threading.Lock()
        self._seated = 0
        self._calls: dict[int, float] = {}  # when each call under way began, by job
        self._worked = 0.0  # when the last call succeeded
        self._suspect: int | None = None  # the job that failed last, if nothing worked since

    def free(self, n: int) -> int:
        """How many of `n` calls may begin now: of a held upstream one, if its next probe is due."""
        with self._lock:
            if self.hold:
                return min(n, 1) if time.monotonic() >= self.hold.probe_at else 0
            return n if self.seats is None else min(n, self.seats - self._seated)

    def admit(self, jobs: list[Job]) -> None:
        """Give these jobs a seat where seats are counted; where the upstream is held, they are its probe."""
        with self._lock:
            for job in jobs:
                if self.seats is not None:
                    self._seated += 1
                    job.seated = True
                if self.hold:
                    self.hold.probe_at = time.monotonic() + PROBE_PAUSE  # a probe that hangs is followed by another
                    job.probe = True

    def leave(self, job: Job) -> None:
        """Give back the job's seat, if it has one."""
        with self._lock:
            if job.seated:
                self._seated -= 1
                job.seated = False

    def call(self, job: Job, function: Callable[..., T], *args: Any) -> T:
        """Call `function` for this job and learn from it how the upstream is. Raises UpstreamError."""
        if (hold := self.hold) and not job.probe:
            raise hold.error.with_traceback(None)  # one that is raised again and again would keep every frame
        started, failed_at = time.monotonic(), json.loads(job.error or "{}").get("at", 0)
        if failed_at > started:  # before the machine's last boot, that is
            failed_at = 0
        worked = self._worked > failed_at
        self._calls[job.number] = started
        try:
            result = function(*args)
        except UpstreamError as error:
            self._learn(error, job.number, started, worked)
            raise
        finally:
            del self._calls[job.number]
        self._succeed(started)
        return result

    def _succeed(self, started: float) -> None:
        with self._lock:
            self._worked, self._suspect = time.monotonic(), None
            # A call from before the hold says nothing: it may have passed just before a rate limit struck.
            if self.hold and started >= self.hold.since:
                log.warning("%s is back after %.0f s", self.name, self._worked - self.hold.since)
                self.hold = None

    def _learn(self, error: UpstreamError, number: int, started: float, worked: bool = False) -> None:
        """Note a failure of a call; `worked`: since the job failed last and before it began, the upstream did."""
        if error.scope == "alert":
            return self._succeed(started)
        now = time.monotonic()
        with self._lock:
            stale = started < self._worked  # others have succeeded since this call began
            if not self.hold and error.scope == "some" and (stale or self._suspect in (None, number)):
                # Unless it has worked for others since this alert failed last (or at all), nothing says that this alert
                # is the trouble, so it is tried again as soon as a held upstream is probed.
                error.longest = LONGEST_PAUSE if worked else PROBE_PAUSE
                if not stale:
                    self._suspect = number
                return
            began = not self.hold
            hold = self.hold = self.hold or Hold(now, now, 0, error, time.time())
            if began or started >= hold.since:
                hold.tries += 1
                hold.probe_at = now + backoff(hold.tries, PROBE_PAUSE)
                hold.error = error
            hold.probe_at = max(hold.probe_at, now + error.retry_after)
            error.longest = None
        if began:
            log.warning("%s is held: %s", self.name, error)

    def trouble(self) -> UpstreamError | None:
        """What stands in the way of this upstream's calls now: a hold, or calls that get no answer."""
        with self._lock:
            if self.hold:
                return self.hold.error
            oldest = min(self._calls.copy().values(), default=0)
            silent = time.monotonic() - oldest if oldest > self._worked else 0
        return self.error("silent", f"no answer yet for {silent:.1f} s") if silent > 0.5 else None

    def check(self) -> str:
        """Make the cheapest call there is; what it proves, in words. Raises UpstreamError."""
        raise NotImplementedError

    def works(self) -> bool:
        """Whether that call succeeds; a hold forbids it like any other, and it may begin one."""
        started = time.monotonic()
        if self.hold:
            return False
        try:
            self.check()
        except UpstreamError as error:
            if error.scope == "all":
                self._learn(error, 0, started)
            return False
        self._succeed(started)
        return True

    def error(self, cause: str, text: str, scope: str = "some", retry_after: float = 0) -> UpstreamError:
        """An UpstreamError of this upstream; what REFUSALS says of it goes before `scope`."""
        hint = ""
        for pattern, known, says in self.REFUSALS:
            if re.search(pattern, f"{cause}: {text}"):
                scope, hint = known or scope, f" ({says})" if says else ""
                break
        return UpstreamError(self.name, cause, f"{self.title}{hint}: {text}", scope, retry_after)

    @contextlib.contextmanager
    def logged(self, call: str) -> Iterator[list[str]]:
        """Show a call in the log at DEBUG, with what came of it, which is put into this context's value."""
        began, said = time.monotonic(), list[str]()
        try:
            yield said
        except Exception as error:  # goes on as it came: what a call ended with is shown, whatever it was
            said.append(getattr(error, "type", type(error).__name__))
            raise
        finally:
            log.debug("%s %s seconds=%.3f", call, " ".join(said), time.monotonic() - began)

    def skew(self) -> float | None:
        """Seconds by which this machine's clock is before the upstream's (RFC 9110, section 6.6.1), if known."""
        ours, theirs = self.clocks
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            # Half of the second to which theirs was cut.
            return ours - calendar.timegm(parsedate_to_datetime(theirs).utctimetuple()) - 0.5
        return None


def retry_after(headers: Any) -> float:
    """Seconds from `Retry-After`, a number or a date (RFC 9110, section 10.2.3), or from Threat Stack's header."""
    value, milliseconds = (headers.get(name, "").strip() for name in ("Retry-After", "x-rate-limit-reset"))
    decimal, seconds = r"[0-9]{1,12}(\.[0-9]+)?", 0.0
    if re.fullmatch(decimal, value):
        seconds = float(value)
    elif value:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            # As UTC, also where a date names no zone, as asctime's does not: timestamp() would take that for local.
            seconds = calendar.timegm(parsedate_to_datetime(value).utctimetuple()) - time.time()
    return max(seconds, float(milliseconds) / 1000 if re.fullmatch(decimal, milliseconds) else 0.0)


class Wire(io.RawIOBase):
    """A socket whose reads and writes end at one moment, `deadline` (monotonic clock), or after seconds of `silence`.

    A socket's own time-out is for each call, and a peer that sends a byte now and then never reaches it. `room`: bytes
    that may come.
    """

    room = math.inf

    def __init__(self, sock: socket.socket, deadline: float, silence: float = math.inf) -> None:
        self.sock, self.deadline, self.silence = sock, deadline, silence

    def arm(self) -> Any:
        """The socket, given the time that is left. Raises TimeoutError where there is none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        left = min(left, self.silence)
        now = self.sock.gettimeout()
        if not now or abs(left - now) > 0.02:  # a system call, also where nothing changes
            self.sock.settimeout(left)
        return self.sock

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As socket.recv_into, within the deadline."""
        count = int(self.arm().recv_into(buffer))
        self.room -= count
        if self.room < 0:
            raise OSError(errno.EMSGSIZE, "too much was sent")
        return count

    def sendall(self, data: Any) -> None:
        """As socket.sendall, within the deadline."""
        self.arm().sendall(data)

    def makefile(self, *_: Any) -> io.BufferedReader:
        """A buffered file to read from."""
        return io.BufferedReader(self)

    def shutdown(self, how: int) -> None:
        """As socket.shutdown, of a connection that may be gone already."""
        with contextlib.suppress(OSError):
            # SSLSocket's own would take TLS away under the thread that uses it, and what follows would be plain text.
            socket.socket.shutdown(self.sock, how)

    def close(self) -> None:
        """Nothing: who made the socket closes it. http.client would do so before the answer has been read."""


# ---------------------------------------------------------------------------------------------------------------------
# Threat Stack
# ---------------------------------------------------------------------------------------------------------------------


PORTS = {"http": 80, "https": 443}


class ApiHandler(urllib.request.BaseHandler):
    """urllib's handler of http: and https:. A request's `wire` is its connection, which who sent it has to close."""

    def __init__(self, dial: Callable[[str, int], Wire], tls: Callable[[], ssl.SSLContext]) -> None:
        self.dial, self.tls = dial, tls

    def http_open(self, request: Any) -> http.client.HTTPResponse:
        """What urllib calls. Raises URLError for what fails before the request is sent, OSError, HTTPException."""
        to, connection = urllib.parse.urlsplit(request.full_url), http.client.HTTPConnection(request.host)
        try:
            tls = self.tls() if to.scheme == "https" else None
            connection.sock = request.wire = wire = self.dial(str(to.hostname), to.port or PORTS[to.scheme])
            if tls:
                wire.sock = tls.wrap_socket(wire.arm(), server_hostname=to.hostname)
            # http.client, which knows of no TLS here, would leave out a port of 80.
            headers = {**request.headers, "Host": request.host, "Connection": "close"}
            connection.request("GET", request.selector, headers=headers)
        except OSError as error:
            raise urllib.error.URLError(error) from None
        wire.room = 2 * ThreatStack.MAX_BODY  # http.client reads all there is of a chunk of size -1
        return connection.getresponse()

    https_open = http_open


def hawk(config: Config, url: str) -> str:
    """The `Authorization` of one GET, signed by Hawk 1 with a time and a nonce of its own.

    https://github.com/mozilla/hawk/blob/main/API.md. There is no body, so no hash of one.
    """
    to, now, nonce = urllib.parse.urlsplit(url), int(time.time()), secrets.token_urlsafe(9)
    ext, port = config.organization_id, to.port or PORTS[to.scheme]
    lines = ("hawk.1.header", now, nonce, "GET", f"/{url.split('/', 3)[3]}", to.hostname, port, "", ext, "")
    digest = hmac.digest(config.api_key.encode(), "\n".join(map(str, lines)).encode(), "sha256")
    mac = base64.b64encode(digest).decode()
    return f'Hawk id="{config.user_id}", ts="{now}", nonce="{nonce}", ext="{ext}", mac="{mac}"'


class ThreatStack(Upstream):
    """Threat Stack's REST API: version 1 with `auth = key`, version 2 with `hawk`. https://apidocs.threatstack.com"""

    name, title = "threatstack", "Threat Stack"
    MAX_BODY = 32 << 20  # bytes of an answer
    MAX_SKEW = 60  # seconds that Hawk's clocks may differ, and that `check` lets all differ
    CAUSES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 429: "rate_limited"}
    UNAUTHORIZED = {
        "key": "is [threatstack] api_key right? One of API v1, that is: one of v2 takes auth = hawk",
        "hawk": "are [threatstack] user_id, api_key and organization_id right, and of API v2? A key of v1: auth = key",
    }
    REFUSALS: tuple[Refused, ...] = (
        ("^clock:", "all", "set this machine's clock right, by NTP for example: Hawk allows it a minute"),
        ("^forbidden:", "some", "may [threatstack] api_key read alerts?"),
        ("^not_found:", "alert", "not there yet, or is [threatstack] base_url right?"),
        ("^rate_limited:", "all", "too many calls, of all of the organization's programs; it passes by itself"),
        ("^30[12378]:", "some", "not followed: is [threatstack] base_url right?"),
        ("^bad_answer: the answer is not JSON|^405:", None, "is [threatstack] base_url right?"),
        *Upstream.BAD_CERTIFICATE,
        ("^unreachable:", None, "is [threatstack] base_url right, and does this machine reach it?"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.REFUSALS = (("^unauthorized:", "all", self.UNAUTHORIZED[config.auth]), *self.REFUSALS)
        # While Threat Stack hangs, some workers must be left for webhooks, which need only S3.
        self.seats = max(1, config.workers - max(1, config.workers // 8))
        # A call that hangs must not keep its alert for the whole of a long time-out once Threat Stack is back.
        self.silence = min(config.timeout, max(10.0, config.timeout / 3))
        # Made at first use, and anew after a failure: reading the system's certificates takes longer than a call.
        self.tls = functools.lru_cache(1)(ssl.create_default_context)
        # With this handler alone: no redirect is followed (the key would leave with it), no proxy of the environment
        # obeyed, no file: opened, and an error status is an answer like any other.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(ApiHandler(self._dial, self.tls))

    def get(self, path: str, id_: str | None = None) -> bytes:
        """The answer to GET `path`: JSON, no error, and of alert `id_` where one is named. Raises UpstreamError."""
        body = self._fetch(self.config.base_url + path)
        try:
            _, value = read_json(body)
        except Malformed as error:
            raise self.error("bad_answer", f"the answer is {error}") from None
        members = dict(value) if isinstance(value, tuple) else {}
        if id_ and (not members or members.get("id", id_) != id_):
            raise self.error("bad_answer", "the answer is not this alert's detail")
        is_error = "id" not in members and (members.get("errors") or members.get("status") == "error")
        if is_error or not (members or isinstance(value, list)):
            raise self.error("bad_answer", "the answer is no object or list, is empty, or is an error with status 200")
        if path.endswith("/events") and members.get("token") is not None:
            log.warning("%s: there are more events than the API gives at once; the first are archived", path)
        return body

    def _fetch(self, url: str) -> bytes:
        """The body of the 200 to GET `url`. Raises UpstreamError."""
        headers = {"User-Agent": f"ts3d/{VERSION}", "Accept": "application/json", "Authorization": self.config.api_key}
        if self.config.auth == "hawk":
            headers["Authorization"] = hawk(self.config, url)
        elif self.config.organization_id:
            headers["Organization"] = self.config.organization_id
        sent = time.time()
        with self.logged(f"GET {url}") as said:
            response, body = self._exchange(url, headers)
            self.clocks = (time.time(), response.headers.get("Date", ""))
            if response.status != 200:
                raise self._refusal(response, body, sent)
            if len(body) > self.MAX_BODY:
                raise self.error("bad_answer", f"an answer of over {self.MAX_BODY} bytes")
            if response.length:  # read(n) returns what came where the peer closed early
                raise self.error("broken_off", f"the answer broke off {response.length} bytes before its end")
            said.append(f"200 bytes={len(body)}")
            return body

    def _exchange(self, url: str, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer to GET `url`, whatever it is, and as much of its body as is taken. Raises UpstreamError."""
        request = urllib.request.Request(url, headers=headers)
        try:
            response = self.opener.open(request)
            return response, response.read(self.MAX_BODY + 1)
        except urllib.error.URLError as error:
            self.tls.cache_clear()  # it may be mended by a certificate that is added to the system's
            said = f"{self.config.base_url} cannot be reached: {error.reason}"
            raise self.error("unreachable", said, "all") from None
        except TimeoutError:
            limits = f"{self.config.timeout:g} s ([threatstack] timeout), or silent for {self.silence:g} s"
            raise self.error("timeout", f"no whole answer within {limits}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a chunk of size -2
            raise self.error("broken_off", f"the answer broke off: {error}") from None
        finally:
            if wire := getattr(request, "wire", None):
                with contextlib.suppress(OSError):  # it is closed all the same (close(2))
                    wire.sock.close()

    def _dial(self, host: str, port: int) -> Wire:
        """Connect, with one deadline for all of the name's addresses, from when they are known on. Raises OSError."""
        found = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        deadline = time.monotonic() + self.config.timeout
        while True:
            left = max(0.001, deadline - time.monotonic())
            try:
                sock = socket.create_connection((found.pop(0), port), min(self.silence, left))
                return Wire(sock, deadline, self.silence)
            except OSError:
                if not found:
                    raise

    def _refusal(self, response: http.client.HTTPResponse, body: bytes, sent: float) -> UpstreamError:
        """What an answer that is no 200 means, to a request that was signed at `sent`."""
        cause = self.CAUSES.get(response.status, str(response.status))
        said = f"{response.status} {body[:4000].decode(errors='replace')}"
        if response.status == 401 and self.config.auth == "hawk":
            # The server's clock by Hawk's own word, or by HTTP's date.
            challenges = ", ".join(response.headers.get_all("WWW-Authenticate", []))
            match = re.search(r'(?i)\bHawk (?:.*[ ,])?ts="([0-9]{1,12})', challenges)
            ahead = int(sent) - float(match[1]) if match else self.skew() or 0.0
            if abs(ahead) >= (1 if "stale" in f"{challenges} {said}".lower() else self.MAX_SKEW):
                cause, said = "clock", f"it is {abs(ahead):.0f} s {'fast' if ahead > 0 else 'slow'}: {said}"
        error = self.error(cause, said, retry_after=retry_after(response.headers))
        error.status = response.status
        return error

    def check(self) -> str:
        """Ask for a list of one alert; of version 2, whether the signature is right, and for the last day's."""
        if self.config.auth == "hawk":
            self._fetch(urllib.parse.urljoin(self.config.base_url, "/help/hawk/self-test"))
            # That was at the host's root: this tells whether the path is right too.
            day = urllib.parse.urlencode({"from": rfc_3339(time.time() - 86400), "until": rfc_3339(time.time())})
            self.get(f"/alerts?status=active&{day}")
            return f"{self.config.base_url} takes the signature"
        self.get("/alerts?count=1")
        return f"{self.config.base_url} takes the key"


# ---------------------------------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------------------------------


class S3(Upstream):
    """AWS S3, or a server that speaks its protocol, by boto3.

    https://boto3.amazonaws.com/v1/documentation/api/latest/reference/services/s3/client/put_object.html
    """

    name, title = "s3", "S3"
    HEADS = 8  # objects that backfill looks for at once
    CREDENTIALS = (
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError ProfileNotFound ConfigParseError "
        "InvalidConfigError InvalidAccessKeyId SignatureDoesNotMatch InvalidToken ExpiredToken InvalidClientTokenId"
    ).split()
    REFUSALS: tuple[Refused, ...] = (
        ("^(ReadTimeoutError|ConnectionClosedError|ResponseStreamingError|IncompleteReadError):", "some", ""),
        (f"^({'|'.join(CREDENTIALS)}):", "all", "are the credentials right where boto3 looks for them?"),
        ("^(NoSuchBucket|InvalidBucketName):", "all", "is [s3] bucket right?"),
        ("^RequestTimeTooSkewed:|request time and", "all", "is this machine's clock right?"),
        (
            "^(AuthorizationHeader|PermanentRedirect|IllegalLocation|30[12378])",
            "all",
            "are [s3] region and endpoint_url right?",
        ),
        ("^KMS", None, "is SSEKMSKeyId of [s3:put_object] an enabled symmetric key of the bucket's region?"),
        (
            "(?i)object.?lock|retain.?until",
            None,
            "has the bucket Object Lock? Its own default retention is better than [s3:put_object]'s, whose date passes",
        ),
        ("^(InvalidRequest|InvalidArgument|InvalidStorageClass):", None, "is [s3:put_object] right for this bucket?"),
        *Upstream.BAD_CERTIFICATE,
        (
            "^(EndpointConnectionError|ConnectTimeoutError|SSLError|ResponseParserError|bad_answer"
            "|MethodNotAllowed|NotImplemented|40[045]|50[0-9]):",
            None,
            "is [s3] endpoint_url right, or region where that is not set, and does this machine reach it?",
        ),
    )
    PERMISSIONS = {  # that parameters of [s3:put_object] take beside s3:PutObject
        "Tagging": "s3:PutObjectTagging",
        "ACL|Grant.*": "s3:PutObjectAcl",
        "ObjectLock(Mode|RetainUntilDate)": "s3:PutObjectRetention",
        "ObjectLockLegalHoldStatus": "s3:PutObjectLegalHold",
        "SSEKMSKeyId": "kms:GenerateDataKey (on the key)",
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, parameters = config, " ".join(config.put_object)
        more = (action for name, action in self.PERMISSIONS.items() if re.search(rf"\b({name})\b", parameters))
        needs = f"it takes {', '.join(('s3:PutObject', *more))} on {config.bucket}/{self.key('*')}, and its KMS key's"
        self.REFUSALS = (("^(AccessDenied|403):(?!.*request time and)", "some", needs), *self.REFUSALS)
        self._client: Any = None
        self._bucket_is_there = False  # as far as a HEAD's 404 is concerned
        self._extra: dict[str, Any] = {}
        self._connecting = threading.Lock()

    def client(self) -> Any:
        """The one client, made at first use. Raises UpstreamError, and ConfigError for a wrong [s3:put_object]."""
        with self._connecting:  # making a client is not thread-safe, using one is
            client = self._client
            if not client:
                client, _ = self._connect("s3", self.config.region, self.config.endpoint_url)
                # A round trip saved, and a second where a server ignores it.
                client.meta.events.register("before-sign.s3.PutObject", without_expect)
                client.meta.events.register("before-call.s3.HeadBucket", without_region)
                self._extra = self._parameters(client)
                self._client = client
            return client

    def _connect(self, service: str, region: str | None, endpoint_url: str | None) -> tuple[Any, Any]:
        """A client of boto3's, and the credentials that it found, None for none. Raises ConfigError, UpstreamError."""
        try:
            import boto3
            import botocore.config
        except ImportError as error:
            raise ConfigError(f"boto3 cannot be imported: {error}") from None
        except OSError as error:  # files are used up, or the disk fails
            raise self.error("not_loaded", f"boto3 cannot be loaded: {error}", "all") from None
        config = botocore.config.Config(
            max_pool_connections=max(10, self.config.workers),
            connect_timeout=5,
            read_timeout=10,
            retries={"mode": "standard", "total_max_attempts": 2},  # the queue does the rest
        )
        try:
            with self._errors():
                session = boto3.session.Session()
                client = session.client(service, region_name=region, endpoint_url=endpoint_url, config=config)
                return client, session.get_credentials()
        except ValueError as error:
            raise ConfigError(f"{self.config.file}: [s3] {error}") from None

    @contextlib.contextmanager
    def _errors(self, client: Any = None) -> Iterator[None]:
        """Raises what boto3, or this client of its, raises as UpstreamError."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError, OSError) as error:
            answer = error.response if isinstance(error, ClientError) else {}
            metadata, problem, said = answer.get("ResponseMetadata", {}), answer.get("Error", {}), str(error)
            status = metadata.get("HTTPStatusCode", 0)
            cause = str(problem.get("Code") or status or type(error).__name__)
            if client and self._client is client and cause in self.CREDENTIALS:
                self._client = None  # botocore reads credentials from a file but once
            headers = {name.title(): value for name, value in metadata.get("HTTPHeaders", {}).items()}
            if headers:
                self.clocks = (time.time(), headers.get("Date", ""))
            right = headers.get("X-Amz-Bucket-Region") or problem.get("Region")
            if right and client and right != client.meta.region_name:
                said = f"the bucket is in {right}: set [s3] region = {right}. {said}"
            refusal = self.error(cause, said, "all" if status in (0, 401, 429) else "some", retry_after(headers))
            refusal.status = status
            raise refusal from None

    def _parameters(self, client: Any) -> dict[str, Any]:
        """[s3:put_object] with the types of botocore's model. Raises ConfigError."""
        import botocore.validate

        shape = client.meta.service_model.operation_model("PutObject").input_shape
        parsers = {"boolean": boolean, "integer": whole, "long": whole, "map": json.loads}
        extra: dict[str, Any] = {}
        for name, text in self.config.put_object.items():
            where = f"{self.config.file}: [{PUT_OBJECT}] {name}"
            if name not in shape.members:
                raise ConfigError(f"{where}: unknown to this boto3{nearest(name, shape.members)}")
            kind = shape.members[name].type_name
            try:
                extra[name] = parsers.get(kind, str)(text)
                report = botocore.validate.ParamValidator().validate({"Bucket": "b", "Key": "k", **extra}, shape)
                if report.has_errors():
                    raise ValueError(" ".join(report.generate_report().split()))
            except ValueError as error:
                raise ConfigError(f"{where} = {text!r}: {error} (its type is {kind})") from None
        return extra

    def key(self, name: str) -> str:
        """The key of an object, under the prefix."""
        return f"{self.config.prefix}/{name}" if self.config.prefix else name

    def put(self, name: str, body: bytes, content_type: str) -> None:
        """Write an object; `IfNoneMatch = *` leaves one that is there. Raises UpstreamError, ConfigError."""
        self.client()
        try:
            answer = self._ask(
                "put_object",
                Key=self.key(name),
                Body=body,
                ContentType=content_type,
                # S3 refuses a body that was damaged on its way, and botocore adds no trailer of its own.
                ChecksumAlgorithm="SHA256",  # a header that S3 demands too where Object Lock retains the object
                ChecksumSHA256=base64.b64encode(hashlib.sha256(body).digest()).decode(),
                **self._extra,
            )
        except UpstreamError as error:
            if error.status == 412 and "IfNoneMatch" in self._extra:
                return  # it is there already
            if error.status == 409 and "IfNoneMatch" in self._extra:
                error.scope = "alert"  # another writer is at the same key
            raise
        if not answer.get("ETag"):  # botocore takes any 200 for success, also a proxy's page
            raise self.error("bad_answer", "a 200 without an ETag is not S3's answer")

    def exists(self, name: str) -> bool:
        """Whether an object is there. Raises UpstreamError, ConfigError."""
        client, key = self.client(), self.key(name)
        members = client.meta.service_model.operation_model("HeadObject").input_shape.members
        # What an object was written with, such as a customer's key, it may take for reading too; but no condition.
        extra = {k: value for k, value in self._extra.items() if k in members and not k.startswith("If")}
        try:
            self._ask("head_object", Key=key, **extra)
            return True
        except UpstreamError as error:
            if error.status not in (400, 403, 404):
                raise
            head = reason = error
        # An answer to HEAD has no body that would give the reason: one to a list does. 400 may be expired credentials.
        if head.status != 404 or not self._bucket_is_there:
            try:
                self._ask("list_objects_v2", MaxKeys=1, Prefix=key)
            except UpstreamError as error:
                reason = error
        if head.status == 404 and reason.cause != "NoSuchBucket":
            self._bucket_is_there = True
            return False
        if head.status == 403 and (reason.cause in ("AccessDenied", "403") or not 400 <= reason.status < 500):
            raise self._unreadable(client)
        raise reason

    def _unreadable(self, client: Any) -> UpstreamError:
        """What to say where objects may not be looked for: the least policy with which they may."""
        bucket = self.config.bucket
        if not bucket.startswith("arn:"):
            bucket = f"arn:{client.meta.partition}:s3:::{bucket}"
        below = f"{bucket}/object" if ":accesspoint" in bucket else bucket
        allowed = {"s3:GetObject": f"{below}/{self.key('alerts/*')}", "s3:ListBucket": bucket}
        policy = [{"Effect": "Allow", "Action": action, "Resource": on} for action, on in allowed.items()]
        said = json.dumps({"Version": "2012-10-17", "Statement": policy})
        error = self.error("unreadable", "403 for a look at whether an object is there")
        error.args = (f"{error}. These credentials need this policy beside that of `ts3d serve`: {said}",)
        error.status = 403
        return error

    def _ask(self, operation: str, **parameters: Any) -> Any:
        """The answer to this operation on the bucket. Raises UpstreamError, ConfigError."""
        client, place = self.client(), f"{self.config.bucket}/{parameters.get('Key', '')}"
        with self.logged(f"{operation} {place}") as said, self._errors(client):
            answer = getattr(client, operation)(Bucket=self.config.bucket, **parameters)
            metadata = answer["ResponseMetadata"]
            said.append(f"{metadata.get('HTTPStatusCode')} request={metadata.get('RequestId')}")
            self.clocks = (time.time(), metadata.get("HTTPHeaders", {}).get("date", ""))
            return answer

    def identity(self) -> str:
        """Whose credentials boto3 finds, and where. Raises UpstreamError, ConfigError.

        https://docs.aws.amazon.com/STS/latest/APIReference/API_GetCallerIdentity.html: it takes no permission.
        """
        client, found = self._connect("s3", self.config.region, self.config.endpoint_url)
        if not found:
            raise self.error("NoCredentialsError", "boto3 finds no credentials")
        with self._errors():
            keys = found.get_frozen_credentials()  # it may ask AWS for them
        wrong = ""
        if re.fullmatch("A[KS]IA[A-Z0-9]{16}", keys.secret_key):
            wrong = "has the access key's id for its secret: the two are swapped"
        elif keys.access_key.startswith("ASIA") and not keys.token:
            wrong = f"has a temporary key ({keys.access_key}) without its aws_session_token"
        if wrong:
            raise self.error("PartialCredentialsError", f"{found.method} {wrong}")
        # Another S3 may have a like service of its own, and has no business with AWS's.
        endpoint = client.meta.endpoint_url
        aws = re.search(r"\.amazonaws\.com(\.cn)?$", urllib.parse.urlsplit(endpoint).hostname or "")
        own = None if aws or "AWS_ENDPOINT_URL_STS" in os.environ else endpoint
        sts, _ = self._connect("sts", client.meta.region_name, own)
        try:
            with self.logged("get_caller_identity") as said, self._errors():
                who = sts.get_caller_identity().get("Arn") or "nobody"
                said.append(who)
        except UpstreamError as error:
            if aws and error.cause in self.CREDENTIALS:
                raise
            shown = keys.access_key if re.fullmatch("[A-Z0-9]+", keys.access_key) else "***"  # it may be the secret
            who = f"access key {shown}; who that is could not be asked ({error.cause})"
        return f"{who}, from {found.method}"

    def check(self) -> str:
        """Write the object that `ts3d check` writes too, always the same. Raises ConfigError too."""
        self.put("ts3d-check", b'{"written by": "ts3d check"}\n', "application/json")
        return f"s3://{self.config.bucket}/{self.key('ts3d-check')} is written"


def without_expect(request: Any, **_: Any) -> None:
    """Take botocore's `Expect: 100-continue` away (it is not signed)."""
    del request.headers["Expect"]


def without_region(**_: Any) -> None:
    """Deny botocore the HEAD of the bucket by which it looks for the region that a redirect did not name.

    That may be redirected too, and so on until Python's stack is used up.
    """
    import botocore.exceptions

    raise botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPHeaders": {}}}, "HeadBucket")


# ---------------------------------------------------------------------------------------------------------------------
# Archiver: takes jobs from the queue and writes their objects
# ---------------------------------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """One kind of object: the step that writes it, also its key's beginning, and the rest of its key.

    `path` is the API's that its body comes from, None where that is what the job carries; `then` the next step.
    `late`: it waits until Threat Stack is free for it. `wanted`: whether it is written with this configuration; where
    it is not, its step is passed over.
    """

    step: str
    rest: str
    path: str | None = None
    then: str | None = None
    content_type: str = "application/json"
    late: bool = False
    wanted: Callable[[Config], bool] = lambda config: True

    def name(self, alert: Arrival | Job) -> str:
        """The object's key, but for the prefix."""
        return f"{self.step}/{self.rest.format(alert=alert, first=alert.id[0:2], second=alert.id[2:4])}"


# The detail is written last, so that where it is, all of its alert is.
OBJECTS = {
    o.step: o
    for o in (
        Object("webhooks", "{alert.minute}/{alert.id}", then="events"),
        # Thousands may come at once. What comes by webhook is begun before them, and so has the API first.
        Object("backfill", "{alert.minute}/{alert.id}", then="events", late=True),
        Object(
            "events",
            "{first}/{second}/{alert.id}",
            path="/alerts/{alert.id}/events",
            then="alerts",
            wanted=lambda config: config.auth == "hawk" and bool(config.events),
        ),
        Object("alerts", "{first}/{second}/{alert.id}", path="/alerts/{alert.id}"),
        Object("rejected", "{alert.minute}/{alert.id}", content_type="application/octet-stream"),
    )
}


class Archiver:
    """Worker threads, and one that hands them jobs; `fatal` is what ends the daemon, if anything does."""

    def __init__(self, config: Config, queue_: Queue) -> None:
        self.config, self.queue = config, queue_
        self.threatstack, self.s3 = ThreatStack(config), S3(config)
        begun = [step for step, o in OBJECTS.items() if o.path]
        late = [step for step, o in OBJECTS.items() if o.late]
        arrived = [step for step in OBJECTS if step not in (*begun, *late)]
        both: tuple[Upstream, ...] = (self.threatstack, self.s3)
        self.turns = ((begun, both), (arrived, (self.s3,)), (late, both))  # who comes first, and what each needs
        self.needs = {step: upstreams for steps, upstreams in self.turns for step in steps}
        self.wake = threading.Event()  # there may be something to hand out
        self.stopping = threading.Event()
        self.fatal: Exception | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        if self.config.workers:
            self.threads = [threading.Thread(target=self._hand_out, name="archiver", daemon=True)]
            for i in range(self.config.workers):
                self.threads.append(threading.Thread(target=self._work, name=f"worker-{i + 1}", daemon=True))
            for thread in self.threads:
                thread.start()

    def stop(self, deadline: float) -> None:
        """Take no more jobs, and wait until `deadline` (monotonic clock) for those at work."""
        self.stopping.set()
        self.wake.set()
        self.queue.stir()
        for _ in self.threads:
            self._jobs.put(None)
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def hopeless(self) -> bool:
        """Whether waiting for S3 makes no sense now."""
        held = self.threatstack.hold or self.s3.hold
        return not self.config.workers or not self.config.wait or self.stopping.is_set() or held is not None

    def held(self) -> list[dict[str, Any]]:
        """The upstreams that are held: the error of each, with its name (`held`) and since when."""
        held = ((upstream, upstream.hold) for upstream in (self.s3, self.threatstack))
        return [{**hold.error.as_json(), "held": up.name, "since": hold.began} for up, hold in held if hold]

    def trouble(self, step: str) -> dict[str, Any] | None:
        """What stands in the way of a job at this step, and of those after it."""
        upstreams = (self.s3,) if step == "rejected" else (self.s3, self.threatstack)
        errors = (upstream.trouble() for upstream in upstreams if self.config.workers)
        return next((error.as_json() for error in errors if error), None)

    def _hand_out(self) -> None:
        """Hand due jobs to the workers, never more than twice their number, of the steps that are allowed now."""
        promise(LONGEST_CALLS)  # credentials may come from another upstream
        try:
            self.s3.client()  # imports boto3, while webhooks are taken already
        except ConfigError as error:
            self.fatal = error  # known only now, by botocore's model
        except UpstreamError:
            pass  # the first job finds it again, and holds S3
        while not self.stopping.is_set():
            promise(LONGEST_TURN)
            self.wake.clear()
            try:
                for steps, upstreams in self.turns:
                    n = 2 * self.config.workers - self.queue.taken()
                    for upstream in upstreams:
                        n = upstream.free(n)
                    if n > 0:
                        jobs = self.queue.take(steps, n)
                        for upstream in upstreams:
                            upstream.admit(jobs)
                        for job in jobs:
                            self._jobs.put(job)
            except QueueError:
                pass  # logged when it began
            self.wake.wait()

    def _work(self) -> None:
        while job := self._jobs.get():
            if self.stopping.is_set():
                return
            try:
                self._archive(job)
            except ConfigError as error:
                self.fatal = error
                self.queue.release(job)
            except QueueError:  # its body cannot be read now: logged when that began
                self.queue.release(job)
                nap(1)
            except Exception as error:  # a bug: a worker that died would take its share of the archive with it
                self._put_off(job, UpstreamError("ts3d", "internal", f"internal error: {describe(error)}"), 0)
            finally:
                self.threatstack.leave(job)
                if self.queue.taken() <= 1.5 * self.config.workers:  # else there is enough to do
                    self.wake.set()
                promise(math.inf)  # until the next job

    def _archive(self, job: Job) -> None:
        """Write the objects that the job lacks, one after the other."""
        first, started = job.step, time.monotonic()
        step: str | None = job.step
        try:
            while step:
                object_ = OBJECTS[step]
                if object_.wanted(self.config):  # what is passed over stays to be done while the alert is not whole
                    if self.stopping.is_set() or not self._may_begin(job):
                        return self.queue.release(job) if job.step == first else self.queue.retry(job)
                    self._write_object(job, object_)
                    job.step = object_.then or step
                step = object_.then
        except UpstreamError as error:
            return self._put_off(job, error, time.monotonic() - started)
        age = max(0.0, time.time() - job.received)
        if job.step != "rejected":
            metrics.count("ts3d_alerts_archived_total")
            metrics.observe("ts3d_archive_seconds", age)
        log.info("archived id=%s tries=%d seconds=%.3f keys=%s", job.id, job.tries + 1, age, self._keys(job))
        self.queue.done(job)  # last: who is answered `archived` finds it counted and logged

    def _keys(self, job: Job) -> str:
        """The keys of all of the alert's objects, also of those that were written before the job was put off."""
        keys, step = [], job.origin or job.step
        while step:
            object_ = OBJECTS[step]
            keys += [self.s3.key(object_.name(job))] if object_.wanted(self.config) else []
            step = object_.then or ""
        return ",".join(keys)

    def _may_begin(self, job: Job) -> bool:
        """Whether the job's step may begin: it has a seat where it needs one, or gets it now."""
        if self.threatstack in self.needs[job.step] and not job.seated:
            if not self.threatstack.free(1):
                return False
            self.threatstack.admit([job])
        return True

    def _write_object(self, job: Job, object_: Object) -> None:
        """Get the body of one of the job's objects, and put it into S3."""
        promise(self.config.timeout + LONGEST_CALLS)
        if self.queue.busy():
            nap(0.04)  # webhooks first: what is archived a little later is on disk already
        if object_.path:
            named = None if object_.then else job.id  # only the detail says whose it is
            body = self.threatstack.call(job, self.threatstack.get, object_.path.format(alert=job), named)
            self.threatstack.leave(job)
        else:
            body = self.queue.body(job)
        self.s3.call(job, self.s3.put, object_.name(job), body, object_.content_type)

    def _put_off(self, job: Job, error: UpstreamError, seconds: float) -> None:
        """A try that failed: later again, at the upstream's fault or at the alert's own, or never."""
        before, now = json.loads(job.error or "{}"), time.monotonic()
        since = before.get("since", time.time()) if before.get("type") == error.type else time.time()
        text = json.dumps({**error.as_json(), "since": since, "at": now})
        if job.probe and self.s3.hold and error.upstream == self.threatstack.name:  # which was asked first
            with contextlib.suppress(UpstreamError):
                self.s3.call(job, self.s3.check)
        if error.longest is None:
            metrics.count("ts3d_retries_total", upstream=error.upstream, cause=error.cause)
            # Due at once when the hold ends, but after all that have not failed: the probe is never the last to fail.
            return self.queue.retry(job, now, text)
        limit = self.config.give_up_after
        if error.type == "threatstack_not_found":
            limit = min(limit, NOT_FOUND_FOR)
        job.tries += 1
        job.waited += seconds
        # An outage is no fault of the alert: the upstream must have worked since the try before, and work now.
        upstream = {u.name: u for u in (self.s3, self.threatstack)}.get(error.upstream)
        if job.waited >= limit and (not upstream or (upstream.works() and error.longest == LONGEST_PAUSE)):
            log.error("alert %s failed for good after %d tries: %s", job.id, job.tries, error)
            metrics.count("ts3d_alerts_failed_total")
            return self.queue.retry(job, now, text, True)
        left = max(0.0, limit - job.waited) or PROBE_PAUSE
        metrics.count("ts3d_retries_total", upstream=error.upstream, cause=error.cause)
        pause = max(min(backoff(job.tries, error.longest), left), error.retry_after)
        job.waited += pause
        log.warning("alert %s: %s; try %d follows in %.1f s", job.id, error, job.tries + 1, pause)
        self.queue.retry(job, now + pause, text)


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------

WEBHOOKS = "/api/v1/s3/alert"
ALL_BODIES = 64 << 20  # bytes of all bodies that are being received
HEAD_BYTES, HEAD_LINES = 64 << 10, 100
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}) ([\x21-\x7e]+) HTTP/1\.([0-9])\r\n")
FIELD_LINE = re.compile(rb"(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*))?\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
HOST = re.compile(r"[]!$%&'()*+,.:;=[_~0-9A-Za-z-]*")
http_date = functools.lru_cache(1)(functools.partial(formatdate, usegmt=True))
Answer = tuple[int, dict[str, Any] | str, dict[str, str]]  # status, what it says (a dict as JSON), headers


class Refusal(Exception):
    """A request that is answered with an error; `headers` and members (`more`) that the answer has too."""

    def __init__(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(text)
        payload = {"success": False, "error": {"type": kind, "message": text}, **more}
        self.answer: Answer = (status, payload, headers or {})


class Connection(Wire):
    """A client's connection.

    `since`: when (monotonic clock) we began to wait for a request; infinity while the client waits for us.
    `begun`: whether that request has.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        super().__init__(sock, 0)
        self.expect(timeout)

    def expect(self, timeout: float) -> None:
        """Wait for a request from now on, for `timeout` seconds."""
        self.since, self.begun = time.monotonic(), False
        self.deadline = self.since + timeout


def listen_address(config: Config) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Family and address of [server] listen. Raises ConfigError where there is none, or where it wants a token."""
    host, port = config.listen
    where = f"{config.file}: [server] listen = {host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)  # `*` is all
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    family, *_, address = min(found, key=lambda entry: entry[0] == socket.AF_INET6)  # localhost is 127.0.0.1
    require_token(config, where, str(address[0]))
    return family, (str(address[0]), port)


def require_token(config: Config, where: str, ip: str) -> None:
    """Raises ConfigError where others than this machine reach the address, and there is no webhook_token."""
    if not config.webhook_token and not is_loopback(ip):
        raise ConfigError(f"{where}: without a [server] webhook_token only a loopback address may be listened on")


def is_loopback(ip: str) -> bool:
    """Whether an address is this machine's own, also where IPv6 carries IPv4."""
    found = ipaddress.ip_address(ip)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def listen(config: Config) -> list[socket.socket]:
    """The sockets to accept connections from: systemd's, or one of our own. Raises ConfigError."""
    sockets = handed_sockets(config)
    if not sockets:
        family, address = listen_address(config)
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # [::] takes IPv4 too
        try:
            sockets = [socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)]
        except OSError as error:
            where = "{}: [server] listen = {}:{}".format(config.file, *config.listen)
            raise ConfigError(f"{where}: {os.strerror(error.errno or 0)}") from None
    for sock in sockets:
        sock.setblocking(False)  # a client that left before `accept` must not block it
    return sockets


def shown_address(sock: socket.socket, scheme: str) -> str:
    """Where a socket listens, as a URL; a Unix socket as `unix:PATH`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return "unix:" + os.fsdecode(name).replace("\0", "@", 1)
    return f"{scheme}://[{name[0]}]:{name[1]}" if ":" in name[0] else f"{scheme}://{name[0]}:{name[1]}"


class Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Accepts connections from all its sockets, and runs a Handler in a thread of its own for each."""

    daemon_threads = True
    block_on_close = False  # `stop` waits, and not for ever

    def __init__(self, config: Config, queue_: Queue, archiver: Archiver, sockets: list[socket.socket]) -> None:
        super().__init__("", Handler)  # it has no one address
        self.config, self.queue, self.archiver = config, queue_, archiver
        self.stopping = False
        self.connections: set[Connection] = set()
        self.receiving = 0  # bytes of bodies that are being received
        self.lock = threading.Lock()  # for these two
        self.parsing = threading.Lock()  # JSON costs a multiple of its body in memory, and one at a time is as fast
        # A connection is a file, and what archives needs some too.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.room = min(config.max_connections, max(1, files - 64 - 2 * config.workers))
        if self.room < config.max_connections:
            log.warning("[server] max_connections is %d here: a process may open %d files", self.room, files)
        self.sockets = {sock.fileno(): sock for sock in sockets}
        self.pending = select.epoll()  # one file for socketserver to wait for, readable while any of the sockets is
        for number in self.sockets:
            self.pending.register(number, select.EPOLLIN)

    def fileno(self) -> int:
        """What socketserver waits for."""
        return self.pending.fileno()

    def service_actions(self) -> None:
        """What socketserver calls ten times a second."""
        promise(LONGEST_TURN)

    def server_close(self) -> None:
        """Listen no longer. Connections that were not accepted are the next daemon's, where the socket is systemd's."""
        self.pending.close()
        for sock in self.sockets.values():
            sock.close()

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """As socketserver's, also after a `poll` that failed: poll(2) may want for memory."""
        while not self.stopping:
            try:
                return super().serve_forever(poll_interval)
            except OSError as error:
                log.error("waiting for connections: %s", error)
                nap(poll_interval)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Where there is no room or no file descriptor for it, the longest idle one goes."""
        ready = self.pending.poll(0, 1)  # one of them, each in its turn
        if not ready:
            raise BlockingIOError("the client has left")
        try:
            sock, client = self.sockets[ready[0][0]].accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.shed()
                nap(0.05)  # the listening socket stays readable, and this loop would spin
            raise
        if len(self.connections) >= self.room and not self.shed():
            sock.close()
            where = client[0] if isinstance(client, tuple) else "local"
            log.warning("connection refused client=%s: all of [server] max_connections are being answered", where)
            raise ConnectionAbortedError
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connection = Connection(sock, self.config.request_timeout)
        with self.lock:
            self.connections.add(connection)
        return connection, client

    def shed(self) -> bool:
        """Cut the connection that has made us wait for longest; False where all are being answered."""
        with self.lock:
            oldest = min(self.connections, key=lambda connection: connection.since, default=None)
            if not oldest or oldest.since == math.inf:
                return False
            self.connections.remove(oldest)
        oldest.shutdown(socket.SHUT_RDWR)
        return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and count it no longer."""
        with self.lock:
            self.connections.discard(request)
        request.shutdown(socket.SHUT_WR)
        request.sock.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection: socketserver would print a traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # the client's doing: gone, or no TLS handshake
            log.debug("connection closed client=%s: %s", client_address, error)
        elif error:
            log.error("connection closed client=%s: %s", client_address, describe(error))

    def stop(self, deadline: float) -> None:
        """Listen no longer, and wait until `deadline` (monotonic clock) for the requests that are being answered."""
        self.shutdown()
        with contextlib.suppress(OSError):
            self.server_close()
        while self.connections and time.monotonic() < deadline:
            with self.lock:
                # One that is new, or was answered just now, may be sending: cutting it off would reset it.
                before = time.monotonic() - 0.3
                idle = [c for c in self.connections if not c.begun and c.since < before]
            for connection in idle:
                connection.shutdown(socket.SHUT_RD)  # what it sent before can still be read
            nap(0.02)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: reads requests as RFC 9112 says, strictly, and answers them in JSON.

    http.server's own parser takes `+4` and `0_4` for a length, passes chunked bodies over, and has no deadline.
    """

    protocol_version = "HTTP/1.1"
    request_version = "HTTP/1.1"  # where none can be read
    server: Server
    request: Connection
    rfile: io.BufferedReader
    wfile: io.BytesIO

    def setup(self) -> None:
        """Shake hands where TLS is spoken, and make the files."""
        # A Unix socket's client has no address, or has bound one: text or bytes.
        self.client = self.client_address[0] if isinstance(self.client_address, tuple) else "local"
        if tls := self.server.config.tls:
            self.request.sock = tls.wrap_socket(self.request.sock, server_side=True, do_handshake_on_connect=False)
            self.request.arm().do_handshake()
        self.rfile = self.request.makefile()
        self.wfile = io.BytesIO()  # an answer leaves as one piece

    def handle_one_request(self) -> None:
        """Read a request, answer it, log it."""
        self.close_connection = self.unread = True  # there may be more of this request to come
        self.command, self.path, self.target, self.note = "-", "-", "-", ""
        try:
            if not self.rfile.peek(1):
                return
        except (OSError, ValueError):  # idle for too long, or gone
            return
        self.id, self.started = secrets.token_hex(8), time.monotonic()
        self.request.deadline, self.request.begun = self.started + self.server.config.request_timeout, True
        try:
            self.read_head()
            answer: Answer = (200, self.route(), {})
        except Exception as error:  # a bug too is answered, and the daemon lives
            answer = self.refusal(error)
        status, path = answer[0], self.path.partition("?")[0][:200]  # the query may hold the token
        if status and self.target == WEBHOOKS:
            metrics.count("ts3d_webhooks_total", status=status)
        said = f"{self.command} {path} {status or '-'} request={self.id} client={self.client}{self.note}"
        priority = logging.WARNING if status >= 500 else logging.INFO
        log.log(priority, "%s seconds=%.3f", said, time.monotonic() - self.started)
        if status:
            self.answer(*answer)  # last: who reads its id finds it in the log

    def refusal(self, error: Exception) -> Answer:
        """What is answered where a request ends with an error; status 0 where nobody is there to be answered."""
        if isinstance(error, TimeoutError):
            error = Refusal(408, "timeout", "the request did not arrive in time ([server] request_timeout)")
        elif isinstance(error, OSError):  # the client is gone, and what it sent of its body is not the next request
            self.close_connection, error = True, Refusal(0, "gone", str(error))
        elif not isinstance(error, Refusal):
            log.error("internal error: request=%s %s", self.id, describe(error))
            error = Refusal(500, "internal", f"internal error: the log has more, with {self.id}")
        self.note += f" error={error}"
        return error.answer

    # Reading ---------------------------------------------------------------------------------------------------------

    def read_head(self) -> None:
        """Read the request line and the headers. Raises Refusal."""
        wrong = "the request line is not METHOD TARGET HTTP/1.1"
        if self.rfile.peek(1)[:1] == b"\r":  # one empty line before it is passed over (RFC 9112, section 2.2)
            self.read_line(FIELD_LINE, HEAD_BYTES, wrong)
        line = self.read_line(REQUEST_LINE, HEAD_BYTES, wrong)
        self.command, self.path, minor = (part.decode() for part in line.groups())
        # absolute-form (RFC 9112, section 3.2.2)
        self.target = re.sub("(?i)^https?://[^/?]*", "", self.path).partition("?")[0]
        self.fields = self.read_fields(HEAD_BYTES - len(line[0]))
        http_1_1 = minor != "0"
        if not http_1_1:
            self.fields.pop("expect", None)  # RFC 9110, section 10.1.1
        hosts = self.fields.get("host", [] if http_1_1 else [""])
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            raise Refusal(400, "malformed_request", "there must be one Host header (RFC 9112, section 3.2)")
        lengths, codings = self.fields.get("content-length", []), self.fields.get("transfer-encoding")
        if codings and (lengths or len(codings) > 1 or codings[0].lower() != "chunked" or not http_1_1):
            raise Refusal(400, "malformed_request", "Transfer-Encoding: only `chunked`, alone, and in HTTP/1.1")
        if lengths and (len(lengths) > 1 or not re.fullmatch("[0-9]{1,15}", lengths[0])):
            raise Refusal(400, "malformed_request", "Content-Length: not one number")
        # The body's bytes, None where it comes in chunks (RFC 9112, section 6).
        self.length = None if codings else int(lengths[0]) if lengths else 0
        self.unread = self.length != 0
        options = ",".join(self.fields.get("connection", ())).lower().split(",")
        self.close_connection = not http_1_1 or "close" in (option.strip() for option in options)

    def read_fields(self, left: int = HEAD_BYTES) -> dict[str, list[str]]:
        """Headers or trailers, `left` bytes at most: values by name, in lower case. Raises Refusal."""
        fields: dict[str, list[str]] = {}
        for _ in range(HEAD_LINES + 1):
            # Neither a folded line nor a blank before the colon matches (RFC 9112, sections 5.1 and 5.2).
            line = self.read_line(FIELD_LINE, left, "a header line is malformed")
            if not line[1]:
                return fields
            left -= len(line[0])
            fields.setdefault(line[1].decode().lower(), []).append(line[2].strip(b" \t").decode("latin-1"))
        raise Refusal(431, "head_too_large", f"over {HEAD_LINES} lines of headers")

    def read_line(self, pattern: re.Pattern[bytes], limit: int, wrong: str) -> re.Match[bytes]:
        """A line that matches, CRLF included; `wrong` says that it does not. Raises Refusal."""
        line = self.rfile.readline(limit)
        if match := pattern.fullmatch(line):
            return match
        if line.endswith(b"\n"):
            said = wrong if line.endswith(b"\r\n") else "a line does not end with CRLF"
            raise Refusal(400, "malformed_request", said)
        if len(line) == limit:
            raise Refusal(431, "head_too_large", f"over {HEAD_BYTES} bytes of headers")
        raise ConnectionResetError("closed in the middle of a request")

    @contextlib.contextmanager
    def body(self) -> Iterator[bytes]:
        """The request's body, counted among all that are being received until the caller has done. Raises Refusal."""
        server, limit, body, held = self.server, self.server.config.max_body, io.BytesIO(), 0
        expects = "100-continue" in map(str.lower, self.fields.get("expect", ()))
        if expects and self.unread and (self.length or 0) <= limit:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunk = functools.partial(self.read_line, CHUNK_LINE, 4096, "a chunk's size is malformed")
        try:
            while n := int(chunk()[1], 16) if self.length is None else self.length - held:
                if held + n > limit:
                    raise Refusal(413, "too_large", f"the body is over [server] max_body, {limit} bytes")
                with server.lock:
                    if server.receiving + n > ALL_BODIES:
                        raise Refusal(503, "busy", f"over {ALL_BODIES >> 20}M are being received", {"Retry-After": "1"})
                    server.receiving += n
                    held += n
                if body.write(self.rfile.read(n)) < n:
                    raise ConnectionResetError("closed in the middle of a body")
                if self.length is None and self.rfile.read(2) != b"\r\n":
                    raise Refusal(400, "malformed_request", "a chunk is longer than its size")
            if self.length is None:
                self.read_fields()  # trailers
            self.unread = False
            self.request.since = math.inf
            yield body.getvalue()
        finally:
            with server.lock:
                server.receiving -= held

    # Answering -------------------------------------------------------------------------------------------------------

    def route(self) -> dict[str, Any] | str:
        """What the answer to this request says. Raises Refusal."""
        routes: dict[str, Callable[[], dict[str, Any] | str]]
        routes = {WEBHOOKS: self.webhook, "/healthz": self.health, "/metrics": self.show_metrics}
        if self.target not in routes:
            raise Refusal(404, "not_found", f"there is nothing here; webhooks go to {WEBHOOKS}")
        allow = "POST" if self.target == WEBHOOKS else "GET, HEAD"
        if self.command not in allow.split(", "):
            raise Refusal(405, "method_not_allowed", f"only {allow}", {"Allow": allow})
        return routes[self.target]()

    def webhook(self) -> dict[str, Any]:
        """Take a webhook's alerts: each one's state, in the webhook's order, once they are on disk. Raises Refusal."""
        if self.server.config.webhook_token:
            self.authorize("webhook_token", self.server.config.webhook_token)
        alerts, numbers = self.take()
        try:
            queued = self.server.queue.wait(numbers, self.server.config.wait, self.server.archiver.hopeless)
        except QueueError:  # they are on disk: that is what this answer has to say
            queued = dict.fromkeys(numbers, ("webhooks", None))
        states: list[dict[str, Any]] = []
        jobs = iter(numbers)
        for alert in alerts:
            state, trouble = "archived", None
            if isinstance(alert, Rejected):
                state, trouble = "rejected", {"type": "invalid_alert", "message": alert.message}
            elif (number := next(jobs)) in queued:
                step, error = queued[number]
                trouble = json.loads(error) if error else self.server.archiver.trouble(step)
                state, trouble = "queued", trouble and {name: trouble[name] for name in ("type", "message")}
            states.append({"id": alert.id, "state": state, **({"error": trouble} if trouble else {})})
        if alerts and not numbers:
            more = f" (and {len(states) - 1} more)" if len(states) > 1 else ""
            raise Refusal(400, "invalid_alert", states[0]["error"]["message"] + more, alerts=states)
        return {"success": True, "alerts": states}

    def take(self) -> tuple[list[Arrival | Rejected], list[int]]:
        """Put a webhook on disk: what it says, and the numbers of the good alerts' jobs. Raises Refusal."""
        alerts: list[Arrival | Rejected] = []
        with self.body() as body:
            try:
                with self.server.parsing:
                    gc.disable()  # it would look at millions of new values again and again, in which there is no cycle
                    try:
                        alerts = read_webhook(body)
                    finally:
                        gc.enable()
                problem = next((alert.message for alert in alerts if isinstance(alert, Rejected)), "")
            except (Malformed, RecursionError) as error:  # at one exact depth the whole is read, and its parts are not
                problem = str(error)
            good = arrivals = [alert for alert in alerts if isinstance(alert, Arrival)]
            self.note = f" bytes={len(body)} alerts={len(good)} rejected={len(alerts) - len(good)}"
            if problem:  # nothing that presented the token is lost, whatever it is
                minute, digest = f"{datetime.now(timezone.utc):%Y/%m/%d/%H/%M}", hashlib.sha256(body).hexdigest()
                arrivals = [*good, Arrival(digest, minute, "rejected", body)]
            try:
                numbers = self.server.queue.put(arrivals) if arrivals else []
            except QueueError as error:
                raise Refusal(503, "queue_unavailable", str(error), {"Retry-After": "10"}) from None
        if problem:
            self.note += f" kept={digest}" + (f" reason={problem}" if good else "")  # 400 says by itself what is wrong
        metrics.observe("ts3d_acknowledgement_seconds", time.monotonic() - self.started)
        metrics.count("ts3d_alerts_received_total", len(good))
        metrics.count("ts3d_alerts_rejected_total", len(alerts) - len(good))
        self.server.archiver.wake.set()
        if problem and not alerts:
            raise Refusal(400, "malformed_webhook", problem)
        return alerts, numbers[: len(good)]

    def authorize(self, option: str, tokens: list[str]) -> None:
        """Raises Refusal unless the request presents one of these tokens, which `option` has."""
        query = self.path.partition("?")[2].replace("+", "%2B")  # `+` is itself here: tokens are often base64
        presented = urllib.parse.parse_qs(query, encoding="latin-1").get("token", [])
        fields = self.fields.get("authorization", ())
        presented += [field[7:].strip() for field in fields if field.lower().startswith("bearer ")]
        pairs = [(a.encode(), b.encode("latin-1")) for a in tokens for b in presented]
        # Every pair is compared, each in constant time.
        if not any([hmac.compare_digest(*pair) for pair in pairs]):
            said = f"present the secret of [server] {option}: Authorization: Bearer TOKEN, or ?token=TOKEN"
            said = said if tokens else f"set [server] {option}: without one this is for the machine itself"
            raise Refusal(401, "unauthorized", said, {"WWW-Authenticate": 'Bearer realm="ts3d"'})

    def show_metrics(self) -> str:
        """Prometheus's metrics, for this machine or who has the token for them. Raises Refusal."""
        config, archiver = self.server.config, self.server.archiver
        tokens = [config.metrics_token] if config.metrics_token else []
        if tokens or not (self.client == "local" or is_loopback(self.client)):
            self.authorize("metrics_token", tokens)
        held = [error["held"] for error in archiver.held()]
        gauges: Samples = {
            "ts3d_upstream_held": {labels_text(upstream=name): name in held for name in ("s3", "threatstack")},
            "ts3d_queue_max_size_bytes": {"": config.max_size},
        }
        if math.isfinite(config.certificate_ends):
            gauges["ts3d_tls_certificate_end_timestamp_seconds"] = {"": config.certificate_ends}
        counts, space = ("depth", "failed", "oldest_age_seconds"), ("size_bytes", "disk_free_bytes")
        for names, read in ((counts, self.server.queue.counts), (space, self.server.queue.space)):
            with contextlib.suppress(QueueError):  # then they are missing, and webhooks are answered 503
                gauges |= {f"ts3d_queue_{name}": {"": value} for name, value in zip(names, read(), strict=True)}
        return metrics.show(gauges)

    def health(self) -> dict[str, Any]:
        """Whether webhooks can be taken, and what is queued. Raises Refusal."""
        counts: dict[str, Any] = {}
        try:
            with contextlib.suppress(QueueError):
                queued, failed, oldest = self.server.queue.counts()
                counts = {"queued": queued, "failed": failed, "oldest_seconds": round(oldest, 3)}
            self.server.queue.prove_writable()
        except QueueError as error:
            raise Refusal(503, "queue_unavailable", str(error), {"Retry-After": "10"}, **counts) from None
        return {"success": True, **counts}

    def answer(self, status: int, payload: dict[str, Any] | str, headers: dict[str, str]) -> None:
        """Send the answer; where the client may still be sending, let it read before the connection closes."""
        if self.unread or self.server.stopping:
            self.close_connection = True
        if self.close_connection:
            headers = {**headers, "Connection": "close"}
        body = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
        kind = "text/plain; version=0.0.4; charset=utf-8" if isinstance(payload, str) else "application/json"
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Request-Id": self.id, **headers}
        self.send_response_only(status)
        for name, value in {"Server": "ts3d", "Date": http_date(int(time.time())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        data = self.wfile.getvalue() + (b"" if self.command == "HEAD" else body)
        self.wfile = io.BytesIO()
        # Idle from here on: the client, which reads this first, must not be overtaken by this thread's next line.
        self.request.expect(self.server.config.request_timeout)
        try:
            self.request.sendall(data)
            if self.unread:
                # Take what the client still sends, or a reset would come before it has read its answer (RFC 9112, 9.6).
                self.request.begun = True
                self.request.shutdown(socket.SHUT_WR)
                while self.rfile.read1(65536):
                    pass
        except OSError as error:
            self.close_connection = True
            log.debug("connection closed client=%s: %s", self.client, error)


# ---------------------------------------------------------------------------------------------------------------------
# systemd: the sockets that it hands over, and what it is told
# ---------------------------------------------------------------------------------------------------------------------


def handed_sockets(config: Config) -> list[socket.socket]:
    """The sockets on which systemd listens for us, as sd_listen_fds(3) has it; often none. Raises ConfigError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = []
    for number in range(3, 3 + int(os.environ.get("LISTEN_FDS") or 0)):
        where, listens = f"socket {number} of systemd's", 0
        with contextlib.suppress(OSError):  # it is no socket
            sock = socket.socket(fileno=number)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            raise ConfigError(f"{where}: does not listen for TCP or Unix connections (ListenStream=, Accept=no)")
        if sock.family != socket.AF_UNIX:
            require_token(config, f"{where}: {shown_address(sock, 'tcp')}", sock.getsockname()[0])
        sockets.append(sock)
    return sockets


def notify(text: str) -> None:
    """Tell systemd, if it is there to be told, as sd_notify(3) has it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(text.encode(), re.sub("^@", "\0", address))  # @: an abstract one


def watchdog() -> float:
    """Seconds within which systemd's watchdog wants to hear of us, as sd_watchdog_enabled(3) has it; else infinity."""
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return float(os.environ.get("WATCHDOG_USEC") or "inf") / 1e6 if ours else math.inf


def tell_systemd(queue_: Queue, archiver: Archiver, late_before: list[str]) -> list[str]:
    """Feed the watchdog while every thread moves, and say what is queued and what stands in its way.

    Returns the names of the threads that are late; `late_before` are those of the last time.
    """
    late = sorted(name for name, moment in MOVES_BY.copy().items() if moment < time.monotonic())
    if late != late_before:
        log.error("threads that do not move: %s", ", ".join(late) or "none any more")
    try:
        queued, failed, _ = queue_.counts()
        status = f"{queued} queued, {failed} failed"
    except QueueError as error:
        status = printable(redact(str(error)))
    status = "; ".join([status, *(error["message"] for error in archiver.held())])
    notify(f"STATUS={status}" + ("" if late else "\nWATCHDOG=1"))
    return late


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
STOP_WITHIN = 7.0  # seconds from SIGTERM for what is at work; systemd and init scripts kill after 10 at the earliest


def require_upstreams(config: Config) -> None:
    """Raises ConfigError unless all is there that archiving needs."""
    config.require("bucket", "api_key", *(("user_id", "organization_id") if config.auth == "hawk" else ()))
    if not importlib.util.find_spec("boto3"):
        raise ConfigError("boto3 is missing: apt install python3-boto3, or pip install boto3")


def serve(config: Config) -> int:
    """The daemon: listen, queue, archive, until SIGTERM or SIGINT."""
    if config.workers:
        require_upstreams(config)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # `supervise` looks for them
    # One thread runs at a time (the GIL): handing it from one processor to another costs more than the others give.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    threading.excepthook = lambda args: log.error("thread ended: %s", describe(args.exc_value or SystemExit()))
    os.umask(0o077)  # the queue holds what customers' alerts say
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    queue_ = Queue(config.path, config.max_size, create=True)
    archiver = Archiver(config, queue_)
    sockets = listen(config)
    server = Server(config, queue_, archiver, sockets)
    acceptor = threading.Thread(target=server.serve_forever, name="acceptor", daemon=True)
    acceptor.start()
    target = f"archiving to s3://{config.bucket}/{config.prefix}" if config.workers else "only receiving"
    shown = ", ".join(shown_address(sock, "https" if config.tls else "http") for sock in sockets)
    log.info("ts3d %s listens on %s, queue %s, %s", VERSION, shown, config.path, target)
    if not config.webhook_token:
        log.warning("[server] webhook_token is not set: whoever can connect can post alerts")
    if config.certificate_ends < time.time():
        log.error("the certificate of [server] tls_certificate ended on %s", rfc_3339(config.certificate_ends))
    notify("READY=1")  # before boto3 is imported, which takes longer than all the rest
    archiver.start()
    try:
        supervise(queue_, archiver, [acceptor, queue_.writer, *archiver.threads])
    except (QueueError, RuntimeError) as error:
        log.critical("%s", error)
        return 1
    finally:
        deadline = time.monotonic() + STOP_WITHIN
        server.stopping = True  # answers close their connections
        archiver.stopping.set()  # answers wait for S3 no longer
        queue_.stir()
        notify("STOPPING=1\nSTATUS=stopping")
        log.info("stopping")
        server.stop(deadline)
        archiver.stop(deadline)
        queue_.close(max(1.0, deadline - time.monotonic()))
    log.info("stopped")
    return 0


def supervise(queue_: Queue, archiver: Archiver, threads: list[threading.Thread]) -> None:
    """Look after the other threads until a signal ends the daemon, or what this raises."""
    next_word, pause, late = 0.0, min(2.0, watchdog() / 4), list[str]()
    # The signals are blocked, and looked for: a handler could run at any moment, with any lock held, and CPython's
    # sigtimedwait takes an interruption after its time-out, such as SIGCONT, for one of them.
    while not STOP_SIGNALS & signal.sigpending():
        nap(0.25)
        # What sleeps looks again now and then. This is the one timer: before Python 3.11 a wait for a lock with a
        # time-out of its own goes by the wall clock, and one that is set back would make it wait for as long.
        archiver.wake.set()
        queue_.stir()
        refused = [{k: v for k, v in error.items() if k != "bytes"} for error in [queue_.refused] if error]
        queue_.obstacles = [json.dumps(error) for error in expired(archiver.config) + refused + archiver.held()]
        queue_.beat()
        if time.monotonic() >= next_word:
            next_word = time.monotonic() + pause
            late = tell_systemd(queue_, archiver, late)
        if damage := queue_.damage():
            raise QueueError(f"the queue is malformed ({damage}): the next start moves it aside")
        if not all(thread.is_alive() for thread in threads):
            raise RuntimeError("a thread has ended")
        if archiver.fatal:
            raise archiver.fatal


def expired(config: Config) -> list[dict[str, Any]]:
    """As an error, that the certificate which this process has read has ended."""
    message = "the certificate of [server] tls_certificate has expired"
    ended = {"type": "tls_certificate", "message": message, "since": config.certificate_ends}
    return [ended] if config.certificate_ends < time.time() else []


def check(path: str) -> int:
    """Look at all that the daemon needs: a line each, `ok`, or what is wrong and how to mend it. The exit code."""
    failed = False

    def look(name: str, function: Callable[..., T], *arguments: Any) -> T | None:
        nonlocal failed
        try:
            value = function(*arguments)
            verdict, said = "ok", path if isinstance(value, Config) else str(value)
        except Exception as error:  # one look that goes wrong must not keep the others from being taken
            verdict, said, value, failed = "FAIL", explain(error), None, True
        print(f"{verdict:6}{name:14}{printable(redact(said))}", flush=True)
        return value

    if config := look("configuration", check_configuration, path):
        start_log(config.level)
        s3, threatstack = S3(config), ThreatStack(config)
        look("queue", check_queue, config)
        look("credentials", s3.identity)
        look("s3", s3.check)
        look("threatstack", threatstack.check)
        look("clock", check_clock, s3, threatstack)
        if config.tls:
            look("certificate", check_certificate, config)
    return int(failed)


def check_configuration(path: str) -> Config:
    """The configuration, if all of it can be used. Raises ConfigError."""
    config = load_config(path)
    require_upstreams(config)
    listen_address(config)
    return config


def check_queue(config: Config) -> str:
    """What is queued, in words, or that the daemon can make a queue. Raises ConfigError, QueueError."""
    folder = os.path.dirname(config.path)
    if not os.path.exists(config.path):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{config.path}: {folder} is no folder that can be written ([queue] path)")
        if disk_free(config.path) < HOLD_BACK:
            raise QueueError(f"{config.path}: {DISK_FULL}: webhooks will be answered 503")
        return f"{config.path} is not there yet: `ts3d serve` makes it"
    with contextlib.closing(Queue(config.path, config.max_size)) as queue_:
        try:
            queued, failed, _ = queue_.counts()
            queue_.prove_writable()
            for cause in queue_.causes():
                if cause["type"] in ("queue_full", "disk_full") and queue_.running():
                    raise QueueError(cause["message"])
        except QueueError as error:
            raise QueueError(f"{config.path}: {error}: webhooks are answered 503 until that is mended") from None
    more = " (`ts3d status` says why)" if queued or failed else ""
    return f"{config.path}: {queued} queued, {failed} failed{more}"


def check_clock(*upstreams: Upstream) -> str:
    """How far this machine's clock is from the upstreams', in words. Raises ConfigError."""
    skews = {upstream.title: skew for upstream in upstreams if (skew := upstream.skew()) is not None}
    said = " and ".join(
        f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {title}'s" for title, skew in skews.items()
    )
    if any(abs(skew) > ThreatStack.MAX_SKEW for skew in skews.values()):
        raise ConfigError(f"this machine's clock is {said}: set it right, by NTP for example (timedatectl set-ntp yes)")
    return f"this machine's is {said}" if said else "not compared: neither S3 nor Threat Stack said what time it is"


def check_certificate(config: Config) -> str:
    """How long [server] tls_certificate is valid, in words. Raises ConfigError where it, or the daemon's, is not."""
    left = config.certificate_ends - time.time()
    if math.isnan(left):
        return f"{config.tls_certificate}: no last day is found in it"
    said = f"{config.tls_certificate}: its last day is {rfc_3339(config.certificate_ends)[:10]}"
    if left < 0:
        raise ConfigError(f"{said}, which is over: Threat Stack sends nothing any more. Renew it, and restart ts3d")
    old = False
    with contextlib.suppress(ConfigError, QueueError), contextlib.closing(Queue(config.path, config.max_size)) as jobs:
        old = jobs.running() and any(cause["type"] == "tls_certificate" for cause in jobs.causes())
    if old:
        raise ConfigError(f"{said}, but the daemon still has the one before, which is over: systemctl restart ts3d")
    return f"{said}, in {duration(left)}"


def duration(seconds: float) -> str:
    """A time span for people, in its two largest units."""
    for unit, n, smaller, m in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= n:
            return f"{seconds // n:.0f} {unit} {seconds % n // m:.0f} {smaller}"
    return f"{seconds:.0f} s"


def size(bytes_: int) -> str:
    """Bytes for people, in the units of ts3d.conf."""
    unit = max((unit for unit, n in SIZE.items() if bytes_ >= n), key=SIZE.__getitem__, default="")
    return f"{bytes_ / SIZE[unit]:.1f}{unit}".replace(".0", "") if unit else str(bytes_)


def status(config: Config, failed: bool, as_json: bool) -> int:
    """Say what is queued and failed, and what stands in the way; it takes nothing but the queue's file."""
    with contextlib.closing(Queue(config.path, config.max_size)) as queue_:
        queued, given_up, oldest = queue_.counts()
        used, free = queue_.space()
        running, causes = queue_.running(), queue_.causes()
        failures = queue_.failed() if failed else iter(())
        # What the daemon says goes before what is seen from here: the certificate that it has may be another.
        seen = expired(config) + ([{"type": "disk_full", "message": DISK_FULL}] if free < HOLD_BACK else [])
        noted = [cause["type"] for cause in causes]
        causes[:0] = [cause for cause in seen if cause["type"] not in noted]
        if as_json:
            facts: dict[str, Any] = {"running": running, "queued": queued, "failed": given_up}
            facts |= {"oldest_seconds": round(oldest, 3), "queue_bytes": used, "max_bytes": config.max_size}
            facts |= {"disk_free_bytes": free, "causes": list(map(readable, causes))}
            print(json.dumps(facts | ({"failures": list(map(readable, failures))} if failed else {})), flush=True)
            return 0
        if not failed:
            say(f"daemon   {'runs' if running else 'does not run'}")
            say(f"queued   {queued}" + (f", the oldest for {duration(oldest)}" if queued else ""))
            hint = ": `ts3d status --failed` lists them, `ts3d retry` tries them again" if given_up else ""
            say(f"failed   {given_up}{hint}")
            say(f"disk     {size(used)} of {size(config.max_size)} used, {size(free)} free: {config.path}")
            last = "" if running else ", as of when the daemon ran last"
            say(f"\nWhat stands in the way{last}:" if causes else f"\nNothing stands in the way{last}.")
            for cause in causes:
                say(headline(cause))
                say(cause["message"], "    ")
        elif not given_up:
            say("none has failed")
        for alert in failures:
            say(f"{alert['id']} came {rfc_3339(alert['received'])}, and failed after {alert['tries']} tries")
            say(f"{alert['error'].get('type')}: {alert['error'].get('message')}", "    ")
    return 0


def headline(cause: dict[str, Any]) -> str:
    """What is in the way, since when, and of how many alerts."""
    said = f"{cause['held']} is held: {cause['type']}" if "held" in cause else str(cause["type"])
    if since := cause.get("since"):
        said += f", since {rfc_3339(since)[:19]}Z ({duration(max(0, time.time() - since))})"
    counts = [f"{cause[state]}\xa0{state}" for state in ("queued", "failed") if cause.get(state)]
    said = f"{said}: {', '.join(counts)}" if counts else said
    return said + (f", such as {cause['alert']}" if cause.get("alert") else "")


def readable(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its times as RFC 3339 has them."""
    times = {name: rfc_3339(entry[name]) for name in ("since", "received") if entry.get(name)}
    return {**entry, **times, **({"error": readable(entry["error"])} if "error" in entry else {})}


def say(text: str, indent: str = "") -> None:
    """Print for people, in lines of at most 80 columns."""
    import textwrap  # here, as the daemon starts faster without it

    wrap = textwrap.TextWrapper(79, indent, indent or 9 * " ", break_on_hyphens=False)
    for line in text.splitlines():
        print(wrap.fill(printable(redact(line))).replace("\xa0", " "), flush=True)  # which it takes for no blank


def retry(config: Config, ids: list[str]) -> int:
    """Queue failed alerts again, those named or all; 1 where one that is named has not failed."""
    ids = list(dict.fromkeys(ids))
    with contextlib.closing(Queue(config.path, config.max_size)) as queue_:
        waiting, counts = queue_.queued(ids), queue_.retry_failed(ids)
    others = [id_ for id_ in ids if not counts[id_]]
    for id_ in others:
        if id_ in waiting:
            print(f"{id_} has not failed: it is queued", flush=True)
        else:
            complain(f"there is no failed alert {id_}: `ts3d status --failed` lists them")
    print(f"{sum(counts.values())} queued again", flush=True)
    return int(not waiting.issuperset(others))


BACKFILL_WAITS = 1000  # jobs that are queued when backfill adds no more
DOES_IT_RUN = "(does `ts3d serve` run?)"
PATIENCE = 120.0  # seconds for which backfill tries again where something is away
OVERLAP, FIRST_TIME = 3600.0, 86400.0  # seconds by which it goes back: an alert may be listed late; the first time


def moment(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time, a date (UTC) or an age. Raises argparse.ArgumentTypeError."""
    try:
        if match := re.fullmatch(f"([0-9]{{1,12}})([{''.join(TIME)}])", text):
            seconds = time.time() - int(match[1]) * TIME[match[2]]
        else:
            with_time = f"{text}T00:00:00Z" if len(text) == len("2026-11-24") else text
            match = RFC_3339.fullmatch(with_time)
            when = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3] or '+00:00'}")  # type: ignore[index]
            seconds = when.timestamp() + float(re.match("[0-9.]+", with_time[17:])[0])  # type: ignore[index]
    except (ValueError, TypeError, OverflowError):
        what = "neither a time such as 2026-11-24T18:00:00Z, nor a date, nor an age such as 2h (s, m, h or d)"
        raise argparse.ArgumentTypeError(f"{text!r} is {what}") from None
    if not 0 <= seconds < YEAR_10000 / 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not within the years 1970 to 9999")
    return seconds


def rfc_3339(seconds: float) -> str:
    """A time in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Backfill:
    """One run of `ts3d backfill`: what it has seen (`listed` …), and what it waits for (`note`), if it does.

    It keeps one page of the list at a time. Whatever ends it loses nothing: what it queued is on disk, and what is
    queued or in S3 is not queued again.
    """

    def __init__(self, config: Config, since: float | None, until: float | None) -> None:
        self.config, self.since = config, since
        # What appears meanwhile is left to the next run: with one end for all pages, it moves none of them.
        self.until = min(math.inf if until is None else until, time.time())
        self.threatstack, self.s3 = ThreatStack(config), S3(config)
        self.pool = ThreadPoolExecutor(1 + S3.HEADS)
        self.listed = self.there = self.waiting = self.queued = self.bad = 0
        self.note = ""
        self.problem: Exception | None = None  # what ends the run, for all of its threads

    def __str__(self) -> str:
        """What was done so far, in words."""
        said = f"{self.listed} listed, {self.there} there already, {self.queued} queued"
        said += f", {self.waiting} in the queue already" if self.waiting else ""
        return said + (f", {self.bad} malformed and not archived" if self.bad else "")

    def run(self) -> None:
        """Do it. Raises ArgumentTypeError for a range that is empty, ConfigError, QueueError, UpstreamError."""
        with contextlib.closing(Queue(self.config.path, self.config.max_size)) as self.queue:
            known = self.insist(self.queue.backfilled)
            if self.since is None:
                self.since = self.until - FIRST_TIME if known is None else known - OVERLAP
            since, until = rfc_3339(self.since), rfc_3339(self.until)
            if self.since >= self.until:
                begin = f"{since} (--from, or where the last run ended less an hour)"
                raise argparse.ArgumentTypeError(f"{begin} is not before {until} (--until, or now)")
            log.info("backfill: alerts from %s until %s", since, until)
            for alerts in self.pages(since, until):
                self.take(alerts)
            known = self.insist(self.queue.backfilled, self.since, self.until)
            if known and known < self.since:
                log.info("backfill: the next run without --from goes on at %s: a gap is left", rfc_3339(known))

    def insist(self, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns, tried again while an upstream is away. Raises UpstreamError, QueueError."""
        began, tries = time.monotonic(), 0
        while True:
            try:
                result = function(*args)
                self.note = ""
                return result
            except (UpstreamError, QueueError) as error:
                tries += 1
                status, pause = getattr(error, "status", 0), getattr(error, "retry_after", 0.0)
                why = f"trying again: {error}"
                refused = (300 <= status < 500 and status != 408) or getattr(error, "cause", "") in S3.CREDENTIALS
                if status == 429:  # for however long
                    began, why = time.monotonic(), "waiting: the rate of calls is limited"
                elif isinstance(error, QueueFull) and self.drains():  # for however long
                    began, why = time.monotonic(), f"waiting: the queue is half full, or its disk is full {DOES_IT_RUN}"
                elif refused or time.monotonic() + pause - began > PATIENCE:
                    self.problem = self.problem or error
                self.pause(pause or backoff(tries, 30.0), why)
                if self.problem:
                    raise self.problem from None

    def drains(self) -> bool:
        """Whether waiting makes room in the queue, as far as that can be read."""
        with contextlib.suppress(QueueError):
            return self.queue.counts()[0] > 0
        return True

    def pause(self, seconds: float, why: str) -> None:
        """Wait, and say why, unless the run is over."""
        self.note, end = why, time.monotonic() + seconds
        while not self.problem and time.monotonic() < end:
            nap(min(0.25, seconds))

    def pages(self, since: str, until: str) -> Iterator[str]:
        """The list of alerts, page by page: the text of a JSON array each. Raises UpstreamError."""
        lists: list[dict[str, Any]] = [{"start": since, "end": until, "count": 100, "page": 0}]
        if self.config.auth == "hawk":  # in this order: an alert that is dismissed meanwhile is in the second list
            lists = [{"status": status, "from": since, "until": until} for status in ("active", "dismissed")]
        for query in lists:
            seen: set[int] = set()  # hashes of pages: the same page again and again would have no end
            more = True
            while more:
                body = self.insist(self.threatstack.get, f"/alerts?{urllib.parse.urlencode(query)}")
                text, alerts = read_json(body)
                page, literal = hash(text), text
                if self.config.auth == "key":
                    more, query["page"] = bool(alerts), query["page"] + 1
                else:
                    members = {"alerts": ["", ""], "token": ["", "null"]}
                    members |= {name: found for name, *found in parts(text)} if text[0] == "{" else {}
                    (alerts, literal), (token, number) = members["alerts"], members["token"]
                    more = number not in ("null", '""', "false")
                    query["token"] = token if isinstance(token, str) else number
                if not isinstance(alerts, list) or page in seen:
                    raise self.threatstack.error(
                        "bad_answer", "the list of alerts is none, has no `alerts`, or has no end"
                    )
                seen.add(page)
                if alerts:
                    yield literal

    def take(self, alerts: str) -> None:
        """Queue those of a page's alerts that S3 has no detail of. Raises ConfigError, QueueError, UpstreamError."""
        time_of, found = "createdAt" if self.config.auth == "hawk" else "created_at", {}
        for i, (_, value, literal) in enumerate(parts(alerts)):
            alert = read_alert(literal, value, f"alerts[{i}].", time_of, "backfill")
            self.listed += 1
            if isinstance(alert, Rejected) and ALERT_ID.fullmatch(alert.id or ""):
                # The time serves for the key alone, and what the API lists has a detail there.
                log.warning("backfill: %s; archived as of now: %s", alert.message, alert.id)
                minute = f"{datetime.fromtimestamp(self.until, timezone.utc):%Y/%m/%d/%H/%M}"
                alert = Arrival(str(alert.id), minute, "backfill", literal.encode())
            if isinstance(alert, Arrival):
                found[alert.id] = alert
            else:
                self.bad += 1
                log.error("backfill: alert %s is not archived: %s", alert.id, alert.message)
        # Before the look at what is there, for it may take hours.
        while self.insist(self.queue.counts)[0] >= BACKFILL_WAITS:
            self.pause(0.5, f"waiting: {BACKFILL_WAITS} alerts or more are queued {DOES_IT_RUN}")
        # In this order: one that leaves the queue in between is in S3.
        waiting = self.insist(self.queue.queued, found)
        rest = [alert for alert in found.values() if alert.id not in waiting]
        there = list(self.pool.map(self.insist, itertools.repeat(self.s3.exists), map(OBJECTS["alerts"].name, rest)))
        missing = [alert for alert, is_there in zip(rest, there, strict=True) if not is_there]
        if missing:
            self.insist(self.queue.put, missing)
        self.waiting += len(waiting)
        self.there += sum(there)
        self.queued += len(missing)


def backfill(config: Config, since: float | None, until: float | None) -> int:
    """Queue the alerts of a time range (seconds since the epoch) that the API lists and S3 lacks."""
    require_upstreams(config)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before there are threads, and looked for as in `serve`
    run, begin, on_terminal = Backfill(config, since, until), time.monotonic(), sys.stderr.isatty()
    work = run.pool.submit(run.run)
    shown, noted = begin, ""
    while not work.done() and not STOP_SIGNALS & signal.sigpending():
        nap(0.1)
        now, note = time.monotonic(), run.note
        said = f"{run}, {run.listed / (now - begin):.0f}/s{note and f'; {note}'}"
        if on_terminal:
            # The cursor is left at the line's beginning, so that what is logged stands in its place.
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\x1b[K{printable(redact(said))[: width - 1]}\r", end="", file=sys.stderr, flush=True)
        elif now - shown > 10 or (note and note != noted and now - shown > 1):
            log.info("backfill: %s", said)
            shown, noted = now, note or noted
    if on_terminal:
        print("\x1b[K", end="", file=sys.stderr, flush=True)
    stopped = not work.done()
    failure = None if stopped else work.exception()
    if isinstance(failure, (UpstreamError, QueueError)):
        complain(str(failure))
    elif failure:
        raise failure
    how = " stopped" if stopped else " failed" if failure else ""
    print(f"backfill{how}: {run}", flush=True)
    if how:
        os._exit(130 if stopped else 1)  # 130: as after SIGINT. Other threads may wait for an upstream still
    return 1 if run.bad else 0


def complain(text: str) -> None:
    """Say in one line, to whoever started this and to `systemctl status`, why it ends."""
    line = printable(redact(text))
    notify(f"STATUS={line}")
    print(f"{'<3>' if in_journal() else ''}ts3d: {line}", file=sys.stderr)


def explain(error: BaseException) -> str:
    """An error in words: one that was foreseen speaks for itself, of a bug it is said where it is."""
    # RuntimeError: no thread can be started.
    foreseen = (ConfigError, QueueError, UpstreamError, argparse.ArgumentTypeError, RuntimeError, OSError)
    return str(error) if isinstance(error, foreseen) else f"internal error: {describe(error)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; its exit code."""
    option = argparse.ArgumentParser(add_help=False)  # before the command and after it
    option.add_argument("-c", dest="config", metavar="FILE", default=argparse.SUPPRESS, help="configuration")
    parser = argparse.ArgumentParser("ts3d", description="Archives Threat Stack's alerts in AWS S3.", parents=[option])
    parser.add_argument("--version", action="version", version=f"ts3d {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", parents=[option], help="the daemon (the default command)")
    commands.add_parser("check", parents=[option], help="say whether everything is in place")
    look = commands.add_parser("status", parents=[option], help="what is queued, and what stands in the way")
    look.add_argument("--failed", action="store_true", help="list the failed alerts with their errors")
    look.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    again = commands.add_parser("retry", parents=[option], help="queue failed alerts again")
    again.add_argument("ids", metavar="ID", nargs="*", help="those to queue; by default all")
    fill = commands.add_parser("backfill", parents=[option], help="archive what the API lists and S3 lacks")
    form = "a time (RFC 3339), a date (UTC), or an age such as 2h"
    fill.add_argument("--from", dest="since", metavar="T", type=moment, help=f"{form}; by default where it left off")
    fill.add_argument("--until", metavar="T", type=moment, help="the same; by default now")
    chosen = vars(parser.parse_args(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):  # what upstreams say may be beyond the locale's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    command = chosen.pop("command")
    path = chosen.pop("config", None) or next(filter(os.path.exists, CONFIG_FILES), CONFIG_FILES[-1])
    others: dict[str, Callable[..., int]] = {"status": status, "retry": retry, "backfill": backfill}
    try:
        if command == "check":
            return check(path)
        config = load_config(path)
        start_log(config.level)
        return others.get(command, serve)(config, **chosen)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `ts3d status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains of it again at exit
        return 1
    except Exception as error:  # also a bug: one line for the user, who can do nothing with a traceback
        complain(explain(error))
        return {ConfigError: 78, argparse.ArgumentTypeError: 2}.get(type(error), 1)  # 78: EX_CONFIG of sysexits.h


if __name__ == "__main__":
    sys.exit(main())
