"""Each way in which Threat Stack or S3 may misbehave: what the answer says, what the log says, and the recovery.

A row of the tables is one upstream that breaks before the daemon starts and recovers later. Then everything must be
archived, with nothing failed, nothing lost and nobody's help.
"""

import contextlib
import gzip
import http.client
import itertools
import json
import os
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, alert, error_of, peak_memory, until

import ts3d

# ---------------------------------------------------------------------------------------------------------------------
# How an upstream breaks: contexts, given the World, which break it and repair it at their end
# ---------------------------------------------------------------------------------------------------------------------


class World:
    """The daemon, which is not started yet, and the upstream of whose failure a row speaks."""

    def __init__(self, daemon, upstream, folder):
        self.daemon, self.upstream, self.folder = daemon, upstream, folder


def answering(mode):
    """It answers as `mode` has it: a status, a name, or a function of threatstack.Handler."""

    @contextlib.contextmanager
    def fault(world):
        world.upstream.mode = mode
        yield
        world.upstream.mode = None

    return fault


def status(code, body=b'{"status": "error", "message": "because"}', **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler):
        handler.send(code, body, [(name, v() if callable(v) else v) for name, v in names.items()])

    return answering(answer)


def date(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def raw(*pieces, pause=0.0, then=None, times=1):
    """Bytes, as they are, with `pause` seconds after each piece; `then` over and over; and the connection is closed."""

    def answer(handler):
        handler.close_connection = True
        for piece in pieces:
            handler.wfile.write(piece)
            handler.server.released.wait(pause)
        while then and not handler.server.released.wait(pause):
            handler.wfile.write(then)

    return answering(answer)


def aborted(handler):
    """A connection that is reset, rather than closed."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


@contextlib.contextmanager
def refused(world):
    port = world.upstream.port
    world.upstream.stop()
    yield
    world.upstream.__init__(port)


@contextlib.contextmanager
def unresolvable(world):
    """This is repaired in the configuration, so with a restart."""
    option = "s3__endpoint_url" if isinstance(world.upstream, Bucket) else "threatstack__base_url"
    section, _, name = option.partition("__")
    right = world.daemon.options[section, name]
    world.daemon.set(**{option: f"http://nonexistent.invalid:{world.upstream.port}/api/v1"})
    yield
    world.daemon.set(**{option: right})
    restart(world)


def until_restart(fault):
    @contextlib.contextmanager
    def faulty(world):
        with fault(world):
            yield
        restart(world)

    return faulty


def restart(world):
    assert world.daemon.stop() == 0
    world.daemon.start()


def tls(names=("127.0.0.1",), known=True, trusted_later=False, plain=False, **more):
    """It speaks TLS with a certificate for these names, of a CA that is known or not."""

    @contextlib.contextmanager
    def fault(world):
        ours, others = trustme.CA(), trustme.CA()
        bundle = world.folder / "ca.pem"
        ours.cert_pem.write_to_path(bundle)
        world.daemon.environment["SSL_CERT_FILE"] = str(bundle)
        world.daemon.set(threatstack__base_url=f"https://127.0.0.1:{world.upstream.port}/api/v1")

        def speak(ca, *names, **more):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            ca.issue_cert(*names, **more).configure_cert(context)
            world.upstream.tls = context

        if not plain:
            speak(ours if known else others, *names, **more)
        yield
        if trusted_later:
            others.cert_pem.write_to_path(bundle)
        else:
            speak(ours, "127.0.0.1")

    return fault


@contextlib.contextmanager
def spoken_plain(world):
    """It speaks TLS, and base_url says http:."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    world.upstream.tls = context
    yield
    world.upstream.tls = None


class Bucket(threatstack.Faulty):
    """S3's stand-in."""


def s3_error(status, code, text="because", **members):
    """S3's own answer. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in members.items())
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{text}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    ).encode()
    return answering(
        lambda h: h.send(status, b"" if h.command == "HEAD" else body, [("Content-Type", "application/xml")])
    )


def credentials(text):
    """Credentials in the file that boto3 reads, wrong at first."""

    @contextlib.contextmanager
    def fault(world):
        file = world.folder / "credentials"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del world.daemon.environment[name]
        world.daemon.environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(file), "HOME": str(world.folder)}
        if text:
            file.write_text(text)
        yield
        pair = AWS["AWS_ACCESS_KEY_ID"], AWS["AWS_SECRET_ACCESS_KEY"]
        file.write_text("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n".format(*pair))

    return fault


@contextlib.contextmanager
def bucket_missing(world):
    """The real server's, whose buckets are folders, and which remembers for minutes what there are."""
    folder = world.upstream.folder / BUCKET
    away = folder.with_name("away")

    def rename(old, new):
        world.upstream.stop()
        old.rename(new)
        world.upstream.start()

    rename(folder, away)
    yield
    rename(away, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------


def words(*patterns):
    """A pattern for a line in which all of these are, in any order."""
    return "".join(rf"(?=[^\n]*(?:{pattern}))" for pattern in patterns)


class Row(NamedTuple):
    name: str
    fault: Callable[[World], Any]
    type: str  # of the error that the answer gives for a queued alert, after `threatstack_` or `s3_`
    says: str  # once in the log, if the upstream is unavailable; otherwise with the tries of each alert
    unavailable: bool = True
    back: bool = True  # by itself, without a restart
    probed: bool = False  # it recovers after a probe that failed
    pause: float = 0.0  # seconds that it asked for, and that nobody calls it
    options: dict = {}


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
NO_ANSWER = words("1 s", r"\[threatstack\] timeout")
TOO_LONG = "8M|8388608"

THREAT_STACK = [
    Row("refused", refused, "unreachable", "cannot be reached: .*refused"),
    Row(
        "unresolvable", unresolvable, "unreachable", "nonexistent.invalid.* cannot be reached: .*not known", back=False
    ),
    Row("aborted", answering(aborted), "broken_off", "reset by peer"),
    Row("closed without a word", answering("reset"), "broken_off", "closed connection without response", probed=True),
    Row("silent", answering("hang"), "timeout", NO_ANSWER),
    Row("body, a byte now and then", raw(HEAD + b"\r\n", then=b" ", pause=0.2), "timeout", NO_ANSWER),
    Row("head of many lines", raw(HEAD + b"X: y\r\n" * 101), "broken_off", "more than 100 headers"),
    Row("head of one long line", raw(HEAD + b"X: " + b"y" * 70_000), "broken_off", "more than 65536 bytes"),
    Row(
        "body without end",
        raw(HEAD + b"\r\n", then=b" " * 1_000_000),
        "bad_answer",
        TOO_LONG,
        options={"threatstack__timeout": "20"},
    ),
    Row(
        "chunks without end",
        raw(CHUNKED, then=b"100000\r\n" + b" " * 0x100000 + b"\r\n"),
        "bad_answer",
        TOO_LONG,
        options={"threatstack__timeout": "20"},
    ),
    Row("body cut", raw(HEAD + b"Content-Length: 1000\r\n\r\n{}"), "broken_off", "998 bytes"),
    Row("body cut, no length", raw(HEAD + b'\r\n{"id": "alert'), "bad_answer", "not JSON"),
    Row("chunk cut", raw(CHUNKED + b"9\r\n{}"), "broken_off", "broke off"),
    Row("chunk of no size", raw(CHUNKED + b"x\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row("chunk of size -2", raw(CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row(
        "chunk of size -1",
        raw(CHUNKED + b"-1\r\n", then=b" " * 1_000_000),
        "broken_off|bad_answer",
        "",
        options={"threatstack__timeout": "20"},
    ),
    Row("HTTP/0.9", raw(b'{"id": "alert-000000"}\n'), "broken_off", r"broke off: .*\{"),
    Row("status line of garbage", raw(b"\x00\xff\x1b[31m\r\n\r\n"), "broken_off", r"broke off: .*\\x00"),
    Row("status of letters", raw(b"HTTP/1.1 OK\r\n\r\n"), "broken_off", "broke off: .*HTTP/1.1 OK"),
    Row("204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "204", "Threat Stack: 204", unavailable=False),
    Row("200, empty", status(200, b""), "bad_answer", "not JSON: .*line 1 column 1"),
    Row("200, a page", answering("garbage"), "bad_answer", "not JSON: .*line 1 column 1", probed=True),
    Row("200, nested", status(200, b"[" * 100_000), "bad_answer", "nested too deeply"),
    Row("200, NaN", status(200, b'{"id": NaN}'), "bad_answer", "NaN"),
    Row("200, an error", status(200, b'{"errors": ["x"]}'), "wrong_detail", "error", unavailable=False),
    Row("200, another", status(200, threatstack.detail("x")), "wrong_detail", "not this alert's", unavailable=False),
    Row("301", status(301, b"", Location="https://127.0.0.1:1/"), "301", words("base_url", "301")),
    Row("307", status(307, b"", Location="/api/v1/alerts/x"), "307", words("base_url", "307")),
    Row("400", status(400), "400", "Threat Stack: 400 .*because", unavailable=False),
    Row("401", status(401), "unauthorized", words(r"\[threatstack\] api_key", "401")),
    Row("403", status(403), "forbidden", words("api_key", "403")),
    Row("404", status(404), "not_found", words("base_url", "404"), unavailable=False),
    Row("500", status(500), "500", "Threat Stack: 500", probed=True),
    Row("503, Retry-After", status(503, Retry_After=2), "503", "Threat Stack: 503", pause=2),
    Row("429", status(429), "rate_limited", "429", probed=True),
    Row("429, no JSON", status(429, b"slow down"), "rate_limited", words("429", "slow down")),
    Row("429, Retry-After in seconds", status(429, Retry_After=2), "rate_limited", "429", pause=2),
    Row("429, Retry-After as a date", status(429, Retry_After=lambda: date(3)), "rate_limited", "429", pause=1.9),
    Row("429, x-rate-limit-reset", status(429, x_rate_limit_reset=2000), "rate_limited", "429", pause=2),
    Row("429, an hour", until_restart(status(429, Retry_After=10**8)), "rate_limited", "429", back=False),
    Row("429, a past date", status(429, Retry_After=date(-9999)), "rate_limited", "429"),
    Row("429, negative", status(429, Retry_After=-5, x_rate_limit_reset=-5), "rate_limited", "429"),
    Row("429, garbage", status(429, Retry_After="soon", x_rate_limit_reset="NaN"), "rate_limited", "429"),
    Row("wrong host", tls(["elsewhere.example"]), "unreachable", "certificate is not valid for '127.0.0.1'"),
    Row("unknown CA", tls(known=False), "unreachable", "unable to get local issuer certificate"),
    Row(
        "certificate expired",
        tls(not_after=datetime.now(UTC) - timedelta(days=1)),
        "unreachable",
        "certificate has expired",
    ),
    Row("no TLS", tls(plain=True), "unreachable", "SSL: "),
    Row("TLS", spoken_plain, "broken_off", "broke off"),
]

S3 = [
    Row("refused", refused, "EndpointConnectionError", "Could not connect"),
    Row("unresolvable", unresolvable, "EndpointConnectionError", "nonexistent.invalid", back=False),
    Row("aborted", answering(aborted), "ConnectionClosedError|HTTPClientError|EndpointConnectionError", ""),
    Row("closed without a word", answering("reset"), "ConnectionClosedError", "Connection was closed"),
    Row("silent", answering("hang"), "ReadTimeoutError", "Read timeout"),
    Row("status line of garbage", raw(b"garbage\r\n\r\n"), "ConnectionClosedError|HTTPClientError", ""),
    Row("200, a page", answering("garbage"), "bad_answer", "a 200 without an ETag is not S3's answer"),
    Row("502, a page", status(502, b"<html>Bad Gateway"), "502", "502"),
    Row("302", status(302, b"", Location="http://127.0.0.1:1/"), "302|RecursionError", "region|endpoint_url"),
    Row(
        "bucket missing",
        s3_error(404, "NoSuchBucket", BucketName=BUCKET),
        "NoSuchBucket",
        words(r"\[s3\] bucket", BUCKET),
    ),
    Row("access denied", s3_error(403, "AccessDenied"), "AccessDenied", "s3:PutObject", probed=True),
    Row(
        "region wrong, 301",
        s3_error(301, "PermanentRedirect", Endpoint="x"),
        "PermanentRedirect|RecursionError",
        "region",
    ),
    Row(
        "region wrong, 400",
        s3_error(400, "AuthorizationHeaderMalformed", Region="eu-west-1"),
        "AuthorizationHeaderMalformed",
        r"\[s3\] region",
    ),
    Row("clock skewed", s3_error(403, "RequestTimeTooSkewed"), "RequestTimeTooSkewed", "clock"),
    Row("token expired", s3_error(400, "ExpiredToken"), "ExpiredToken", "credentials", probed=True),
    Row("key unknown", s3_error(403, "InvalidAccessKeyId"), "InvalidAccessKeyId", "credentials"),
    Row("secret wrong", s3_error(403, "SignatureDoesNotMatch"), "SignatureDoesNotMatch", "credentials"),
    Row("412", s3_error(412, "PreconditionFailed"), "PreconditionFailed", "PreconditionFailed", probed=True),
    Row(
        "409",
        s3_error(409, "ConditionalRequestConflict"),
        "ConditionalRequestConflict",
        "ConditionalRequestConflict",
        unavailable=False,
    ),
    Row(
        "409, IfNoneMatch",
        s3_error(409, "ConditionalRequestConflict"),
        "ConditionalRequestConflict",
        "ConditionalRequestConflict",
        unavailable=False,
        options={"put_object__IfNoneMatch": "*"},
    ),
    Row("SlowDown", s3_error(503, "SlowDown"), "SlowDown", "SlowDown", probed=True),
    Row("429", status(429, b""), "429", "429"),
]

REAL_S3 = [
    Row("bucket missing", bucket_missing, "NoSuchBucket", words(r"\[s3\] bucket", BUCKET)),
    Row("no credentials", credentials(""), "NoCredentialsError", "[Cc]redentials|access key"),
    Row(
        "half of the credentials",
        credentials("[default]\naws_access_key_id = AKIDEXAMPLE\n"),
        "PartialCredentialsError",
        "[Cc]redentials|access key",
    ),
    Row(
        "key unknown",
        credentials("[default]\naws_access_key_id = AKIDOTHER\naws_secret_access_key = x\n"),
        "InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied",
        "[Cc]redentials|access key",
    ),
    Row(
        "secret wrong",
        credentials("[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = x\n"),
        "SignatureDoesNotMatch",
        "[Cc]redentials|access key",
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# The tests that walk them
# ---------------------------------------------------------------------------------------------------------------------


def walk(row, world, name, objects):
    daemon = world.daemon
    with row.fault(world):
        daemon.start()
        assert daemon.post({"alerts": [alert(0), alert(1)]})[0] == 200
        if row.unavailable:
            until(lambda: daemon.logged(rf"WARNING {name} unavailable: [^\n]*{row.says}"), 30, "outage")
        else:
            for n in range(2):
                line = rf"WARNING alert failed, will be retried id=alert-00000{n} [^\n]*{row.says}"
                until(lambda line=line: daemon.logged(line))
        # What comes meanwhile is taken, and told the problem.
        code, answer = daemon.post({"alerts": [alert(0), alert(2)]})
        assert code == 200
        for state in answer["alerts"][: 1 + row.unavailable]:
            assert state["state"] == "queued"
            assert re.fullmatch(f"{name}_({row.type})", state["error"]["type"]), state
            assert re.search(row.says, state["error"]["message"])
        if row.probed:
            calls = len(world.upstream.calls)
            until(lambda: len(world.upstream.calls) > calls, what="probe")
        assert daemon.health()["queued"] == 3
    archived = "INFO archived id=alert-00000"
    until(lambda: daemon.log().count(archived) == 3, 20, "archive")  # within 20 s of its repair
    until(lambda: daemon.health()["queued"] == 0)
    assert daemon.health()["failed"] == 0
    for n in range(3):
        id_ = alert(n)["id"]
        assert f"{archived}{n} " in daemon.log()
        assert objects()[f"alerts/al/er/{id_}"] == threatstack.detail(id_)
        assert objects()[f"webhooks/2017/01/17/13/{51 + n}/{id_}"] == json.dumps(alert(n)).encode()
    assert len(re.findall(f"{name} unavailable: ", daemon.log())) == row.unavailable
    assert len(re.findall(rf"{name} recovered after \d+ s", daemon.log())) == (row.unavailable and row.back)
    if row.pause:
        times = [when for when, _, _ in world.upstream.calls]
        assert max(after - before for before, after in itertools.pairwise(times)) >= row.pause - 0.01


def named(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name.replace(" ", "-"))


QUICK = {"server__wait": "0", "threatstack__timeout": "1"}


@named(THREAT_STACK)
def test_threat_stack(new_daemon, s3, api, tmp_path, row):
    daemon = new_daemon(start=False, **{**QUICK, **row.options})
    walk(row, World(daemon, api, tmp_path), "threatstack", s3.objects)


@named(S3)
def test_s3(new_daemon, api, tmp_path, row):
    if "put_object__IfNoneMatch" in row.options and boto3.__version__.startswith("1.26."):
        pytest.skip(f"boto3 {boto3.__version__} has no IfNoneMatch")
    server = Bucket()
    daemon = new_daemon(start=False, s3__endpoint_url=server.url, **{**QUICK, **row.options})
    try:
        walk(row, World(daemon, server, tmp_path), "s3", lambda: objects_of(server))
    finally:
        server.stop()


@named(REAL_S3)
def test_real_s3(new_daemon, s3, tmp_path, row):
    walk(row, World(new_daemon(start=False, **QUICK), s3, tmp_path), "s3", s3.objects)


def objects_of(server):
    return {path.removeprefix(f"/{BUCKET}/"): body for path, body in server.objects.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Beside the tables
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [300, 301, 302, 303, 307, 308])
def test_a_redirect_takes_the_key_nowhere(new_daemon, s3, api, code):
    elsewhere = threatstack.Faulty()
    to = [("Location", f"{elsewhere.url}/api/v1/alerts/alert-000000"), ("Refresh", f"0; url={elsewhere.url}")]
    api.mode = lambda handler: handler.send(code, b"", to)
    assert error_of(new_daemon(server__wait="0"))["type"] == f"threatstack_{code}"
    assert set(api.paths()) == {"/api/v1/alerts/alert-000000"}
    assert elsewhere.connections == []
    elsewhere.stop()


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_s3s_redirect_takes_nothing_elsewhere(new_daemon, code):
    server, elsewhere = Bucket(), threatstack.Faulty()
    server.mode = lambda handler: handler.send(code, b"", [("Location", f"{elsewhere.url}/{BUCKET}/x")])
    assert error_of(new_daemon(server__wait="0", s3__endpoint_url=server.url))["type"] in (
        f"s3_{code}",
        "s3_RecursionError",
    )  # botocore's own
    assert {path for _, path, _ in server.calls} - {f"/{BUCKET}"} == {  # whose region botocore asks for
        f"/{BUCKET}/webhooks/2017/01/17/13/51/alert-000000"
    }
    assert elsewhere.connections == []
    server.stop()
    elsewhere.stop()


@pytest.mark.parametrize(
    "fault",
    [
        raw(HEAD + b"\r\n", then=b" " * 1_000_000),
        raw(CHUNKED + b"-1\r\n", then=b" " * 1_000_000),
        raw(CHUNKED, then=b"100000\r\n" + b" " * 0x100000 + b"\r\n"),
    ],
    ids=["body", "chunk", "chunks"],
)
def test_the_memory_that_an_endless_answer_takes(new_daemon, s3, api, tmp_path, fault):
    daemon = new_daemon(threatstack__timeout="20", archive__workers="1", server__wait="1")
    until(lambda: daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived")
    before = peak_memory(daemon)
    with fault(World(daemon, api, tmp_path)):
        daemon.post({"alerts": [alert(1)]})
        until(
            lambda: daemon.logged("will be retried id=alert-000001 |threatstack unavailable: "), 40, "end of the call"
        )
        assert peak_memory(daemon) - before < 64 << 20


@pytest.mark.parametrize("encoding", ["gzip", "br"])
@pytest.mark.parametrize("version", [1, 2])
def test_an_answer_that_is_compressed_unasked(new_daemon, s3, api, encoding, version):
    """It is undone, or named."""
    more = {"threatstack__base_url": f"{api.url}/v2", **threatstack.HAWK} if version == 2 else {}
    daemon = new_daemon(server__wait="0", **more)
    bodies = {"alert-000000": threatstack.detail("alert-000000"), "events": threatstack.events("alert-000000")}

    def send(handler):
        body = gzip.compress(bodies[handler.path.rpartition("/")[2]])
        handler.send(200, body, [("Content-Encoding", encoding)])

    api.modes = dict.fromkeys(bodies, send)
    daemon.post({"alerts": [alert(0)]})
    until(
        lambda: (
            s3.objects("alerts/")
            or daemon.logged(f"id=alert-000000 .*{encoding}|threatstack unavailable: .*{encoding}")
        )
    )
    assert s3.objects("alerts/").get("alerts/al/er/alert-000000", bodies["alert-000000"]) == bodies["alert-000000"]
    assert s3.objects("events/").get("events/al/er/alert-000000", bodies["events"]) == bodies["events"]


RESOLVES = """
import socket
real = socket.getaddrinfo

def getaddrinfo(host, port, *args, **more):
    if host != "two.example":
        return real(host, port, *args, **more)
    return [found for address in ("127.0.0.2", "127.0.0.1") for found in real(address, port, *args, **more)]

socket.getaddrinfo = getaddrinfo
"""


def test_a_name_of_which_one_address_is_dead(new_daemon, s3, api, tmp_path, tracer):
    """That is not tried again with each call, or the log says it."""
    (tmp_path / "sitecustomize.py").write_text(RESOLVES)
    with socket.create_server(("127.0.0.2", api.port), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(2):  # from then on it swallows packets
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        daemon = new_daemon(start=False, threatstack__base_url=f"http://two.example:{api.port}/api/v1")
        daemon.set(server__wait="0", threatstack__timeout="12")
        daemon.environment["PYTHONPATH"] = str(tmp_path)
        daemon.start()
        daemon.post({"alerts": [alert(0)]})
        until(lambda: len(s3.objects("alerts/")) == 1, 60, "archived alert")
        with tracer(daemon, "trace=connect") as trace:
            daemon.post({"alerts": [alert(n) for n in range(1, 4)]})
            until(lambda: len(s3.objects("alerts/")) == 4, 60, "archived alerts")
        tried = trace.read_text().count('inet_addr("127.0.0.2")')
        assert tried <= 1 or daemon.logged("WARNING .*address")


# ---------------------------------------------------------------------------------------------------------------------
# Proxies, and what boto3 takes from the environment
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_both_upstreams_are_reached_through_the_proxy(new_daemon, s3, api, new_proxy, variable):
    """Names that only the proxy can resolve: of the daemon, and of backfill."""
    proxy = new_proxy()
    daemon = new_daemon(
        start=False,
        s3__endpoint_url=f"http://s3.example:{s3.port}",
        threatstack__base_url=f"http://api.example:{api.port}/api/v1",
    )
    daemon.environment[variable] = f"http://127.0.0.1:{proxy.port}"
    daemon.start()
    archive(daemon)
    assert s3.objects()["alerts/al/er/alert-000000"] == threatstack.detail("alert-000000")
    for name in (f"s3.example:{s3.port}", f"api.example:{api.port}"):
        assert name in until(lambda name=name: name in proxy.log() and proxy.log())
    name = f"proxied-{variable}"  # rclone may remember for a while what an earlier test put
    api.lists["active"] = [threatstack.entry(name, int(time.time() * 1000) - 60_000, version=1)]
    result = daemon.run("backfill")
    assert result.returncode == 0, result.stderr
    until(lambda: f"alerts/pr/ox/{name}" in s3.objects())


def test_https_through_the_proxy(new_daemon, api, certificate, new_proxy, tmp_path):
    """By CONNECT: the proxy sees neither key nor path."""
    bucket, proxy = Bucket(), new_proxy()
    for server in (api, bucket):
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(certificate.file)
    certificate.authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    daemon = new_daemon(
        start=False,
        s3__endpoint_url=f"https://localhost:{bucket.port}",
        threatstack__base_url=f"https://localhost:{api.port}/api/v1",
    )
    daemon.environment |= dict.fromkeys(("SSL_CERT_FILE", "AWS_CA_BUNDLE"), str(tmp_path / "authority.pem"))
    daemon.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{proxy.port}"
    daemon.start()
    archive(daemon)
    daemon.stop()
    for port in (bucket.port, api.port):
        until(lambda port=port: re.search(f"CONNECT localhost:{port}", proxy.log()), what="CONNECT")
    assert "/api/v1" not in proxy.log()
    bucket.stop()


@pytest.mark.parametrize("excepted", ["127.0.0.1", "localhost,127.0.0.1", "*"])
def test_no_proxy(new_daemon, s3, api, new_proxy, excepted):
    proxy = new_proxy()
    daemon = new_daemon(start=False)
    daemon.environment |= {"HTTP_PROXY": f"http://127.0.0.1:{proxy.port}", "NO_PROXY": excepted}
    daemon.start()
    archive(daemon)
    assert f":{api.port}" not in proxy.log()
    assert f":{s3.port}" not in proxy.log()


def test_a_proxy_that_wants_a_password(new_daemon, s3, api, new_proxy):
    """It is in the variable's URL, and never in the log; without it both upstreams are unavailable."""
    proxy = new_proxy("--basic-auth=ts3d:proxy-password")
    daemon = new_daemon(start=False, server__wait="0", log__level="DEBUG")
    daemon.environment["HTTP_PROXY"] = f"http://ts3d:wrong-password@127.0.0.1:{proxy.port}"
    daemon.start()
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.logged("(s3 unavailable: |will be retried id=).*407"))
    assert daemon.stop() == 0
    assert "wrong-password" not in daemon.log()
    daemon.environment["HTTP_PROXY"] = f"http://ts3d:proxy-password@127.0.0.1:{proxy.port}"
    daemon.start()
    until(lambda: s3.objects("alerts/"))
    assert daemon.stop() == 0
    assert "proxy-password" not in daemon.log()


def test_a_proxy_that_is_down(new_daemon, s3, api, new_proxy):
    """Nothing goes round it."""
    daemon = new_daemon(start=False, server__wait="0")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    daemon.environment["HTTP_PROXY"] = f"http://ts3d:proxy-password@127.0.0.1:{port}"
    daemon.start()
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.logged(f"s3 unavailable: .*127.0.0.1:{port}"))
    assert api.calls == []
    assert s3.objects() == {}
    assert "proxy-password" not in daemon.log()


CREDENTIALS = """#!{python}
import json, pathlib
pathlib.Path({status!r}).write_text(pathlib.Path("/proc/self/status").read_text())
print(json.dumps({{"Version": 1, "AccessKeyId": {AWS_ACCESS_KEY_ID!r}, "SecretAccessKey": {AWS_SECRET_ACCESS_KEY!r}}}))
"""  # not a shell's: dash clears what it inherits


def archive(daemon, number=0):
    until(lambda: daemon.post({"alerts": [alert(number)]})[1]["alerts"][0]["state"] == "archived", what="archive")


@pytest.mark.parametrize("command", ["serve", "check", "backfill"])
def test_credential_process_is_a_child_like_any_other(new_daemon, s3, api, command):
    """It is found in the environment's AWS_CONFIG_FILE; no signal is blocked in it, and it may use all processors."""
    daemon = new_daemon(start=False)
    program, config, status_file = (daemon.folder / name for name in ("credentials.py", "aws-config", "status"))
    program.write_text(CREDENTIALS.format(python=sys.executable, status=str(status_file), **AWS))
    program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del daemon.environment[name]
    daemon.environment |= {"AWS_CONFIG_FILE": str(config), "HOME": str(daemon.folder)}
    daemon.start()
    archive(daemon)
    if command != "serve":
        status_file.unlink()
        api.lists["active"] = [threatstack.entry("alert-000001", int(time.time() * 1000) - 60_000, version=1)]
        result = daemon.run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    of_child, of_us = (
        dict(re.findall(r"(\w+):\s+(\S+)", text))
        for text in (status_file.read_text(), Path("/proc/self/status").read_text())
    )
    assert int(of_child["SigBlk"], 16) == 0
    ignored = int(of_child["SigIgn"], 16)
    assert not [s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM) if ignored >> s - 1 & 1]
    assert of_child["Cpus_allowed_list"] == of_us["Cpus_allowed_list"]


@pytest.mark.parametrize("place", ["environment", "secrets", "both"])
def test_where_aws_credentials_are_looked_for(new_daemon, s3, place):
    """AWS_CONFIG_FILE of a drop-in counts, also beside secrets/aws_credentials."""
    daemon = new_daemon(start=False, s3__region=None)
    pair = f"aws_access_key_id = {AWS['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {AWS['AWS_SECRET_ACCESS_KEY']}\n"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        daemon.environment.pop(name, None)
    daemon.environment["HOME"] = str(daemon.folder)
    if place != "secrets":
        config = daemon.folder / "aws-config"
        config.write_text(f"[default]\nregion = eu-north-1\n{pair if place == 'environment' else ''}")
        daemon.environment["AWS_CONFIG_FILE"] = str(config)
    (daemon.folder / "secrets").mkdir()
    if place != "environment":
        region = "region = us-east-1\n" if place == "secrets" else ""
        (daemon.folder / "secrets" / "aws_credentials").write_text(f"[default]\n{region}{pair}")
    bucket = Bucket()
    daemon.set(s3__endpoint_url=bucket.url)
    daemon.start()
    archive(daemon)
    region = "us-east-1" if place == "secrets" else "eu-north-1"
    assert f"/{region}/s3/" in bucket.calls[0][2]["Authorization"]
    bucket.stop()


HOUR = 3600


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "999999999"}, HOUR),
        ({"Retry-After": "9" * 40}, 0),
        ({"Retry-After": "-7"}, 0),
        ({"Retry-After": "1e3"}, 0),
        ({"Retry-After": "nan"}, 0),
        ({"Retry-After": ""}, 0),
        ({"Retry-After": "2001-01-17T13:51:05Z"}, 0),
        ({"Retry-After": "Tue, 17 Jan 2017 13:51:05 GMT"}, 60),
        ({"Retry-After": "Tuesday, 17-Jan-17 13:51:05 GMT"}, 60),
        ({"Retry-After": "Tue Jan 17 13:51:05 2017"}, 60),
        ({"Retry-After": "Tue, 17 Jan 2017 13:51:05 -0000"}, 60),
        ({"Retry-After": "Tue, 17 Jan 2017 15:51:05 +0200"}, 60),
        ({"Retry-After": "Tue, 17 Jan 2017 13:49:05 GMT"}, 0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, HOUR),
        ({"Retry-After": "Fri, 31 Dec 99999 23:59:59 GMT"}, 0),
        ({"Retry-After": "Tue, 99 Jan 2017 99:99:99 GMT"}, 0),
        ({"x-rate-limit-reset": "1500"}, 1.5),
        ({"x-rate-limit-reset": "1484661065000"}, 0),
        ({"x-rate-limit-reset": "999999999999"}, HOUR),
        ({"x-rate-limit-reset": "-1"}, 0),
        ({"x-rate-limit-reset": "soon"}, 0),
        ({"Retry-After": "7", "x-rate-limit-reset": "1500"}, 7),
        ({"Retry-After": "0", "x-rate-limit-reset": "4000"}, 4),
        ({"Retry-After": "soon", "x-rate-limit-reset": "4500.0"}, 4.5),
        ({"Retry-After": "1.5", "x-rate-limit-reset": ""}, 1.5),
    ],
    ids=lambda value: "+".join(value.values()).strip()[:31] if isinstance(value, dict) else "",
)
def test_how_long_an_upstream_asks_to_be_left_alone(monkeypatch, headers, seconds):
    monkeypatch.setattr(time, "time", lambda: 1484661005.0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        message[name] = value
    try:
        error = ts3d.UpstreamError("threatstack", "rate_limited", "because", 429, message)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert error.retry_after == seconds


@pytest.mark.parametrize("source", ["details", "events"])
def test_hostile_answers_are_parsed_one_at_a_time(new_daemon, s3, api, source):
    """Each of 8M, of a kind that takes twenty-five times as much when it is parsed; they come at the same moment."""
    more = {"threatstack__base_url": f"{api.url}/v2", **threatstack.HAWK} if source == "events" else {}
    daemon = new_daemon(server__wait="0", **more)
    together = threading.Barrier(12)

    def answer(handler):
        start = b'{"id": "%s", "x": [' % handler.path.removesuffix("/events").rpartition("/")[2].encode()
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(5)
        handler.send(200, start + b"[]," * (((8 << 20) - len(start) - 4) // 3) + b"[]]}")

    names = [alert(n)["id"] for n in range(12)] if source == "details" else ["events"]
    api.modes = dict.fromkeys(names, answer)
    daemon.post({"alerts": [alert(n) for n in range(12)]})
    until(lambda: len(s3.objects("alerts/")) == 12, 150, "details")
    assert peak_memory(daemon) < 800 << 20  # the unit's MemoryMax is 1G
