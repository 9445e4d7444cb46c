"""Nothing that was answered 200 is lost: kills, outages, clocks that jump, other processes, and many alerts."""

import contextlib
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import threatstack
from conftest import ROOT, alert, until

EIGHT = range(1, 9)


class Load:
    """Clients that post webhooks without a pause, as Threat Stack does: what gets no 200 is sent up to three times."""

    def __init__(self, daemon, clients=EIGHT, alerts=3, pause=0.0, **members):
        self.daemon, self.alerts, self.pause, self.members = daemon, alerts, pause, members
        self.acknowledged = {}  # each alert's bytes by its id
        self.archived = set()  # those that were said to be in S3
        self.statuses = {}
        self.longest = 0.0  # seconds for an answer
        self.problems = []
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in clients]
        for thread in self.threads:
            thread.start()

    def run(self, number):
        n = 0
        while not self.ending.is_set():
            n += 1
            alerts = [alert(number * 100_000 + 10 * n + i, **self.members) for i in range(self.alerts)]
            for _ in range(3):
                if self.post(alerts):
                    break
                self.ending.wait(0.05)
            self.ending.wait(self.pause)

    def post(self, alerts):
        started = time.monotonic()
        try:
            status, answer = self.daemon.post({"alerts": alerts})
        except OSError:
            return False
        self.longest = max(self.longest, time.monotonic() - started)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status != 200:
            return False
        states = {a["id"]: a["state"] for a in answer["alerts"]}
        if list(states) != [a["id"] for a in alerts] or not set(states.values()) <= {"queued", "archived"}:
            self.problems.append(answer)
        self.archived |= {id_ for id_, state in states.items() if state == "archived"}
        self.acknowledged.update((a["id"], a) for a in alerts)
        return True

    def end(self):
        self.ending.set()
        for thread in self.threads:
            thread.join()
        assert not self.problems


def assert_whole(s3, load):
    """Every acknowledged alert is in S3, both objects whole."""
    objects = s3.objects()
    webhooks = {key.rpartition("/")[2]: body for key, body in objects.items() if key.startswith("webhooks/")}
    missing = [id_ for id_ in load.acknowledged if f"alerts/al/er/{id_}" not in objects or id_ not in webhooks]
    assert not missing, f"{len(missing)} of {len(load.acknowledged)}: {missing[:3]}"
    for id_, sent in load.acknowledged.items():
        assert objects[f"alerts/al/er/{id_}"] == threatstack.detail(id_)
        assert webhooks[id_] == json.dumps(sent).encode()


def drained(daemon, seconds=60):
    until(lambda: daemon.health()["queued"] == 0, seconds, "drained queue")
    assert daemon.health()["failed"] == 0


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.long)])
def test_kill_at_any_moment_loses_nothing(new_daemon, s3, kills):
    """kill -9 under load from eight clients, S3 restarted now and then."""
    rng = random.Random(kills)
    daemon = new_daemon(server__wait="1")
    load = Load(daemon, pause=0.1)
    for kill in range(kills):
        before = len(load.acknowledged)
        until(lambda: len(load.acknowledged) > before)  # noqa: B023
        load.ending.wait(rng.random() / 2)
        if kill % 3 == 1:
            s3.stop()
        # What was said to be archived is there at this moment, whatever comes.
        archived = set(load.archived)
        assert archived <= {key.rpartition("/")[2] for key in s3.objects("alerts/")}
        daemon.kill()
        daemon.start()
        if not s3.process:
            s3.start()
    load.end()
    drained(daemon, 60 + 5 * kills)
    assert_whole(s3, load)


@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_s3_becomes_unavailable_under_load(new_daemon, s3, seconds, way):
    """It refuses connections, or is silent: all that is acknowledged meanwhile arrives."""
    daemon = new_daemon(server__wait="0")
    load = Load(daemon, alerts=4, pause=0.3)
    until(lambda: len(s3.objects("alerts/")) > 10)
    s3.stop() if way == signal.SIGKILL else s3.process.send_signal(way)
    before = len(load.acknowledged)
    load.ending.wait(seconds)
    assert len(load.acknowledged) > before
    s3.start() if way == signal.SIGKILL else s3.process.send_signal(signal.SIGCONT)
    load.end()
    assert set(load.statuses) == {200}
    drained(daemon, 120)
    assert_whole(s3, load)


YEAR = 365 * 86400


def test_a_clock_that_jumps_stalls_and_expires_nothing(new_daemon, s3, api, clock):
    """A year forward, a year back, while Threat Stack is unavailable: it is probed on, and nothing is marked failed."""
    daemon = new_daemon(start=False, server__wait="0", archive__give_up_after="1h")
    clock.use(daemon)
    daemon.start()
    for n, jump in enumerate([0, YEAR, 0, -YEAR, YEAR]):
        api.mode = 429
        assert daemon.post({"alerts": [alert(n)]})[0] == 200
        until(lambda n=n: f"/api/v1/alerts/alert-{n:06}" in api.paths())
        clock.set(jump=jump)
        calls = len(api.calls)
        until(lambda calls=calls: len(api.calls) > calls, 30)
        assert daemon.health()["oldest_seconds"] >= 0
        api.mode = None
        until(lambda n=n: f"alerts/al/er/alert-{n:06}" in s3.objects(), 30)
    drained(daemon)
    clock.set(jump=-YEAR)
    assert daemon.stop() == 0
    years = {line[:4] for line in daemon.log().splitlines()}
    assert len(years) >= 2, years


@pytest.mark.long
@pytest.mark.parametrize("status", [401, 429, 500])
@pytest.mark.parametrize("alerts", [1, 5])
def test_a_week_without_threat_stack(new_daemon, s3, api, clock, status, alerts):
    """All clocks go so fast that it takes half a minute. Nothing is marked failed, and the log stays short."""
    daemon = new_daemon(start=False, server__wait="0", **clock.HOURS)
    clock.use(daemon)
    daemon.start()
    api.mode = status
    assert daemon.post({"alerts": [alert(n) for n in range(alerts)]})[0] == 200
    until(lambda: len(s3.objects("webhooks/")) == alerts)
    clock.set(speed=20_000)

    def after_a_week():
        with contextlib.suppress(OSError):  # a request may arrive too slowly: its hour takes 0.2 s
            return (health := daemon.health())["oldest_seconds"] > 8 * 86400 and health

    health = until(after_a_week, 120)
    assert (health["queued"], health["failed"]) == (alerts, 0)
    lines = re.findall("(?:INFO|WARNING|ERROR) .*(?:id=alert-|threatstack ).*", daemon.log())
    assert len(lines) <= 1 + 3 * alerts, lines
    clock.set()
    api.mode = None
    until(lambda: len(s3.objects("alerts/")) == alerts, 60)
    drained(daemon)


END_A_THREAD = """
import ctypes, os, threading, time
from pathlib import Path

def end():
    place = Path(__file__).parent
    while not (place / "end").exists():
        time.sleep(0.05)
    others = [thread for thread in threading.enumerate() if thread not in (threading.main_thread(), ours)]
    (place / "names.new").write_text("\\n".join(thread.name for thread in others))
    (place / "names.new").rename(place / "names")
    for thread in others:
        if thread.name == (place / "end").read_text():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

ours = threading.Thread(target=end, daemon=True)
ours.start()
"""


def test_a_thread_that_ends_ends_the_daemon(new_daemon, s3, tmp_path):
    """Each kind of them: it exits with 1 and one line, and the next start goes on with the queue."""
    (tmp_path / "sitecustomize.py").write_text(END_A_THREAD)
    daemon = new_daemon(start=False, server__wait="0")
    daemon.environment["PYTHONPATH"] = str(tmp_path)

    def start():
        for path in (tmp_path / "end", tmp_path / "names"):
            path.unlink(missing_ok=True)
        daemon.start()
        assert daemon.post({"alerts": [alert(0)]})[0] == 200
        drained(daemon)

    def end(name):
        """End its threads of this name; the names of all that it had."""
        (tmp_path / "end.new").write_text(name)
        (tmp_path / "end.new").rename(tmp_path / "end")
        return until(lambda: (tmp_path / "names").exists() and (tmp_path / "names").read_text().splitlines())

    def ended():  # a thread that waits must go on, to end
        with contextlib.suppress(OSError, http.client.HTTPException):
            daemon.post({"alerts": [alert(1)]})
        return daemon.process.poll() is not None

    start()
    names = end("none")
    assert daemon.stop() == 0
    kinds = {re.sub(r"[0-9 ]+", "#", name): name for name in names if name != "connection"}
    assert len(kinds) >= 3, names
    for name in kinds.values():
        start()
        begin = len(daemon.log())
        end(name)
        until(ended, 40, f"end of the daemon after {name}")
        assert daemon.process.returncode == 1, name
        (line,) = re.findall("^ts3d: .*", daemon.log(begin), re.MULTILINE)
        assert "ended" in line
    start()


def test_a_daemon_that_is_suspended_goes_on(new_daemon, s3):
    """CPython's sigtimedwait takes an interruption after its time-out for a signal."""
    daemon = new_daemon()
    for _ in range(2):
        daemon.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(1.5)  # longer than any timer of the main thread
        daemon.process.send_signal(signal.SIGCONT)
        assert daemon.post({"alerts": [alert(0)]})[0] == 200
    until(lambda: daemon.health()["queued"] == 0)
    assert not daemon.logged("stopping")
    assert daemon.stop() == 0


BESIDE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import ts3d
queue = ts3d.Queue(sys.argv[2], 1 << 30)
print("begun", flush=True)
ends = time.monotonic() + float(sys.argv[3])
n = 0
while time.monotonic() < ends:
    new = ts3d.Job(f"beside-{n:06}", "2017/01/17/13/51", "webhooks", "webhooks", b'{"id": "beside-%06d"}' % n)
    queue.put([new])
    queue.problems(), queue.refresh([new])
    for _ in range(20):
        queue.retry("none")  # a commit: more jobs than these would take long to archive
    n += 1
queue.close()
print(n)
"""


@pytest.mark.parametrize("seconds", [8, pytest.param(180, marks=pytest.mark.long)])
def test_another_process_writes_and_reads_without_a_pause(new_daemon, s3, seconds, record_property):
    """No error on either side, and no job is lost, while the daemon is under load."""
    daemon = new_daemon(server__wait="0", archive__workers="0")
    load = Load(daemon, alerts=1, pause=0.1)
    command = [sys.executable, "-c", BESIDE, str(ROOT), str(daemon.queue), str(seconds)]
    beside = subprocess.run(command, capture_output=True, text=True, check=False)
    load.end()
    assert (beside.returncode, beside.stderr) == (0, "")
    put = int(beside.stdout.split()[-1])
    assert put > 10
    assert set(load.statuses) == {200}
    record_property("longest answer", load.longest)
    print(f"{put} jobs put beside {len(load.acknowledged)}; longest answer {load.longest:.3f} s")
    until(lambda: daemon.health()["queued"] == put + len(load.acknowledged))  # the figures are up to a second old
    daemon.restart(archive__workers="16")
    drained(daemon, 30 + seconds * 4)
    assert_whole(s3, load)
    assert len([key for key in s3.objects("alerts/be/si/") if "/beside-" in key]) == put


@pytest.mark.parametrize("first, second", [(500, 2500), pytest.param(10_000, 100_000, marks=pytest.mark.long)])
def test_nothing_grows(new_daemon, s3, first, second):
    """Memory and the queue's file after many alerts are what they were after some."""
    daemon = new_daemon(server__wait="0")

    def archive(begin, end):
        for n in range(begin, end, 100):
            assert daemon.post({"alerts": [alert(i, text="x" * 500) for i in range(n, n + 100)]})[0] == 200
            until(lambda: daemon.health()["queued"] < 200, 120)
        drained(daemon)
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10
        files = len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))
        return resident, sum(path.stat().st_size for path in daemon.folder.glob("queue.db*")), files

    before, after = archive(0, first), archive(first, second)
    print(f"after {first}: {before}, after {second}: {after}")
    assert after[0] < before[0] + (8 << 20)
    assert after[1] < before[1] + (5 << 20)  # the write-ahead log comes and goes
    assert after[2] < before[2] + 20


def test_a_sync_comes_before_each_answer_and_is_shared(new_daemon, tracer):
    """strace shows the order: the write of the alert, a sync that begins after it and ends well, the 200."""
    daemon = new_daemon(archive__workers="0", server__wait="0")
    with tracer(daemon, "trace=fdatasync,fsync,sendto,pwrite64") as trace:
        load = Load(daemon, alerts=1)
        until(lambda: len(load.acknowledged) > 100, 60)
        load.end()
        daemon.stop()
    begun, synced = {}, []  # by thread: the line at which a sync began; first and last lines of those that ended well
    written, checked = {}, 0
    for i, line in enumerate(trace.read_text().splitlines()):
        thread, call = line.split(None, 1)
        if re.match(r"f(data)?sync\(", call):
            begun[thread] = i
        if re.search(r"f(data)?sync.*= 0$", call):
            synced.append((begun[thread], i))
        for id_ in re.findall(r"alert-[0-9]{6}", call) if call.startswith("pwrite64(") else ():
            written.setdefault(id_, i)
        if call.startswith("sendto(") and (match := re.search(r'200 OK.*"(alert-[0-9]{6})', call)):
            assert any(written[match[1]] < start and end < i for start, end in synced), match[1]
            checked += 1
    assert checked >= 100
    assert len(synced) < checked
