"""`ts3d backfill`: what the webhook missed is found in the API's list, queued, and archived."""

import argparse
import contextlib
import itertools
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import threading
import time

import pytest
import threatstack
from conftest import AWS, BUCKET, TOKEN, alert, until
from threatstack import HAWK, KEY, USER, s3_error

import ts3d

HOUR, DAY = 3600, 86400
VERSIONS = [1, 2]


def now():
    return int(time.time() * 1000)


def listed(n, version=2, age=600_000):
    """An entry of the API's list, some minutes old."""
    return threatstack.entry(f"alert-{n:06}", now() - age - n, version)


def key_of(n):
    return f"alerts/al/er/alert-{n:06}"


@pytest.fixture
def s3(rclone):
    """rclone remembers for minutes what it has seen in a folder, and these tests look: it is started afresh."""
    rclone.stop()
    rclone.clear()
    rclone.start()
    yield rclone
    if not rclone.process:
        rclone.start()


@pytest.fixture
def make(new_daemon, s3, api):
    """Makes daemons that are not started, whose queue is there, for an API of this version."""

    def make(version=2, start=False, **options):
        base = {"threatstack__base_url": f"{api.url}/v2", **HAWK} if version == 2 else {}
        daemon = new_daemon(start=False, server__wait="0", **{**base, **options})
        if start:
            daemon.start()
        else:
            ts3d.Queue(str(daemon.queue), 1 << 30, "here").close()
        return daemon

    yield make
    assert api.misused == []


def archive(s3, *numbers):
    """Put details where the archive has them, before S3 is asked for anything."""
    for n in numbers:
        path = s3.folder / BUCKET / key_of(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")


def backfill(daemon, *arguments, code=0, timeout=60):
    """Run it; its summary."""
    result = daemon.run("backfill", *arguments, timeout=timeout)
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in said
    assert "internal error" not in said
    for secret in (TOKEN, KEY, USER, AWS["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in said
    backfill.said = result.stderr
    if code in (0, 1):
        assert result.stdout.count("\n") == 1, result.stdout
    return result.stdout


def summary(listed, archived=0, waiting=0, queued=0, invalid=0, how=""):
    parts = (
        f"{archived} archived already, {waiting} queued already, {queued} queued, {invalid} invalid and not archived"
    )
    return f"backfill{how and ' ' + how}: {listed} listed, {parts}\n"


def queued(daemon):
    with sqlite3.connect(daemon.queue) as db:
        rows = db.execute("SELECT id, step, body FROM jobs ORDER BY number").fetchall()
    db.close()
    return rows


def remembered(daemon):
    with contextlib.closing(ts3d.Queue(str(daemon.queue), 1 << 30)) as queue:
        return queue.backfilled()


def window(api):
    """The range that the last list was asked for, in seconds since the epoch."""
    query = api.queries()[-1]
    return tuple(
        ts3d.time_argument(query.get(name) or query[other]) for name, other in (("from", "start"), ("until", "end"))
    )


@pytest.mark.parametrize(
    ("seconds", "events"), [(0.5, "yes"), pytest.param(5, "no", marks=pytest.mark.long)], ids=["0.5 s", "5 s"]
)
def test_500_alerts_of_which_some_are_there_already(make, s3, api, seconds, events):
    """Ten calls in so many seconds are allowed, and webhooks come meanwhile."""
    daemon = make(start=True, threatstack__events=events)
    missing = [n for n in range(500) if n % 5 > (2 if seconds < 1 else 0)]
    archive(s3, *set(range(500)) - set(missing))
    bodies = {}
    for n in range(500):
        entry = listed(n)
        api.lists["dismissed" if n % 4 == 1 else "active"].append(entry)
        minute = time.strftime("%Y/%m/%d/%H/%M", time.gmtime(entry[0] // 1000))
        bodies[f"backfill/{minute}/alert-{n:06}"] = entry[1]
    api.limit = (10, seconds)
    said = backfill(daemon, timeout=120)
    assert said == summary(500, archived=500 - len(missing), queued=len(missing))
    assert daemon.health()["queued"] > 100, "many wait, for the rate of calls is limited"
    assert daemon.post({"alerts": [alert(n) for n in range(9000, 9005)]})[0] == 200
    until(lambda: all(key_of(n) in s3.objects("alerts/") for n in range(9000, 9005)), what="webhooks' details")
    assert daemon.health()["queued"] > len(missing) - 100, "the webhooks' alerts did not wait for the others"
    assert api.limited > 0
    if seconds < 1:
        api.limit = None  # the rest is no different
    until(lambda: daemon.health()["queued"] == 0, 400, "end of the queue")
    assert daemon.health()["failed"] == 0
    assert s3.objects("backfill/") == {key: body for key, body in bodies.items() if int(key[-6:]) in missing}
    details = s3.objects("alerts/")
    assert set(details) == {key_of(n) for n in (*range(500), *range(9000, 9005))}
    assert all(details[key_of(n)] == threatstack.detail(f"alert-{n:06}") for n in missing)
    assert len(s3.objects("events/")) == (len(missing) + 5 if events == "yes" else 0)
    assert len(s3.objects("webhooks/")) == 5
    assert backfill(daemon) == summary(500, archived=500)


def test_an_outage_is_made_good(make, s3, api):
    """The daemon is down for a while, and Threat Stack drops the webhooks."""
    daemon = make(1, start=True)  # version 2: test_500_alerts_of_which_some_are_there_already
    api.lists["active"] = [listed(n, 1) for n in range(250)]

    def webhook(numbers):
        bodies = [dict(alert(n), created_at=api.lists["active"][n][0]) for n in numbers]
        assert daemon.post({"alerts": bodies})[0] == 200

    webhook(range(100))
    until(lambda: len(s3.objects("alerts/")) == 100)
    daemon.stop()
    daemon.start()
    webhook(range(220, 250))
    assert " 250 listed, " in backfill(daemon)
    until(lambda: daemon.health()["queued"] == 0)
    assert set(s3.objects("alerts/")) == {key_of(n) for n in range(250)}
    ids = {key[-6:]: body for key, body in s3.objects("backfill/").items()}
    assert {f"{n:06}" for n in range(100, 220)} <= set(ids)
    assert all(body == api.lists["active"][int(n)][1] for n, body in ids.items())
    assert backfill(daemon) == summary(250, archived=250)
    assert daemon.health()["queued"] == 0


def test_without_a_daemon(make, s3, api):
    """What is queued, by a webhook too, is not queued again; what is twice on a page is queued once."""
    daemon = make(archive__workers="0", start=True)
    daemon.post({"alerts": [alert(3)]})
    daemon.stop()
    api.lists["active"] = [listed(n) for n in (*range(51), *range(50, 150))]
    assert backfill(daemon) == summary(151, waiting=1, queued=149)
    found = [(f"alert-{n:06}", "backfill", api.lists["active"][n + (n >= 50)][1]) for n in range(150) if n != 3]
    assert queued(daemon)[1:] == found
    assert queued(daemon)[0][:2] == ("alert-000003", "webhooks")
    assert backfill(daemon) == summary(151, waiting=151)
    assert len(queued(daemon)) == 150
    daemon.set(archive__workers=None)
    daemon.start()
    until(lambda: len(s3.objects("alerts/")) == 150)


def test_put_queues_what_backfill_found_once(tmp_path):
    """Also where a webhook comes between backfill's look and its put."""

    def put(name, source, body):
        job = ts3d.Job(name, "2017/01/17/13/51", source, source, body)
        queue.put([job])
        return job.number

    with contextlib.closing(ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30, "here")) as queue:
        assert put("abcd", "webhooks", b"1") == put("abcd", "backfill", b"2")
        # The other way round it is two: each is to be archived as it came.
        assert put("efgh", "backfill", b"3") != put("efgh", "webhooks", b"4")


def test_a_failed_alert_is_tried_anew(make, s3, api):
    daemon = make(archive__give_up_after="0")
    api.modes["alert-000001"] = 404
    api.lists["active"] = [listed(n) for n in range(3)]
    daemon.start()
    backfill(daemon)
    until(lambda: daemon.health() | {"oldest_seconds": 0} == dict(success=True, queued=0, failed=1, oldest_seconds=0))
    api.modes.clear()
    assert backfill(daemon) == summary(3, archived=2, queued=1)
    until(lambda: len(s3.objects("alerts/")) == 3)
    until(lambda: daemon.health()["failed"] == 0)  # its figures are up to a second old


def test_the_prefix_is_where_it_looks(make, s3, api):
    daemon = make(s3__prefix="a/b")
    archive(s3, 0)
    path = s3.folder / BUCKET / "a/b" / key_of(1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}")
    api.lists["active"] = [listed(n) for n in range(2)]
    assert backfill(daemon) == summary(2, archived=1, queued=1)
    assert [id_ for id_, _, _ in queued(daemon)] == ["alert-000000"]


def test_alerts_that_are_dismissed_between_the_lists(make, s3, api):
    """One before the first list had it, one after that: it is listed twice."""
    daemon = make()
    api.lists["active"] = [listed(n) for n in range(250)]
    api.lists["dismissed"] = [listed(n) for n in range(250, 370)]

    def dismiss(handler):
        handler.succeed("alerts")
        if len(api.queries()) == 1:  # the first page has been given, the third has not
            api.lists["dismissed"][:0] = api.lists["active"].pop(230), api.lists["active"].pop(30)

    api.modes["alerts"] = dismiss
    assert backfill(daemon) == summary(371, waiting=1, queued=370)
    assert {id_ for id_, _, _ in queued(daemon)} == {f"alert-{n:06}" for n in range(370)}
    assert [query["status"] for query in api.queries()] == ["active"] * 3 + ["dismissed"] * 2
    assert len({(query["from"], query["until"]) for query in api.queries()}) == 1


@pytest.mark.parametrize(("version", "late"), [(1, False), (2, False), (1, True)])
def test_alerts_that_appear_meanwhile(make, s3, api, version, late):
    """New ones move no page. Version 1's pages go by count: one that is listed late, between others, moves them.

    What moves to the next page is seen twice, and queued once.
    """
    daemon = make(version)
    api.lists["active"] = [listed(n, version) for n in range(250)]

    def appear(handler):
        handler.succeed("alerts")
        n = 900 + len(api.queries())
        new = listed(n, version) if late else threatstack.entry(f"alert-{n:06}", now(), version)
        api.lists["active"].insert(0, new)

    api.modes["alerts"] = appear
    backfill(daemon)
    ids = [id_ for id_, _, _ in queued(daemon)]
    assert len(ids) == len(set(ids))
    expected = {f"alert-{n:06}" for n in range(250)}
    assert expected <= set(ids) if late else expected == set(ids)
    del api.modes["alerts"]
    new = len(api.queries())
    assert late or f", {new} queued" in backfill(daemon)


@pytest.mark.parametrize("version", VERSIONS)
def test_malformed_entries_are_named_and_stop_nothing(make, s3, api, version):
    daemon = make(version)
    time_of = b"createdAt" if version == 2 else b"created_at"
    bad = [b'{"id": "x", "%s": 1}', b'{"id": "no-time", "%s_": 1}', b'{"id": "bad-time", "%s": "soon"}', b'["%s"]']
    api.lists["active"] = [listed(n, version) for n in range(3)]
    api.lists["active"][1:1] = [(now() - HOUR, literal % time_of) for literal in bad]
    said = backfill(daemon, code=1)
    assert said == summary(7, queued=5, invalid=2)
    assert re.search(r'ERROR backfill: invalid alert id=x error="alerts\[\d\]\.id: ', backfill.said)
    for id_, what in (("no-time", "missing"), ("bad-time", ".*soon")):  # their detail can be had all the same
        assert re.search(rf'invalid alert id={id_} error="alerts\[\d\]\.{time_of.decode()}: {what}', backfill.said)
    assert remembered(daemon), "they would be no better the next time"
    daemon.start()
    until(lambda: len(s3.objects("alerts/")) == 5)


def test_one_that_fails_ends_at_once(make, s3, api, bucket):
    """S3 is not asked for the alerts that follow."""
    daemon = make(s3__endpoint_url=bucket.url)
    api.lists["active"] = [listed(n) for n in range(100)]
    bucket.mode = lambda handler: handler.send(403 if handler.path.endswith("05") else 404, b"")
    backfill(daemon, code=1, timeout=30)
    assert "s3:GetObject" in backfill.said
    assert len(bucket.calls) == 6
    assert queued(daemon) == []


@pytest.mark.parametrize(
    ("version", "answer"),
    [
        (1, b'[{"id": "alert-000000", "created_at": 1}]'),
        (1, b'{"alerts": []}'),
        (2, b'{"alerts": [], "token": "again"}'),
        (2, b'{"alerts": [], "token": 5}'),
        (2, b"[]"),
        (2, b'{"token": null}'),
        (2, b'{"alerts": {}, "token": null}'),
        (2, b'{"errors": ["x"]}'),
        (2, b"<html>"),
    ],
    ids=str,
)
def test_a_list_that_is_none_or_has_no_end(make, s3, api, clock, version, answer):
    daemon = make(version)
    api.modes["alerts"] = lambda handler: handler.send(200, answer)
    hurry(daemon, clock, 200)
    assert backfill(daemon, code=1).startswith("backfill failed: ")
    assert remembered(daemon) == 0


def test_tokens_are_kept_as_they_are(make, s3, api):
    daemon = make()
    tokens = iter([b'"a/b+c=&d"', b"17", b'""'])
    api.modes["alerts"] = lambda h: (
        h.is_signed() and h.send(200, b'{"alerts": [], "token": %s}' % next(tokens, b"null"))
    )
    backfill(daemon)
    assert [query.get("token") for query in api.queries()] == [None, "a/b+c=&d", "17", None]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2017-01-17T13:51:05Z", 1484661065),
        ("2017-01-17t13:51:05.250z", 1484661065.25),
        ("2017-01-17 14:51:05+01:00", 1484661065),
        ("2017-01-17T13:51:60Z", 1484661119),
        ("2017-01-17T13:51:05", 1484661065),
        ("2017-01-17T13:51", 1484661060),
        ("2017-01-17", 1484611200),
        ("1970-01-01", 0),
        ("90s", 1484661065 - 90),
        ("2h", 1484661065 - 7200),
        ("7d", 1484661065 - 7 * 86400),
        *(
            (text, None)
            for text in ("", "2", "h", "-2h", "2w", "1.5h", "yesterday", "2017-1-7", "2017-02-30", "20170117")
        ),
        *((text, None) for text in ("2017-01-17T25:00:00Z", "2017-01-17T13:51:99Z")),
        *(
            (text, None)
            for text in ("1969-12-31", "0000-01-01", "0001-01-01T00:00:00+01:00", "\u0662h", "2017-01-17\n")
        ),
    ],
)
def test_times(monkeypatch, text, seconds):
    monkeypatch.setattr(ts3d, "time", lambda: 1484661065.0)
    if seconds is None:
        with pytest.raises(argparse.ArgumentTypeError, match="nor a date such as"):
            ts3d.time_argument(text)
    else:
        assert ts3d.time_argument(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "yesterday"], "argument --from: 'yesterday' is not a time"),
        (["--until", "2017-02-30"], "argument --until: '2017-02-30' is not an ISO 8601 time"),
        (["--from", "1h", "--until", "2h"], "is not before"),
        (["--from", "2999-01-01"], "is not before"),
        (["--until", "0000-01-01"], "argument --until"),
        (["--since", "2h"], "unrecognized arguments"),
        (["2h"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_wrong_usage(make, api, arguments, says):
    daemon = make()
    backfill(daemon, *arguments, code=2)
    assert says in backfill.said
    assert api.calls == []


@pytest.mark.parametrize("version", VERSIONS)
def test_where_it_goes_on(make, s3, api, version):
    daemon = make(version)

    def run(*arguments, begin, end=None, code=0):
        """Begin and end are seconds before now, or moments."""
        at = time.time()
        backfill(daemon, *arguments, code=code)
        since, until_ = window(api)
        assert since == pytest.approx(begin if begin > 1e9 else at - begin, abs=20)
        assert until_ == pytest.approx(at - (end or 0), abs=20)
        return until_

    run("--from", "10m", begin=600)
    assert remembered(daemon) == 0  # the first that is remembered has seen a day
    first = run(begin=DAY)
    assert remembered(daemon) == pytest.approx(first, abs=0.01)
    second = run(begin=first - HOUR)
    assert remembered(daemon) == pytest.approx(second, abs=0.01)
    # A range that is named moves nothing.
    run("--from", "5d", "--until", "4d", begin=5 * DAY, end=4 * DAY)
    run("--from", "2h", "--until", "2999-01-01", begin=2 * HOUR)  # the end of which is now
    assert remembered(daemon) == pytest.approx(second, abs=0.01)

    def set_back(seconds):
        with sqlite3.connect(daemon.queue) as db:
            db.execute("UPDATE notes SET value = value - ? WHERE name = 'backfilled'", (seconds,))
        db.close()

    set_back(2 * DAY)
    # One that fails does not, and the next goes on from the same place.
    api.modes["alerts"] = 401
    run(begin=2 * DAY + HOUR, code=1)
    assert remembered(daemon) == pytest.approx(time.time() - 2 * DAY, abs=20)
    del api.modes["alerts"]
    run(begin=2 * DAY + HOUR)
    # What a clock of the future left is not believed.
    set_back(-9 * DAY)
    third = run(begin=DAY)
    assert remembered(daemon) == pytest.approx(third, abs=0.01)
    backfill(daemon, "--until", "2d", code=2)
    assert "is not before" in backfill.said


@pytest.mark.parametrize("option", ["threatstack__api_key", "s3__bucket", "threatstack__user_id"])
def test_what_it_needs(make, option):
    daemon = make()
    daemon.set(**{option: None})
    backfill(daemon, code=78)
    assert f"{option.partition('__')[2]} is not set" in backfill.said


def start(daemon, *arguments, **streams):
    command = daemon.command("backfill", *arguments)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, env=daemon.environment, text=True, **streams)


RATE_LIMITS = {  # the answer, and the seconds for which no call follows it
    "Retry-After": (lambda handler: handler.send(429, b"slow down", [("Retry-After", "2")]), 1.5),
    "reset": (lambda handler: handler.send(429, b"slow down", [("x-rate-limit-reset", "1500")]), 1.5),
    "429": (lambda handler: handler.send(429, b"slow down"), 0),
}
FAILURES = {
    **RATE_LIMITS,
    "503": (lambda handler: handler.send(503, b""), 0),
    "500": (lambda handler: handler.send(500, b""), 0),
    "garbage": (lambda handler: handler.send(200, b"<html>"), 0),
    "closed": (lambda handler: setattr(handler, "close_connection", True), 0),
}


@pytest.mark.parametrize(("version", "failure"), [(2, name) for name in FAILURES] + [(1, name) for name in RATE_LIMITS])
def test_calls_that_fail_slow_it(make, s3, api, version, failure):
    """A rate limit is kept to; what is no answer is asked for again."""
    fail, seconds = FAILURES[failure]
    daemon = make(version)
    api.lists["active"] = [listed(n, version) for n in range(150)]
    api.modes["alerts"] = lambda handler: fail(handler) if len(api.calls) in (1, 3) else handler.succeed("alerts")
    assert backfill(daemon) == summary(150, queued=150)
    times = [when for when, _, _ in api.calls]
    assert min(times[1] - times[0], times[3] - times[2]) >= seconds


def hurry(daemon, clock, speed=2000):
    """Its clocks go so fast that ten minutes take less than a second. Of version 2 no signature is in time then."""
    clock.use(daemon)
    clock.set(speed)
    daemon.set(threatstack__timeout="1h")


def never(handler):
    handler.send(429, b"slow down", [("Retry-After", "3600")])


PROBLEMS = {
    "503": (503, "503"),
    "429": (429, "429|rate"),
    "429, Retry-After": (never, "429|rate"),
    "reset": ("reset", "closed|broke"),
    "garbage": ("garbage", "JSON"),
}


@pytest.mark.parametrize("mode", PROBLEMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_without_progress_ends(make, s3, api, clock, version, mode):
    """With a reason, so that systemd's timer can start the next one."""
    daemon = make(version)
    hurry(daemon, clock)
    api.mode, says = PROBLEMS[mode]
    assert backfill(daemon, code=1) == summary(0, how="failed")
    (reason,) = [line for line in backfill.said.splitlines() if line.startswith("ts3d: ")]
    assert re.search(says, reason)
    assert len(api.calls) > 1 or mode == "429, Retry-After"
    assert remembered(daemon) == 0


@pytest.mark.parametrize("problem", ["1,000 queued", "full", "locked"])
def test_a_queue_that_lets_nothing_in_ends_the_run(make, s3, api, clock, problem):
    """No daemon runs, and the next one is not kept from its turn by a run that waits for ever."""
    daemon = make(1, start=True, queue__max_size="1M", archive__workers="0")
    if problem == "1,000 queued":
        assert daemon.post({"alerts": [alert(n) for n in range(9000, 10_000)]})[0] == 200
    elif problem == "full":
        numbers = itertools.count(9000)
        until(lambda: daemon.post({"alerts": [alert(next(numbers), text="x" * 20_000)]})[0] == 503)
    assert daemon.stop() == 0
    before = len(queued(daemon))
    hurry(daemon, clock)
    literal = b', "note": "%s"}' % (b"x" * 1000)
    api.lists["active"] = [(when, entry[:-1] + literal) for when, entry in (listed(n, 1) for n in range(100))]
    with contextlib.closing(sqlite3.connect(daemon.queue, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE" if problem == "locked" else "SELECT 1")
        assert backfill(daemon, code=1).startswith("backfill failed: ")
    (reason,) = [line for line in backfill.said.splitlines() if line.startswith("ts3d: ")]
    assert re.search({"1,000 queued": "1,?000", "full": "full|max_size", "locked": "lock"}[problem], reason)
    assert len(queued(daemon)) == before
    assert remembered(daemon) == 0


def test_a_run_with_progress_goes_on(make, s3, api, clock):
    """However slow: each page is refused for five minutes, ten pages for most of an hour."""
    daemon = make(1)
    hurry(daemon, clock, 500)
    api.lists["active"] = [listed(n, 1) for n in range(900)]
    began = []

    def limit(handler):
        began.append(time.monotonic())
        if began[-1] - began[0] < 300 / 500:
            handler.send(429, b"slow down", [("Retry-After", "20")])
        else:
            began.clear()
            handler.succeed("alerts")

    api.modes["alerts"] = limit
    assert backfill(daemon) == summary(900, queued=900)


@pytest.mark.parametrize(("left", "ends"), [(range(1300, 998, -1), True), (itertools.repeat(1000), False)])
def test_a_queue_that_drains_slowly_is_waited_for(monkeypatch, left, ends):
    """One alert every seven minutes; but ten minutes without one end the run."""
    clock, left = itertools.count(0, 200), iter(left)
    monkeypatch.setattr(ts3d, "monotonic", lambda: next(clock))
    monkeypatch.setattr(ts3d, "sleep", lambda _: None)
    queue = type("Queue", (), {"facts": property(lambda _: {"queued": next(left)})})()
    with contextlib.nullcontext() if ends else pytest.raises(ts3d.QueueError):
        ts3d.wait_for_room(queue)


@pytest.mark.parametrize("mode", [400, 401, 403, 404, 301])
def test_an_error_that_no_retry_can_help_ends_the_run_at_once(make, s3, api, mode):
    daemon = make(1 if mode == 404 else 2)  # of version 2 a 404 is an empty list
    api.modes["alerts"] = mode
    assert backfill(daemon, code=1) == summary(0, how="failed")
    assert re.search(rf"^ts3d: Threat Stack.* {mode}\b", backfill.said, re.MULTILINE)
    assert len(api.calls) == 1


def test_s3_is_unavailable_for_a_while(make, s3, api):
    daemon = make()
    api.lists["active"] = [listed(n) for n in range(30)]
    archive(s3, *range(10))
    s3.stop()
    process = start(daemon)
    until(lambda: len(api.queries()) >= 1)
    threading.Event().wait(3)  # it tries S3, and waits
    s3.start()
    assert process.communicate(timeout=60)[0] == summary(30, archived=10, queued=20)


def test_s3_stays_unavailable(make, s3, api, clock):
    daemon = make(1)
    hurry(daemon, clock)
    api.lists["active"] = [listed(n, 1) for n in range(30)]
    s3.stop()
    assert backfill(daemon, code=1) == summary(30, how="failed")
    assert re.search("^ts3d: S3.*Could not connect", backfill.said, re.MULTILINE)
    assert remembered(daemon) == 0
    clock.set()
    s3.start()
    assert " 30 queued" in backfill(daemon)


@pytest.mark.parametrize("listing", [200, 403])
def test_a_missing_permission_is_named(make, api, bucket, listing):
    daemon = make(s3__endpoint_url=bucket.url)
    api.lists["active"] = [listed(n) for n in range(30)]
    empty = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
    refuse = s3_error(403, "AccessDenied")
    bucket.mode = lambda h: h.send(200, empty) if h.command == "GET" and listing == 200 else refuse(h)
    assert backfill(daemon, code=1) == summary(30, how="failed")
    (line,) = [line for line in backfill.said.splitlines() if line.startswith("ts3d: ")]
    for word in ("s3:GetObject", "s3:ListBucket", "README"):
        assert word in line
    assert queued(daemon) == []
    assert remembered(daemon) == 0


@pytest.mark.parametrize("status", [301, 400, 404, 412])
def test_other_refusals_of_s3(make, api, bucket, status):
    """An answer to HEAD has no body that would say which it is: nothing but a 404 may be taken for a missing object."""
    daemon = make(s3__endpoint_url=bucket.url)
    api.lists["active"] = [listed(n) for n in range(30)]
    bucket.mode = s3_error(status, "Refused")
    assert backfill(daemon, code=status != 404)
    if status != 404:
        assert re.search("^ts3d: S3", backfill.said, re.MULTILINE)
    assert len(queued(daemon)) == (30 if status == 404 else 0)


def test_it_waits_while_the_queue_is_long(make, s3, api):
    daemon = make()
    queue = ts3d.Queue(str(daemon.queue), 1 << 30)
    queue.put([ts3d.Job(f"rejected-{n}", "2017/01/17/13/51", "rejected", "rejected", b"x") for n in range(1000)])
    api.lists["active"] = [listed(n) for n in range(150)]
    process = start(daemon)
    until(lambda: api.queries())
    threading.Event().wait(2)  # it waits
    assert process.poll() is None
    assert queue.read("SELECT queued FROM counts")[0][0] == 1000
    daemon.start()
    out, _ = process.communicate(timeout=60)
    assert out == summary(150, queued=150)
    queue.close()
    until(lambda: len(s3.objects("alerts/")) == 150)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["list", "S3"])
def test_it_is_stopped_and_goes_on(make, s3, api, bucket, sig, place):
    daemon = make(**({"s3__endpoint_url": bucket.url} if place == "S3" else {}))
    api.lists["active"] = [listed(n) for n in range(350)]
    server, enough, stuck = (api, 2, threading.Event()) if place == "list" else (bucket, 250, threading.Event())

    def hang(handler):
        if len(server.calls) > enough:
            stuck.set()
            server.released.wait(60)
            handler.close_connection = True
        else:
            handler.succeed(handler.path.rpartition("/")[2].partition("?")[0])

    server.mode = hang
    process = start(daemon)
    assert stuck.wait(30)
    process.send_signal(sig)
    out, error = process.communicate(timeout=10)
    assert process.returncode == 130
    count = "200" if place == "list" else r"\d+"
    assert re.fullmatch(rf"backfill (failed|stopped): {count} listed, 0 archived .* 200 queued, .*\n", out)
    assert "Traceback" not in error
    assert remembered(daemon) == 0
    api.mode = bucket.mode = None
    if place == "list":
        assert backfill(daemon) == summary(350, waiting=200, queued=150)
        daemon.start()
        until(lambda: daemon.health()["queued"] == 0)
        assert len(s3.objects("backfill/")) == len(s3.objects("alerts/")) == 350


def test_killed_at_any_moment_it_loses_and_repeats_nothing(make, s3, api):
    daemon = make()
    api.lists["active"] = [listed(n) for n in range(900)]
    for n in range(4):
        process = start(daemon)
        until(lambda n=n: len(queued(daemon)) > 200 * n)
        process.kill()
        process.communicate()
    backfill(daemon)
    assert backfill.said == "", "progress is for a terminal"
    assert sorted(id_ for id_, _, _ in queued(daemon)) == [f"alert-{n:06}" for n in range(900)]


def test_progress_on_a_terminal(make, s3, api):
    daemon = make()
    api.lists["active"] = [listed(n) for n in range(250)]
    api.modes["alerts"] = lambda h: (
        h.send(429, b"", [("Retry-After", "1")]) if len(api.calls) == 2 else h.succeed("alerts")
    )
    ours, theirs = pty.openpty()
    process = start(daemon, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # EIO: the other end is closed
        pass
    os.close(ours)
    assert process.wait(30) == 0
    lines = seen.decode().split("\r\n")
    assert lines[-2].endswith(summary(250, queued=250).rstrip())
    assert re.search("\r[^\n]*100 listed, 0 archived already, 0 queued already, 100 queued", seen.decode())
    assert len(lines) <= 4, "what range, perhaps a wait, and a line that is written again and again"
    assert all(len(part.rpartition("\x1b[K")[2]) < 80 for part in lines[1].split("\r"))


@pytest.mark.long
def test_ten_thousand_alerts_take_no_more_memory(make, api, bucket):
    memory = []
    for n in (200, 10_000):
        daemon = make(s3__endpoint_url=bucket.url)
        api.lists["active"] = [listed(n) for n in range(n)]
        for _, literal in api.lists["active"]:
            name = json.loads(literal)["id"]
            bucket.objects[f"/{BUCKET}/alerts/al/er/{name}"] = b""
        process = start(daemon)
        out = process.stdout.read()
        memory.append(os.wait4(process.pid, 0)[2].ru_maxrss)
        assert out == summary(n, archived=n)
    assert memory[1] - memory[0] < 8 << 10  # kB
