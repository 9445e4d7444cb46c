"""The log: a line for each request, each archived alert and each end of an outage; priorities; each call at DEBUG."""

import contextlib
import json
import re
import socket
import sqlite3
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, TOKEN, Daemon, alert, free_port, listening, until
from test_http import CHUNKED, CLOSE, EMPTY, LENGTH, PATH, message, talk
from threatstack import HAWK

import ts3d

REQUEST = re.compile(
    r"(?P<level>[A-Z]+) (?P<method>\S+) (?P<path>\S+) (?P<status>[0-9]{3}|-) request=(?P<id>[0-9a-f]{16}) "
    r"client=(?P<client>\S+)(?P<note>.*) seconds=[0-9]+\.[0-9]{3}"
)


def requests(daemon, begin=0):
    """What the log says of requests, in its order."""
    return [match for line in daemon.log(begin).splitlines() if (match := REQUEST.fullmatch(line[24:]))]


def lines(daemon, pattern):
    return [line for line in daemon.log().splitlines() if re.search(pattern, line)]


def is_at_rest(daemon):
    return daemon.health()["queued"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------

EMPTY_NOTE = "bytes=14 alerts=0 rejected=0"
BOTH = b'{"alerts": [{"id": "abcd", "created_at": 0}, 1]}'
LARGE = json.dumps(alert(0, text="x" * 200_000)).encode()
ASKED = {  # what is sent, and what the line says: priority, method, path, status, what else
    "good": (message([LENGTH, CLOSE], EMPTY), f"INFO POST {PATH} 200", EMPTY_NOTE),
    "absolute": (message([LENGTH, CLOSE], EMPTY, path=f"http://x{PATH}"), f"INFO POST http://x{PATH} 200", EMPTY_NOTE),
    "token": (message([LENGTH, CLOSE], EMPTY, path=f"{PATH}?token={TOKEN}"), f"INFO POST {PATH} 200", EMPTY_NOTE),
    "partly": (
        message([b"Content-Length: %d" % len(BOTH), CLOSE], BOTH),
        f"INFO POST {PATH} 200",
        r"bytes=48 alerts=1 rejected=1 kept=[0-9a-f]{64} reason=alerts\[1\]: not an object",
    ),
    "malformed": (
        message([b"Content-Length: 1", CLOSE], b"{"),
        f"INFO POST {PATH} 400",
        "bytes=1 alerts=0 rejected=0 kept=[0-9a-f]{64} error=not JSON: line 1 .*",
    ),
    "invalid": (
        message([b"Content-Length: 15", CLOSE], b'{"alerts": [1]}'),
        f"INFO POST {PATH} 400",
        r"bytes=15 alerts=0 rejected=1 kept=[0-9a-f]{64} error=alerts\[0\]: not an object",
    ),
    "nonsense": (b"nonsense\r\n\r\n", "INFO - - 400", "error=the request line is not METHOD TARGET HTTP/1.1"),
    "two lengths": (message([LENGTH, LENGTH], EMPTY), f"INFO POST {PATH} 400", "error=Content-Length: not one number"),
    "no token": (message([LENGTH]).replace(TOKEN.encode(), b"x"), f"INFO POST {PATH} 401", "error=present the .*"),
    "elsewhere": (message([CLOSE], method="GET", path="/x"), "INFO GET /x 404", "error=there is nothing here.*"),
    "method": (message([CLOSE], method="PUT"), f"INFO PUT {PATH} 405", "error=only POST"),
    "late body": (message([LENGTH]), f"INFO POST {PATH} 408", "error=the request did not arrive in time.*"),
    "late head": (message()[:-2], f"INFO POST {PATH} 408", "error=the request did not arrive in time.*"),
    "late line": (b"POST ", "INFO - - 408", "error=the request did not arrive in time.*"),
    "too large": (message([b"Content-Length: 99999999"]), f"INFO POST {PATH} 413", "error=the body is over .*"),
    "large head": (message([b"X: x"] * 200), f"INFO POST {PATH} 431", "error=over 100 lines of headers"),
    "large line": (b"x" * 70_000, "INFO - - 431", "error=over 65536 bytes of headers"),
    "no room": (
        message([b"Content-Length: %d" % len(LARGE), CLOSE], LARGE),
        f"WARNING POST {PATH} 503",
        "bytes=2000.. alerts=1 rejected=0 error=the queue is full.*",
    ),
    "head": (message([CLOSE], method="HEAD", path="/healthz"), "INFO HEAD /healthz 200", ""),
    "escape": (message([CLOSE], method="GET", path="/%1b[2J?a=b"), r"INFO GET /%1b\[2J 404", "error=.*"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A daemon that only receives, with little room and little patience."""
    options = {"queue__max_size": "100K", "server__request_timeout": "1", "archive__workers": "0"}
    daemon = Daemon(tmp_path_factory.mktemp("small"), **options).start()
    yield daemon
    daemon.stop()
    assert TOKEN not in daemon.log()


@pytest.mark.parametrize("name", ASKED)
def test_a_line_for_each_request(small, name):
    """With the id that the answer has."""
    data, head, note = ASKED[name]
    begin = len(small.log())
    answer = talk(small, data)
    [id_] = re.findall(rb"\r\nX-Request-Id: ([0-9a-f]{16})\r\n", answer)
    until(lambda: small.logged(f"request={id_.decode()}.*\n", begin))
    [line] = requests(small, begin)
    assert line["id"] == id_.decode()
    assert re.fullmatch(head, f"{line['level']} {line['method']} {line['path']} {line['status']}"), line[0]
    assert line["client"] == "127.0.0.1"
    assert re.fullmatch(note, line["note"].strip()), line[0]
    assert b" %s " % line["status"].encode() in answer[:20]


def test_ids_differ_also_on_one_connection(daemon):
    data = message([LENGTH], EMPTY) * 2 + message([CHUNKED], b"0\r\n\r\n") + message([CLOSE], method="GET", path="/")
    answer = talk(daemon, data)
    ids = re.findall(r"X-Request-Id: (\S+)", answer.decode())
    assert len(set(ids)) == 4
    until(lambda: len(requests(daemon)) == 4)
    assert [line["id"] for line in requests(daemon)] == ids
    assert [line["status"] for line in requests(daemon)] == ["200", "200", "400", "404"]


@pytest.mark.parametrize("data", [b"POST ", message(), message([LENGTH]), message([LENGTH], EMPTY[:5])])
def test_a_client_that_goes_away(daemon, data):
    """There is no answer, but a line that says so."""
    with socket.create_connection(daemon.address) as sock:
        sock.sendall(data[:-2] if data == message() else data)
    [line] = until(lambda: requests(daemon))
    assert line["status"] == "-"
    assert line["path"] == (PATH if data.startswith(b"POST /") else "-")
    assert line["note"].startswith(" error=closed in the middle of a ")


def test_a_connection_that_says_nothing_has_no_line(daemon):
    socket.create_connection(daemon.address).close()
    assert daemon.post({"alerts": []})[0] == 200
    [line] = until(lambda: requests(daemon))
    assert line["path"] == PATH


def test_an_answer_in_which_a_bug_shows_names_its_line(caplog):
    """What is said of the bug, and of the request, has the answer's id."""

    class Broken(ts3d.Handler):
        def route(self):
            raise ZeroDivisionError("by zero")

    ours, theirs = socket.socketpair()
    with ours, theirs, caplog.at_level("INFO", "ts3d"):
        theirs.sendall(message([CLOSE], method="GET", path="/healthz"))
        config = SimpleNamespace(tls=None, request_timeout=5)
        Broken(ts3d.Connection(ours, 5), "", SimpleNamespace(config=config, stopping=False))
        answer = theirs.recv(65536).decode()
    [id_] = re.findall("X-Request-Id: (.*)\r\n", answer)
    assert id_ in json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]
    assert [(record.levelname, id_ in record.getMessage()) for record in caplog.records] == [
        ("ERROR", True),
        ("WARNING", True),
    ]
    assert re.search(r"ZeroDivisionError: by zero \(ts3d.py:\d+", caplog.text)


def test_connections_that_are_turned_away(new_daemon, api, s3):
    api.mode = "hang"
    daemon = new_daemon(server__max_connections="1", server__wait="30")
    body = json.dumps({"alerts": [alert(0)]}).encode()
    with socket.create_connection(daemon.address) as sock:
        sock.sendall(message([b"Content-Length: %d" % len(body)], body))
        until(lambda: s3.objects("webhooks/"))
        with contextlib.suppress(OSError), socket.create_connection(daemon.address, 20) as other:
            assert other.recv(100) == b""
        until(lambda: daemon.logged(r"WARNING connection refused client=127.0.0.1: all of \[server\] max_con"))


# ---------------------------------------------------------------------------------------------------------------------
# Alerts
# ---------------------------------------------------------------------------------------------------------------------


def archived(daemon):
    """Of each line about an archived alert: id, tries and keys."""
    pattern = r"INFO archived id=(\S+) tries=([0-9]+) seconds=[0-9]+\.[0-9]{3} keys=(\S+)$"
    found = re.findall(pattern, daemon.log(), re.MULTILINE)
    return sorted((id_, int(tries), keys.split(",")) for id_, tries, keys in found)


@pytest.mark.parametrize(("version", "prefix"), [(1, ""), (2, "some/prefix")])
def test_a_line_for_each_archived_alert(new_daemon, api, s3, version, prefix):
    more = {"threatstack__base_url": f"{api.url}/v2", **HAWK} if version == 2 else {}
    daemon = new_daemon(s3__prefix=prefix, **more)
    daemon.post({"alerts": [alert(n) for n in range(3)]})
    events = ["events/al/er/{}"] if version == 2 else []
    below = f"{prefix}/" if prefix else ""
    expected = []
    for n, minute in enumerate(("51", "52", "53")):
        id_ = f"alert-{n:06}"
        keys = [f"webhooks/2017/01/17/13/{minute}/{{}}", *events, "alerts/al/er/{}"]
        expected.append((id_, 1, [below + key.format(id_) for key in keys]))
    until(lambda: len(archived(daemon)) == 3)
    assert archived(daemon) == expected
    assert {key for _, _, keys in expected for key in keys} == s3.objects().keys()


@pytest.mark.parametrize("step", ["webhooks", "backfill"])
def test_the_line_names_also_what_another_process_has_written(new_daemon, api, s3, step):
    """And in a queue of before there was a note of that."""
    daemon = new_daemon(start=False, server__wait="0")
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        db.executescript(f"PRAGMA journal_mode = WAL;{ts3d.Queue.SCHEMA}")
    with contextlib.closing(ts3d.Queue(str(daemon.queue), 1 << 20)) as queue_:
        queue_.put([ts3d.Arrival("abcd", "2026/11/24/18/00", step, b"{}")])
    api.modes["abcd"] = 500
    daemon.start()
    until(lambda: lines(daemon, "try 2 follows"))
    daemon.stop()
    assert archived(daemon) == []
    api.modes.clear()
    daemon.start()
    [(_, _, keys)] = until(lambda: archived(daemon))
    assert keys == [f"{step}/2026/11/24/18/00/abcd", "alerts/ab/cd/abcd"]
    assert sorted(keys) == sorted(s3.objects())


def test_the_line_is_whole_where_threat_stack_is_busy(new_daemon, api):
    """Workers that find no seat at Threat Stack give their alerts back after the first object."""

    def slow(handler):
        handler.server.released.wait(0.05)
        handler.succeed(handler.path.rpartition("/")[2])

    api.mode = slow
    daemon = new_daemon(server__wait="0", archive__workers="4")
    for n in range(10):
        daemon.post({"alerts": [alert(n * 10 + i) for i in range(10)]})
    until(lambda: is_at_rest(daemon), 40)
    assert len(archived(daemon)) == 100
    assert [line for line in archived(daemon) if len(line[2]) != 2] == []


def test_what_is_kept_of_a_refused_webhook(daemon, s3):
    daemon.post(b"{")
    [(id_, tries, keys)] = until(lambda: archived(daemon))
    assert (tries, keys) == (1, list(s3.objects()))
    assert keys[0].startswith("rejected/") and keys[0].endswith(id_)
    assert daemon.logged(f"POST {PATH} 400 .* kept={id_} ")


def test_the_tries_of_an_alert_that_fails(new_daemon, api):
    """One line for each, with the cause and when the next follows."""
    daemon = new_daemon(server__wait="0")
    api.modes["alert-000000"] = 500
    daemon.post({"alerts": [alert(0)]})
    tried = r"WARNING alert alert-000000: Threat Stack: 500 .*; try ([0-9]+) follows in [0-9]+\.[0-9] s$"
    until(lambda: lines(daemon, tried))
    api.modes.clear()
    [(_, tries, keys)] = until(lambda: archived(daemon))
    numbers = [int(re.search(tried, line)[1]) for line in lines(daemon, tried)]
    assert numbers == list(range(2, tries + 1))
    assert keys == ["webhooks/2017/01/17/13/51/alert-000000", "alerts/al/er/alert-000000"]


def test_an_alert_that_is_given_up(new_daemon, api):
    daemon = new_daemon(server__wait="0", archive__give_up_after="0.1")
    api.modes["alert-000000"] = 404
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.health()["failed"])
    [line] = lines(daemon, "failed for good")
    assert re.search(r"ERROR alert alert-000000 failed for good after \d+ tries: Threat Stack \(not there yet", line)
    assert archived(daemon) == []


# ---------------------------------------------------------------------------------------------------------------------
# Outages
# ---------------------------------------------------------------------------------------------------------------------


def test_an_outage_of_s3(new_daemon, s3):
    daemon = new_daemon(server__wait="0", archive__workers="8")
    s3.stop()
    for n in range(10):
        daemon.post({"alerts": [alert(n * 10 + i) for i in range(10)]})
    until(lambda: daemon.logged("s3 is held"))
    s3.start()
    until(lambda: is_at_rest(daemon), 40)
    [begin, end] = lines(daemon, "s3 is")
    assert re.search("WARNING s3 is held: S3 .*Could not connect", begin)
    assert re.search("WARNING s3 is back after [0-9]+ s$", end)
    assert not daemon.logged("threatstack is")


@pytest.mark.parametrize("mode", [503, 401])
def test_an_outage_of_threat_stack(new_daemon, api, mode):
    daemon = new_daemon(server__wait="0", archive__workers="8")
    api.mode = mode
    for n in range(10):
        daemon.post({"alerts": [alert(n * 10 + i) for i in range(10)]})
    until(lambda: daemon.logged("threatstack is held"))
    api.mode = None
    until(lambda: is_at_rest(daemon), 40)
    [begin, end] = lines(daemon, "threatstack is")
    assert re.search(f"WARNING threatstack is held: Threat Stack.*: {mode} ", begin)
    assert re.search("WARNING threatstack is back after [0-9]+ s$", end)
    assert not daemon.logged("s3 is")


def test_a_queue_that_is_full(new_daemon, s3):
    daemon = new_daemon(server__wait="0", queue__max_size="300K")
    s3.stop()
    statuses = [daemon.post({"alerts": [alert(n, text="x" * 30_000)]})[0] for n in range(20)]
    assert statuses.count(503) > 3
    s3.start()
    until(lambda: daemon.logged("the queue takes webhooks again"), 40)
    pattern = "webhooks are answered|takes webhooks again"
    [begin, end] = lines(daemon, pattern)
    assert "ERROR the queue is full: [queue] max_size is 307200 bytes; webhooks are answered 503" in begin
    assert end.endswith("WARNING the queue takes webhooks again")


def test_a_disk_that_fails(new_daemon, tracer):
    daemon = new_daemon(server__wait="0", archive__workers="0")
    with tracer(daemon, "inject=fdatasync:error=EIO"):
        assert {daemon.post({"alerts": [alert(n)]})[0] for n in range(5)} == {503}
    until(lambda: daemon.request("GET", "/healthz")[0] == 200)
    [begin, end] = lines(daemon, "the queue (fails|works)")
    assert re.search("ERROR the queue fails: disk I/O error; webhooks are answered 503$", begin)
    assert end.endswith("WARNING the queue works again")


# ---------------------------------------------------------------------------------------------------------------------
# Priorities
# ---------------------------------------------------------------------------------------------------------------------


def in_journal(daemon):
    """Have its log file taken for the journal."""
    daemon.log_file.touch()
    stat = daemon.log_file.stat()
    daemon.environment["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
    return daemon


def test_priorities_for_the_journal(new_daemon, api):
    daemon = in_journal(new_daemon(start=False, server__wait="0", log__level="DEBUG", archive__give_up_after="0.1"))
    daemon.queue.write_bytes(b"no database" * 1000)
    api.modes["alert-000000"] = 404
    daemon.start()
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.health()["failed"])
    api.mode = 401
    daemon.post({"alerts": [alert(1)]})
    until(lambda: daemon.logged("held"))
    log = daemon.log().splitlines()
    assert [line for line in log if not re.match("<[2-7]>[a-zA-Z]", line)] == []
    for start in (
        *("<2>the queue was malformed", "<3>alert alert-000000 failed for good", "<4>threatstack is held"),
        *("<6>ts3d ", f"<6>POST {PATH} 200", "<7>GET http://", "<7>put_object "),
    ):
        assert [line for line in log if line.startswith(start)], start


def test_another_programs_journal_is_none_of_ours(new_daemon):
    """What a unit started may write elsewhere: $JOURNAL_STREAM is inherited."""
    daemon = new_daemon(start=False)
    daemon.environment["JOURNAL_STREAM"] = "1:2"
    daemon.start().post({"alerts": []})
    daemon.stop()
    form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S.*"
    assert [line for line in daemon.log().splitlines() if not re.fullmatch(form, line)] == []


def test_what_is_said_before_the_end(new_daemon):
    """A configuration that botocore's model refuses is known only while it runs."""
    daemon = in_journal(new_daemon(start=False, put_object__Nonsense="x"))
    with daemon.log_file.open("ab") as log:
        assert daemon.popen(log).wait(20) == 78
    assert re.search("^<3>ts3d: .*Nonsense: unknown to this boto3", daemon.log(), re.MULTILINE)


@pytest.mark.parametrize(("level", "said"), [("WARNING", {"WARNING"}), ("ERROR", set())])
def test_the_level(new_daemon, api, level, said):
    daemon = new_daemon(start=False, log__level=level, server__wait="0")
    daemon.address = ("127.0.0.1", free_port())
    daemon.set(server__listen="{}:{}".format(*daemon.address))
    with daemon.log_file.open("ab") as log:
        daemon.process = daemon.popen(log)
    until(lambda: listening(daemon.address[1]))  # which the log does not say
    api.mode = 401
    daemon.post({"alerts": [alert(0)]})
    until(lambda: "unauthorized" in daemon.run("status", "--json").stdout)
    assert {line.split()[2] for line in daemon.log().splitlines()} == said


# ---------------------------------------------------------------------------------------------------------------------
# Each call, at DEBUG
# ---------------------------------------------------------------------------------------------------------------------

SESSION = "aws-session-token-that-nobody-may-see"
SECRETS = [TOKEN, "metrics-secret", threatstack.KEY, AWS["AWS_SECRET_ACCESS_KEY"], SESSION, 'mac="', "Hawk id"]
CALLS = r"(GET|put_object|head_object|list_objects_v2|get_caller_identity) .* seconds=[0-9]+\.[0-9]{3}$"


@pytest.fixture
def talkative(new_daemon, api):
    """Makes daemons whose S3 is the stand-in too, with credentials that pass."""

    def make(version, **options):
        if version == 2:
            options = {"threatstack__base_url": f"{api.url}/v2", **HAWK, **options}
        options = {"log__level": "DEBUG", "server__metrics_token": "metrics-secret", "server__wait": "0", **options}
        daemon = new_daemon(start=False, s3__endpoint_url=api.url, **options)
        daemon.environment["AWS_SESSION_TOKEN"] = SESSION
        return daemon

    return make


def calls(text):
    """Each call that is shown: what it is and its outcome, in its order, with nothing of the place."""
    found = [match for line in text.splitlines() if (match := re.search(CALLS, line))]
    return [re.sub(r"http://[^/]+| seconds=.*", "", match[0]) for match in found]


def assert_silent(text, version):
    secrets = [*SECRETS, threatstack.USER] if version == 2 else SECRETS
    assert [secret for secret in secrets if secret in text] == []


@pytest.mark.parametrize("version", [1, 2])
def test_each_call_of_the_daemon(talkative, api, version):
    daemon = talkative(version).start()
    daemon.post({"alerts": [alert(0)]})
    until(lambda: archived(daemon))
    api_path = f"/{'api/v1' if version == 1 else 'v2'}/alerts/alert-000000"
    detail, events = threatstack.detail("alert-000000"), threatstack.events("alert-000000")
    shown = [f"put_object {BUCKET}/webhooks/2017/01/17/13/51/alert-000000 200 request=None"]
    if version == 2:
        shown.append(f"GET {api_path}/events 200 bytes={len(events)}")
        shown.append(f"put_object {BUCKET}/events/al/er/alert-000000 200 request=None")
    shown.append(f"GET {api_path} 200 bytes={len(detail)}")
    shown.append(f"put_object {BUCKET}/alerts/al/er/alert-000000 200 request=None")
    assert calls(daemon.log()) == shown
    assert_silent(daemon.log(), version)
    levels = {line.split()[2] for line in daemon.log().splitlines() if re.search(CALLS, line)}
    assert levels == {"DEBUG"}


def echo(handler):
    """An upstream that quotes what it was sent, but for the header that is signed anew for each call."""
    said = "".join(f"{name}: {value}\n" for name, value in handler.headers.items() if "Hawk" not in value)
    handler.send(500, said.encode())


@pytest.mark.parametrize("version", [1, 2])
def test_calls_that_fail(talkative, api, version):
    api.mode = echo
    daemon = talkative(version).start()
    daemon.post({"alerts": [alert(0), alert(1), alert(2)]})
    until(lambda: daemon.logged("s3 is held"))
    failed = until(lambda: calls(daemon.log()))
    assert re.fullmatch(rf"put_object {BUCKET}/webhooks/\S+ s3_500", failed[0])
    api.mode = lambda handler: handler.succeed("x") if handler.command == "PUT" else echo(handler)
    until(lambda: daemon.logged("threatstack is held"), 40)
    assert [call for call in calls(daemon.log()) if re.fullmatch(r"GET \S+/alerts/\S+ threatstack_500", call)]
    assert_silent(daemon.log(), version)


WHO = b"""<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>
<Arn>arn:aws:iam::123456789012:user/ts3d</Arn></GetCallerIdentityResult></GetCallerIdentityResponse>"""


@pytest.mark.parametrize("version", [1, 2])
def test_each_call_of_check(talkative, monkeypatch, version):
    monkeypatch.setattr(threatstack.Handler, "do_POST", lambda handler: handler.send(200, WHO), raising=False)
    result = talkative(version).run("check")
    who, put, *api = calls(result.stderr)
    assert who == "get_caller_identity arn:aws:iam::123456789012:user/ts3d"
    assert put == f"put_object {BUCKET}/ts3d-check 200 request=None"
    assert [re.sub(r"&from.* 200", " 200", call) for call in api] == {
        1: ["GET /api/v1/alerts?count=1 200 bytes=4"],
        2: ["GET /help/hawk/self-test 200 bytes=11", "GET /v2/alerts?status=active 200 bytes=30"],
    }[version]
    assert_silent(result.stdout + result.stderr, version)


@pytest.mark.parametrize("version", [1, 2])
def test_each_call_of_backfill(talkative, api, version):
    """The lists, and the looks at what is there."""
    milliseconds = int(datetime(2026, 11, 1, tzinfo=timezone.utc).timestamp() * 1000)
    api.lists["active"] = [threatstack.entry("alert-000000", milliseconds, version)]
    daemon = talkative(version)
    daemon.start()
    result = daemon.run("backfill", "--from", "2026-10-31", "--until", "2026-11-02")
    assert result.stdout == "backfill: 1 listed, 0 there already, 1 queued\n", result
    shown = calls(result.stderr)
    lists = [call for call in shown if call.startswith("GET")]
    assert len(lists) == 2  # a page and an empty one, or active and dismissed
    for call in lists:
        assert re.fullmatch(r"GET /\S+/alerts\?\S*2026-10-31T00%3A00%3A00.000Z\S* 200 bytes=[0-9]+", call), call
    assert f"head_object {BUCKET}/alerts/al/er/alert-000000 s3_404" in shown
    assert [call for call in shown if call.startswith(f"list_objects_v2 {BUCKET}/ ")]
    until(lambda: archived(daemon))
    assert archived(daemon)[0][2][0] == "backfill/2026/11/01/00/00/alert-000000"
    assert_silent(result.stdout + result.stderr + daemon.log(), version)


def test_at_info_no_call_is_shown(talkative, api):
    daemon = talkative(1, log__level="INFO").start()
    api.modes["alert-000000"] = lambda handler: (
        handler.succeed("x") if handler.command == "PUT" else handler.send(500, b"")
    )
    daemon.post({"alerts": [alert(0)]})
    until(lambda: lines(daemon, "try 2 follows"))
    api.modes.clear()
    until(lambda: archived(daemon))
    for text in (daemon.log(), daemon.run("check").stderr, daemon.run("backfill").stderr):
        assert calls(text) == []
        assert "DEBUG" not in text


def test_a_handshake_that_fails_is_shown(new_daemon, tmp_path):
    pem = tmp_path / "server.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    daemon = new_daemon(log__level="DEBUG", server__tls_certificate=pem, server__tls_key=pem)
    talk(daemon, b"GET / HTTP/1.1\r\n\r\n")
    until(lambda: daemon.logged(r"DEBUG connection closed client=\('127.0.0.1', \d+\): .*HTTP_REQUEST"))
