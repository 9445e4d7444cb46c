"""Threat Stack or S3 unavailable, in every way: webhooks are taken, the answer says why, all arrives by itself."""

import contextlib
import functools
import http.client
import itertools
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from types import SimpleNamespace

import boto3
import pytest
import threatstack
from conftest import alert, error_of, peak_memory, until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import ts3d

QUICK = {"server__wait": "1", "threatstack__timeout": "1"}


def limited(handler):
    handler.send(429, b"slow down", [("x-rate-limit-reset", "1500")])


@pytest.mark.parametrize(
    ("upstream", "mode", "alerts", "type_"),
    [
        ("threatstack", "stopped", 1, "threatstack_unreachable"),
        ("threatstack", "hang", 3, "threatstack_timeout"),
        ("threatstack", "reset", 1, "threatstack_broken_off"),
        ("threatstack", "garbage", 3, "threatstack_bad_answer"),
        ("threatstack", 401, 3, "threatstack_unauthorized"),
        ("threatstack", 403, 1, "threatstack_forbidden"),
        ("threatstack", 429, 3, "threatstack_rate_limited"),
        ("threatstack", limited, 1, "threatstack_rate_limited"),
        ("threatstack", 500, 1, "threatstack_500"),
        ("threatstack", 503, 3, "threatstack_503"),
        ("s3", "stopped", 3, "s3_EndpointConnectionError"),
        ("s3", "hang", 1, "s3_"),
        ("s3", 503, 3, "s3_503"),
    ],
)
def test_an_outage_gives_nothing_up(new_daemon, api, bucket, clock, upstream, mode, alerts, type_):
    """For many times as long as an alert may fail by itself, and over a kill. Without Threat Stack S3 has webhooks."""
    server = api if upstream == "threatstack" else bucket
    daemon = new_daemon(start=False, **QUICK, s3__endpoint_url=bucket.url, archive__give_up_after="0.5s")
    if mode != "hang":  # or a slow machine is an outage too
        daemon.set(threatstack__timeout="1h")
    clock.use(daemon)
    daemon.start()
    if mode == "stopped":
        server.stop()
    else:
        server.mode = mode

    def ask():
        """What is said of the alerts, once each has an error: until boto3 is imported nothing has been tried."""
        status, answer = daemon.post({"alerts": [alert(n) for n in range(alerts)]})
        assert (status, answer["success"]) == (200, True)
        return all("error" in state for state in answer["alerts"]) and answer["alerts"]

    for state in until(ask, 60, "errors"):
        assert state["state"] == "queued"
        assert state["error"]["type"].startswith(type_), state
        assert state["error"]["message"]
    until(lambda: [path.split("/")[2] for path in bucket.objects] == ["webhooks"] * alerts * (upstream != "s3"))
    daemon.kill()
    daemon.start()
    status, answer = daemon.post({"alerts": [alert(alerts)]})
    assert (status, answer["alerts"][0]["state"]) == (200, "queued")
    clock.set(20)
    threading.Event().wait(1)  # how long it lasts is what this is about
    health, put = daemon.health(), dict(bucket.objects)
    assert (health["queued"], health["failed"]) == (alerts + 1, 0)
    clock.set(1)
    if mode == "stopped":
        server.__init__(server.port)
    else:
        server.mode = None
        server.released.set()
    until(lambda: len(put | bucket.objects) == 2 * (alerts + 1))
    until(lambda: daemon.health()["queued"] == 0)
    assert daemon.health()["failed"] == 0


@pytest.mark.parametrize("mode", [401, 503])
def test_s3_recovers_while_threat_stack_is_unavailable(new_daemon, s3, api, mode):
    """Alerts that wait for both must not take S3's probe each time, and then never reach S3. No other object is put."""
    daemon = new_daemon(**QUICK)
    api.mode = mode
    daemon.post({"alerts": [alert(n) for n in range(5)]})
    until(lambda: daemon.logged("threatstack unavailable: ") and len(s3.objects("webhooks/")) == 5)
    s3.stop()
    daemon.post({"alerts": [alert(5)]})
    until(lambda: daemon.logged("s3 unavailable: "))
    s3.start()
    until(lambda: len(s3.objects("webhooks/")) == 6)
    until(lambda: daemon.logged("s3 recovered after "))
    assert not daemon.logged("threatstack recovered after ")
    assert len(s3.objects()) == 6


def test_a_poisoned_alert_stops_no_other(new_daemon, s3, api):
    """It delays the others for seconds only, although two workers try four such alerts, and the breaker opens."""
    daemon = new_daemon(server__wait="0", archive__workers="2")
    api.modes = {alert(n)["id"]: mode for n, mode in enumerate([404, 500, 500, 500])}
    types = [error_of(daemon, n)["type"] for n in range(4)]
    assert types == ["threatstack_not_found", *["threatstack_500"] * 3]
    until(lambda: daemon.logged("threatstack unavailable: "))
    daemon.post({"alerts": [alert(n) for n in range(4, 104)]})
    until(lambda: len(s3.objects("alerts/")) == 100, 30)
    until(lambda: daemon.health()["queued"] == 4)


def test_one_hung_call_keeps_no_other_alert_waiting(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", threatstack__timeout="30", archive__workers="3")
    api.modes["alert-000000"] = "hang"
    daemon.post({"alerts": [alert(n) for n in range(50)]})
    until(lambda: len(s3.objects("alerts/")) == 49)


def test_while_threat_stack_hangs_webhooks_go_to_s3(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", threatstack__timeout="30")
    api.mode = "hang"
    answer = daemon.post({"alerts": [alert(n) for n in range(100)]})[1]
    assert answer["alerts"] == [{"id": alert(n)["id"], "state": "queued"} for n in range(100)]
    until(lambda: len(s3.objects("webhooks/")) == 100)
    api.mode = None
    api.released.set()
    until(lambda: len(s3.objects("alerts/")) == 100)


@pytest.mark.parametrize(
    ("upstream", "mode", "alerts"),
    [
        *(("threatstack", mode, alerts) for mode in (500, "hang") for alerts in (1, 3)),
        *(("threatstack", mode, 100) for mode in (401, 429, 503)),
        *(("s3", 503, alerts) for alerts in (1, 3, 100)),
    ],
)
def test_an_unavailable_upstream_is_probed_by_one_and_logged_once(
    new_daemon, api, bucket, clock, upstream, mode, alerts
):
    """Two lines, and few of the alerts, however many of them and of the probes fail meanwhile."""
    server = api if upstream == "threatstack" else bucket
    timeout, speed, probes = ("0.5", 20, 10) if mode == "hang" else ("1h", 50, 20)
    daemon = new_daemon(start=False, server__wait="0", threatstack__timeout=timeout, s3__endpoint_url=bucket.url)
    clock.use(daemon)
    daemon.start()
    server.mode = mode
    daemon.post({"alerts": [alert(n) for n in range(alerts)]})
    until(lambda: daemon.logged(f"{upstream} unavailable"))
    until(lambda: upstream == "s3" or len(bucket.objects) == alerts)
    first = len(server.calls)  # as many as were under way when the first answer came
    assert mode == 503 or first <= 16  # one 503 may come by itself
    clock.set(speed)
    until(lambda: len(server.calls) >= first + probes, 60, "probes")
    clock.set(1)
    server.mode = None
    until(lambda: len(bucket.objects) == 2 * alerts)
    until(lambda: daemon.health()["queued"] == 0)
    lines = [line for line in daemon.log().splitlines() if re.search("WARNING|ERROR|INFO", line)]
    [begin, end] = [line for line in lines if re.search("(s3|threatstack) (unavailable|recovered)", line)]
    title = {"s3": "S3", "threatstack": "Threat Stack"}[upstream]
    cause = r"\[threatstack\] timeout" if mode == "hang" else mode
    assert re.search(f" WARNING {upstream} unavailable: {title}: .*{cause}", begin)
    assert re.search(f" WARNING {upstream} recovered after [0-9]+ s$", end)
    assert len([line for line in lines if "will be retried" in line]) <= min(2 * alerts, 19)
    assert len(lines) <= 6 + 3 * alerts, daemon.log()


def test_steps_done_are_remembered(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0")
    api.mode = 401
    daemon.post({"alerts": [alert(n) for n in range(3)]})
    until(lambda: len(s3.objects("webhooks/")) == 3)
    until(lambda: daemon.logged("threatstack unavailable: "))
    daemon.post({"alerts": [alert(n) for n in range(3, 6)]})  # these do not even come to be tried
    until(lambda: len(s3.objects("webhooks/")) == 6)
    assert daemon.stop() == 0
    s3.clear()
    api.mode = None
    daemon.start()
    until(lambda: len(s3.objects("alerts/")) == 6)
    until(lambda: daemon.health()["queued"] == 0)
    assert s3.objects("webhooks/") == {}


def answer(status):
    """A mode for one alert: the API answers so, S3's stand-in succeeds."""
    return lambda handler: handler.succeed("") if handler.command == "PUT" else handler.send(status, b"{}")


def archive_others(daemon, condition, seconds=60):
    """Post other alerts, ten a second, by which the API is seen to work, until the condition holds."""
    numbers, pause = itertools.count(1), threading.Event()

    def one():
        assert daemon.post({"alerts": [alert(next(numbers))]})[0] == 200
        return condition() or pause.wait(0.1)

    until(one, seconds, "end")


@pytest.mark.parametrize("mode", [500, "hang"])
def test_an_alert_that_keeps_failing_is_marked_failed_and_retried_when_it_is_sent_again(new_daemon, api, mode):
    daemon = new_daemon(archive__give_up_after="2", threatstack__timeout="1", server__wait="0")
    api.modes["alert-000000"] = mode
    daemon.post({"alerts": [alert(0)]})
    archive_others(daemon, lambda: daemon.health()["failed"] == 1)
    assert daemon.logged("ERROR alert marked failed id=alert-000000 ")
    until(lambda: daemon.health()["queued"] == 0)
    daemon.restart(server__wait="30")
    assert daemon.health()["failed"] == 1
    api.modes.clear()
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"] == [{"id": "alert-000000", "state": "archived"}]
    assert daemon.health()["failed"] == 0


def test_the_hour_of_a_404_is_an_hour_of_404s(new_daemon, api, clock):
    """Not of whatever the API answered before: it may lag behind the webhook from then on."""
    daemon = new_daemon(start=False, server__wait="0", s3__endpoint_url=api.url, **clock.HOURS)
    clock.use(daemon)
    daemon.start()
    clock.set(3000)

    def hours(text):
        """Between the first and the last line on the alert that has this text."""
        lines = [line[:23] for line in daemon.log().splitlines() if "id=alert-000000 " in line and text in line]
        times = [datetime.strptime(line, "%Y-%m-%d %H:%M:%S,%f") for line in lines]
        return (times[-1] - times[0]) / timedelta(hours=1) if times else 0

    api.modes["alert-000000"] = answer(500)
    daemon.post({"alerts": [alert(0)]})
    archive_others(daemon, lambda: hours("500") > 2)
    api.modes["alert-000000"] = answer(404)
    archive_others(daemon, lambda: daemon.health()["failed"] == 1)
    assert hours("404") >= 0.99
    assert daemon.logged("marked failed id=alert-000000 .*404")


def test_ts3d_writes_nothing_but_archived_objects(new_daemon, api, bucket):
    """No probe is an object, in an outage, or where an alert is marked failed: in the archive it would stay."""
    if boto3.__version__.startswith("1.26."):
        pytest.skip(f"boto3 {boto3.__version__} has no IfNoneMatch")
    options = {"put_object__IfNoneMatch": "*", "archive__give_up_after": "0.1", "server__wait": "0"}
    daemon = new_daemon(s3__endpoint_url=bucket.url, **options)
    bucket.modes["alert-000000"] = threatstack.s3_error(409, "ConditionalRequestConflict")
    daemon.post({"alerts": [alert(0)]})
    archive_others(daemon, lambda: daemon.health()["failed"] == 1)
    bucket.mode = api.mode = 503
    daemon.post({"alerts": [alert(n) for n in range(9000, 9009)]})
    until(lambda: daemon.logged("s3 unavailable: "))
    calls = len(bucket.calls)
    until(lambda: len(bucket.calls) > calls + 2)
    bucket.mode = api.mode = None
    until(lambda: daemon.health()["queued"] == 0)
    assert {path.split("/")[2] for path in bucket.paths()} == {"webhooks", "alerts"}


@pytest.fixture
def archiver(tmp_path, monkeypatch):
    """That of a daemon, of which no thread has been started."""
    monkeypatch.setattr(ts3d, "SECRETS", [])
    (tmp_path / "ts3d.conf").write_text("")
    queue = ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30, "here")
    yield ts3d.Archiver(ts3d.load_config(str(tmp_path / "ts3d.conf")), queue)
    queue.close()


HOUR, DAY = 3600, 86400


@pytest.mark.parametrize(
    ("statuses", "works", "lasts"),
    [
        ([404], True, HOUR),
        ([500], True, 7 * DAY),
        ([500] * 20 + [404], True, 2 * HOUR),  # the hour is of 404s
        ([404], False, 30 * DAY),
        ([500], False, 30 * DAY),
    ],
    ids=str,
)
def test_how_long_an_alert_may_fail(archiver, monkeypatch, statuses, works, lasts):
    """By itself, while its upstream works for others; an outage between two failures does not count."""
    now = [1e6]
    monkeypatch.setattr(ts3d, "monotonic", lambda: now[0])
    job = ts3d.Job("abcd", "2017/01/17/13/51", "webhooks", "alerts", number=1)
    random.seed(1)  # of the pauses
    began, statuses = now[0], iter(statuses)
    status, causes = 0, {404: "not_found", 500: 500}
    while not job.failed and now[0] - began < 30 * DAY:
        status = next(statuses, status)
        if works:
            archiver.threatstack.success(now[0])
        error = archiver.threatstack.error(causes[status], "because", status)
        archiver._put_off(job, error)
        now[0] = max(job.due, now[0] + 1) + 3
    took = now[0] - began
    assert job.failed == works
    assert lasts <= took <= lasts * 1.5 + HOUR


def test_an_outage_between_two_failures_does_not_count(archiver, monkeypatch):
    now = [1e6]
    monkeypatch.setattr(ts3d, "monotonic", lambda: now[0])
    job = ts3d.Job("abcd", "2017/01/17/13/51", "webhooks", "alerts", number=1)
    error = archiver.threatstack.error("not_found", "because", 404)
    for _ in range(3):
        archiver._put_off(job, error)
        now[0] += 30 * DAY
        archiver.threatstack.success(now[0])
        now[0] += 1
    assert not job.failed
    assert job.failing <= 2 * ts3d.MAX_RETRY_PAUSE


KINDS = {
    ("threatstack", "unavailable"): "unreachable:0 unauthorized:401 forbidden:403 407:407 rate_limited:429",
    ("threatstack", "failing"): "408:408 500:500 503:503 timeout:0 broken_off:0 bad_answer:200 302:302",
    ("threatstack", "alert"): "not_found:404 400:400 410:410 wrong_detail:200",
    ("s3", "unavailable"): "NoSuchBucket:404 AccessDenied:403 EndpointConnectionError:0 InvalidArgument:400 TypeError:0"
    " NoCredentialsError:0 PreconditionFailed:412 PermanentRedirect:301 AuthorizationHeaderMalformed:400"
    " RequestTimeTooSkewed:403 InvalidAccessKeyId:403 SignatureDoesNotMatch:403",
    ("s3", "failing"): "SlowDown:503 InternalError:500 ReadTimeoutError:0 bad_answer:200 RequestTimeout:400"
    " ConnectionClosedError:0",
    ("s3", "alert"): "ConditionalRequestConflict:409 OperationAborted:409",
}


@pytest.mark.parametrize(("upstream", "kind"), KINDS)
def test_the_kinds_of_errors(upstream, kind):
    for each in KINDS[upstream, kind].split():
        cause, _, status = each.partition(":")
        error = ts3d.UpstreamError(upstream, int(cause) if cause == status else cause, "because", int(status))
        assert (error.kind, error.type) == (kind, f"{upstream}_{cause}")
        assert str(error).startswith({"s3": "S3: because. ", "threatstack": "Threat Stack: because. "}[upstream])


class BreakerMachine(RuleBasedStateMachine):
    """The circuit breaker beside a model of it: calls begin, and end in any order, while time passes.

    The model is a state (closed or open; half-open is an open one whose probe is due) and the failures in a row.
    """

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ts3d, "monotonic", lambda: self.now)
        self.breaker = ts3d.CircuitBreaker(SimpleNamespace())
        self.breaker.error = functools.partial(ts3d.UpstreamError, "threatstack")
        self.opened_at = None  # of the model: None while it is closed
        self.failures = 0
        self.earliest = self.latest = 0.0  # between these the next probe is due
        self.asked = 0.0  # until when Retry-After forbids every call

    def teardown(self):
        self.patch.undo()

    calls = Bundle("calls")

    @rule(seconds=st.sampled_from([0.001, 0.4, 1.0, 3.0, 8.0, 60.0, 3600.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(target=calls)
    def begin(self):
        self.now += 0.001
        return self.now

    @rule(call=consumes(calls), kind=st.sampled_from(["success", "alert"]))
    def succeed(self, call, kind):
        """An error that is the alert's own says that the upstream works, as a success does."""
        self.now += 0.001
        if kind == "success":
            self.breaker.success(call)
        else:
            self.breaker.failure(self.breaker.error("not_found", "because", 404), call)
        assert self.breaker.worked_at == self.now
        if self.opened_at is None or call >= self.opened_at:
            self.opened_at, self.failures, self.asked = None, 0, 0.0

    @rule(
        call=consumes(calls),
        kind=st.sampled_from(["failing", "unavailable"]),
        after=st.sampled_from([None, "0", "20", "100000", "soon"]),
    )
    def fail(self, call, kind, after):
        self.now += 0.001
        cause, status = {"failing": (503, 503), "unavailable": ("rate_limited", 429)}[kind]
        headers = {"retry-after": after} if after else {}
        self.breaker.failure(self.breaker.error(cause, "because", status, headers), call)
        asked = {None: 0, "0": 0, "20": 20, "100000": 3600, "soon": 0}[after]
        self.asked = max(self.asked, self.now + asked if asked else 0)
        self.latest = max(self.latest, self.now + asked)
        if self.opened_at is not None and call < self.opened_at:
            return  # it began before the opening, which it does not make later; but what it asked for counts
        self.failures += 1
        if self.opened_at is None and kind == "failing" and self.failures < 2:
            return
        if self.opened_at is None:
            self.opened_at = self.now
        self.earliest = max(self.now + 1, self.now + asked)
        self.latest = max(self.latest, self.now + max(8, asked))

    @invariant()
    def agrees(self):
        assert (self.breaker.open_for is not None) == (self.opened_at is not None)
        if self.opened_at is None:
            assert self.breaker.allowance(9) == 9
            return
        allowed = self.breaker.allowance(9)
        assert allowed in (0, 1), "half-open: one call at a time"
        assert self.breaker.allowance(0) == 0
        if self.now < self.earliest or self.now < self.asked:
            assert allowed == 0, "no probe before the backoff or Retry-After is over"
        if self.now > self.latest:
            assert allowed == 1, "an outage is probed for ever"


BreakerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestBreaker = BreakerMachine.TestCase


def take_all(archiver, *lanes):
    """Fill the detail pool, as the dispatcher does, and return the jobs in their order."""
    pool = archiver.pools[1]
    for lane in lanes or pool.lanes:
        archiver._fill(pool, lane)
    return [pool.jobs.get_nowait() for _ in range(pool.jobs.qsize())]


def test_webhooks_details_go_before_those_of_backfill(archiver):
    pool, queue = archiver.pools[1], archiver.queue
    queue.put([ts3d.Job(f"old-{n}", "2017/01/17/13/51", "backfill", "alerts", b"{}") for n in range(100)])
    queue.put([ts3d.Job(f"new-{n}", "2017/01/17/13/51", "webhooks", "alerts", b"{}") for n in range(9)])
    jobs = take_all(archiver)
    assert [job.id for job in jobs][:9] == [f"new-{n}" for n in range(9)]
    assert len(jobs) == pool.size


def test_an_open_breaker_lets_one_job_probe_that_has_not_failed_before(archiver):
    archiver.queue.put([ts3d.Job(f"id-{n}", "2017/01/17/13/51", "webhooks", "alerts", b"{}") for n in range(9)])
    (bad,) = archiver.queue.take("detail", 1)
    error = archiver.threatstack.error("unreachable", "because")
    archiver.threatstack.failure(error, time.monotonic())
    archiver._put_off(bad, error)
    archiver.queue.settle(bad)
    assert take_all(archiver) == []
    archiver.threatstack.probe_at = time.monotonic()
    (probe,) = take_all(archiver)
    assert (probe.id, probe.probe) == ("id-1", True)
    assert take_all(archiver) == [], "a probe that hangs is followed by another only after a pause"
    archiver.threatstack.success(time.monotonic())
    assert len(take_all(archiver)) == 7


def test_an_error_with_status_200_is_not_archived(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0")
    for number, body in enumerate(
        [b"{}", b'{"status": "error", "message": "x"}', b'{"errors": ["x"]}', b"[]", b"null"]
    ):
        api.modes[alert(number)["id"]] = lambda handler, body=body: handler.send(200, body)
        assert error_of(daemon, number)["type"] == "threatstack_wrong_detail", body
    assert s3.objects("alerts/") == {}


def test_an_answer_ends_its_wait_where_waiting_makes_no_sense(new_daemon, api):
    daemon = new_daemon(server__wait="30")
    api.mode = 401
    begin = time.monotonic()
    answer = daemon.post({"alerts": [alert(0)]})[1]
    assert time.monotonic() - begin < 10
    assert answer["alerts"][0]["error"]["type"] == "threatstack_unauthorized"


@pytest.mark.parametrize("text", ["bad key ", "x" * 375], ids=["whole", "cut"])
def test_the_key_in_an_upstreams_answer_is_not_passed_on(new_daemon, api, text):
    """Nor its beginning, where the answer is cut."""
    api.mode = lambda handler: handler.send(403, text.encode() + threatstack.KEY.encode())
    answer = json.dumps(error_of(new_daemon(**QUICK)))
    assert text in answer
    assert threatstack.KEY[:8] not in answer


def test_answers_that_wait_for_s3_keep_no_bodies(new_daemon, bucket):
    """A hundred of 7M, with malloc as the unit sets it. Of so many at once some are told to come again, and do."""
    bucket.mode = "hang"
    daemon = new_daemon(start=False, server__wait="15", s3__endpoint_url=bucket.url)
    daemon.environment["MALLOC_ARENA_MAX"] = "1"
    daemon.start()
    body = json.dumps({"alerts": [alert(0, text="x" * 7_000_000)]}).encode()

    def post(_):
        status = 503
        while status in (408, 503):
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = daemon.post(body)
        return status, [each["state"] for each in answer["alerts"]]

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(post, range(100))) == [(200, ["queued"])] * 100
    assert daemon.health()["queued"] == 1
    assert peak_memory(daemon) < 450_000_000
