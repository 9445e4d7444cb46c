"""API version 2: Hawk's signatures, contributing events, the clock, and the rate limit of both versions."""

import re
import time
from types import SimpleNamespace

import mohawk
import pytest
import threatstack
from conftest import alert, until
from threatstack import HAWK, KEY, ORGANIZATION, USER

import ts3d


@pytest.fixture
def v2(new_daemon, api):
    def make(**options):
        return new_daemon(**{"threatstack__base_url": f"{api.url}/v2", **HAWK, **options})

    yield make
    assert api.misused == []


def objects_of(id_, minute, *kinds):
    middle = f"{id_[:2]}/{id_[2:4]}"
    return {f"{kind}/{minute if kind in ('webhooks', 'backfill') else middle}/{id_}" for kind in kinds}


MINUTE = "2017/01/17/13/51"


@pytest.mark.parametrize(
    "url",
    [
        "https://api.threatstack.com/v2/alerts/587c0159a907346eccb84004",
        "https://API.ThreatStack.com:443/v2/alerts",
        "https://api.threatstack.com:8443/v2/alerts?status=active&from=2026-11-24T18%3A00%3A00.000Z&token=a%2Fb%3D%3D",
        "http://127.0.0.1/help/hawk/self-test",
        "http://127.0.0.1:8080/v2/alerts",
    ],
)
def test_the_signature(url):
    config = SimpleNamespace(user_id=USER, api_key=KEY, organization_id=ORGANIZATION)
    credentials, seen = {USER: {"id": USER, "key": KEY, "algorithm": "sha256"}}, []
    for _ in range(2):
        header = ts3d.hawk(config, url)
        receiver = mohawk.Receiver(
            credentials.get, header, url, "GET", content="", content_type="", seen_nonce=lambda *_: False
        )
        assert receiver.parsed_header["ext"] == ORGANIZATION
        assert KEY not in header
        assert "hash" not in receiver.parsed_header
        seen.append(receiver.parsed_header["nonce"])
    assert seen[0] != seen[1]


def test_each_try_is_signed_anew(v2, s3, api):
    """The stand-in refuses a nonce that it has seen."""
    daemon = v2(server__wait="0")
    tries = iter([503, "reset", 429, None])

    def fail_at_first(handler):
        mode = next(tries, None)
        if handler.is_signed():
            handler.send(mode, b"{}") if isinstance(mode, int) else mode or handler.send(
                200, threatstack.detail("abcd")
            )
        handler.close_connection = True

    api.modes["abcd"] = fail_at_first
    daemon.post({"id": "abcd", "created_at": 0})
    until(lambda: "alerts/ab/cd/abcd" in s3.objects())
    headers = [headers["Authorization"] for _, path, headers in api.calls if path.endswith("/abcd")]
    assert len(headers) == len(set(headers)) == 4


@pytest.mark.parametrize("events", ["yes", "no"])
def test_detail_and_events_byte_for_byte(v2, s3, api, events):
    daemon = v2(threatstack__events=events)
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    id_ = alert(0)["id"]
    kinds = ("webhooks", "events", "alerts") if events == "yes" else ("webhooks", "alerts")
    objects = s3.objects()
    assert set(objects) == objects_of(id_, MINUTE, *kinds)
    assert objects[f"alerts/al/er/{id_}"] == threatstack.detail(id_)
    assert objects.get(f"events/al/er/{id_}", threatstack.events(id_)) == threatstack.events(id_)
    assert api.paths() == [f"/v2/alerts/{id_}/events"] * (events == "yes") + [f"/v2/alerts/{id_}"]


def test_version_1_has_no_events(new_daemon, s3, api):
    daemon = new_daemon(threatstack__organization_id=ORGANIZATION)
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    assert set(s3.objects()) == objects_of(alert(0)["id"], MINUTE, "webhooks", "alerts")
    (call,) = api.calls
    assert (call[2]["Authorization"], call[2]["Organization"]) == (KEY, ORGANIZATION)


def test_the_detail_is_written_last(v2, bucket):
    daemon = v2(s3__endpoint_url=bucket.url)
    assert daemon.post({"alerts": [alert(n) for n in range(20)]})[0] == 200
    until(lambda: len(bucket.objects) == 60)
    for n in range(20):
        kinds = [path.split("/")[2] for path in bucket.paths() if path.endswith(alert(n)["id"])]
        assert kinds == ["webhooks", "events", "alerts"]


def test_without_its_events_no_detail_is_written(v2, s3, api):
    daemon = v2(server__wait="0")
    answers = (200, b'{"errors": ["x"]}'), (200, b'"later"'), (200, b"{}"), (200, b""), (403, b"{}"), (500, b"")
    for n, answer in enumerate(answers):
        api.modes["events"] = lambda handler, answer=answer: handler.send(*answer)
        id_, begin = alert(n)["id"], len(daemon.log())
        daemon.post({"alerts": [alert(n, created_at=alert()["created_at"])]})
        until(lambda: daemon.logged(f"threatstack unavailable: |will be retried id={id_} ", begin))  # noqa: B023
        kept = {key for key in s3.objects() if id_ in key}
        assert kept == objects_of(id_, MINUTE, "webhooks"), answer
        del api.modes["events"]
        until(lambda: len(s3.objects()) == 3 * (n + 1))  # noqa: B023


@pytest.mark.parametrize(
    ("answer", "says"), [((404, b""), "events"), ((200, b'{"events": [{}], "token": "next"}'), "more events")]
)
def test_events_that_the_api_does_not_give_are_said(v2, s3, api, answer, says):
    """It answers 404 for them, or gives a token for the next page: there is no way to ask for that."""
    daemon = v2()
    api.modes["events"] = lambda handler: handler.send(*answer)
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    kinds = ["webhooks", "alerts", *["events"] * (answer[0] == 200)]
    assert set(s3.objects()) == objects_of(alert(0)["id"], MINUTE, *kinds)
    assert daemon.logged(f"WARNING [^\n]*alert-000000[^\n]*{says}|WARNING [^\n]*{says}[^\n]*alert-000000")


def test_events_are_not_missed_while_the_api_lags_behind(v2, s3, api):
    """There is neither detail nor events at first."""
    daemon = v2(server__wait="0")
    api.modes["events"] = api.modes["alert-000000"] = 404
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.logged("will be retried id=alert-000000 "))
    assert s3.objects("alerts/") == {}
    api.modes.clear()
    until(lambda: daemon.health()["queued"] == 0)
    assert set(s3.objects()) == objects_of(alert(0)["id"], MINUTE, "webhooks", "events", "alerts")


def test_events_need_not_name_the_alert(v2, s3, api):
    daemon = v2()
    for n, events in enumerate((b"[]", b'{"events": []}', b'[{"id": "another"}]', b'{"id": "another"}')):
        api.modes["events"] = lambda handler, events=events: handler.send(200, events)
        assert daemon.post({"alerts": [alert(n)]})[1]["alerts"][0]["state"] == "archived"
        assert s3.objects()[f"events/al/er/alert-{n:06}"] == events


def test_events_that_are_there_are_not_asked_for_again(v2, s3, api):
    daemon = v2(server__wait="0")
    api.modes["alert-000000"] = 500
    daemon.post({"alerts": [alert(0)]})
    until(lambda: len(s3.objects()) == 2)
    until(lambda: api.paths().count("/v2/alerts/alert-000000") > 1)
    assert daemon.stop() == 0
    api.modes.clear()
    daemon.start()
    until(lambda: len(s3.objects()) == 3)
    assert api.paths().count("/v2/alerts/alert-000000/events") == 1


@pytest.mark.parametrize("change", [{"threatstack__events": "no"}, {"threatstack__auth": "key"}], ids=str)
def test_a_queued_alert_goes_by_the_configuration_of_the_day(v2, s3, api, change):
    """Whichever way that changes while the alert waits for the API."""
    daemon = v2(server__wait="0")
    api.mode = 503
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.logged("threatstack unavailable: |will be retried id=alert-000000 "))
    until(lambda: len(s3.objects("webhooks/")) == 1)
    before = {name: daemon.options.get(tuple(name.split("__"))) for name in change}
    if "threatstack__auth" in change:
        change = {**change, "threatstack__base_url": f"{api.url}/api/v1"}
        before["threatstack__base_url"] = f"{api.url}/v2"
    daemon.restart(**change)
    daemon.post({"alerts": [alert(1)]})
    until(lambda: daemon.health()["queued"] == 2)
    api.mode = None
    until(lambda: daemon.health()["queued"] == 0)
    assert len(s3.objects("alerts/")) == 2
    assert s3.objects("events/") == {}

    api.mode = 503
    daemon.post({"alerts": [alert(2)]})
    until(lambda: daemon.health()["queued"] == 1)
    daemon.restart(**before)
    api.mode = None
    until(lambda: len(s3.objects("alerts/")) == 3)
    assert set(s3.objects("events/")) == {"events/al/er/alert-000002"}


@pytest.mark.parametrize("ahead", [0, 50, 100, -3600])
def test_a_401_names_all_that_may_be_wrong(v2, api, ahead):
    """A real Hawk server refuses a clock that is wrong by a minute just as it does a wrong key."""
    api.ahead = ahead
    daemon = v2(server__wait="0", **({"threatstack__api_key": "wrong"} if ahead in (0, 50) else {}))
    daemon.post({"alerts": [alert(0)]})
    line = until(lambda: daemon.logged("threatstack unavailable: .*"))[0]
    for word in ("401", "user_id", "api_key", "organization_id", "clock"):
        assert word in line
    api.misused.clear()


def test_a_clock_that_is_wrong_by_less_than_a_minute(v2, s3, api):
    api.ahead = 50
    assert v2().post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"


def test_check_asks_for_hawks_self_test(v2, s3, api):
    daemon = v2(start=False)
    result = daemon.run("check")
    assert (result.returncode, "FAIL" in result.stdout, api.paths()[0]) == (0, False, "/help/hawk/self-test")
    assert re.search(r"^ok +threatstack +http\S+/v2", result.stdout, re.MULTILINE)
    (query,) = api.queries()
    assert (query["status"], query["from"] < query["until"]) == ("active", True)


NO_ALERTS = [(404, b'{"errors": ["not found"]}'), (200, b'{"alerts": null, "token": null}'), (200, b'{"alerts": []}')]


@pytest.mark.parametrize("listed", [None, "active", "dismissed"])
def test_lists_without_alerts(v2, s3, api, listed):
    """However the API says it, of both or of one: `check` and `backfill` take it as an empty list."""
    daemon = v2()
    for status, body in NO_ALERTS:
        name = f"half-{listed}-{status}-{len(body)}"  # S3's stand-in remembers what was there
        if listed:
            api.lists[listed] = [threatstack.entry(name, int(time.time() * 1000) - 60_000)]

        def answer(handler, status=status, body=body):
            if listed and f"status={listed}" in handler.path:
                handler.succeed("alerts")
            elif handler.is_signed():
                handler.send(status, body)

        api.modes["alerts"] = answer
        result = daemon.run("check")
        assert (result.returncode, "FAIL" in result.stdout) == (0, False), result.stdout
        api.calls.clear()
        result = daemon.run("backfill")
        assert (result.returncode, f"{int(bool(listed))} listed" in result.stdout) == (0, True), result
        assert {query["status"] for query in api.queries()} == {"active", "dismissed"}
        until(lambda: not listed or f"alerts/ha/lf/{name}" in s3.objects())  # noqa: B023


@pytest.mark.parametrize("auth", ["key", "hawk"])
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"errors": ["slow down"]}', [("Retry-After", "2")]),
        (b"slow down", [("x-rate-limit-reset", "2000"), ("x-rate-limit-remaining", "0")]),
    ],
    ids=["Retry-After", "x-rate-limit-reset"],
)
def test_a_rate_limit_delays_every_call_and_nothing_else(v2, new_daemon, s3, api, auth, body, headers):
    daemon = (v2 if auth == "hawk" else new_daemon)(server__wait="0")
    limited = []

    def limit_once(handler):
        if limited and time.monotonic() - limited[0] >= 2:
            handler.succeed(handler.path.rpartition("/")[2])
        else:
            limited.append(time.monotonic())
            handler.send(429, body, headers)

    api.mode = limit_once
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.logged("threatstack unavailable: .*429"))
    daemon.post({"alerts": [alert(n) for n in range(1, 20)]})
    until(lambda: len(s3.objects("webhooks/")) == 20)
    assert len(limited) == 1, "webhooks are in S3 while no call is made"
    until(lambda: daemon.health()["queued"] == 0)
    assert len(limited) == 1, "the 429 was obeyed"
    assert len(s3.objects()) == (60 if auth == "hawk" else 40)


def test_a_limit_of_calls_in_a_time_is_kept_to(v2, s3, api):
    """Each call that is refused for it is made again, and no alert is marked failed."""
    api.limit = (10, 0.5)
    daemon = v2(server__wait="0")
    daemon.post({"alerts": [alert(n) for n in range(40)]})
    until(lambda: len(s3.objects("alerts/")) == 40, 40)
    until(lambda: daemon.health()["queued"] == 0)
    assert daemon.health()["failed"] == 0
    assert api.limited > 0
    assert len(s3.objects("events/")) == 40
