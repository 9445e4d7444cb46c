"""ts3d against what it could be compared with, measured side by side: `sh tests/bench`, in about five minutes.

What is compared takes turns for several rounds, and the ratio is the median of the rounds' ratios, so that a machine
that slows down slows both. Half of the time goes into 50,000 alerts, of which memory must show nothing. By hand, on a
machine that has nothing else to do: no test asserts any of it.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import boto3
import threatstack
from conftest import BUCKET, TOKEN, Daemon, environment, free_port, listening, until

import ts3d

ROUNDS = 3
SECONDS = 2  # of load in a round
ALERTS = 1000  # archived in a round without latency
S3_SECONDS, API_SECONDS, WORKERS = 0.030, 0.120, 32
BACKLOG, ARCHIVED = 100_000, 50_000
HERE = Path(__file__).parent
IMPORTS = "http.server, sqlite3, ssl, urllib.request, json, configparser, argparse, logging"
ALERT = (
    '{"id":"%s","title":"CloudTrail Activity (IAM Policy Changes) : CreatePolicy by someone","severity":3,'
    '"created_at":1484661065000,"organization_id":"5a2f3c9d1e8b7a6f4c0d2e1b","source":"CLOUDTRAIL"}'
)


class Missing(Exception):
    """What a part needs is not on this machine."""


class Row(NamedTuple):
    """A line of the table: what each round measured, of ts3d and of what it is compared with, which may be nothing.

    Their ratio has to be within `least` and `most`; in megabytes, and where there is nothing, the difference.
    """

    what: str
    against: str
    unit: str
    measured: list[float]
    baseline: list[float]
    least: float | None = None
    most: float | None = None

    def value(self):
        ratio = self.baseline and self.unit != "MB"
        pairs = zip(self.measured, self.baseline or [0] * len(self.measured), strict=True)
        return statistics.median(a / b if ratio else a - b for a, b in pairs)

    def reached(self):
        return (self.least or 0) <= self.value() <= (self.most or float("inf"))

    def line(self):
        measured = f"{statistics.median(self.measured):.4g} {self.unit}"
        baseline = f"{statistics.median(self.baseline):.4g}" if self.baseline else ""
        reach = f">= {self.least}" if self.least else f"<= {self.most}"
        figures = f"{self.value():>8.3g}  {reach:<8}{'ok' if self.reached() else 'MISSED'}"
        return f"{self.what:<36}{measured:>12}  {self.against:<26}{baseline:>8}{figures}"


class Place:
    """A folder, and what was started in it and ends with it."""

    def __init__(self, folder):
        self.folder, self.stack, self.numbers = Path(folder), contextlib.ExitStack(), itertools.count()

    def start(self, *command, **more):
        """A process of one of this file's kinds."""
        with open(self.folder / "output", "ab") as output:
            options = {"stdout": output, "stderr": output, "env": environment(), "cwd": HERE, **more}
            process = subprocess.Popen(list(map(str, command)), **options)
        self.stack.callback(end, process)
        return process

    def serve(self, port, *command, **more):
        """A process that has begun to listen on this port."""
        process = self.start(*command, **more)
        until(lambda: listening(port), what=command[0])
        return process

    def upstream(self, delay=0.0, port=None):
        """The URL of what takes the place of S3 and Threat Stack, and answers after `delay` seconds."""
        port = port or free_port()
        self.serve(port, program("node"), HERE / "bench.js", port, delay * 1000)
        return f"http://127.0.0.1:{port}"

    def daemon(self, s3="http://127.0.0.1:1", api=None, start=True, **options):
        """ts3d; by default its upstreams are away."""
        folder = self.folder / f"ts3d-{next(self.numbers)}"
        folder.mkdir()
        upstreams = {"s3__endpoint_url": s3, "threatstack__base_url": api or s3}
        daemon = Daemon(folder, queue__max_size="100G", server__wait="0", **upstreams, **options)
        self.stack.callback(lambda: daemon.process and end(daemon.process))
        return daemon.start() if start else daemon

    def load(self, url, batch=1, connections=32, seconds=SECONDS):
        """Webhooks at full speed: answers a second, and the milliseconds that the slowest of 1,000 takes."""
        options = f"-t1 -c{connections} -d{seconds}s --timeout 60s -s {HERE}/bench.lua".split()
        options += ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
        command = [program("wrk"), *options, url, "--", f"load-{next(self.numbers)}", str(batch), ALERT]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rate, slowest, bad = json.loads(said.splitlines()[-1])
        assert not bad, said
        return rate, slowest


def end(process):
    process.kill()
    process.wait()


def program(name):
    if not shutil.which(name):
        raise Missing(f"{name} is missing")
    return name


def address(daemon):
    return f"http://127.0.0.1:{daemon.address[1]}/api/v1/s3/alert"


def post(daemon, name, number, batch=25):
    """Send so many alerts, whose ids begin with `name`."""
    for first in range(0, number, batch):
        alerts = [json.loads(ALERT % f"{name}-{n:06}") for n in range(first, min(number, first + batch))]
        assert daemon.post({"alerts": alerts})[0] == 200


def archived(url):
    """How many details an upstream was given."""
    with urllib.request.urlopen(f"{url}/archived") as answer:
        return int(answer.read())


def archive_more(url, number):
    """How many a second it is given, until it was given so many more."""
    begin, began = archived(url), time.monotonic()
    until(lambda: archived(url) >= begin + number, seconds=600, what="archived alerts")
    return (archived(url) - begin) / (time.monotonic() - began)


def work(daemon, url, name, number=ALERTS):
    """Alerts a second, from webhooks to S3; none may be queued before, or more than are archived meanwhile."""
    begin, began = archived(url), time.monotonic()
    post(daemon, name, number)
    until(lambda: archived(url) >= begin + number, seconds=60, what="archived alerts")
    return number / (time.monotonic() - began)


def processor(process):
    """Seconds of processor that a process, and the children that it waited for, have used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def resident(process):
    """Megabytes in memory."""
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def settled(process):
    """Megabytes in memory, once that changes no more."""
    before = 0.0
    while before != (before := resident(process)):
        time.sleep(1.5)
    return before


@contextlib.contextmanager
def running(process):
    """Let a process run that stands still before and afterwards."""
    process.send_signal(signal.SIGCONT)
    yield
    process.send_signal(signal.SIGSTOP)


# What it is compared with -------------------------------------------------------------------------------------------


def loop(threads, url):
    """For each number that is read, archive so many alerts with bare boto3 and urllib, and print a line."""
    client = boto3.client("s3", endpoint_url=url)
    client.meta.events.register("before-sign.s3.PutObject", ts3d.without_expect)

    def archive(numbers):
        for n in numbers:
            id_ = f"alert-{n:06}"
            client.put_object(Bucket=BUCKET, Key=f"webhooks/2017/01/17/13/51/{id_}", Body=(ALERT % id_).encode())
            request = urllib.request.Request(f"{url}/alerts/{id_}", headers={"Authorization": threatstack.KEY})
            with urllib.request.urlopen(request) as answer:
                detail = answer.read()
            client.put_object(Bucket=BUCKET, Key=f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", Body=detail)

    for line in sys.stdin:
        numbers = iter(range(int(line)))  # shared: each is taken once
        workers = [threading.Thread(target=archive, args=(numbers,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(flush=True)


def tutorial():
    """The tutorial's app: it archives before it answers, with a boto3 client for each object."""
    import flask
    import requests

    app = flask.Flask("tutorial")
    bucket, base = os.environ["TS_AWS_S3_BUCKET"], os.environ["THREATSTACK_BASE_URL"]

    def put(key, value):
        client = boto3.client("s3", endpoint_url=os.environ["S3_URL"])
        client.put_object(Bucket=bucket, Key=key, Body=json.dumps(value))

    @app.post("/api/v1/s3/alert")
    def archive():
        for alert in flask.request.get_json()["alerts"]:
            id_ = alert["id"]
            detail = requests.get(f"{base}/alerts/{id_}", headers={"Authorization": threatstack.KEY}).json()
            put(time.strftime(f"webhooks/%Y/%m/%d/%H/%M/{id_}", time.gmtime(alert["created_at"] / 1000)), alert)
            put(f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", detail)
        return flask.jsonify(success=True)

    return app


# The table's parts --------------------------------------------------------------------------------------------------


def start(place):
    """From exec to the first webhook that is acknowledged."""
    port, ours, bare = free_port(), [], []
    daemon = place.daemon(start=False, server__listen=f"127.0.0.1:{port}")
    daemon.address = ("127.0.0.1", port)
    for n in range(5 * ROUNDS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], check=True)
        bare.append(time.monotonic() - began)
        began = time.monotonic()
        daemon.process = daemon.popen(subprocess.DEVNULL)
        while not ours[n:]:
            with contextlib.suppress(ConnectionError):
                post(daemon, f"start-{n}", 1)
                ours.append(time.monotonic() - began)
            time.sleep(0.001)
        daemon.kill()
    yield Row("start to first acknowledgement", "python3 -c 'import ...'", "s", ours, bare, most=2)


def receive(place):
    """Acknowledgements of alerts that are on disk."""
    hook = {"execute-command": "/bin/true", "http-methods": ["POST"]}
    waiting = {"id": "waiting", "include-command-output-in-response": True, **hook}
    hooks = place.folder / "hooks.json"
    hooks.write_text(json.dumps([{"id": "fast", **hook}, waiting]))
    daemon = place.daemon(archive__workers="0")
    rates = {"fast": [], "waiting": [], 1: [], 25: []}
    for _ in range(2 * ROUNDS):
        for id_ in ("fast", "waiting") if shutil.which("webhook") else ():
            port = free_port()
            # -verbose: it logs its requests, as ts3d does.
            command = ["webhook", "-verbose", "-hooks", hooks, "-ip", "127.0.0.1", "-port", port]
            process = place.serve(port, *command)
            rates[id_].append(place.load(f"http://127.0.0.1:{port}/hooks/{id_}")[0])
            end(process)  # and what it has still to execute
        for batch in (1, 25):
            rates[batch].append(batch * place.load(address(daemon), batch)[0])
    yield Row("acknowledged in batches of 25", "one alert each", "/s", rates[25], rates[1], least=8)
    program("webhook")
    yield Row("acknowledged, one alert each", "webhook, at once", "/s", rates[1], rates["fast"], least=0.5)
    yield Row("acknowledged, one alert each", "webhook, waiting", "/s", rates[1], rates["waiting"], least=2)


def busy(place):
    """Acknowledgements while the archiver works at full speed."""
    url = place.upstream()
    daemon, idle = place.daemon(url), place.daemon(archive__workers="0")
    work(daemon, url, "warm", 500)
    ours, without, slowest = [], [], []
    for _ in range(2 * ROUNDS):
        without.append(place.load(address(idle))[0])
        with running(daemon.process):
            rate, milliseconds = place.load(address(daemon))
        ours.append(rate)
        slowest.append(milliseconds)
    yield Row("acknowledged while it archives", "while it does not", "/s", ours, without, least=0.5)
    yield Row("slowest of 1,000 answers meanwhile", "", "ms", slowest, [], most=250)


def archive(place):
    """Archiving without latency."""
    url = place.upstream()
    daemon = place.daemon(url)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    code = "import bench; bench.loop({}, {!r})"
    loops = [place.start(sys.executable, "-c", code.format(threads, url), **pipes) for threads in (1, 4, 8)]

    def run_loop(process, number=ALERTS):
        used, began = processor(process), time.monotonic()
        print(number, file=process.stdin, flush=True)
        process.stdout.readline()
        return number / (time.monotonic() - began), (processor(process) - used) * 1000 / number

    for process in loops:
        run_loop(process, 100)
    work(daemon, url, "warm", 100)
    rates, costs, best = [], [], []
    for n in range(ROUNDS):
        best.append(max(map(run_loop, loops)))
        used = processor(daemon.process)
        rates.append(work(daemon, url, f"round-{n}"))
        costs.append((processor(daemon.process) - used) * 1000 / ALERTS)
    best_rates, their_costs = zip(*best, strict=True)
    yield Row("archived, no latency", "bare loop, 1, 4, 8 threads", "/s", rates, best_rates, least=0.9)
    yield Row("processor time, webhook to S3", "the same loop", "ms", costs, their_costs, most=1.15)


def latency(place):
    """Archiving where S3 and Threat Stack take their time."""
    s3, api = place.upstream(S3_SECONDS), place.upstream(API_SECONDS)
    daemon = place.daemon(s3, api, archive__workers=WORKERS)
    settings = environment(S3_URL=s3, TS_AWS_S3_BUCKET=BUCKET, THREATSTACK_BASE_URL=api)
    ports = {threads: free_port() for threads in (16, 1)}
    for threads, port in ports.items():
        command = [sys.executable, "-m", "gunicorn", "-w", 2, "--threads", threads, "-b", f"127.0.0.1:{port}"]
        place.serve(port, *command, "bench:tutorial()", env=settings)
    ours, theirs = [], {16: [], 1: []}
    for n in range(ROUNDS):
        whole = archived(s3) + 850
        post(daemon, f"round-{n}", 850)
        archive_more(s3, 100)
        ours.append(archive_more(s3, 550))
        archive_more(s3, whole - archived(s3))
        for threads, port in ports.items():
            url = f"http://127.0.0.1:{port}/api/v1/s3/alert"
            theirs[threads].append(place.load(url, connections=8 * threads, seconds=8)[0])
    law = [WORKERS / (2 * S3_SECONDS + API_SECONDS)] * ROUNDS
    what = "archived, 32 workers, 30 and 120 ms"
    yield Row(what, "Little's law", "/s", ours, law, least=0.95)
    yield Row(what, "tutorial, 2 x 16 threads", "/s", ours, theirs[16], least=4)
    yield Row(what, "tutorial, 2 processes", "/s", ours, theirs[1], least=15)


def backlog(place):
    """What 100,000 alerts in the queue change."""
    url = place.upstream()
    full, empty = both = [place.daemon(url, archive__workers="0") for _ in range(2)]
    post(full, "backlog", BACKLOG, batch=1000)
    acknowledged, rates = {full: [], empty: []}, {full: [], empty: []}
    for _ in range(ROUNDS):
        for daemon in both:
            acknowledged[daemon].append(place.load(address(daemon))[0])
    yield Row("acknowledged, 100,000 queued", "none", "/s", acknowledged[full], acknowledged[empty], least=0.9)
    for daemon in both:
        daemon.kill()
    empty.queue.unlink()
    for daemon in both:
        daemon.set(archive__workers=None)
        work(daemon.start(), url, "warm", 200)
        daemon.process.send_signal(signal.SIGSTOP)
    for n in range(ROUNDS):
        for daemon in both:
            with running(daemon.process):
                rates[daemon].append(work(daemon, url, f"round-{n}"))
    yield Row("archived, 100,000 queued", "none", "/s", rates[full], rates[empty], least=0.9)


def memory(place):
    """Memory: idle, with 100,000 alerts queued while the upstreams are away, and while 50,000 are archived."""
    bare = settled(place.start(sys.executable, "-c", "import boto3, time; s3 = boto3.client('s3'); time.sleep(1000)"))
    port, samples = free_port(), []
    daemon = place.daemon(f"http://127.0.0.1:{port}")
    idle = settled(daemon.process)
    yield Row("memory, idle", "boto3's S3 client", "MB", [idle], [bare], most=15)
    post(daemon, "outage", BACKLOG, batch=100)
    yield Row("memory, 100,000 queued", "idle", "MB", [settled(daemon.process)], [idle], most=15)
    url = place.upstream(port=port)
    while not samples or samples[-1][0] < ARCHIVED:
        time.sleep(0.5)
        samples.append((archived(url), resident(daemon.process)))
    steady = [sample for sample in samples if sample[0] > ARCHIVED / 5]
    growth = statistics.linear_regression(*zip(*steady, strict=True)).slope * ARCHIVED
    yield Row("memory, growth over 50,000 archived", "", "MB", [growth], [], most=1)


PARTS = {part.__name__: part for part in (start, receive, busy, archive, latency, backlog, memory)}


def machine():
    """What it is measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    disk = subprocess.run(["df", "--output=fstype", tempfile.gettempdir()], capture_output=True, text=True, check=True)
    return {
        "processor": f"{os.cpu_count()} x {(models or ['?'])[0].rpartition(': ')[2]}",
        "Python": sys.version.split()[0],
        "boto3": boto3.__version__,
        "SQLite": sqlite3.sqlite_version,
        "disk": f"{disk.stdout.split()[-1]} ({tempfile.gettempdir()})",
        "command": " ".join(["sh tests/bench", *sys.argv[1:]]),
    }


def main():
    parser = argparse.ArgumentParser(prog="tests/bench", description="Measure ts3d against others, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--json", metavar="FILE", help="write what each round measured, too")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    about, rows = machine(), []
    for name, value in about.items():
        print(f"{name}: {value}")
    print(f"\n{'what':<36}{'measured':>12}  {'against':<26}{'':>8}{'figure':>8}  reach", flush=True)
    for name in chosen.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="ts3d-bench-") as folder:
            place = Place(folder)
            with place.stack:
                try:
                    for row in PARTS[name](place):
                        print(row.line(), flush=True)
                        rows.append({"part": name, **row._asdict(), "value": row.value(), "reached": row.reached()})
                except Missing as error:
                    print(f"{name}: {error}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
