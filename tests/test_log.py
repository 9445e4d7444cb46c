"""The log: a line for each request, each archived alert and each end of an outage; priorities; each call at DEBUG."""

import contextlib
import json
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import threatstack
from conftest import AWS, TOKEN, Daemon, alert, free_port, listening, until
from test_http import CHUNKED, CLOSE, EMPTY, LENGTH, PATH, message, talk
from threatstack import HAWK

import ts3d

PAIR = r' (\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]*)'
REQUEST = re.compile(rf"(?P<level>[A-Z]+) (?P<method>\S+) (?P<path>\S+) (?P<status>[0-9]{{3}}|-)(?P<pairs>({PAIR})+)")


def pairs(text):
    """What stands behind a line's message, as logfmt has it, by name; the line has nothing else there."""
    assert re.fullmatch(f"({PAIR})*", text), text
    found = re.findall(PAIR, text)
    assert len({name for name, _ in found}) == len(found)
    return {name: re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] == '"' else value for name, value in found}


def requests(daemon, begin=0):
    """What the log says of requests, in its order: level, method, path, status, and each pair."""
    found = [match for line in daemon.log(begin).splitlines() if (match := REQUEST.fullmatch(line[24:]))]
    each = [{**match.groupdict(), **pairs(match["pairs"])} for match in found]
    for line in each:
        assert re.fullmatch("[0-9a-f]{16}", line["request"])
        assert re.fullmatch(r"[0-9]+\.[0-9]{3}", line["seconds"])
    return each


def lines(daemon, pattern):
    return [line for line in daemon.log().splitlines() if re.search(pattern, line)]


def is_at_rest(daemon):
    return daemon.health()["queued"] == 0


NOTHING = {"bytes": "14", "alerts": "0", "rejected": "0"}
BOTH = b'{"alerts": [{"id": "abcd", "created_at": 0}, 1]}'
LARGE = json.dumps(alert(0, text="x" * 200_000)).encode()
WRONG = TOKEN[::-1].encode()
METRICS = "the-token-of-the-metrics"
QUOTED = b'{"alerts": [{"id": "abcd", "created_at": "\\"a=b\\" \\\\"}]}'
ASKED = {  # what is sent, and what the line says: priority, method, path, status, what else
    "good": (message([LENGTH, CLOSE], EMPTY), f"INFO POST {PATH} 200", NOTHING),
    "token alone": (
        message([LENGTH, CLOSE], EMPTY, path=f"HTTPS://x{PATH}?token={TOKEN}&a=b").replace(b"Authorization", b"X"),
        f"INFO POST HTTPS://x{PATH} 200",
        NOTHING,
    ),
    "slash": (message([LENGTH, CLOSE], EMPTY, path=f"{PATH}/"), f"INFO POST {PATH}/ 200", NOTHING),
    "absolute": (message([LENGTH, CLOSE], EMPTY, path=f"http://x{PATH}"), f"INFO POST http://x{PATH} 200", NOTHING),
    "token": (message([LENGTH, CLOSE], EMPTY, path=f"{PATH}?token={TOKEN}"), f"INFO POST {PATH} 200", NOTHING),
    "partly": (
        message([b"Content-Length: %d" % len(BOTH), CLOSE], BOTH),
        f"INFO POST {PATH} 200",
        {"bytes": "48", "alerts": "1", "rejected": "1", "error": r"alerts\[1\].*"},
    ),
    "malformed": (
        message([b"Content-Length: 1", CLOSE], b"{"),
        f"INFO POST {PATH} 400",
        {"bytes": "1", "alerts": "0", "rejected": "0", "error": "not JSON: .*line 1 .*"},
    ),
    "invalid": (
        message([b"Content-Length: 15", CLOSE], b'{"alerts": [1]}'),
        f"INFO POST {PATH} 400",
        {"bytes": "15", "alerts": "0", "rejected": "1", "error": r"alerts\[0\].*"},
    ),
    "quoted": (
        message([b"Content-Length: %d" % len(QUOTED), CLOSE], QUOTED),
        f"INFO POST {PATH} 400",
        {"error": r".*created_at.*a=b.*"},
    ),
    "encoded": (
        message([LENGTH, b"Content-Encoding: gzip", CLOSE], EMPTY),
        f"[A-Z]+ POST {PATH} 415",
        {"bytes": "14", "error": ".*Content-Encoding.*"},
    ),
    "nonsense": (b"nonsense\r\n\r\n", "INFO - - 400", {"error": ".+"}),
    "bad chunk": (message([CHUNKED], b"x\r\n"), f"INFO POST {PATH} 400", {"error": ".+"}),
    "two lengths": (message([LENGTH, LENGTH], EMPTY), f"INFO POST {PATH} 400", {"error": ".*Content-Length.*"}),
    "no token": (message([LENGTH]).replace(TOKEN.encode(), b"x"), f"INFO POST {PATH} 401", {"error": ".*token.*"}),
    "wrong token": (
        message([LENGTH], EMPTY, path=f"https://x{PATH}?token=x").replace(TOKEN.encode(), WRONG),
        f"INFO POST https://x{PATH} 401",
        {"error": ".*token.*"},
    ),
    "elsewhere": (message([CLOSE], method="GET", path="/x"), "INFO GET /x 404", {"error": ".+"}),
    "HEAD elsewhere": (message([CLOSE], method="HEAD", path="/" + PATH), f"INFO HEAD /{PATH} 404", {"error": ".+"}),
    "in the query": (message([LENGTH, CLOSE], EMPTY, path=f"/?a={PATH}"), "WARNING POST / 404", {"error": ".+"}),
    "chunks elsewhere": (message([CHUNKED, CLOSE], b"0\r\n\r\n", path="https://x/"), "WARNING POST https://x/ 404", {}),
    **{
        f"POST {path}": (message([LENGTH, CLOSE], EMPTY, path=f"{path}?token={TOKEN}"), f"WARNING POST {path} 404", {})
        for path in (f"/{PATH}", "/", "/api/v1/s3/alerts", f"{PATH}/x", f"{PATH}%20")
    },
    "POST by a stranger": (
        message([LENGTH, CLOSE], EMPTY, path="/x").replace(TOKEN.encode(), b"x"),
        "WARNING POST /x 404",
        {"error": ".+"},
    ),
    **{
        method: (message([CLOSE], method=method), f"INFO {method} {PATH} 405", {"error": ".*POST.*"})
        for method in ("PUT", "GET", "HEAD")
    },
    "late body": (message([LENGTH]), f"INFO POST {PATH} 408", {"error": ".+"}),
    "late head": (message()[:-2], f"INFO POST {PATH} 408", {"error": ".+"}),
    "late line": (b"POST ", "INFO - - 408", {"error": ".+"}),
    "too large": (message([b"Content-Length: 99999999"]), f"INFO POST {PATH} 413", {"error": ".*max_body.*"}),
    "large head": (message([b"X: x"] * 200), f"INFO POST {PATH} 431", {"error": ".*100.*"}),
    "large line": (b"x" * 70_000, "INFO - - 431", {"error": ".*65536.*"}),
    "no room": (
        message([b"Content-Length: %d" % len(LARGE), CLOSE], LARGE),
        f"WARNING POST {PATH} 503",
        {"bytes": "2000..", "alerts": "1", "rejected": "0", "error": ".*full.*"},
    ),
    "head": (message([CLOSE], method="HEAD", path="/healthz"), "DEBUG HEAD /healthz 200", {}),
    "POST to health": (message([LENGTH, CLOSE], EMPTY, path="/healthz"), "INFO POST /healthz 405", {"error": ".+"}),
    "health": (message([CLOSE], method="GET", path="/healthz"), "DEBUG GET /healthz 200", {}),
    "metrics": (message([CLOSE], method="GET", path=f"/metrics?token={METRICS}"), "DEBUG GET /metrics 200", {}),
    "refused metrics": (message([CLOSE], method="GET", path="/metrics"), "INFO GET /metrics 401", {"error": ".+"}),
    "no metrics": (message([CLOSE], method="PUT", path="/metrics"), "INFO PUT /metrics 405", {}),
    "escape": (message([CLOSE], method="GET", path="/%1b[2J?a=b"), r"INFO GET /%1b\[2J 404", {}),
}

# They are no webhooks: what a wrong URL in Threat Stack loses is one.
NOT_COUNTED = (
    "nonsense|elsewhere|HEAD elsewhere|late line|large line|"
    "head|POST to health|health|metrics|refused metrics|no metrics|escape"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A daemon that only receives, with little room and little patience."""
    options = {"queue__max_size": "100K", "server__request_timeout": "1", "archive__workers": "0"}
    options |= {"log__level": "DEBUG", "server__metrics_token": METRICS}
    daemon = Daemon(tmp_path_factory.mktemp("small"), **options).start()
    yield daemon
    daemon.stop()
    assert [token for token in (TOKEN, METRICS) if token in daemon.log()] == []


@pytest.fixture
def counted(small):
    """By how much the counter of webhooks of each status has grown since the test began."""

    def look():
        answer = talk(small, message([CLOSE], method="GET", path=f"/metrics?token={METRICS}")).decode()
        [id_] = re.findall("X-Request-Id: (.*)\r\n", answer)
        until(lambda: small.logged(f"request={id_}.*\n"))
        return {status: int(n) for status, n in re.findall(r'webhooks_total\{status="(\d+)"\} (\d+)', answer)}

    before = look()
    return lambda: {status: n - before[status] for status, n in look().items() if n != before[status]}


@pytest.mark.parametrize("name", ASKED)
def test_a_line_for_each_request(small, counted, name):
    """With the id that the answer has; and webhooks are counted by their status."""
    data, head, more = ASKED[name]
    begin = len(small.log())
    answer = talk(small, data)
    [id_] = re.findall(rb"\r\nX-Request-Id: ([0-9a-f]{16})\r\n", answer)
    until(lambda: small.logged(f"request={id_.decode()}.*\n", begin))
    [line] = requests(small, begin)
    assert line["request"] == id_.decode()
    assert re.fullmatch(head, "{level} {method} {path} {status}".format_map(line)), line
    assert line["client"] == "127.0.0.1"
    assert "forwarded_for" not in line
    for key, value in more.items():
        assert re.fullmatch(value, line[key]), line
    assert b" %s " % line["status"].encode() in answer[:20]
    assert counted() == ({} if name in NOT_COUNTED.split("|") else {line["status"]: 1}), line


FORWARDED = {  # what a proxy sends, and what the line has; the last is the proxy's own word
    (b"X-Forwarded-For: 203.0.113.9",): "203.0.113.9",
    (b"x-forwarded-for:203.0.113.9 ",): "203.0.113.9",
    (b"X-Forwarded-For: 198.51.100.1, 203.0.113.9",): "203.0.113.9",
    (b"X-Forwarded-For: 198.51.100.1", b"X-Forwarded-For: 203.0.113.9"): "203.0.113.9",
    (b"X-Forwarded-For: 198.51.100.1,203.0.113.9 ,2001:db8::1",): "2001:db8::1",
    (b"X-Forwarded-For: unknown",): "unknown",
    (b'X-Forwarded-For: a b="c',): 'a b="c',
    (b"X-Forwarded-For: %s" % TOKEN.encode(),): r"\*\*\*",
    (b"X-Forwarded-For: \xff\x9b2J",): r"[^\x00-\x1f\x7f-\x9f]+",
}


@pytest.mark.parametrize("fields", FORWARDED, ids=lambda fields: str(fields)[:60])
def test_the_sender_that_a_proxy_names(small, fields):
    begin = len(small.log())
    talk(small, message([LENGTH, CLOSE, *fields], EMPTY))
    [line] = until(lambda: requests(small, begin))
    assert line["client"] == "127.0.0.1"
    assert re.fullmatch(FORWARDED[fields], line["forwarded_for"]), line


def test_only_a_proxy_on_this_machine_is_believed(new_daemon, elsewhere):
    daemon = new_daemon(server__listen="0.0.0.0:0", archive__workers="0")
    daemon.address = (elsewhere, daemon.address[1])
    talk(daemon, message([LENGTH, CLOSE, b"X-Forwarded-For: 203.0.113.9"], EMPTY))
    [line] = until(lambda: requests(daemon))
    assert (line["client"], line.get("forwarded_for")) == (elsewhere, None)


def test_sighup_is_ignored(new_daemon, s3, api):
    """With one line that says so; a request that is being answered is answered."""
    api.mode = "hang"
    daemon = new_daemon(server__wait="30")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(daemon.post, {"alerts": [alert(0)]})
        until(lambda: s3.objects("webhooks/"))
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: len(lines(daemon, "SIGHUP.*(reload|restart)")) == 1, what="line")
        assert not answer.done()
        api.mode = None
        api.released.set()
        assert answer.result()[0] == 200
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(lines(daemon, "SIGHUP")) == 2)
    assert daemon.post({"alerts": []})[0] == 200
    assert daemon.stop() == 0


def test_ids_differ_also_on_one_connection(small, counted):
    data = message([LENGTH], EMPTY) * 2 + message([CHUNKED], b"0\r\n\r\n") + message([CLOSE], method="GET", path="/")
    begin = len(small.log())
    ids = re.findall(r"X-Request-Id: (\S+)", talk(small, data).decode())
    assert len(set(ids)) == 4
    until(lambda: len(requests(small, begin)) == 4)
    assert [line["request"] for line in requests(small, begin)] == ids
    assert [line["status"] for line in requests(small, begin)] == ["200", "200", "400", "404"]
    assert counted() == {"200": 2, "400": 1}


@pytest.mark.parametrize("data", [b"POST ", message()[:-2], message([LENGTH]), message([LENGTH], EMPTY[:5])])
def test_a_client_that_goes_away(small, data):
    """There is no answer, but a line that says so."""
    begin = len(small.log())
    with socket.create_connection(small.address) as sock:
        sock.sendall(data)
    [line] = until(lambda: requests(small, begin))
    assert line["status"] == "-"
    assert line["path"] == (PATH if data.startswith(b"POST /") else "-")
    assert line["error"].startswith("closed in the middle of a ")


def test_a_connection_that_says_nothing_has_no_line(small):
    begin = len(small.log())
    socket.create_connection(small.address).close()
    assert small.post({"alerts": []})[0] == 200
    [line] = until(lambda: requests(small, begin))
    assert line["path"] == PATH


def test_an_answer_in_which_a_bug_shows_names_its_line(caplog):
    """What is said of the bug, and of the request, has the answer's id."""

    class Broken(ts3d.Handler):
        def read_head(self):
            raise ZeroDivisionError("by zero")

    ours, theirs = socket.socketpair()
    with ours, theirs, caplog.at_level("INFO", "ts3d"):
        theirs.sendall(message([CLOSE], method="GET", path="/healthz"))
        theirs.shutdown(socket.SHUT_WR)
        config = SimpleNamespace(tls=None, request_timeout=5, keepalive_timeout=5)
        Broken(ours, "local", ts3d.Server(config, SimpleNamespace(queue=None)))
        answer = theirs.recv(65536).decode()
    [id_] = re.findall("X-Request-Id: (.*)\r\n", answer)
    assert id_ in json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]
    assert [(record.levelname, id_ in record.getMessage()) for record in caplog.records] == [
        ("ERROR", True),
        ("WARNING", True),
    ]
    assert re.search(r"ZeroDivisionError.*by zero.*\d+", caplog.text)


def archived(daemon):
    """Of each line about an archived alert: id, tries and keys."""
    pattern = r"(?:INFO |<6>)archived id=(\S+) tries=([0-9]+) seconds=[0-9]+\.[0-9]{3} keys=(\S+)$"
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
    # At INFO no call is shown, of the commands neither.
    assert "DEBUG" not in daemon.log() + daemon.run("check").stderr + daemon.run("backfill").stderr


@pytest.mark.parametrize("step", ["webhooks", "backfill"])
def test_the_line_names_also_what_another_process_has_written(new_daemon, api, s3, step):
    daemon = new_daemon(server__wait="0")
    id_ = f"{step}-of-its-own"  # rclone remembers for minutes what was in the bucket
    api.modes[id_] = 500
    if step == "webhooks":
        daemon.post({"alerts": [alert(0, id=id_)]})
    else:
        api.lists["active"] = [threatstack.entry(id_, alert(0)["created_at"], version=1)]
        assert daemon.run("backfill", "--from", "2017-01-17").returncode == 0
    until(lambda: s3.objects(step) and lines(daemon, "alert failed, will be retried"))
    daemon.stop()
    assert archived(daemon) == []
    api.modes.clear()
    daemon.start()
    [(_, _, keys)] = until(lambda: archived(daemon))
    assert keys == [f"{step}/2017/01/17/13/51/{id_}", f"alerts/{id_[:2]}/{id_[2:4]}/{id_}"]
    assert sorted(keys) == sorted(s3.objects())


def test_the_line_is_whole_where_threat_stack_is_slow(new_daemon, api):
    """Of each alert the webhook is stored by one worker, and the detail by another."""

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


def outcomes(daemon, head):
    """The pairs of each line that begins so."""
    return [pairs(line[24:].removeprefix(head)) for line in daemon.log().splitlines() if line[24:].startswith(head)]


RETRIED = "WARNING alert failed, will be retried"


def test_the_tries_of_an_alert_that_fails(new_daemon, api):
    """One line for each, with the cause and when the next follows."""
    daemon = new_daemon(server__wait="0")
    api.modes["alert-000000"] = 500
    daemon.post({"alerts": [alert(0)]})
    [line] = until(lambda: outcomes(daemon, RETRIED))
    assert re.fullmatch("Threat Stack.* 500 .*", line["error"])
    assert (line["id"], line["tries"]) == ("alert-000000", "1")
    assert 0 <= float(line["retry_seconds"]) <= 8
    api.modes.clear()
    [(_, tries, keys)] = until(lambda: archived(daemon))
    assert [line["tries"] for line in outcomes(daemon, RETRIED)] == [str(n) for n in range(1, tries)]
    assert "DEBUG" not in daemon.log()
    assert keys == ["webhooks/2017/01/17/13/51/alert-000000", "alerts/al/er/alert-000000"]


def in_journal(daemon):
    """Have its log file taken for the journal."""
    daemon.log_file.touch()
    stat = daemon.log_file.stat()
    daemon.environment["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
    return daemon


def test_priorities_for_the_journal(new_daemon, api):
    daemon = in_journal(new_daemon(start=False, server__wait="0", log__level="DEBUG", archive__give_up_after="0.1"))
    api.modes["alert-000000"] = 404
    daemon.start()
    daemon.post({"alerts": [alert(0), alert(2)]})
    until(lambda: daemon.health()["failed"] and archived(daemon))
    daemon.request("POST", f"/{PATH}")
    api.mode = 401
    daemon.post({"alerts": [alert(1)]})
    until(lambda: daemon.logged("unavailable"))
    log = daemon.log().splitlines()
    assert [line for line in log if not re.match("<[2-7]>[a-zA-Z]", line)] == []
    for start in (
        *("<3>alert marked failed id=alert-000000 ", "<4>threatstack unavailable: ", f"<4>POST /{PATH} 404 "),
        *("<6>ts3d ", f"<6>POST {PATH} 200 ", "<6>archived id=alert-000002 "),
        *("<7>GET /healthz 200 ", "<7>s3 ", "<7>threatstack "),
    ):
        assert [line for line in log if line.startswith(start)], start


def test_another_programs_journal_is_none_of_ours(new_daemon):
    """What a unit started may write elsewhere: $JOURNAL_STREAM is inherited."""
    daemon = new_daemon(start=False, archive__workers="0")
    daemon.environment["JOURNAL_STREAM"] = "1:2"
    daemon.start().post({"alerts": []})
    daemon.stop()
    form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S.*"
    assert [line for line in daemon.log().splitlines() if not re.fullmatch(form, line)] == []


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


SESSION = "aws-session-token-that-no-log-may-have"
SECRETS = [TOKEN, METRICS, threatstack.KEY, AWS["AWS_SECRET_ACCESS_KEY"], SESSION, 'mac="', "Hawk id"]
CALL = r" DEBUG (s3|threatstack) (?!still unavailable)"


@pytest.fixture
def talkative(new_daemon, api):
    """Makes daemons whose S3 is the stand-in too, with credentials that pass."""

    def make(version, **options):
        if version == 2:
            options = {"threatstack__base_url": f"{api.url}/v2", **HAWK, **options}
        options = {"log__level": "DEBUG", "server__metrics_token": METRICS, "server__wait": "0", **options}
        daemon = new_daemon(start=False, s3__endpoint_url=api.url, **options)
        daemon.environment["AWS_SESSION_TOKEN"] = SESSION
        return daemon

    return make


def assert_silent(text, version):
    secrets = [*SECRETS, threatstack.USER] if version == 2 else SECRETS
    assert [secret for secret in secrets if secret in text] == []


@pytest.mark.parametrize("version", [1, 2])
def test_each_call_and_no_secret_is_shown(talkative, api, version):
    """By the daemon, and by the commands."""
    daemon = talkative(version).start()
    daemon.post({"alerts": [alert(0)]})
    [(_, _, keys)] = until(lambda: archived(daemon))
    shown = lines(daemon, CALL)
    assert len(shown) == {1: 3, 2: 5}[version]
    for part in (*keys, "/alerts/alert-000000"):
        assert [line for line in shown if part in line], part
    milliseconds = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp() * 1000)
    api.lists["active"] = [threatstack.entry("alert-000001", milliseconds, version)]
    for arguments in (["check"], ["backfill", "--from", "2026-10-31", "--until", "2026-11-02"]):
        result = daemon.run(*arguments)
        assert result.returncode == 0, result
        assert_silent(result.stdout + result.stderr, version)
    until(lambda: len(archived(daemon)) == 2)
    assert archived(daemon)[1][2][0] == "backfill/2026/11/01/00/00/alert-000001"
    assert_silent(daemon.log(), version)


def echo(handler):
    """An upstream that quotes what it was sent, but for the header that is signed anew for each call, and secrets."""
    said = "".join(f"{name}: {value}\n" for name, value in handler.headers.items() if "Hawk" not in value)
    said += f"{threatstack.USER} {threatstack.KEY}"
    handler.send(500, said.encode())


@pytest.mark.parametrize("version", [1, 2])
def test_calls_that_fail(talkative, api, version):
    api.mode = echo
    daemon = talkative(version).start()
    daemon.post({"alerts": [alert(0), alert(1), alert(2)]})
    until(lambda: daemon.logged("s3 unavailable"))
    api.mode = lambda handler: handler.succeed("x") if handler.command == "PUT" else echo(handler)
    until(lambda: daemon.logged("threatstack unavailable"), 40)
    assert_silent(daemon.log() + str(daemon.post({"alerts": [alert(0)]})), version)


def test_a_handshake_that_fails_is_shown(new_daemon, certificate):
    daemon = new_daemon(archive__workers="0", log__level="DEBUG", **certificate.options)
    with contextlib.suppress(ConnectionError):
        talk(daemon, b"GET / HTTP/1.1\r\n\r\n")
    until(lambda: daemon.logged(r"DEBUG .*127\.0\.0\.1.*HTTP_REQUEST"))
