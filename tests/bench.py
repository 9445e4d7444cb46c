"""Measures ts3d against alternatives, or against another version of itself: `sh tests/bench`, in about five minutes.

The sides take turns for several rounds, and each is stopped (SIGSTOP) during the others' turns. A ratio is the median
of the rounds' ratios, so a machine that slows down slows all sides. Run it on a machine that does nothing else.
Versions differ inside, so everything here uses only HTTP and the configuration.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import boto3
import threatstack
from conftest import BUCKET, TOKEN, TS3D, Daemon, environment, free_port, listening, until

S3_SECONDS, API_SECONDS = 0.030, 0.120
HERE = Path(__file__).parent
ALERT = (
    '{"id":"%s","title":"CloudTrail Activity (IAM Policy Changes) : CreatePolicy by someone","severity":3,'
    '"created_at":1484661065000,"organization_id":"5a2f3c9d1e8b7a6f4c0d2e1b","source":"CLOUDTRAIL"}'
)


class Side:
    """One side of a comparison: a folder, a version of ts3d, and the processes that were started."""

    def __init__(self, folder, program):
        self.folder, self.program, self.started, self.numbers = Path(folder), program, [], itertools.count()

    def start(self, *command, port=None, **more):
        """Start a process. With a port, wait until something listens there."""
        with open(self.folder / "output", "ab") as output:
            options = {"stdout": output, "stderr": output, "env": environment(), "cwd": HERE, **more}
            process = subprocess.Popen(list(map(str, command)), **options)
        self.started.append(process)
        while port and not listening(port):
            assert process.poll() is None, (self.folder / "output").read_text()
            time.sleep(0.001)
        return process

    def signal(self, number):
        for process in self.started:
            process.send_signal(number)  # does nothing to a process that has ended

    def upstream(self, delay=0.0, port=None):
        """The URL of a stub for S3 and Threat Stack that answers after `delay` seconds."""
        port = port or free_port()
        self.start("node", HERE / "bench.js", port, delay * 1000, port=port)
        return f"http://127.0.0.1:{port}"

    def wrk(self, url, batch=1, connections=32, pause=0, seconds=2):
        """Start wrk, which sends webhooks of `batch` alerts, or GET requests if `batch` is 0."""
        options = f"-t1 -c{connections} -d{seconds}s --timeout 60s -s {HERE}/bench.lua".split()
        options += ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
        arguments = [f"load-{next(self.numbers)}", batch, ALERT, pause]
        return self.start("wrk", *options, url, "--", *arguments, stdout=subprocess.PIPE, text=True)

    def load(self, url, **more):
        """Answers a second, and the milliseconds of the median and of the slowest of 1,000 answers."""
        said = self.wrk(url, **more).communicate()[0]
        *figures, errors = json.loads(said.splitlines()[-1])
        assert not errors, said
        return figures


class Server(Daemon):
    """A running ts3d in a folder of its own. By default its upstreams are unavailable."""

    def __init__(self, side, s3="http://127.0.0.1:1", api=None, **options):
        folder, port = side.folder / f"ts3d-{next(side.numbers)}", free_port()
        folder.mkdir()
        upstreams = {"s3__endpoint_url": s3, "threatstack__base_url": api or s3}
        defaults = {"server__listen": f"127.0.0.1:{port}", "server__wait": "0", "queue__max_size": "10G"}
        super().__init__(folder, **upstreams, **(defaults | options))
        self.side, self.address, self.base = side, ("127.0.0.1", port), f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/api/v1/s3/alert"
        self.start()

    def start(self):
        command = [sys.executable, self.side.program, "serve", "-c", self.config]
        self.process = self.side.start(*command, port=self.address[1])

    def restart(self, **options):
        self.kill()
        self.set(**options)
        self.start()

    def send(self, name, number, batch=25):
        """Send webhooks of `batch` alerts, whose ids begin with `name`."""
        for first in range(0, number, batch):
            alerts = ",".join(ALERT % f"{name}-{n:06}" for n in range(first, min(number, first + batch)))
            status, answer = self.post(b'{"alerts":[%s]}' % alerts.encode())
            assert status == 200, answer

    def work(self, url, name, number=1000):
        """Alerts a second from webhooks to S3."""
        return archive_rate(url, number, before=lambda: self.send(name, number))

    def cost(self, url, function, *arguments, **more):
        """What the function returns, and milliseconds of processor time for each alert that is archived meanwhile."""
        used, begin = self.processor(), archived(url)
        result = function(*arguments, **more)
        return result, (self.processor() - used) / (archived(url) - begin)

    def processor(self):
        """Milliseconds of processor time that it and its children have used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) * 1000 / os.sysconf("SC_CLK_TCK")

    def wake_ups(self):
        """How often its present threads have waited for something."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # the thread has ended
                total += int((task / "status").read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return total


def end(*processes):
    for process in processes:
        process.kill()
        process.wait()


def archived(url):
    """The number of details that this upstream was given."""
    with urllib.request.urlopen(f"{url}/archived") as answer:
        return int(answer.read())


def archive_rate(url, number=10**9, seconds=600.0, before=lambda: None):
    """Alerts a second, until `number` more are archived or `seconds` have passed."""
    begin, began = archived(url), time.monotonic()
    before()
    while (done := archived(url) - begin) < number and time.monotonic() < began + seconds:
        time.sleep(0.01)
    return done / (time.monotonic() - began)


def resident(process):
    """Megabytes in memory."""
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def settled(process):
    """Megabytes in memory, once that no longer changes."""
    before = 0.0
    while before != (before := resident(process)):
        time.sleep(1.5)
    return before


# The rows: each yields its figures once a round. "FIGURE | VARIANT" is compared with FIGURE -------------------------


def start(side):
    daemon = Server(side)
    for n in itertools.count():
        daemon.kill()
        began = time.monotonic()
        daemon.start()
        daemon.send(f"start-{n}", 1)
        yield {"start to first acknowledgement, s": time.monotonic() - began}


def receive(side):
    url, daemon = side.upstream(), Server(side, archive__workers="0")
    while True:
        one, batches = side.load(daemon.url)[0], 25 * side.load(daemon.url, batch=25)[0]
        busy = Server(side, url)
        busy.work(url, "warm", 300)
        meanwhile, _, slowest = side.load(busy.url)
        busy.kill()
        figures = {"acknowledged, /s": one, "acknowledged, /s | batches of 25": batches}
        yield figures | {"acknowledged, /s | while it archives": meanwhile, "slowest of 1,000 meanwhile, ms": slowest}


def archive(side):
    url = side.upstream()
    daemon = Server(side, url)
    daemon.work(url, "warm", 100)
    for n in itertools.count():
        woken = daemon.wake_ups()
        rate, used = daemon.cost(url, daemon.work, url, f"round-{n}")
        woken = (daemon.wake_ups() - woken) / 1000
        yield {"archived, /s": rate, "processor time an alert, ms": used, "wake-ups an alert": woken}


def latency(side):
    """S3 takes 30 ms and the API 120 ms. First no client waits for S3, then 32 do."""
    s3, api = side.upstream(S3_SECONDS), side.upstream(API_SECONDS)
    daemon = Server(side, s3, api, archive__workers="32")
    others = {n: Server(side, s3, api, server__wait="30", archive__workers=str(n)) for n in (32, 16)}
    for n in itertools.count():
        begin = archived(s3)
        daemon.send(f"round-{n}", 700)
        archive_rate(s3, 100)
        rate, used = daemon.cost(s3, archive_rate, s3, 450)
        figures = {"archived by 32 workers, /s": rate, "processor time with latency, ms": used}
        until(lambda target=begin + 700: archived(s3) >= target, 60, "archived alerts")
        for workers, other in others.items():
            (rate, *_), used = other.cost(s3, side.load, other.url, seconds=4)
            figures[f"answers that wait for {workers} workers, /s"] = rate
            figures[f"processor time with latency, ms | 32 wait for {workers}"] = used
            time.sleep(0.5)  # until the last of them are archived
        yield figures


def waiting(side):
    url = side.upstream()
    while True:
        figures = {}
        for clients, variant in ((0, ""), (300, " | 300 answers wait")):
            daemon = Server(side, url, archive__workers="0")
            daemon.send("before", 8000, batch=1000)
            daemon.restart(archive__workers=None, server__wait="30")
            others = [side.wrk(daemon.url, connections=clients, seconds=60)] if clients else []
            archive_rate(url, 100)
            rate, used = daemon.cost(url, archive_rate, url, seconds=4)
            figures |= {f"archived from the queue, /s{variant}": rate, f"processor time of these, ms{variant}": used}
            end(daemon.process, *others)
        yield figures


def backlog(side):
    url = side.upstream()
    both = _, full = [Server(side, url, archive__workers="0") for _ in range(2)]
    full.send("backlog", 300_000, batch=1000)
    for n in itertools.count():
        figures = {}
        for variant, pause in (("", None), (" | 8 ask every second", 1000), (" | 8 ask without a pause", 0)):
            asked = [("healthz", 8, pause), ("metrics", 1, 1000)] if variant else []
            others = [side.wrk(f"{full.base}/{path}", 0, clients, wait, 60) for path, clients, wait in asked]
            figures[f"median POST, 300,000 queued, ms{variant}"] = side.load(full.url, connections=1)[1]
            end(*others)
        for daemon, variant in zip(both, ("", " | 300,000 queued"), strict=True):
            figures[f"acknowledged, empty queue, /s{variant}"] = side.load(daemon.url)[0]
            daemon.restart(archive__workers=None)
            daemon.work(url, f"warm-{n}", 200)
            figures[f"archived, empty queue, /s{variant}"] = daemon.work(url, f"round-{n}")
            daemon.restart(archive__workers="0")
        yield figures


def memory(side):
    """One round: idle, then with alerts queued while the upstreams are unavailable, then while they are archived."""
    port, samples = free_port(), []
    daemon = Server(side, f"http://127.0.0.1:{port}")
    idle, woken = settled(daemon.process), daemon.wake_ups()
    time.sleep(5)
    woken = daemon.wake_ups() - woken
    daemon.send("outage", 100_000, batch=1000)
    queued, url = settled(daemon.process), side.upstream(port=port)
    while not samples or samples[-1][0] < 20_000:
        time.sleep(0.5)
        samples.append((archived(url), resident(daemon.process)))
    steady = [sample for sample in samples if sample[0] > 4000]
    yield {
        "wake-ups when idle, /s": woken / 5,
        "memory idle, MB": idle,
        "memory idle, MB | 100,000 queued": queued,
        "growth over 20,000 archived, MB": statistics.linear_regression(*zip(*steady, strict=True)).slope * 20_000,
    }


# The alternatives: each yields figures under the names of those that they are compared with -------------------------


def loop(url):
    """Archive with bare boto3 and urllib, and print alerts a second and milliseconds of processor time an alert."""
    client = boto3.client("s3", endpoint_url=url)
    client.meta.events.register("before-sign.s3.PutObject", lambda request, **_: request.headers.__delitem__("Expect"))
    for number in (100, 1000):  # the first are to warm up
        began, used = time.monotonic(), time.process_time()
        for n in range(number):
            id_ = f"alert-{n:06}"
            client.put_object(Bucket=BUCKET, Key=f"webhooks/2017/01/17/13/51/{id_}", Body=(ALERT % id_).encode())
            request = urllib.request.Request(f"{url}/alerts/{id_}", headers={"Authorization": threatstack.KEY})
            with urllib.request.urlopen(request) as answer:
                detail = answer.read()
            client.put_object(Bucket=BUCKET, Key=f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", Body=detail)
    print([number / (time.monotonic() - began), (time.process_time() - used) * 1000 / number])


def bare_loop(side):
    code = f"import bench; bench.loop({side.upstream()!r})"
    while True:
        process = side.start(sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=None)
        rate, used = json.loads(process.communicate()[0])
        yield {"archived, /s": rate, "processor time an alert, ms": used}


def app():
    """The tutorial's app: it archives before it answers, with a boto3 client for each object."""
    import flask
    import requests

    app = flask.Flask("tutorial")

    @app.post("/api/v1/s3/alert")
    def archive():
        for alert in flask.request.get_json()["alerts"]:
            id_ = alert["id"]
            url, headers = f"{os.environ['API_URL']}/alerts/{id_}", {"Authorization": threatstack.KEY}
            detail = requests.get(url, headers=headers).json()
            minute = time.strftime("%Y/%m/%d/%H/%M", time.gmtime(alert["created_at"] / 1000))
            for key, value in ((f"webhooks/{minute}/{id_}", alert), (f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", detail)):
                client = boto3.client("s3", endpoint_url=os.environ["S3_URL"])
                client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(value))
        return flask.jsonify(success=True)

    return app


def tutorial(side):
    """The tutorial's app under gunicorn, with 32 threads."""
    settings, port = environment(S3_URL=side.upstream(S3_SECONDS), API_URL=side.upstream(API_SECONDS)), free_port()
    command = [sys.executable, "-m", "gunicorn", "-w", 2, "--threads", 16, "-b", f"127.0.0.1:{port}", "bench:app()"]
    side.start(*command, port=port, env=settings)
    while True:
        rate = side.load(f"http://127.0.0.1:{port}/api/v1/s3/alert", connections=128, seconds=5)[0]
        yield {"archived by 32 workers, /s": rate}


def littles_law(_):
    """What so many workers can do at most."""
    rate = 1 / (2 * S3_SECONDS + API_SECONDS)
    while True:
        figures = {f"answers that wait for {workers} workers, /s": workers * rate for workers in (32, 16)}
        yield {"archived by 32 workers, /s": 32 * rate, **figures}


def boto3_client(side):
    code = "import boto3, time; client = boto3.client('s3'); time.sleep(1000)"
    yield {"memory idle, MB": settled(side.start(sys.executable, "-c", code))}


ROWS = {row.__name__: row for row in (start, receive, archive, latency, waiting, backlog, memory)}
ALTERNATIVES = {archive: [bare_loop], latency: [littles_law, tutorial], memory: [boto3_client]}


def measure(sides, rounds):
    """Every round's figures of each side, by its name. A side is a function of those above and a version of ts3d."""
    with contextlib.ExitStack() as stack:
        turns, measured = [], {}
        for name, (function, program) in sides.items():
            side = Side(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts3d-bench-")), program)
            stack.callback(lambda side=side: end(*side.started))
            measured[name] = defaultdict(list)
            turns.append((side, function(side), measured[name]))
        for n in range(rounds):
            for side, part, figures in turns[:: -1 if n % 2 else 1]:
                side.signal(signal.SIGCONT)
                for figure, value in next(part, {}).items():
                    figures[figure].append(value)
                side.signal(signal.SIGSTOP)
        return measured


def lines(measured):
    """The first side's figures, each with every figure that it is compared with."""
    ours, *_ = measured.values()
    for figure, values in ours.items():
        against = {name: figures[figure] for name, figures in list(measured.items())[1:] if figure in figures}
        if (base := figure.partition(" | ")[0]) != figure:
            against[base] = ours[base]
        for name, baseline in (against or {"": []}).items():
            ratios = [a / (b or float("nan")) for a, b in zip(values, baseline, strict=False)]
            yield {"figure": figure, "values": values, "against": name, "baseline": baseline, "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="FILE", type=Path, help="compare with this other ts3d.py instead")
    parser.add_argument("--rows", metavar="NAME,…", default=",".join(ROWS), help="by default all: %(default)s")
    parser.add_argument("--rounds", metavar="N", type=int, help="by default 3, or 5 with --against")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every round's values")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows.split(",")) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)} (there are {', '.join(ROWS)})")
    other = chosen.against and chosen.against.resolve(strict=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what was started
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    versions = f"Python {sys.version.split()[0]}, boto3 {boto3.__version__}, SQLite {sqlite3.sqlite_version}"
    machine, results = f"{os.cpu_count()} x {model}, {versions}, {tempfile.gettempdir()}", []
    print(f"{machine}\n\n{'figure':<56}{'median':>9}  {'against':<32}{'median':>9}{'ratio':>7}  spread", flush=True)
    for row in chosen.rows.split(","):
        sides = {"ts3d": (ROWS[row], TS3D)}
        if other:
            sides["old"] = (ROWS[row], other)
        else:
            sides |= {side.__name__: (side, TS3D) for side in ALTERNATIVES.get(ROWS[row], [])}
        for line in lines(measure(sides, chosen.rounds or (5 if other else 3))):
            results.append({"row": row, **line})
            text = f"{line['figure']:<56}{statistics.median(line['values']):>9.4g}"
            if ratios := line["ratios"]:
                text += f"  {line['against']:<32}{statistics.median(line['baseline']):>9.4g}"
                text += f"{statistics.median(ratios):>7.3g}  {min(ratios):.3g} to {max(ratios):.3g}"
            print(text, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
