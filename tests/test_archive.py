"""The main job: a webhook comes in, its alerts are in S3, byte for byte."""

import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import threatstack
from conftest import TUTORIAL_ID, alert, until
from test_http import message

TUTORIAL = (
    b'{"alerts": [ {"id":"587c0159a907346eccb84004", "title": "caf\\u00e9 caf\xc3\xa9",\n "created_at": 1484661065000,'
    b' "severity":1.50, "big": 123456789012345678901234567890 } ]}'
)
TUTORIAL_ALERT = TUTORIAL[len(b'{"alerts": [ ') : -len(b" ]}")]


def test_the_tutorials_own_case(daemon, s3, api):
    status, answer = daemon.post(TUTORIAL)
    assert (status, answer) == (200, {"success": True, "alerts": [{"id": TUTORIAL_ID, "state": "archived"}]})
    assert s3.objects() == {
        "webhooks/2017/01/17/13/51/587c0159a907346eccb84004": TUTORIAL_ALERT,
        "alerts/58/7c/587c0159a907346eccb84004": threatstack.detail(TUTORIAL_ID),
    }
    assert api.paths() == [f"/api/v1/alerts/{TUTORIAL_ID}"]
    assert api.calls[0][2]["Authorization"] == threatstack.KEY


def test_a_bare_alert_with_a_string_of_milliseconds(daemon, s3):
    body = b'{"id": "587c0159a907346eccb84004", "created_at": "1459447024000", "severity": "1"}'
    assert daemon.post(body + b"\n")[1]["alerts"] == [{"id": TUTORIAL_ID, "state": "archived"}]
    assert s3.objects("webhooks/") == {f"webhooks/2016/03/31/17/57/{TUTORIAL_ID}": body}


def test_a_batch_of_25(daemon, s3, api):
    alerts = [alert(n) for n in range(25)]
    status, answer = daemon.post({"alerts": alerts})
    assert status == 200
    assert answer["alerts"] == [{"id": a["id"], "state": "archived"} for a in alerts]
    assert len(s3.objects("webhooks/")) == len(s3.objects("alerts/")) == len(api.calls) == 25
    for a in alerts:
        assert s3.objects()[f"alerts/{a['id'][:2]}/{a['id'][2:4]}/{a['id']}"] == threatstack.detail(a["id"])


def test_the_same_alert_twice_is_one_job(daemon, s3, api):
    body = {"alerts": [alert(1), alert(1), alert(1, severity=2)]}
    assert [a["state"] for a in daemon.post(body)[1]["alerts"]] == ["archived"] * 3
    assert len(api.calls) == 2
    daemon.post({"alerts": [alert(1)]})
    assert len(api.calls) == 3
    assert len(s3.objects()) == 2


def test_workers_0_only_receives_and_needs_no_upstream(new_daemon):
    daemon = new_daemon(archive__workers="0", s3__bucket=None, threatstack__api_key=None, server__wait="30")
    assert daemon.post(TUTORIAL)[1]["alerts"] == [{"id": TUTORIAL_ID, "state": "queued"}]
    assert daemon.health()["queued"] == 1


def test_what_a_put_looks_like(new_daemon, bucket):
    """One plain PUT: no Expect, which costs a round trip; no trailer, which S3-compatible servers refuse."""
    new_daemon(s3__endpoint_url=bucket.url).post(TUTORIAL)
    calls = {path: {name.lower(): value for name, value in headers.items()} for _, path, headers in bucket.calls}
    headers = calls[f"/evidence/webhooks/2017/01/17/13/51/{TUTORIAL_ID}"]
    digest = base64.b64encode(hashlib.sha256(TUTORIAL_ALERT).digest()).decode()
    assert headers["x-amz-checksum-sha256"] == digest
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(TUTORIAL_ALERT)
    for name in ("expect", "transfer-encoding", "content-encoding", "x-amz-trailer"):
        assert name not in headers


def test_put_object_parameters(new_daemon, s3):
    options = {"put_object__StorageClass": "STANDARD", "put_object__Metadata": '{"a": "b"}'}
    daemon = new_daemon(**options, put_object__BucketKeyEnabled="no")
    assert daemon.post(TUTORIAL)[1]["alerts"][0]["state"] == "archived"


def test_a_webhook_with_something_rejected_is_200_and_kept_whole(daemon, s3):
    body = json.dumps({"alerts": [alert(1), {"id": "a/../../../x", "created_at": 0}, 7, alert(2)]}).encode()
    status, answer = daemon.post(body)
    assert (status, answer["success"]) == (200, True)
    assert [(a["id"], a["state"]) for a in answer["alerts"]] == [
        ("alert-000001", "archived"),
        ("a/../../../x", "rejected"),
        (None, "rejected"),
        ("alert-000002", "archived"),
    ]
    assert "alerts[1].id" in answer["alerts"][1]["error"]["message"]
    assert "alerts[2]" in answer["alerts"][2]["error"]["message"]
    ((key, kept),) = until(lambda: s3.objects("rejected/")).items()
    assert re.fullmatch(r"rejected/\d{4}(/\d\d){4}/[0-9a-f]{64}", key)
    assert kept == body
    assert len(s3.objects("webhooks/")) == 2
    until(lambda: daemon.logged(rf"INFO archived id={key[-64:]} tries=1 seconds=\S+ keys={key}\n"))


def test_of_one_id_with_two_bodies_the_later_one_is_kept(new_daemon, s3):
    """Both have the same key, if they are of the same minute; in one webhook, or in two while S3 is unavailable."""
    daemon = new_daemon(server__wait="0")
    s3.stop()
    batches = [[alert(n, body=letter * 20) for letter in ("AB", "ABA", "BAAB")[n % 3]] for n in range(120)]
    for alerts in [*batches[:60], *([each] for batch in batches[60:] for each in batch)]:
        status, answer = daemon.post({"alerts": alerts})
        assert (status, [each["state"] for each in answer["alerts"]]) == (200, ["queued"] * len(alerts))
    s3.start()
    until(lambda: daemon.health()["queued"] == 0)
    found = {key.rpartition("/")[2]: json.loads(body) for key, body in s3.objects("webhooks/").items()}
    assert found == {batch[-1]["id"]: batch[-1] for batch in batches}


def test_of_one_id_in_two_minutes_both_are_kept(daemon, s3):
    bodies = [alert(0), alert(0, created_at=alert(1)["created_at"])]
    assert [a["state"] for a in daemon.post({"alerts": bodies})[1]["alerts"]] == ["archived"] * 2
    assert [json.loads(body) for body in s3.objects("webhooks/").values()] == bodies
    assert len(s3.objects("alerts/")) == 1


@pytest.mark.parametrize("changed", ["prefix", "bucket", "both"])
@pytest.mark.parametrize("version", [1, 2])
def test_an_alert_is_in_one_place_whatever_is_configured_meanwhile(new_daemon, s3, api, changed, version):
    """Its webhook is in S3 and its detail is not, when the bucket or the prefix changes."""
    more = {"threatstack__base_url": f"{api.url}/v2", **threatstack.HAWK} if version == 2 else {}
    daemon = new_daemon(server__wait="0", s3__prefix="old", **more)
    api.modes["alert-000000"] = 503  # of version 2 the events are there already
    kinds = {"webhooks", "alerts"} | ({"events"} if version == 2 else set())
    daemon.post({"alerts": [alert(0)]})
    until(lambda: len(s3.objects()) == len(kinds) - 1)
    until(lambda: daemon.logged("id=alert-000000 "))
    assert daemon.stop() == 0
    bucket = s3.folder / "other"
    try:
        bucket.mkdir()
        s3.stop()  # it remembers what buckets there are
        s3.start()
        daemon.set(**({"s3__prefix": "new"} if changed != "bucket" else {}))
        daemon.set(**({"s3__bucket": "other"} if changed != "prefix" else {}))
        api.modes.clear()
        daemon.start()
        until(lambda: daemon.health()["queued"] == 0)
        keys = {str(path.relative_to(s3.folder)) for path in s3.folder.rglob("alert-000000")}
        places = {}
        for key in keys:
            bucket_, prefix, kind, *_ = key.split("/")
            places.setdefault((bucket_, prefix), set()).add(kind)
        assert kinds in places.values(), keys
        (line,) = [line for line in daemon.log().splitlines() if "INFO archived " in line]
        place = next(place for place, found in places.items() if found == kinds)
        for key in line.partition("keys=")[2].split(","):
            assert any(full.endswith(f"{key}") and tuple(full.split("/")[:2]) == place for full in keys), (line, keys)
    finally:
        shutil.rmtree(bucket)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_daemon_answers_what_it_has_and_keeps_what_it_took(new_daemon, s3, api, sig):
    daemon = new_daemon(server__wait="30", threatstack__timeout="30")
    api.mode = "hang"
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(daemon.post, TUTORIAL)
        until(lambda: api.calls)
        daemon.process.send_signal(sig)
        status, answer = client.result(10)  # it does not wait for the call that hangs
    assert daemon.process.wait(20) == 0
    assert (status, answer["alerts"][0]["state"]) == (200, "queued")
    api.mode = None
    api.released.set()
    daemon.start()
    until(lambda: len(s3.objects()) == 2)


def test_a_stopped_daemon_waits_for_no_idle_connection(new_daemon):
    daemon = new_daemon(archive__workers="0")
    with socket.create_connection(daemon.address) as sock:
        sock.sendall(message(method="GET", path="/healthz"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 5


def test_a_stopping_daemon_takes_a_request_that_has_begun(new_daemon):
    daemon = new_daemon(archive__workers="0")
    body = b'{"id": "abcd", "created_at": 0}'
    with socket.create_connection(daemon.address, 10) as sock:
        sock.sendall(message([b"Content-Length: %d" % len(body)]))
        until(lambda: daemon.health())
        daemon.process.terminate()
        until(lambda: daemon.logged("INFO stopping"))
        sock.sendall(body)
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answer
    assert daemon.process.wait(10) == 0


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0"])
def test_other_addresses(new_daemon, listen):
    host = listen.rpartition(":")[0].strip("[]")
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    daemon = new_daemon(archive__workers="0", server__listen=listen)
    daemon.address = (host, daemon.address[1])
    assert daemon.health()["success"]


def test_webhooks_are_taken_while_boto3_is_imported(new_daemon, s3):
    daemon = new_daemon(start=False)
    package = daemon.folder / "slow" / "boto3"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import importlib, os, sys, time\n"
        f"while not os.path.exists({str(daemon.folder / 'go')!r}):\n    time.sleep(0.05)\n"
        "sys.path.remove(os.path.dirname(os.path.dirname(__file__)))\n"
        "del sys.modules['boto3']\n"
        "importlib.import_module('boto3')\n"
    )
    daemon.environment["PYTHONPATH"] = package.parent
    daemon.set(server__wait="0")
    daemon.start()
    assert daemon.post(TUTORIAL)[1]["alerts"][0] == {"id": TUTORIAL_ID, "state": "queued"}
    (daemon.folder / "go").touch()
    until(lambda: len(s3.objects()) == 2)
