"""Threat Stack or S3 away, in every way: webhooks are taken, the answer says why, and all arrives by itself."""

import itertools
import json
import signal
import time

import pytest
import threatstack
from conftest import TOKEN, alert, error_of, until

import ts3d

QUICK = {"server__wait": "1", "threatstack__timeout": "1"}


def limited(handler):
    handler.send(429, b"slow down", [("x-rate-limit-reset", "1500")])


API_FAULTS = {
    "stopped": "threatstack_unreachable",
    "hang": "threatstack_",  # silent, and after the time-out timeout
    503: "threatstack_503",
    429: "threatstack_rate_limited",
    401: "threatstack_unauthorized",
    403: "threatstack_forbidden",
    "garbage": "threatstack_bad_answer",
    "reset": "threatstack_broken_off",
    302: "threatstack_302",
    limited: "threatstack_rate_limited",
}


def answer_with_errors(daemon):
    """What is said of five alerts, as soon as there is an error: until boto3 is imported nothing has been tried."""

    def ask():
        status, answer = daemon.post({"alerts": [alert(n) for n in range(5)]})
        assert (status, answer["success"]) == (200, True)
        return all("error" in state for state in answer["alerts"]) and answer["alerts"]

    return until(ask)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(("mode", "type_"), API_FAULTS.items())
def test_threat_stack_away(new_daemon, s3, api, mode, type_, killed):
    daemon = new_daemon(**QUICK)
    port = api.port
    if mode == "stopped":
        api.stop()
    else:
        api.mode = mode
    for state in answer_with_errors(daemon):
        assert state["state"] == "queued"
        assert state["error"]["type"].startswith(type_)
        assert state["error"]["message"]
    # Threat Stack being down keeps no webhook from S3.
    until(lambda: len(s3.objects("webhooks/")) == 5)
    assert s3.objects("alerts/") == {}
    if killed:
        daemon.kill()
        daemon.start()
        status, answer = daemon.post({"alerts": [alert(5)]})
        assert (status, answer["alerts"][0]["state"]) == (200, "queued")
    if mode == "stopped":
        api = threatstack.Faulty(port)
    else:
        api.mode = None
    until(lambda: len(s3.objects("alerts/")) == 5 + killed)
    until(lambda: daemon.health()["queued"] == 0)
    if mode == "stopped":
        api.stop()


S3_FAULTS = {
    "stopped": "s3_EndpointConnectionError",
    "frozen": "s3_",
    "hang": "s3_",
    503: "s3_503",
    429: "s3_429",
    401: "s3_401",
    403: "s3_403",
    "garbage": "s3_",
    "reset": "s3_",
}


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(("mode", "type_"), S3_FAULTS.items())
def test_s3_away(new_daemon, s3, api, faulty, mode, type_, killed):
    daemon = new_daemon(**QUICK)
    if mode == "frozen":
        s3.process.send_signal(signal.SIGSTOP)
    else:
        s3.stop()
    if mode not in ("stopped", "frozen"):
        faulty(s3.port, mode)
    for state in answer_with_errors(daemon):
        assert state["state"] == "queued"
        # botocore itself tries a 429 or a 503 again, after up to a second in which there is no answer yet.
        assert state["error"]["type"].startswith((type_, "s3_silent")), state
        assert state["error"]["message"]
    if killed:
        daemon.kill()
        daemon.start()
        assert daemon.post({"alerts": [alert(5)]})[0] == 200
    faulty.stop()
    if mode == "frozen":
        s3.process.send_signal(signal.SIGCONT)
    else:
        s3.start()
    until(lambda: len(s3.objects("webhooks/")) == len(s3.objects("alerts/")) == 5 + killed)
    until(lambda: daemon.health()["queued"] == 0)


@pytest.mark.parametrize("mode", [401, 503])
def test_s3_is_noticed_to_be_back_while_threat_stack_is_away(new_daemon, s3, api, mode):
    """Alerts that wait for both must not take S3's probe each time, and then never reach S3."""
    daemon = new_daemon(**QUICK)
    api.mode = mode
    daemon.post({"alerts": [alert(n) for n in range(5)]})
    until(lambda: daemon.logged("threatstack is held") and len(s3.objects("webhooks/")) == 5)
    s3.stop()
    daemon.post({"alerts": [alert(5)]})
    until(lambda: daemon.logged("s3 is held"))
    s3.start()
    until(lambda: len(s3.objects("webhooks/")) == 6)
    assert daemon.logged("s3 is back")
    assert not daemon.logged("threatstack is back")


def test_a_poisoned_alert_delays_no_other(new_daemon, s3, api):
    daemon = new_daemon(server__wait="5")
    api.modes["alert-000000"] = 500
    api.modes["alert-000001"] = 404
    bad = daemon.post({"alerts": [alert(0), alert(1)]})[1]["alerts"]
    assert [a["error"]["type"] for a in bad] == ["threatstack_500", "threatstack_not_found"]
    for n in range(2, 42):
        assert daemon.post({"alerts": [alert(n)]})[1]["alerts"][0] == {"id": f"alert-{n:06}", "state": "archived"}
    assert len(s3.objects("alerts/")) == 40
    assert daemon.health()["queued"] == 2


def test_two_poisoned_alerts_hold_the_rest_for_seconds_only(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", archive__workers="2")
    for n in range(3):
        api.modes[f"alert-{n:06}"] = 500
    daemon.post({"alerts": [alert(n) for n in range(3)]})
    until(lambda: daemon.logged("threatstack is held"))
    daemon.post({"alerts": [alert(n) for n in range(3, 100)]})
    until(lambda: len(s3.objects("alerts/")) == 97, 30)


def test_one_hung_call_keeps_no_other_alert_waiting(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", threatstack__timeout="30", archive__workers="3")
    api.modes["alert-000000"] = "hang"
    daemon.post({"alerts": [alert(n) for n in range(50)]})
    until(lambda: len(s3.objects("alerts/")) == 49)


def test_while_threat_stack_hangs_webhooks_go_to_s3(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", threatstack__timeout="30")
    api.mode = "hang"
    daemon.post({"alerts": [alert(n) for n in range(100)]})
    until(lambda: len(s3.objects("webhooks/")) == 100)


def test_a_held_upstream_is_probed_by_one_and_logged_once(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0")
    api.mode = 429
    daemon.post({"alerts": [alert(n) for n in range(100)]})
    until(lambda: len(s3.objects("webhooks/")) == 100)
    first = len(api.calls)  # as many as were under way when the first answer came
    assert first <= 16
    until(lambda: len(api.calls) >= first + 3)
    assert len(daemon.log().split("threatstack is held")) == 2
    api.mode = None
    until(lambda: len(s3.objects("alerts/")) == 100)
    assert len(daemon.log().split("threatstack is back")) == 2


def test_retry_after_is_obeyed(new_daemon, s3, api):
    def later(handler):
        handler.send(429, b"", [("Retry-After", "3")])

    daemon = new_daemon()
    api.mode = later
    daemon.post({"alerts": [alert(0)]})
    api.mode = None
    until(lambda: s3.objects("alerts/"))
    first, *_, last = [when for when, _, _ in api.calls]
    assert last - first >= 3


def test_steps_done_are_remembered(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0")
    api.mode = 401
    daemon.post({"alerts": [alert(n) for n in range(3)]})
    until(lambda: len(s3.objects("webhooks/")) == 3)
    until(lambda: daemon.logged("threatstack is held"))
    daemon.post({"alerts": [alert(n) for n in range(3, 6)]})  # these do not even come to be tried
    until(lambda: len(s3.objects("webhooks/")) == 6)
    daemon.stop()
    s3.clear()
    api.mode = None
    daemon.start()
    until(lambda: len(s3.objects("alerts/")) == 6)
    until(lambda: daemon.health()["queued"] == 0)
    assert s3.objects("webhooks/") == {}


def test_an_alert_that_keeps_failing_is_set_aside_and_tried_anew_when_sent_again(new_daemon, s3, api):
    daemon = new_daemon(archive__give_up_after="1", server__wait="1")
    api.modes["alert-000000"] = 500
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.health()["failed"] == 1)
    assert daemon.health()["queued"] == 0
    assert daemon.logged("alert alert-000000 failed for good after")
    daemon.stop()
    daemon.set(server__wait="30")
    daemon.start()
    assert daemon.health()["failed"] == 1
    api.modes.clear()
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"] == [{"id": "alert-000000", "state": "archived"}]
    assert daemon.health()["failed"] == 0


def test_an_alert_whose_call_hangs_is_set_aside_while_others_are_archived(new_daemon, api):
    daemon = new_daemon(archive__give_up_after="3", threatstack__timeout="1", server__wait="0")
    api.modes["alert-000000"] = "hang"
    numbers = itertools.count()
    until(
        lambda: daemon.post({"alerts": [alert(next(numbers))]}) and daemon.health()["failed"] == 1, 60, "failed alert"
    )
    assert daemon.logged("alert alert-000000 failed for good after")


@pytest.fixture
def archiver(tmp_path, monkeypatch):
    monkeypatch.setattr(ts3d, "SECRETS", [])
    (tmp_path / "ts3d.conf").write_text("")
    queue = ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30, create=True)
    yield ts3d.Archiver(ts3d.load_config(str(tmp_path / "ts3d.conf")), queue)
    queue.close()


@pytest.mark.parametrize(
    ("cause", "seconds", "failed"),
    [("not_found", 3500, 0), ("not_found", 3601, 1), ("500", 3601, 0), ("500", 7 * 86400 + 1, 1)],
)
def test_how_long_an_alert_may_fail(archiver, monkeypatch, cause, seconds, failed):
    monkeypatch.setattr(archiver.threatstack, "works", lambda: True)
    archiver.queue.put([ts3d.Arrival("abcd", "2017/01/17/13/51", "webhooks", b"{}")])
    (job,) = archiver.queue.take(["webhooks"], 1)
    archiver._put_off(job, archiver.threatstack.error(cause, "because"), seconds)
    archiver.queue.prove_writable()  # a transaction, with which it is written
    assert archiver.queue.counts()[:2] == (1 - failed, failed)


def failing(upstream, job, scope="some", **more):
    def fail():
        raise upstream.error("x", "because", scope, **more)

    with pytest.raises(ts3d.UpstreamError) as caught:
        upstream.call(job, fail)
    return caught.value


def test_what_holds_an_upstream(archiver):
    one, two = (ts3d.Job(n, "abcd", "", "alerts", 0, 0, 0) for n in (1, 2))
    upstream = archiver.threatstack
    assert failing(upstream, one).longest == ts3d.PROBE_PAUSE  # nothing says that it is the alert's own fault
    assert failing(upstream, one).longest == ts3d.PROBE_PAUSE
    upstream.call(two, int)
    assert failing(upstream, one).longest == ts3d.LONGEST_PAUSE  # now something does
    assert failing(upstream, one, "alert").longest == ts3d.LONGEST_PAUSE
    assert not upstream.hold
    failing(upstream, one)
    assert failing(upstream, two).longest is None  # two different alerts
    assert upstream.hold
    called = []
    with pytest.raises(ts3d.UpstreamError):
        upstream.call(one, called.append, 1)
    assert not called
    upstream.admit([one])
    upstream.call(one, called.append, 1)  # the probe
    assert not upstream.hold
    assert failing(upstream, one, "all", retry_after=9000).longest is None
    assert upstream.free(9) == 0
    assert 3500 < upstream.hold.probe_at - time.monotonic() <= 3600


def test_a_call_from_before_a_hold_does_not_lift_it(archiver):
    one, two = (ts3d.Job(n, "abcd", "", "alerts", 0, 0, 0) for n in (1, 2))
    upstream = archiver.threatstack
    upstream.call(one, lambda: failing(upstream, two, "all"))
    assert upstream.hold


def test_a_failure_from_before_a_success_holds_nothing(archiver):
    one, two, three = (ts3d.Job(n, "abcd", "", "alerts", 0, 0, 0) for n in (1, 2, 3))
    upstream = archiver.threatstack

    def fail_late():
        upstream.call(two, int)
        failing(upstream, three)
        raise upstream.error("timeout", "because")

    with pytest.raises(ts3d.UpstreamError):
        upstream.call(one, fail_late)
    assert not upstream.hold


def test_an_outage_makes_no_alert_fail(new_daemon, s3, api):
    daemon = new_daemon(archive__give_up_after="0.5")
    api.mode = 401
    daemon.post({"alerts": [alert(n) for n in range(3)]})
    until(lambda: len(api.calls) >= 5, 40)
    assert daemon.health()["failed"] == 0
    api.mode = None
    until(lambda: len(s3.objects("alerts/")) == 3)


def test_somebody_elses_detail_is_not_archived(new_daemon, s3, api):
    daemon = new_daemon(**QUICK)
    api.mode = lambda handler: handler.send(200, threatstack.detail("alert-000009"))
    error = error_of(daemon)
    assert error == {"type": "threatstack_bad_answer", "message": "Threat Stack: the answer is not this alert's detail"}
    assert s3.objects("alerts/") == {}


@pytest.mark.parametrize("body", [b"{}", b'{"status": "error", "message": "x"}', b'{"errors": ["x"]}', b"[]", b"null"])
def test_an_error_with_status_200_is_not_archived(new_daemon, s3, api, body):
    daemon = new_daemon(**QUICK)
    api.mode = lambda handler: handler.send(200, body)
    assert error_of(daemon)["type"] == "threatstack_bad_answer"
    assert s3.objects("alerts/") == {}


def test_a_call_that_hangs_for_good_does_not_keep_its_alert_for_the_whole_timeout(new_daemon, s3, api):
    daemon = new_daemon(server__wait="1")  # and the default time-out of 30 s
    api.mode = "hang"
    daemon.post({"alerts": [alert(0)]})
    until(lambda: api.calls)
    api.mode = None  # it is back, and the old connection stays silent
    until(lambda: len(s3.objects("alerts/")) == 1, 20)


def test_a_redirect_is_not_followed(new_daemon, s3, api):
    daemon = new_daemon(**QUICK)
    elsewhere = threatstack.Faulty()
    api.mode = lambda handler: handler.send(302, b"", [("Location", f"{elsewhere.url}/api/v1/alerts/alert-000000")])
    assert error_of(daemon)["type"] == "threatstack_302"
    assert elsewhere.calls == []
    elsewhere.stop()


def slowly(handler):
    """One byte of the head now and then."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + b"X: y\r\n" * 100:
        handler.wfile.write(bytes([byte]))
        if handler.server.released.wait(0.1):
            break
    handler.close_connection = True


def endlessly(handler):
    """A body without end."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.released.is_set():
        handler.wfile.write(b" " * 1_000_000)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{}")
    handler.close_connection = True


@pytest.mark.parametrize(
    ("mode", "type_"),
    [(slowly, "timeout"), (endlessly, "bad_answer"), (cut, "broken_off")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_call_ends_at_its_deadline(new_daemon, s3, api, mode, type_):
    daemon = new_daemon(server__wait="5", threatstack__timeout="1.5")
    api.mode = mode
    daemon.post({"alerts": [alert(0), alert(1)]})
    until(lambda: daemon.logged(r"threatstack is held|alert-00000\d: "))
    until(lambda: error_of(daemon)["type"] == f"threatstack_{type_}")


def test_an_answer_ends_its_wait_where_waiting_makes_no_sense(new_daemon, api):
    daemon = new_daemon(server__wait="30")
    api.mode = 401
    begin = time.monotonic()
    answer = daemon.post({"alerts": [alert(0)]})[1]
    assert time.monotonic() - begin < 10
    assert answer["alerts"][0]["error"]["type"] == "threatstack_unauthorized"


def test_the_key_in_an_upstreams_answer_is_not_passed_on(new_daemon, api):
    daemon = new_daemon(**QUICK)
    api.mode = lambda handler: handler.send(403, f"bad key {threatstack.KEY}".encode())
    answer = json.dumps(error_of(daemon))
    assert "bad key ***" in answer
    api.mode = lambda handler: handler.send(403, b"x" * 480 + threatstack.KEY.encode())
    answer += json.dumps(error_of(daemon, 1))
    assert threatstack.KEY[:8] not in answer
    assert threatstack.KEY not in answer
    assert TOKEN not in answer


def test_wrong_credentials_of_aws(new_daemon, s3):
    daemon = new_daemon(start=False)
    daemon.environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
    daemon.start()
    assert "SignatureDoesNotMatch" in error_of(daemon)["type"]


def test_no_credentials_of_aws(new_daemon):
    daemon = new_daemon(start=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del daemon.environment[name]
    daemon.environment["HOME"] = str(daemon.folder)
    daemon.start()
    assert error_of(daemon)["type"] == "s3_NoCredentialsError"


def test_no_bucket(new_daemon):
    daemon = new_daemon(s3__bucket="elsewhere")
    assert error_of(daemon)["type"] == "s3_NoSuchBucket"
