"""/metrics: what each number counts, who may ask, and the README's rules, each of which fires in the bad case alone."""

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import promql_parser
import pytest
import yaml
from conftest import ROOT, TOKEN, alert, until
from prometheus_client.parser import text_string_to_metric_families
from test_http import CLOSE, message, talk

import ts3d


def ask(place, path="/metrics", method="GET", headers=()):
    """Status, headers and text of one answer, at an address, at a Unix socket's path, or through a socket."""
    connection = http.client.HTTPConnection("localhost")
    if isinstance(place, tuple):
        place = socket.create_connection(place)
    elif isinstance(place, str):
        path_of_socket, place = place, socket.socket(socket.AF_UNIX)
        place.connect(path_of_socket)
    place.settimeout(30)
    with place:
        connection.sock = place
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def read(text):
    """Values by sample, as `name{label="value"}`, labels sorted. Each metric has a type and says what it is."""
    values = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("counter", "gauge", "summary"), family
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in values
            assert math.isfinite(sample.value)
            values[key] = sample.value
    return values


def fell(before, after):
    """The counters that went back, or away."""
    counters = [key for key in before if re.search(r"_(total|sum|count)(\{|$)", key)]
    return [key for key in counters if after.get(key, -1) < before[key]]


@pytest.fixture
def idle(new_daemon):
    """A daemon that archives nothing."""
    return new_daemon(archive__workers="0", server__listen="0.0.0.0:0", log__level="DEBUG")


@pytest.fixture
def scrape():
    """What a daemon's /metrics says; no counter of it may ever go back."""
    seen = {}

    def look(daemon):
        status, _, text = ask(daemon.address)
        assert status == 200
        values, process = read(text), daemon.process
        assert fell(seen.get(process.pid, {}), values) == []
        seen[process.pid] = values
        return values

    return look


def statuses(values):
    """How many webhooks were answered with each status."""
    found = {key: value for key, value in values.items() if key.startswith("ts3d_webhooks_total")}
    return {int(re.search('status="([0-9]+)"', key)[1]): value for key, value in found.items() if value}


def retries(values, upstream):
    return values[f'ts3d_retries_total{{upstream="{upstream}"}}']


def unavailable(values):
    """The upstreams that are."""
    found = {name: values[f'ts3d_upstream_unavailable{{upstream="{name}"}}'] for name in ("s3", "threatstack")}
    return [name for name, value in found.items() if value]


def is_at_rest(daemon):
    return daemon.health()["queued"] == 0


def test_what_a_new_daemon_says(idle, scrape):
    """All that there is from the start: a rate needs to see the 0 before the 1."""
    status, headers, text = ask(idle.address)
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    names = re.findall(r"(?m)^\w+", ts3d.METRICS)
    assert re.findall("^# HELP ([a-z0-9_]+) .*\n# TYPE \\1 [a-z]+\n\\1", text, re.MULTILINE) == names
    values = scrape(idle)
    build = next(key for key in values if key.startswith("ts3d_build_info"))
    assert re.fullmatch(r'ts3d_build_info\{.*version="[0-9.]+"\}', build)
    assert ts3d.VERSION in build
    said = {
        **{f'ts3d_webhooks_total{{status="{n}"}}': 0 for n in (200, 400, 401, 404, 405, 408, 413, 415, 431, 500, 503)},
        **{f"ts3d_alerts_{what}_total": 0 for what in ("received", "archived", "rejected", "failed")},
        **{f"ts3d_{what}_seconds_{of}": 0 for what in ("acknowledgement", "archive") for of in ("sum", "count")},
        **{f'ts3d_upstream_unavailable{{upstream="{name}"}}': 0 for name in ("s3", "threatstack")},
        **{f'ts3d_retries_total{{upstream="{name}"}}': 0 for name in ("s3", "threatstack")},
        **{f"ts3d_queue_{what}": 0 for what in ("depth", "failed", "oldest_age_seconds")},
        "ts3d_queue_max_size_bytes": 1 << 30,
        build: 1,
    }
    assert {key: values[key] for key in said} == said
    more = {"process_start_time_seconds", "ts3d_queue_size_bytes", "ts3d_queue_disk_free_bytes"}
    assert values.keys() - said.keys() == more
    assert scrape(idle.restart())["process_start_time_seconds"] > values["process_start_time_seconds"] > 1.7e9


def test_a_webhook_for_which_there_is_no_room(new_daemon, scrape):
    """It says nothing of others."""
    daemon = new_daemon(queue__max_size="100K", archive__workers="0", server__wait="0")
    assert daemon.post({"alerts": [alert(0, text="x" * 200_000)]})[0] == 503
    values = scrape(daemon)
    assert statuses(values) == {503: 1}
    assert values["ts3d_alerts_received_total"] == values["ts3d_acknowledgement_seconds_count"] == 0
    assert daemon.request("GET", "/healthz")[0] == 200
    assert daemon.post({"alerts": [alert(0)]})[0] == 200


def test_alerts_are_counted(daemon, s3, scrape):
    """A body that is kept under rejected/ is no alert."""
    bodies = [
        {"alerts": [alert(0), alert(1), 1, 2, {"id": "abcd"}]},
        alert(2),
        {"alerts": [None]},
        {"alerts": []},
        b"nonsense",
    ]
    received = archived = 0
    for body in bodies:
        states = daemon.post(body)[1].get("alerts", [])
        received += sum(state["state"] != "rejected" for state in states)
        archived += sum(state["state"] == "archived" for state in states)
        values = scrape(daemon)
        # What the answer says is counted already.
        assert (values["ts3d_alerts_received_total"], values["ts3d_alerts_archived_total"]) == (received, archived)
    until(lambda: len(s3.objects("rejected/")) == 3 and is_at_rest(daemon))
    values = scrape(daemon)
    for name, expected in {"received": 3, "archived": 3, "rejected": 4, "failed": 0}.items():
        assert values[f"ts3d_alerts_{name}_total"] == expected, name
    assert (values["ts3d_acknowledgement_seconds_count"], values["ts3d_archive_seconds_count"]) == (5, 3)
    assert values["ts3d_acknowledgement_seconds_sum"] > 0
    assert values["ts3d_archive_seconds_sum"] > 0


def test_archived_is_there_when_it_is_said(daemon, s3, scrape):
    """An answer that waits for the job's end is sent once it is in S3, in the log and in the counters."""
    for n in range(30):
        [state] = daemon.post({"alerts": [alert(n)]})[1]["alerts"]
        assert state["state"] == "archived"
        assert f"alerts/al/er/alert-{n:06}" in s3.objects()
        assert daemon.logged(f"archived id=alert-{n:06} ")
        values = scrape(daemon)
        assert values["ts3d_alerts_archived_total"] == values["ts3d_archive_seconds_count"] == n + 1


def test_an_alert_that_fails_for_good_and_is_tried_anew(new_daemon, api, scrape):
    daemon = new_daemon(server__wait="0", archive__give_up_after="0.1")
    api.modes["alert-000000"] = 404
    daemon.post({"alerts": [alert(0)]})
    until(lambda: daemon.health()["failed"])
    values = scrape(daemon)
    assert [values[f"ts3d_queue_{name}"] for name in ("failed", "depth", "oldest_age_seconds")] == [1, 0, 0]
    assert (values["ts3d_alerts_failed_total"], values["ts3d_alerts_archived_total"]) == (1, 0)
    [line] = re.findall("ERROR alert marked failed(.*)", daemon.log())
    for pattern in (" id=alert-000000 ", " tries=[1-9]", ' error="Threat Stack: 404'):
        assert re.search(pattern, line)
    assert not daemon.logged(" archived id=")
    api.modes.clear()
    assert daemon.run("retry").stdout == "1 queued again\n"
    until(lambda: scrape(daemon)["ts3d_alerts_archived_total"] == 1)
    until(lambda: scrape(daemon)["ts3d_queue_failed"] == 0)
    assert scrape(daemon)["ts3d_alerts_failed_total"] == 1


def answers(method, status, body):
    """An answer to requests of one method alone: GET is Threat Stack's, PUT S3's, which share a place."""

    return lambda handler: handler.send(status, body) if handler.command == method else handler.succeed("alert-000000")


SLOW_DOWN = b"<Error><Code>Slow&#34;Down}\n</Code><Message>because</Message></Error>"


@pytest.mark.parametrize(
    ("mode", "upstream"),
    [
        (answers("GET", 500, b""), "threatstack"),
        (answers("GET", 200, b"<html>"), "threatstack"),
        (answers("PUT", 503, SLOW_DOWN), "s3"),
    ],
)
def test_retries_by_upstream(new_daemon, api, scrape, mode, upstream):
    """Another program's words are no labels: they would be without number, and could break the page."""
    daemon = new_daemon(server__wait="0", s3__endpoint_url=api.url)
    api.modes["alert-000000"] = mode
    daemon.post({"alerts": [alert(0)]})
    values = until(lambda: retries(v := scrape(daemon), upstream) and v)
    assert retries(values, {"s3": "threatstack", "threatstack": "s3"}[upstream]) == 0
    assert len([key for key in values if key.startswith("ts3d_retries_total")]) == 2
    api.modes.clear()
    until(lambda: scrape(daemon)["ts3d_alerts_archived_total"] == 1)


@pytest.mark.parametrize(("upstream", "other"), [("s3", "threatstack"), ("threatstack", "s3")])
def test_an_upstream_is_unavailable_and_recovers(new_daemon, s3, api, scrape, upstream, other):
    daemon = new_daemon(server__wait="0")
    if upstream == "s3":
        s3.stop()
    api.mode = 401 if upstream == "threatstack" else None
    daemon.post({"alerts": [alert(0)]})
    until(lambda: unavailable(scrape(daemon)) == [upstream])
    until(lambda: retries(scrape(daemon), upstream))
    api.mode = None
    if upstream == "s3":
        s3.start()
    until(lambda: is_at_rest(daemon))
    values = scrape(daemon)
    assert (unavailable(values), retries(values, other)) == ([], 0)
    assert values["ts3d_alerts_archived_total"] == 1


def test_the_queue(new_daemon, scrape):
    daemon = new_daemon(server__wait="0", archive__workers="0", queue__max_size="10M")
    sizes = []
    for n in range(3):
        daemon.post({"alerts": [alert(n, text="x" * 1_000_000)]})
        values = scrape(daemon)
        assert values["ts3d_queue_depth"] == n + 1
        sizes.append(values["ts3d_queue_size_bytes"])
    assert 1_000_000 < sizes[0] < sizes[1] < sizes[2] < values["ts3d_queue_max_size_bytes"] == 10 << 20
    assert values["ts3d_queue_disk_free_bytes"] > 16 << 20
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
        db.execute("UPDATE jobs SET received = received - 5000 WHERE number < 3")
        db.execute("UPDATE jobs SET received = received - 2000, failed = 1 WHERE number = 1")
    values = until(lambda: (v := scrape(daemon))["ts3d_queue_failed"] and v)
    assert (values["ts3d_queue_depth"], values["ts3d_queue_failed"]) == (2, 1)
    assert 5000 <= values["ts3d_queue_oldest_age_seconds"] < 7000  # one that has failed does not wait


def test_scrapes_under_load_are_whole_and_nothing_is_lost(new_daemon, s3):
    daemon = new_daemon(server__wait="0")
    done = threading.Event()

    def watch(_):
        before, looks = {}, 0
        while not done.is_set():
            values = read(ask(daemon.address)[2])
            assert fell(before, values) == []
            assert sum(statuses(values).values()) <= values["ts3d_acknowledgement_seconds_count"]
            before, looks = values, looks + 1
        return looks

    def send(client):
        return {daemon.post({"alerts": [alert(client * 100 + n), 1]})[0] for n in range(20)}

    with ThreadPoolExecutor(9) as pool:
        looks = [pool.submit(watch, n) for n in range(4)]
        try:
            assert list(pool.map(send, range(5))) == [{200}] * 5
            until(lambda: is_at_rest(daemon), 60)
        finally:
            done.set()
        assert min(look.result() for look in looks) > 3
    values = read(ask(daemon.address)[2])
    assert statuses(values) == {200: 100}
    for name in ("alerts_received_total", "alerts_archived_total", "alerts_rejected_total"):
        assert values[f"ts3d_{name}"] == 100, name
    for name in ("acknowledgement_seconds_count", "archive_seconds_count"):
        assert values[f"ts3d_{name}"] == 100, name


def assert_refused(answer):
    status, headers, text = answer
    assert (status, json.loads(text)["error"]["type"]) == (401, "unauthorized")
    assert headers["WWW-Authenticate"].startswith("Bearer")
    assert "ts3d_" not in text


def test_head_and_other_methods(idle):
    status, headers, text = ask(idle.address, method="HEAD")
    assert (status, text, headers["Content-Type"].partition(";")[0]) == (200, "", "text/plain")
    assert int(headers["Content-Length"]) > 1000
    assert talk(idle, message([CLOSE], method="HEAD", path="/metrics")).endswith(b"\r\n\r\n")
    status, headers, _ = ask(idle.address, method="POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert ask(idle.address, "http://example.com/metrics?name[]=up")[0] == 200


def test_without_a_token_it_is_for_this_machine(idle, elsewhere):
    port = idle.address[1]
    assert ask(("127.0.0.1", port))[0] == 200
    assert ask(("127.8.9.10", port))[0] == 200
    for token in ("", TOKEN):
        assert_refused(ask((elsewhere, port), f"/metrics?token={token}"))
        assert_refused(ask((elsewhere, port), headers={"Authorization": f"Bearer {token}"}))
    assert_refused(ask((elsewhere, port), headers={"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}))
    assert ask((elsewhere, port), method="HEAD")[0] == 401
    assert ask((elsewhere, port), "/healthz")[0] == 200


def test_ipv4_within_ipv6(new_daemon, listener, elsewhere):
    daemon = new_daemon(start=False, archive__workers="0", log__level="DEBUG")
    daemon.handed = [listener("[::]:0")]
    daemon.start()
    port = daemon.handed[0].getsockname()[1]
    for host in ("127.0.0.1", "::1"):
        assert ask((host, port))[0] == 200
    assert daemon.logged("DEBUG GET /metrics 200 .*client=::ffff:127.0.0.1")
    assert_refused(ask((elsewhere, port)))


def test_a_unix_socket_is_of_this_machine(new_daemon, listener, tmp_path):
    """Also where the client has given its own end a name."""
    daemon = new_daemon(start=False, archive__workers="0", log__level="DEBUG")
    daemon.handed = [listener(str(tmp_path / "sock"))]
    daemon.start()
    for n, name in enumerate((None, str(tmp_path / "client"), f"\0{tmp_path}/client"), 1):
        client = socket.socket(socket.AF_UNIX)
        if name:
            client.bind(name)
        client.connect(str(tmp_path / "sock"))
        assert ask(client)[0] == 200
        until(lambda n=n: len(re.findall("GET /metrics 200 .*client=local", daemon.log())) == n)


def test_with_a_token_it_is_for_who_has_it(new_daemon, listener, elsewhere, tmp_path):
    options = {"server__metrics_token": "for+the+metrics/==", "server__listen": "0.0.0.0:0"}
    daemon = new_daemon(start=False, archive__workers="0", **options)
    path = str(tmp_path / "sock")
    daemon.handed = [listener(path), listener("0.0.0.0:0")]
    daemon.start()
    port = daemon.handed[1].getsockname()[1]
    for place in (("127.0.0.1", port), (elsewhere, port), path):
        for token in ("for+the+metrics/==", "for%2Bthe%2Bmetrics%2F%3D%3D"):
            assert ask(place, f"/metrics?token={token}")[0] == 200
        assert ask(place, headers={"Authorization": "bearer for+the+metrics/=="})[0] == 200
        assert ask(place, method="HEAD", headers={"Authorization": "Bearer for+the+metrics/=="})[0] == 200
        assert_refused(ask(place))
        for token in ("", "wrong", "for+the+metrics/=", TOKEN):  # nor does the webhooks' open it
            assert_refused(ask(place, f"/metrics?token={token}"))
            assert_refused(ask(place, headers={"Authorization": f"Bearer {token}"}))
    daemon.address = ("127.0.0.1", port)
    assert daemon.post({"alerts": []}, "for+the+metrics/==")[0] == 401
    assert "for+the+metrics" not in daemon.log()


def test_each_token_is_compared_in_constant_time(monkeypatch):
    """All of them, also where the first is right."""
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(ts3d.hmac, "compare_digest", compare)
    handler = ts3d.Handler.__new__(ts3d.Handler)
    handler.path, handler.fields = "/metrics?token=a&token=b", {"authorization": "Bearer c"}
    handler.server = SimpleNamespace(config=SimpleNamespace(metrics_token="a\nb"))
    handler.authorize("metrics_token")
    assert sorted(compared) == [(a, b) for a in (b"a", b"b") for b in (b"a", b"b", b"c")]


RULES = (ROOT / "systemd" / "ts3d.rules.yml").read_text()
SCRAPING = re.search(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]}


def promtool(*arguments, **more):
    """Its output, once it has nothing to find fault with."""
    if not shutil.which("promtool"):
        pytest.skip("no promtool (Debian's package prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def selectors(expr):
    """The vector selectors of an expression."""
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(expr), visit)
    return found


def test_what_the_rules_ask_for_is_there(idle):
    """Each metric, and each label that a rule selects by or names in its words."""
    text = ask(idle.address)[2]
    labels = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(ALERTS) == RULES.count("- alert: ") > 8
    for name, rule in ALERTS.items():
        assert re.fullmatch("Ts3d[A-Za-z]+", name)
        assert rule["annotations"]["summary"]
        asked = selectors(rule["expr"])
        assert asked, name
        for selector in asked:
            assert selector.name in labels, name
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= labels[selector.name] | {"job"}, name
        named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert named <= labels[asked[0].name], name


def test_promtool_finds_no_fault(new_daemon, tmp_path, api):
    (tmp_path / "rules.yml").write_text(RULES)
    assert "rule_files: [/usr/local/lib/ts3d/ts3d.rules.yml]" in SCRAPING
    (tmp_path / "prometheus.yml").write_text(SCRAPING.replace("/usr/local/lib/ts3d/ts3d.", ""))
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")
    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yml")
    daemon = new_daemon(server__wait="0")
    api.modes["alert-000000"] = 500
    daemon.post({"alerts": [alert(0)]})
    text = until(lambda: retries(read(text := ask(daemon.address)[2]), "threatstack") and text)
    assert promtool("check", "metrics", input=text) == ""


def test_what_is_scraped_is_where_it_listens():
    [job] = yaml.safe_load(SCRAPING)["scrape_configs"]
    assert job["job_name"] == "ts3d"
    default = next(option.default for option in ts3d.OPTIONS if option.name == "listen")
    assert job["static_configs"] == [{"targets": [default]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"


HERE = {"instance": "a", "job": "ts3d"}


def series(name, values, **labels):
    """A series of samples, one a minute, in promtool's notation: `1x5` is 1 and five times 1 again."""
    text = ",".join(f'{label}="{value}"' for label, value in {**HERE, **labels}.items())
    return {"series": f"{name}{{{text}}}", "values": values}


def webhooks(status, values):
    return series("ts3d_webhooks_total", values, status=status)


def room(size, free):
    limits = {"size_bytes": size, "max_size_bytes": 1000, "disk_free_bytes": free}
    return [series(f"ts3d_queue_{name}", f"{value}x30") for name, value in limits.items()]


UP, UNAVAILABLE = "up", "ts3d_upstream_unavailable"
START, OLDEST, REJECTED = "process_start_time_seconds", "ts3d_queue_oldest_age_seconds", "ts3d_alerts_rejected_total"
FIRES = [  # the alert, the minute, the series, and the labels that it then has beside those of the place
    ("Ts3dDown", 15, [series(UP, "1x5 0x10")], {}),
    ("Ts3dRestarting", 40, [series(START, "1x5 2x5 3x5 4x5 5x20")], {}),
    ("Ts3dQueueUnreadable", 10, [series(UP, "1x20")], {}),
    ("Ts3dWebhooksRefused", 7, [webhooks(503, "0x5 1x10"), webhooks(200, "0+1x10")], {"status": "503"}),
    *(
        ("Ts3dWebhooksRefused", 7, [webhooks(status, "0x5 1x10")], {"status": str(status)})
        for status in (500, 413, 408, 415)
    ),
    ("Ts3dWrongToken", 35, [webhooks(401, "0x30 1x10"), webhooks(200, "9x40")], {"status": "401"}),
    ("Ts3dWrongPath", 35, [webhooks(404, "0x30 1x10"), webhooks(200, "9x40")], {"status": "404"}),
    ("Ts3dUpstreamUnavailable", 25, [series(UNAVAILABLE, "0x5 1x30", upstream="s3")], {"upstream": "s3"}),
    ("Ts3dAlertDelayed", 20, [series(OLDEST, "3000+60x30")], {}),
    ("Ts3dQueueNearlyFull", 5, room(900, 1 << 40), {}),
    ("Ts3dQueueNearlyFull", 5, room(1, 100_000_000), {}),
    ("Ts3dQueueNearlyFull", 5, room(900, 100_000_000), {}),
    ("Ts3dAlertFailed", 5, [series("ts3d_queue_failed", "2x10")], {"value": "2"}),
    ("Ts3dAlertRejected", 30, [series(REJECTED, "0x5 1x30"), webhooks(400, "0x40")], {}),
    ("Ts3dAlertRejected", 30, [series(REJECTED, "0x5 1x30"), webhooks(400, "0x5 1x30")], {}),
    ("Ts3dAlertRejected", 30, [series(REJECTED, "0x40"), webhooks(400, "0x5 1x30")], {"status": "400"}),
]
SILENT = [
    ("Ts3dDown", 20, [series(UP, "1x30")]),
    ("Ts3dDown", 9, [series(UP, "1x5 0x3 1x20")]),  # an upgrade
    ("Ts3dRestarting", 40, [series(START, "1x5 2x5 3x5 4x40")]),
    ("Ts3dQueueUnreadable", 10, [series(UP, "1x20"), series("ts3d_queue_depth", "0x20")]),
    ("Ts3dQueueUnreadable", 10, [series(UP, "0x20")]),  # that is another alert
    ("Ts3dWebhooksRefused", 10, [webhooks(n, "0+1x20") for n in (200, 400, 401, 405)] + [webhooks(503, "3x20")]),
    ("Ts3dWrongToken", 35, [webhooks(401, "0+1x40"), webhooks(200, "0+1x40")]),
    ("Ts3dWrongToken", 50, [webhooks(401, "0x5 1x50"), webhooks(200, "0x60")]),
    ("Ts3dWrongPath", 35, [webhooks(404, "0+1x40"), webhooks(200, "0+1x40")]),
    ("Ts3dUpstreamUnavailable", 19, [series(UNAVAILABLE, "0x5 1x10 0x20", upstream="s3")]),
    ("Ts3dUpstreamUnavailable", 16, [series(UNAVAILABLE, "0x5 1x10 0x20", upstream="s3")]),
    ("Ts3dAlertDelayed", 20, [series(OLDEST, "0+60x30")]),
    ("Ts3dAlertDelayed", 3, [series(OLDEST, "9000x3 0x20")]),  # tried anew after it had failed
    ("Ts3dQueueNearlyFull", 5, room(700, 1 << 40)),
    ("Ts3dAlertFailed", 5, [series("ts3d_queue_failed", "0x10")]),
    ("Ts3dAlertRejected", 30, [series(REJECTED, "7x40"), webhooks(400, "7x40"), webhooks(200, "0+1x40")]),
]


def expectation(name, labels):
    """What promtool is to see of an alert that fires."""
    words = ALERTS[name]["annotations"]["summary"].replace("{{ $value }}", labels.get("value", ""))
    labels = {label: value for label, value in labels.items() if label != "value"}
    words = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], words)
    return {"exp_labels": {**HERE, **labels}, "exp_annotations": {"summary": words}}


def test_each_rule_fires_in_the_bad_case_and_in_no_other(tmp_path):
    assert set(ALERTS) == {case[0] for case in FIRES} == {case[0] for case in SILENT}
    cases = [(*case[:3], [expectation(case[0], case[3])]) for case in FIRES] + [(*case, []) for case in SILENT]
    tests = [
        {
            "interval": "1m",
            "name": f"{name} {'fires' if expected else 'is silent'}",
            "input_series": given,
            "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}],
        }
        for name, minute, given, expected in cases
    ]
    (tmp_path / "rules.yml").write_text(RULES)
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests})
    )
    assert "SUCCESS" in promtool("test", "rules", "tests.yml", cwd=tmp_path)
