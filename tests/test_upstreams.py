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
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, CREDENTIALS, Daemon, Rclone, alert, error_of, free_port, peak_memory, until

import ts3d


class World(NamedTuple):
    """The daemon, which is not started yet, and the upstream of whose failure a row speaks."""

    daemon: Daemon
    upstream: threatstack.Faulty | Rclone
    folder: Path


def answering(mode):
    """It answers as `mode` has it: a status, a name, or a function of threatstack.Handler."""

    def fault(world):
        world.upstream.mode = mode
        yield
        world.upstream.mode = None

    return fault


def status(code, body=b'{"status": "error", "message": "because"}', **headers):
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return answering(lambda handler: handler.send(code, body, fields))


def raw(*pieces, pause=0.0, then=None):
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


def refused(world):
    world.upstream.stop()
    yield
    world.upstream.__init__(world.upstream.port)


def unresolvable(world):
    """This is repaired in the configuration, so with a restart."""
    [(option, right)] = [each for each in world.daemon.options.items() if world.upstream.url in str(each[1])]
    world.daemon.set(**{"__".join(option): f"http://nonexistent.invalid:{world.upstream.port}/api/v1"})
    yield
    world.daemon.restart(**{"__".join(option): right})


def until_restart(fault):
    def faulty(world):
        yield from fault(world)
        world.daemon.restart()

    return faulty


def tls(names=("127.0.0.1",), known=True, plain=False, **more):
    """It speaks TLS with a certificate for these names, of a CA that is known or not."""

    def fault(world):
        ours, others = trustme.CA(), trustme.CA()
        bundle = world.folder / "ca.pem"
        ours.cert_pem.write_to_path(bundle)
        world.daemon.environment["SSL_CERT_FILE"] = str(bundle)
        world.daemon.set(threatstack__base_url=f"https://127.0.0.1:{world.upstream.port}/api/v1")
        if not plain:
            world.upstream.speak_tls((ours if known else others).issue_cert(*names, **more))
        yield
        world.upstream.speak_tls(ours.issue_cert("127.0.0.1"))

    return fault


def spoken_plain(world):
    """It speaks TLS, and base_url says http:."""
    world.upstream.speak_tls(trustme.CA().issue_cert("127.0.0.1"))
    yield
    world.upstream.tls = None


def s3_error(*arguments, **members):
    return answering(threatstack.s3_error(*arguments, **members))


def credentials(text):
    """Credentials in the file that boto3 reads, wrong at first."""

    def fault(world):
        file = world.folder / "credentials"
        world.daemon.without_keys()
        world.daemon.environment["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
        if text:
            file.write_text(text)
        yield
        file.write_text(f"[default]\n{CREDENTIALS}")

    return fault


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


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
YESTERDAY = datetime.now(UTC) - timedelta(days=1)
CONFLICT = "ConditionalRequestConflict"
NO_ANSWER = words("1 s", r"\[threatstack\] timeout")

THREAT_STACK = [
    Row("refused", refused, "unreachable", "cannot be reached: .*refused"),
    Row("unresolvable", unresolvable, "unreachable", r"nonexistent\.invalid.* be reached: .*not known", back=False),
    Row("aborted", answering(aborted), "broken_off", "reset by peer"),
    Row("closed without a word", answering("reset"), "broken_off", "closed connection without response", probed=True),
    Row("silent", answering("hang"), "timeout", NO_ANSWER),
    Row("body, a byte now and then", raw(HEAD + b"\r\n", then=b" ", pause=0.2), "timeout", NO_ANSWER),
    Row("head of many lines", raw(HEAD + b"X: y\r\n" * 101), "broken_off", "more than 100 headers"),
    Row("head of one long line", raw(HEAD + b"X: " + b"y" * 70_000), "broken_off", "more than 65536 bytes"),
    Row("body cut", raw(HEAD + b"Content-Length: 1000\r\n\r\n{}"), "broken_off", "998 bytes"),
    Row("body cut, no length", raw(HEAD + b'\r\n{"id": "alert'), "bad_answer", "not JSON"),
    Row("chunk cut", raw(CHUNKED + b"9\r\n{}"), "broken_off", "broke off"),
    Row("chunk of no size", raw(CHUNKED + b"x\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row("chunk of size -2", raw(CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n"), "broken_off", "broke off"),
    Row("HTTP/0.9", raw(b'{"id": "alert-000000"}\n'), "broken_off", r"broke off: .*\{"),
    Row("status line of garbage", raw(b"\x00\xff\x1b[31m\r\n\r\n"), "broken_off", r"broke off: .*\\x00"),
    Row("status of letters", raw(b"HTTP/1.1 OK\r\n\r\n"), "broken_off", "broke off: .*HTTP/1.1 OK"),
    Row("204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "204", "Threat Stack: 204", unavailable=False),
    Row("200, empty", status(200, b""), "bad_answer", "not JSON: .*line 1 column 1"),
    Row("200, a page", answering("garbage"), "bad_answer", "not JSON: .*line 1 column 1", probed=True),
    Row("200, nested", status(200, b"[" * 100_000), "bad_answer", "nested too deeply"),
    Row("200, NaN", status(200, b'{"id": NaN}'), "bad_answer", "NaN"),
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
    Row("429, an hour", until_restart(status(429, Retry_After=10**8)), "rate_limited", "429", back=False),
    Row("wrong host", tls(["elsewhere.example"]), "unreachable", "certificate is not valid for '127.0.0.1'"),
    Row("unknown CA", tls(known=False), "unreachable", "unable to get local issuer certificate"),
    Row("certificate expired", tls(not_after=YESTERDAY), "unreachable", "certificate has expired"),
    Row("no TLS", tls(plain=True), "unreachable", "SSL: "),
    Row("TLS", spoken_plain, "broken_off", "broke off"),
]

S3 = [
    Row("refused", refused, "EndpointConnectionError", r"Could not connect[^<>]*refused"),
    Row("unresolvable", unresolvable, "EndpointConnectionError", "nonexistent.invalid", back=False),
    Row("aborted", answering(aborted), "ConnectionClosedError|HTTPClientError|EndpointConnectionError", ""),
    Row("closed without a word", answering("reset"), "ConnectionClosedError", "Connection was closed"),
    Row("silent", answering("hang"), "ReadTimeoutError", "Read timeout"),
    Row("status line of garbage", raw(b"garbage\r\n\r\n"), "ConnectionClosedError|HTTPClientError", ""),
    Row("200, a page", answering("garbage"), "bad_answer", "a 200 without an ETag is not S3's answer"),
    Row("502, a page", status(502, b"<html>Bad Gateway"), "502", "502"),
    Row("302", status(302, b"", Location="http://127.0.0.1:1/"), "302|PermanentRedirect", "region|endpoint_url"),
    Row("access denied", s3_error(403, "AccessDenied"), "AccessDenied", "s3:PutObject", probed=True),
    Row("region wrong, 301", s3_error(301, "PermanentRedirect", Endpoint="x"), "PermanentRedirect", "region"),
    Row("token expired", s3_error(400, "ExpiredToken"), "ExpiredToken", "credentials", probed=True),
    Row("412", s3_error(412, "PreconditionFailed"), "PreconditionFailed", "PreconditionFailed", probed=True),
    Row("409", s3_error(409, CONFLICT), CONFLICT, CONFLICT, unavailable=False),
    Row("SlowDown", s3_error(503, "SlowDown"), "SlowDown", "SlowDown", probed=True),
    Row("429", status(429, b""), "429", "429"),
]

HALF, KEYS = "[default]\naws_access_key_id = AKIDEXAMPLE\n", "[Cc]redentials|access key"
WRONG_SECRET = HALF + "aws_secret_access_key = x\n"
WRONG_KEY = WRONG_SECRET.replace("AKIDEXAMPLE", "AKIDOTHER")
REAL_S3 = [
    Row("bucket missing", bucket_missing, "NoSuchBucket", words(r"\[s3\] bucket", BUCKET)),
    Row("no credentials", credentials(""), "NoCredentialsError", KEYS),
    Row("half of the credentials", credentials(HALF), "PartialCredentialsError", KEYS),
    Row("key unknown", credentials(WRONG_KEY), "InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied", KEYS),
    Row("secret wrong", credentials(WRONG_SECRET), "SignatureDoesNotMatch", KEYS),
]


def walk(row, world, name, objects):
    daemon = world.daemon
    with contextlib.contextmanager(row.fault)(world):
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
    daemon = new_daemon(start=False, **QUICK)
    walk(row, World(daemon, api, tmp_path), "threatstack", s3.objects)


@named(S3)
def test_s3(new_daemon, bucket, tmp_path, row):
    def objects():
        return {path.removeprefix(f"/{BUCKET}/"): body for path, body in bucket.objects.items()}

    daemon = new_daemon(start=False, s3__endpoint_url=bucket.url, **QUICK)
    walk(row, World(daemon, bucket, tmp_path), "s3", objects)


@named(REAL_S3)
def test_real_s3(new_daemon, s3, tmp_path, row):
    walk(row, World(new_daemon(start=False, **QUICK), s3, tmp_path), "s3", s3.objects)


@pytest.fixture
def trap():
    """A server to which nothing may connect."""
    server = threatstack.Faulty()
    yield server
    assert server.connections == []
    server.stop()


def repaired(daemon, server):
    """Its upstream works again, and has been found to."""
    server.mode = None
    until(lambda: daemon.health()["queued"] == 0)


def test_a_redirect_takes_the_key_nowhere(new_daemon, api, trap):
    daemon = new_daemon(server__wait="0")
    for number, code in enumerate([300, 301, 302, 303, 307, 308]):
        path = f"/api/v1/alerts/{alert(number)['id']}"
        to = [("Location", trap.url + path), ("Refresh", f"0; url={trap.url}")]
        api.mode = lambda handler, code=code, to=to: handler.send(code, b"", to)
        assert error_of(daemon, number)["type"] == f"threatstack_{code}"
        repaired(daemon, api)
        assert set(api.paths()) == {path}
        api.calls.clear()


def test_s3s_redirect_takes_nothing_elsewhere(new_daemon, bucket, trap):
    daemon = new_daemon(server__wait="0", s3__endpoint_url=bucket.url)
    for number, code in enumerate([301, 302, 307, 308]):
        to = [("Location", f"{trap.url}/{BUCKET}/x")]
        bucket.mode = lambda handler, code=code, to=to: handler.send(code, b"", to)
        assert error_of(daemon, number)["type"] in (f"s3_{code}", "s3_PermanentRedirect")
        paths = set(bucket.paths()) - {f"/{BUCKET}"}  # whose region botocore asks for
        assert paths == {f"/{BUCKET}/webhooks/2017/01/17/13/{51 + number}/{alert(number)['id']}"}
        repaired(daemon, bucket)
        bucket.calls.clear()


@pytest.mark.parametrize(
    ("fault", "type_", "says"),
    [
        (raw(HEAD + b"\r\n", then=b" " * 1_000_000), "bad_answer", "8M|8388608"),
        (raw(CHUNKED, then=b"100000\r\n" + b" " * 0x100000 + b"\r\n"), "bad_answer", "8M|8388608"),
        (raw(CHUNKED + b"-1\r\n", then=b" " * 1_000_000), "broken_off|bad_answer", ""),
    ],
    ids=["body", "chunks", "chunk"],
)
def test_an_answer_without_end(new_daemon, s3, api, tmp_path, fault, type_, says):
    """It takes little memory, and is an outage as any other."""
    daemon = new_daemon(threatstack__timeout="20", archive__workers="1", server__wait="1")
    daemon.archive()
    before = peak_memory(daemon)
    with contextlib.contextmanager(fault)(World(daemon, api, tmp_path)):
        assert daemon.post({"alerts": [alert(1)]})[0] == 200
        until(lambda: daemon.logged(f"WARNING threatstack unavailable: [^\n]*(?:{says})"), 40, "end of the call")
        assert re.fullmatch(f"threatstack_({type_})", error_of(daemon, 1)["type"])
        assert peak_memory(daemon) - before < 64 << 20
    until(lambda: len(s3.objects("alerts/")) == 2)
    until(lambda: daemon.logged(r"threatstack recovered after \d+ s"))
    until(lambda: daemon.health()["queued"] == 0)
    assert daemon.health()["failed"] == 0
    assert len(re.findall("threatstack unavailable: ", daemon.log())) == 1


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


PASSWORD = "the-password-of-the-proxy"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_both_upstreams_are_reached_through_the_proxy(new_daemon, api, bucket, certificate, new_proxy, scheme):
    """Of the daemon, `check` and `backfill`. It alone resolves the names, and wants a password, which is not shown."""
    proxy = new_proxy(f"--basic-auth=ts3d:{PASSWORD}")
    variable = f"{scheme}_proxy"
    daemon = new_daemon(start=False, log__level="DEBUG")
    trusted = daemon.folder / "authority.pem"
    certificate.authority.cert_pem.write_to_path(trusted)
    daemon.environment |= dict.fromkeys(("SSL_CERT_FILE", "AWS_CA_BUNDLE"), str(trusted))
    daemon.environment[variable] = f"http://ts3d:{PASSWORD}@127.0.0.1:{proxy.port}"
    servers = {"api.threatstack.test": api, "s3.test": bucket}
    daemon.set(threatstack__base_url=f"{scheme}://api.threatstack.test:{api.port}/api/v1")
    daemon.set(s3__endpoint_url=f"{scheme}://s3.test:{bucket.port}")
    for name, server in servers.items():
        if scheme == "https":
            server.speak_tls(certificate.authority.issue_cert(name))
    checked = daemon.run("check")
    assert (checked.returncode, "FAIL" in checked.stdout) == (0, False), checked
    for name in ("s3", "threatstack"):
        assert re.search(rf"(?m)^ok +{name} .*through proxy http://127\.0\.0\.1:{proxy.port}\b", checked.stdout)
    daemon.environment[variable.upper()] = daemon.environment.pop(variable)
    daemon.start()
    daemon.archive()
    assert bucket.objects[f"/{BUCKET}/alerts/al/er/alert-000000"] == threatstack.detail("alert-000000")
    api.lists["active"] = [threatstack.entry("alert-000001", int(time.time() * 1000) - 60_000, version=1)]
    result = daemon.run("backfill")
    assert result.returncode == 0, result.stderr
    until(lambda: f"/{BUCKET}/alerts/al/er/alert-000001" in bucket.objects)
    assert daemon.stop() == 0
    for name, server in servers.items():
        line = f"{'CONNECT ' if scheme == 'https' else ''}{name}:{server.port}"
        until(lambda line=line: line in proxy.log(), what=line)
    assert ("/api/v1" in proxy.log()) == (scheme == "http"), "by CONNECT it sees neither key nor path"
    assert PASSWORD not in daemon.log() + checked.stdout + checked.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"NO_PROXY": "127.0.0.1"},
        {"no_proxy": "localhost,127.0.0.1"},
        {"NO_PROXY": "*"},
        {"HTTP_PROXY": "", "HTTPS_PROXY": "http://127.0.0.1:9"},
    ],
)
def test_what_no_proxy_names_is_reached_directly(new_daemon, variables):
    """There is no proxy at port 9."""
    daemon = new_daemon(start=False)
    daemon.environment |= {"HTTP_PROXY": "http://127.0.0.1:9", **variables}
    checked = daemon.run("check")
    assert (checked.returncode, "through proxy" in checked.stdout) == (0, False), checked
    daemon.start()
    daemon.archive()


@pytest.mark.parametrize(
    ("up", "says"), [(True, "(s3 unavailable: |will be retried id=).*407"), (False, "s3 unavailable: .*127.0.0.1:PORT")]
)
def test_a_proxy_that_is_down_or_refuses_the_password(new_daemon, s3, api, new_proxy, up, says):
    """Nothing goes round it, and the password is not in the log."""
    daemon = new_daemon(start=False, server__wait="0", log__level="DEBUG")
    port = new_proxy("--basic-auth=ts3d:proxy-password").port if up else free_port()
    daemon.environment["HTTP_PROXY"] = f"http://ts3d:wrong-password@127.0.0.1:{port}"
    daemon.start().post({"alerts": [alert(0)]})
    until(lambda: daemon.logged(says.replace("PORT", str(port))))
    assert daemon.stop() == 0
    assert (api.calls, s3.objects()) == ([], {})
    assert "wrong-password" not in daemon.log()


CREDENTIAL_PROCESS = """#!{python}
import json, pathlib
pathlib.Path({status!r}).write_text(pathlib.Path("/proc/self/status").read_text())
print(json.dumps({{"Version": 1, "AccessKeyId": {AWS_ACCESS_KEY_ID!r}, "SecretAccessKey": {AWS_SECRET_ACCESS_KEY!r}}}))
"""  # not a shell's: dash clears what it inherits


def test_credential_process_is_a_child_like_any_other(new_daemon, s3, api):
    """It is found in the environment's AWS_CONFIG_FILE; no signal is blocked in it."""
    daemon = new_daemon(start=False)
    program, config, status_file = (daemon.folder / name for name in ("credentials.py", "aws-config", "status"))
    program.write_text(CREDENTIAL_PROCESS.format(python=sys.executable, status=str(status_file), **AWS))
    program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")
    daemon.without_keys()
    daemon.environment["AWS_CONFIG_FILE"] = str(config)
    daemon.start()
    daemon.archive()
    api.lists["active"] = [threatstack.entry("alert-000001", int(time.time() * 1000) - 60_000, version=1)]
    ours = Path("/proc/self/status").read_text()
    for command in ("serve", "check", "backfill"):
        if command != "serve":
            result = daemon.run(command)
            assert result.returncode == 0, result.stdout + result.stderr
        of_child, of_us = (dict(re.findall(r"(\w+):\s+(\S+)", text)) for text in (status_file.read_text(), ours))
        status_file.unlink()
        assert int(of_child["SigBlk"], 16) == 0
        ignored = int(of_child["SigIgn"], 16)
        assert not [s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM) if ignored >> s - 1 & 1], command
        if command != "serve":  # which keeps to one processor with its children
            assert of_child["Cpus_allowed_list"] == of_us["Cpus_allowed_list"]


@pytest.mark.parametrize("place", ["environment", "secrets", "both"])
def test_where_aws_credentials_are_looked_for(new_daemon, bucket, place):
    """AWS_CONFIG_FILE of a drop-in counts, also beside secrets/aws_credentials."""
    daemon = new_daemon(start=False, s3__endpoint_url=bucket.url)
    daemon.without_keys()
    del daemon.environment["AWS_DEFAULT_REGION"]
    if place != "secrets":
        config = daemon.folder / "aws-config"
        config.write_text(f"[default]\nregion = eu-north-1\n{CREDENTIALS if place == 'environment' else ''}")
        daemon.environment["AWS_CONFIG_FILE"] = str(config)
    (daemon.folder / "secrets").mkdir()
    if place != "environment":
        region = "region = us-east-1\n" if place == "secrets" else ""
        (daemon.folder / "secrets" / "aws_credentials").write_text(f"[default]\n{region}{CREDENTIALS}")
    daemon.start()
    daemon.archive()
    region = "us-east-1" if place == "secrets" else "eu-north-1"
    assert f"/{region}/s3/" in bucket.calls[0][2]["Authorization"]


HOUR = 3600


RETRY_AFTER = {  # seconds, and what asks for them
    0: [
        *("9" * 40, "-7", "1e3", "nan", "", "2001-01-17T13:51:05Z", "Tue, 17 Jan 2017 13:49:05 GMT"),
        *("Fri, 31 Dec 99999 23:59:59 GMT", "Tue, 99 Jan 2017 99:99:99 GMT"),
    ],
    7: ["7"],
    60: [
        *("Tue, 17 Jan 2017 13:51:05 GMT", "Tuesday, 17-Jan-17 13:51:05 GMT", "Tue Jan 17 13:51:05 2017"),
        *("Tue, 17 Jan 2017 13:51:05 -0000", "Tue, 17 Jan 2017 15:51:05 +0200"),
    ],
    HOUR: ["999999999", "Fri, 31 Dec 9999 23:59:59 GMT"],
}
RESET = {0: ["1484661065000", "-1", "soon", "NaN"], 1.5: ["1500"], HOUR: ["999999999999"]}


def test_how_long_an_upstream_asks_to_be_left_alone(monkeypatch):
    asked = [(seconds, {"Retry-After": text}) for seconds, texts in RETRY_AFTER.items() for text in texts]
    asked += [(seconds, {"x-rate-limit-reset": text}) for seconds, texts in RESET.items() for text in texts]
    asked += [
        (0, {}),
        (7, {"Retry-After": "7", "x-rate-limit-reset": "1500"}),
        (4, {"Retry-After": "0", "x-rate-limit-reset": "4000"}),
        (4.5, {"Retry-After": "soon", "x-rate-limit-reset": "4500.0"}),
        (1.5, {"Retry-After": "1.5", "x-rate-limit-reset": ""}),
    ]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ts3d, "time", lambda: 1484661005.0)
            patch.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            for seconds, headers in asked:
                message = http.client.HTTPMessage()
                for name, value in headers.items():
                    message[name] = value
                error = ts3d.UpstreamError("threatstack", "rate_limited", "because", 429, message)
                assert error.retry_after == seconds, headers
    finally:
        time.tzset()


def test_hostile_answers_are_parsed_one_at_a_time(new_daemon, s3, api):
    """Each of 8M, of a kind that takes twenty-five times as much when it is parsed; they come at the same moment."""
    daemon, together = new_daemon(server__wait="0"), threading.Barrier(8)
    alerts = [alert(n) for n in range(8)]

    def answer(handler):
        start = b'{"id": "%s", "x": [' % handler.path.rpartition("/")[2].encode()
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(5)
        handler.send(200, start + b"[]," * (((8 << 20) - len(start) - 4) // 3) + b"[]]}")

    api.modes = {each["id"]: answer for each in alerts}
    daemon.post({"alerts": alerts})
    until(lambda: len(s3.objects("alerts/")) == 8, 150, "details")
    assert peak_memory(daemon) < 600 << 20  # 500M, and from 680M on without the lock
