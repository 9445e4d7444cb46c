"""Each way in which Threat Stack or S3 may misbehave: what the answer says, what the log says once, what mends it.

A row of the tables is one upstream that breaks before the daemon starts and is mended later. Then everything must be
archived, with nothing failed, nothing lost and nobody's help.
"""

import contextlib
import errno
import gzip
import itertools
import json
import os
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any, NamedTuple

import boto3
import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, alert, error_of, until

import ts3d

# ---------------------------------------------------------------------------------------------------------------------
# How an upstream breaks: contexts, given the World, which break it and mend it at their end
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
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


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


def bytewise(text):
    return [bytes([byte]) for byte in text]


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
    """This is mended in the configuration, so with a restart."""
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


class Row(NamedTuple):
    name: str
    fault: Callable[[World], Any]
    type: str  # of the error that the answer gives for a queued alert, after `threatstack_` or `s3_`
    says: str  # once in the log, where the upstream is held; otherwise with each try of each alert
    held: bool = True
    back: bool = True  # by itself, without a restart
    probed: bool = False  # it is mended after a probe that failed
    pause: float = 0.0  # seconds that it asked for, and that nobody calls it
    options: dict = {}


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
NOT_FOLLOWED = r"not followed: is \[threatstack\] base_url right"

THREAT_STACK = [
    Row("refused", refused, "unreachable", "cannot be reached: .*refused"),
    Row(
        "unresolvable", unresolvable, "unreachable", "nonexistent.invalid.* cannot be reached: .*not known", back=False
    ),
    Row("aborted", answering(aborted), "broken_off", "reset by peer"),
    Row("closed without a word", answering("reset"), "broken_off", "closed connection without response", probed=True),
    Row("silent", answering("hang"), "timeout", r"no whole answer within 1 s \(\[threatstack\] timeout\)"),
    Row("head, a byte now and then", raw(*bytewise(HEAD * 20), pause=0.2), "timeout", "no whole answer within 1 s"),
    Row(
        "body, a byte now and then", raw(HEAD + b"\r\n", then=b" ", pause=0.2), "timeout", "no whole answer within 1 s"
    ),
    Row("head without end", raw(HEAD, then=b"X: y\r\n", pause=0.05), "timeout", "no whole answer within 1 s"),
    Row("head of many lines", raw(HEAD + b"X: y\r\n" * 101), "broken_off", "more than 100 headers"),
    Row("head of one long line", raw(HEAD + b"X: " + b"y" * 70_000), "broken_off", "more than 65536 bytes"),
    Row(
        "100 for ever", raw(then=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.02), "timeout", "no whole answer within 1 s"
    ),
    Row(
        "body without end",
        raw(HEAD + b"\r\n", then=b" " * 1_000_000),
        "bad_answer",
        "an answer of over 33554432 bytes",
        options={"threatstack__timeout": "20"},
    ),
    Row(
        "chunks without end",
        raw(CHUNKED, then=b"100000\r\n" + b" " * 0x100000 + b"\r\n"),
        "bad_answer",
        "an answer of over 33554432 bytes",
        options={"threatstack__timeout": "20"},
    ),
    Row("body cut", raw(HEAD + b"Content-Length: 1000\r\n\r\n{}"), "broken_off", "broke off 998 bytes before its end"),
    Row("body cut, no length", raw(HEAD + b'\r\n{"id": "alert'), "bad_answer", "not JSON: line 1 column 8"),
    Row("chunk cut", raw(CHUNKED + b"9\r\n{}"), "broken_off", "broke off"),
    Row("chunk of no size", raw(CHUNKED + b"x\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row("chunk of size -2", raw(CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row(
        "chunk of size -1",
        raw(CHUNKED + b"-1\r\n", then=b" " * 1_000_000),
        "broken_off",
        "too much was sent",
        options={"threatstack__timeout": "20"},
    ),
    Row("HTTP/0.9", raw(b'{"id": "alert-000000"}\n'), "broken_off", r"broke off: \{"),
    Row("status line of garbage", raw(b"\x00\xff\x1b[31m\r\n\r\n"), "broken_off", r"broke off: \\x00"),
    Row("status of letters", raw(b"HTTP/1.1 OK\r\n\r\n"), "broken_off", "broke off: HTTP/1.1 OK"),
    Row("204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "204", "Threat Stack: 204"),
    Row("200, empty", status(200, b""), "bad_answer", "not JSON: line 1 column 1"),
    Row("200, a page", answering("garbage"), "bad_answer", "not JSON: line 1 column 1", probed=True),
    Row(
        "200, gzip", status(200, gzip.compress(b"{}"), Content_Encoding="gzip"), "bad_answer", "not JSON: byte 1 is not"
    ),
    Row("200, nested", status(200, b"[" * 100_000), "bad_answer", "nested too deeply"),
    Row("200, NaN", status(200, b'{"id": NaN}'), "bad_answer", "NaN is no JSON number"),
    Row("200, an error", status(200, b'{"errors": ["x"]}'), "bad_answer", "an error with status 200"),
    Row("200, another alert", status(200, threatstack.detail("x")), "bad_answer", "not this alert's detail"),
    Row("301", status(301, b"", Location="https://127.0.0.1:1/"), "301", f"{NOT_FOLLOWED}.*301"),
    Row("307", status(307, b"", Location="/api/v1/alerts/x"), "307", f"{NOT_FOLLOWED}.*307"),
    Row("400", status(400), "400", 'Threat Stack: 400 .*"because"'),
    Row("401", status(401), "unauthorized", r"is \[threatstack\] api_key right.*401"),
    Row("403", status(403), "forbidden", r"may \[threatstack\] api_key read alerts.*403"),
    Row("404", status(404), "not_found", r"\[threatstack\] base_url right.*404", held=False),
    Row("500", status(500), "500", "Threat Stack: 500", probed=True),
    Row("503, Retry-After", status(503, Retry_After=2), "503", "Threat Stack: 503", pause=2),
    Row("429", status(429), "rate_limited", "too many calls.*: 429", probed=True),
    Row("429, no JSON", status(429, b"slow down"), "rate_limited", "too many calls.*: 429 slow down"),
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
        "CA known later", tls(known=False, trusted_later=True), "unreachable", "unable to get local issuer certificate"
    ),
    Row(
        "certificate expired",
        tls(not_after=datetime.now(timezone.utc) - timedelta(days=1)),
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
    Row("302", status(302, b"", Location="http://127.0.0.1:1/"), "302", r"\[s3\] region and endpoint_url.*302"),
    Row("bucket missing", s3_error(404, "NoSuchBucket", BucketName=BUCKET), "NoSuchBucket", r"\[s3\] bucket"),
    Row("access denied", s3_error(403, "AccessDenied"), "AccessDenied", "s3:PutObject", probed=True),
    Row("region wrong, 301", s3_error(301, "PermanentRedirect", Endpoint="x"), "PermanentRedirect", r"\[s3\] region"),
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
    Row("409", s3_error(409, "ConditionalRequestConflict"), "ConditionalRequestConflict", "ConditionalRequestConflict"),
    Row(
        "409, IfNoneMatch",
        s3_error(409, "ConditionalRequestConflict"),
        "ConditionalRequestConflict",
        "ConditionalRequestConflict",
        held=False,
        options={"put_object__IfNoneMatch": "*"},
    ),
    Row("SlowDown", s3_error(503, "SlowDown"), "SlowDown", "SlowDown", probed=True),
    Row("429", status(429, b""), "429", "429"),
]

REAL_S3 = [
    Row("bucket missing", bucket_missing, "NoSuchBucket", r"\[s3\] bucket"),
    Row("no credentials", credentials(""), "NoCredentialsError", "where boto3 looks"),
    Row(
        "half of the credentials",
        credentials("[default]\naws_access_key_id = AKIDEXAMPLE\n"),
        "PartialCredentialsError",
        "where boto3 looks",
    ),
    Row(
        "key unknown",
        credentials("[default]\naws_access_key_id = AKIDOTHER\naws_secret_access_key = x\n"),
        "InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied",
        "where boto3 looks",
    ),
    Row(
        "secret wrong",
        credentials("[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = x\n"),
        "SignatureDoesNotMatch",
        "where boto3 looks",
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
        if row.held:
            until(lambda: daemon.logged(rf"WARNING {name} is held: [^\n]*{row.says}"), 30, "hold")
        else:
            for n in range(2):
                until(lambda n=n: daemon.logged(rf"alert alert-00000{n}: [^\n]*{row.says}[^\n]*; try 2 follows in"))
        # What comes meanwhile is taken, and told what stands in the way.
        code, answer = daemon.post({"alerts": [alert(0), alert(2)]})
        assert code == 200
        for state in answer["alerts"][: 1 + row.held]:
            assert state["state"] == "queued"
            assert re.fullmatch(f"{name}_({row.type})", state["error"]["type"]), state
            assert re.search(row.says, state["error"]["message"])
        if row.probed:
            calls = len(world.upstream.calls)
            until(lambda: len(world.upstream.calls) > calls, what="probe")
        assert daemon.health()["queued"] == 3
    archived = "INFO archived id=alert-00000"
    until(lambda: daemon.log().count(archived) == 3, 20, "archive")  # within 20 s of its mend
    until(lambda: daemon.health()["queued"] == 0)
    assert daemon.health()["failed"] == 0
    for n in range(3):
        id_ = alert(n)["id"]
        assert f"{archived}{n} " in daemon.log()
        assert objects()[f"alerts/al/er/{id_}"] == threatstack.detail(id_)
        assert objects()[f"webhooks/2017/01/17/13/{51 + n}/{id_}"] == json.dumps(alert(n)).encode()
    assert len(re.findall(f"{name} is held: ", daemon.log())) == row.held
    assert len(re.findall(rf"{name} is back after \d+ s", daemon.log())) == (row.held and row.back)
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
    assert error_of(new_daemon(server__wait="0", s3__endpoint_url=server.url))["type"] == f"s3_{code}"
    assert {path for _, path, _ in server.calls} == {f"/{BUCKET}/webhooks/2017/01/17/13/51/alert-000000"}
    assert elsewhere.connections == []
    server.stop()
    elsewhere.stop()


@pytest.mark.parametrize(
    "fault",
    [
        raw(HEAD + b"\r\n", then=b" " * 1_000_000),
        raw(CHUNKED + b"-1\r\n", then=b" " * 1_000_000),
        raw(CHUNKED, then=b"100000\r\n" + b" " * 0x100000 + b"\r\n"),
        raw(then=b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 60_000 + b"\r\n\r\n"),
    ],
    ids=["body", "chunk", "chunks", "heads"],
)
def test_the_memory_that_an_endless_answer_takes(new_daemon, s3, api, tmp_path, fault):
    daemon = new_daemon(threatstack__timeout="20", archive__workers="1", server__wait="1")
    until(lambda: daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived")
    before = peak_memory(daemon)
    with fault(World(daemon, api, tmp_path)):
        daemon.post({"alerts": [alert(1)]})
        until(lambda: daemon.logged("alert alert-000001: "), 40, "end of the call")
        assert peak_memory(daemon) - before < 5 * ts3d.ThreatStack.MAX_BODY


def peak_memory(daemon):
    with open(f"/proc/{daemon.process.pid}/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) << 10


@pytest.fixture
def unstarted(tmp_path, monkeypatch):
    """The parts of a daemon, in this process."""
    monkeypatch.setattr(ts3d, "SECRETS", [])
    config = tmp_path / "ts3d.conf"

    def make(text):
        config.write_text(text)
        return ts3d.load_config(str(config))

    return make


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_deadline_is_for_all_of_a_names_addresses(unstarted, monkeypatch, scheme):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(2):  # from then on it swallows packets
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        threat_stack = ts3d.ThreatStack(
            unstarted(f"[threatstack]\nbase_url = {scheme}://many.example:{port}\napi_key = x\ntimeout = 0.5\n")
        )
        real, asked = socket.getaddrinfo, []

        def resolve(host, *args, **more):
            if host == "many.example":
                asked.append(time.sleep(0.6))  # a slow resolver's time does not count
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", full.getsockname()) for _ in range(40)]
            return real(host, *args, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        begin = time.monotonic()
        with pytest.raises(ts3d.UpstreamError, match="cannot be reached: timed out"):
            threat_stack.get("/alerts/x")
        assert time.monotonic() - begin < 10
        assert len(asked) == 1


def test_a_close_that_fails_spoils_no_answer(unstarted, monkeypatch, api):
    class Socket(socket.socket):
        def close(self):
            super().close()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def connect(address, timeout):
        sock = Socket()
        sock.settimeout(timeout)
        sock.connect(address)
        return sock

    threat_stack = ts3d.ThreatStack(unstarted(f"[threatstack]\nbase_url = {api.url}\napi_key = {threatstack.KEY}\n"))
    monkeypatch.setattr(socket, "create_connection", connect)
    assert threat_stack.get("/alerts/abcd") == threatstack.detail("abcd")


def test_a_slow_resolver_takes_nothing_from_the_deadline(unstarted, monkeypatch, api):
    threat_stack = ts3d.ThreatStack(
        unstarted(
            f"[threatstack]\nbase_url = http://slow.example:{api.port}/\napi_key = {threatstack.KEY}\ntimeout = 3\n"
        )
    )

    def resolve(host, port, *args, **more):
        time.sleep(3.1 if host == "slow.example" else 0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert threat_stack.get("/alerts/abcd") == threatstack.detail("abcd")


HOUR = ts3d.LONGEST_RETRY_AFTER


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": " 7 "}, 7),
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
def test_how_long_an_upstream_wants_to_be_left_alone(monkeypatch, headers, seconds):
    monkeypatch.setattr(time, "time", lambda: 1484661005.0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        wanted = ts3d.retry_after(headers)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert ts3d.UpstreamError("x", "y", "z", retry_after=wanted).retry_after == seconds


def test_a_wrong_base_url_gives_no_alert_up(unstarted, api):
    """A 404 may mean that the alert is not there yet, or that nothing is."""
    config = unstarted(f"[threatstack]\nbase_url = {api.url}\napi_key = {threatstack.KEY}\n")
    queue = ts3d.Queue(config.path, 1 << 30, create=True)
    archiver = ts3d.Archiver(config, queue)
    queue.put([ts3d.Arrival("abcd", "2017/01/17/13/51", "alerts", b"{}")])
    for mode, failed in ((404, 0), (None, 1)):  # for all, for this alert
        api.mode, api.modes["abcd"] = mode, 404
        (job,) = queue.take(["alerts"], 1)
        with pytest.raises(ts3d.UpstreamError) as caught:
            archiver.threatstack.call(job, archiver.threatstack.get, "/alerts/abcd", "abcd")
        archiver._put_off(job, caught.value, ts3d.NOT_FOUND_FOR)
        queue.prove_writable()  # a transaction, with which it is written
        assert queue.counts()[:2] == (1 - failed, failed)
        queue._write(lambda db: db.execute("UPDATE jobs SET due = 0"))
    queue.close()
