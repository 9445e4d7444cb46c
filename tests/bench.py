"""ts3d against what it could be compared with, measured side by side: `sh tests/bench`, in about four minutes.

What is compared takes turns, for several rounds, and the ratio is the median of the rounds' ratios, so that a machine
that slows down slows both. By hand, on a machine that has nothing else to do; no test asserts any of it.
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

import threatstack
from conftest import BUCKET, TOKEN, Daemon, environment, free_port, listening, until

import ts3d

ROUNDS = 3
SECONDS = 2  # of load
ALERTS = 1000  # archived in one measurement without latency
CONNECTIONS = 32
S3_SECONDS, API_SECONDS, WORKERS = 0.030, 0.120, 32
BACKLOG, ARCHIVED = 100_000, 50_000
LIMITS = {"queue__max_size": "100G", "server__wait": "0"}
IMPORTS = "http.server, sqlite3, ssl, urllib.request, json, configparser, argparse, logging"
ALERT = (
    '{"id":"%s","title":"CloudTrail Activity (IAM Policy Changes) : CreatePolicy by someone","created_at":1484661065000,'
    '"severity":3,"organization_id":"5a2f3c9d1e8b7a6f4c0d2e1b","server_or_region":"us-east-1","source":"CLOUDTRAIL"}'
)
# S3 and Threat Stack in one: it counts the details that are put, and says so to GET /archived.
UPSTREAM = """
const [port, delay] = process.argv.slice(1).map(Number), filler = "x".repeat(1000);
let archived = 0;
require("http").createServer({keepAliveTimeout: 0}, (request, response) => request.resume().on("end", () => {
  const [, kind, id] = request.url.split("/").slice(-3);
  const answer = () => {
    if (request.method == "PUT") {
      archived += request.url.includes("/alerts/");
      response.setHeader("ETag", '"0"').end();
    } else {
      response.end(request.url == "/archived" ? String(archived) : JSON.stringify({id, filler}));
    }
  };
  delay && request.url != "/archived" ? setTimeout(answer, delay) : answer();
})).listen(port, "127.0.0.1");
"""
# wrk's arguments: what makes the ids new, and how many alerts a webhook has.
LOAD = """
local threads = 0
function setup(thread) threads = threads + 1; thread:set("number", threads) end
function init(arguments) stamp, batch, sent = arguments[1], tonumber(arguments[2]), 0 end
function request()
  local alerts = {}
  for i = 1, batch do
    sent = sent + 1
    alerts[i] = string.format('ALERT', string.format("%s-%d-%d", stamp, number, sent))
  end
  return wrk.format("POST", nil, nil, '{"alerts":[' .. table.concat(alerts, ",") .. ']}')
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('{"rate": %f, "slowest": %f, "bad": %d}\\n', summary.requests / summary.duration * 1e6,
    latency:percentile(99.9) / 1e6, errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
""".replace("ALERT", ALERT)


class Missing(Exception):
    """What a part needs is not on this machine."""


class Row(NamedTuple):
    """A line of the table: what was measured in each round, of ts3d and of what it is compared with.

    `figure`: what of it has to be within `least` and `most`: the `ratio`, the `difference`, or it `alone`.
    """

    what: str
    against: str
    unit: str
    measured: list[float]
    baseline: list[float]
    least: float = 0
    most: float = float("inf")
    figure: str = "ratio"

    def value(self):
        pairs = zip(self.measured, self.baseline or self.measured, strict=True)
        of = {"ratio": lambda a, b: a / b, "difference": lambda a, b: a - b, "alone": lambda a, b: a}[self.figure]
        return statistics.median(of(*pair) for pair in pairs)

    def reach(self):
        return f">= {self.least:g}" if self.least else f"<= {self.most:g}"

    def reached(self):
        return self.least <= self.value() <= self.most

    def line(self):
        baseline = f"{statistics.median(self.baseline):.4g}" if self.baseline else ""
        figure = f"{'+' if self.figure == 'difference' else ''}{self.value():.3g}"
        measured = f"{statistics.median(self.measured):.4g} {self.unit}"
        verdict = "ok" if self.reached() else "MISSED"
        return (
            f"{self.what:<35} {measured:>14}  {self.against:<26}{baseline:>8} {figure:>7} {self.reach():>8} {verdict}"
        )


class Place:
    """A folder, and all that was started in it and is ended with it."""

    def __init__(self, folder):
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.numbers = itertools.count()

    def start(self, *command, **more):
        """A process; it is killed at the end, if it was not before."""
        with open(self.folder / "output", "ab") as output:
            options = {"stdout": output, "stderr": output, "env": environment(), **more}
            process = subprocess.Popen(list(map(str, command)), **options)
        self.stack.callback(end, process)
        return process

    def upstream(self, delay=0.0, port=0):
        """The URL of a server that takes the place of S3 and of Threat Stack, and answers after `delay` seconds."""
        port = port or free_port()
        self.start(program("node"), "-e", UPSTREAM, port, delay * 1000)
        until(lambda: listening(port), what="upstream")
        return f"http://127.0.0.1:{port}"

    def daemon(self, s3="http://127.0.0.1:1", api="", start=True, **options):
        """ts3d; by default its upstreams are away."""
        folder = self.folder / f"ts3d-{next(self.numbers)}"
        folder.mkdir()
        options = {"s3__endpoint_url": s3, "threatstack__base_url": api or s3, **LIMITS, **options}
        daemon = Daemon(folder, **options)
        self.stack.callback(lambda: daemon.process and end(daemon.process))
        return daemon.start() if start else daemon

    def load(self, url, batch=1, connections=CONNECTIONS, seconds=SECONDS):
        """What wrk says of webhooks that are sent at full speed: `rate` a second, `slowest` of 1,000 in seconds."""
        script = self.folder / "load.lua"
        script.write_text(LOAD)
        command = [program("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script]
        command += ["-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json", url, "--"]
        command += [f"load-{next(self.numbers)}", batch]
        said = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        result = json.loads(said.splitlines()[-1])
        assert not result["bad"], said
        return result


def end(process):
    process.kill()
    process.wait()


def program(name):
    path = shutil.which(name)
    if not path:
        raise Missing(f"{name} is missing")
    return path


def address(daemon):
    return f"http://127.0.0.1:{daemon.address[1]}/api/v1/s3/alert"


def post(daemon, name, number, batch=25):
    """Send so many alerts, whose ids begin with `name`."""
    for first in range(0, number, batch):
        alerts = [json.loads(ALERT % f"{name}-{n:06}") for n in range(first, min(number, first + batch))]
        assert daemon.post({"alerts": alerts})[0] == 200


def fill(daemon, number):
    """Put so many alerts into the queue of a daemon that does not run."""
    queue = ts3d.Queue(str(daemon.queue), 1 << 40, create=True)
    bodies = ((f"backlog-{n:06}", ALERT % f"backlog-{n:06}") for n in range(number))
    arrivals = [ts3d.Arrival(id_, "2017/01/17/13/51", "webhooks", body.encode()) for id_, body in bodies]
    for first in range(0, number, 10_000):
        queue.put(arrivals[first : first + 10_000])
    queue.close()


def archived(url):
    """How many details an upstream has been given."""
    with urllib.request.urlopen(f"{url}/archived") as answer:
        return int(answer.read())


def count(url, number):
    """How many details it is given from now on, and in what time, until it is this number or more."""
    begin, started = archived(url), time.monotonic()
    until(lambda: archived(url) >= begin + number, seconds=600, what="archived alerts")
    return (archived(url) - begin) / (time.monotonic() - started)


def processor_seconds(process):
    """What a process and the children that it has waited for have used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def resident(process):
    """Megabytes in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def settled(process):
    """Megabytes in memory, once they change no more."""
    while (before := resident(process)) != (time.sleep(1.5), resident(process))[1]:
        pass
    return before


@contextlib.contextmanager
def running(process):
    """Let a process that stands still go on for a while."""
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


# What is compared with ----------------------------------------------------------------------------------------------


def loop(threads, url):
    """For each line of standard input archive so many alerts with nothing but boto3 and urllib, and print a line."""
    import boto3
    import botocore.config

    config = botocore.config.Config(max_pool_connections=10)
    client = boto3.client("s3", endpoint_url=url, config=config)
    client.meta.events.register("before-sign.s3.PutObject", ts3d.without_expect)

    def work(numbers):
        for n in numbers:
            id_ = f"alert-{n:06}"
            body = (ALERT % id_).encode()
            put = {"Bucket": BUCKET, "ContentType": "application/json"}
            client.put_object(Key=f"webhooks/2017/01/17/13/51/{id_}", Body=body, **put)
            request = urllib.request.Request(f"{url}/alerts/{id_}", headers={"Authorization": threatstack.KEY})
            with urllib.request.urlopen(request) as answer:
                detail = answer.read()
            client.put_object(Key=f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", Body=detail, **put)

    for line in sys.stdin:
        numbers = iter(range(int(line)))  # shared: each is taken once
        workers = [threading.Thread(target=work, args=(numbers,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("done", flush=True)


def tutorial():
    """The tutorial's app: it archives before it answers, with a boto3 client for each object."""
    import boto3
    import flask
    import requests

    app = flask.Flask("tutorial")
    bucket, base = os.environ["TS_AWS_S3_BUCKET"], os.environ["THREATSTACK_BASE_URL"]
    headers = {"Authorization": os.environ["THREATSTACK_API_KEY"]}

    def put(key, value):
        client = boto3.client("s3", endpoint_url=os.environ["S3_URL"])
        client.put_object(Bucket=bucket, Key=key, Body=json.dumps(value))

    @app.post("/api/v1/s3/alert")
    def archive():
        for alert in flask.request.get_json()["alerts"]:
            id_ = alert["id"]
            detail = requests.get(f"{base}/alerts/{id_}", headers=headers).json()
            put(time.strftime(f"webhooks/%Y/%m/%d/%H/%M/{id_}", time.gmtime(alert["created_at"] / 1000)), alert)
            put(f"alerts/{id_[:2]}/{id_[2:4]}/{id_}", detail)
        return flask.jsonify(success=True)

    return app


# The parts of the table ---------------------------------------------------------------------------------------------


def start(place):
    """From exec to the first webhook that is acknowledged."""
    daemon = place.daemon(start=False, server__listen=f"127.0.0.1:{free_port()}")
    ours, bare = [], []
    for _ in range(4 * ROUNDS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], check=True)
        bare.append(time.monotonic() - began)
        began = time.monotonic()
        with daemon.log_file.open("ab") as log:
            daemon.process = daemon.popen(log)
        daemon.address = ts3d.load_config(str(daemon.config)).listen
        while True:
            with contextlib.suppress(ConnectionError):
                post(daemon, f"start-{len(ours)}", 1)
                break
            time.sleep(0.001)
        ours.append(time.monotonic() - began)
        daemon.kill()
    yield Row("start to first acknowledgement", "python3 -c import ...", "s", ours, bare, most=2)


def receive(place):
    """Acknowledgements of alerts that are on disk, one a webhook and 25."""
    hook = {"execute-command": "/bin/true", "http-methods": ["POST"]}
    waiting = {"id": "waiting", "include-command-output-in-response": True, **hook}
    hooks = place.folder / "hooks.json"
    hooks.write_text(json.dumps([{"id": "fast", **hook}, waiting]))
    daemon = place.daemon(archive__workers="0")
    rates = {"fast": [], "waiting": [], 1: [], 25: []}
    for _ in range(ROUNDS):
        for id_ in ("fast", "waiting") if shutil.which("webhook") else ():
            port = free_port()
            # -verbose: it logs its requests, as ts3d does.
            process = place.start("webhook", "-verbose", "-hooks", hooks, "-ip", "127.0.0.1", "-port", port)
            until(lambda port=port: listening(port), what="webhook")
            rates[id_].append(place.load(f"http://127.0.0.1:{port}/hooks/{id_}")["rate"])
            end(process)  # and what it has still to execute
        for batch in (1, 25):
            rates[batch].append(batch * place.load(address(daemon), batch)["rate"])
    if rates["fast"]:
        yield Row("acknowledged, one alert each", "webhook, at once", "/s", rates[1], rates["fast"], least=0.5)
        yield Row("acknowledged, one alert each", "webhook, waiting", "/s", rates[1], rates["waiting"], least=2)
    yield Row("alerts acknowledged in batches of 25", "one alert each", "/s", rates[25], rates[1], least=8)
    if not rates["fast"]:
        raise Missing("webhook is missing")


def busy(place):
    """Acknowledgements while the archiver works at full speed."""
    url = place.upstream()
    busy, idle = place.daemon(url), place.daemon(archive__workers="0")
    post(busy, "warm", 500)
    until(lambda: archived(url) >= 500, what="archived alerts")
    ours, without, slowest = [], [], []
    for _ in range(2 * ROUNDS):
        without.append(place.load(address(idle))["rate"])
        with running(busy.process):
            result = place.load(address(busy))
        ours.append(result["rate"])
        slowest.append(result["slowest"] * 1000)
    yield Row("acknowledged while it archives", "while it does not", "/s", ours, without, least=0.5)
    yield Row("slowest of 1,000 answers meanwhile", "", "ms", slowest, [], most=250, figure="alone")


def archive(place):
    """Archiving without latency: alerts a second, and what one costs from the webhook on."""
    url = place.upstream()
    daemon = place.daemon(url)
    loops = []
    for threads in (1, 4, 8):
        code = f"import bench; bench.loop({threads}, {url!r})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
        loops.append(place.start(sys.executable, "-c", code, **pipes))

    def measure(process, work):
        used, began = processor_seconds(process), time.monotonic()
        work()
        seconds = time.monotonic() - began
        return ALERTS / seconds, (processor_seconds(process) - used) * 1000 / ALERTS

    def run_loop(process, number=ALERTS):
        print(number, file=process.stdin, flush=True)
        process.stdout.readline()

    def run_daemon(name, number=ALERTS):
        whole = archived(url) + number
        post(daemon, name, number)
        until(lambda: archived(url) >= whole, what="archived alerts")

    for process in loops:
        run_loop(process, 100)
    run_daemon("warm", 100)
    ours, best = [], []
    for n in range(ROUNDS):
        best.append(max(measure(process, lambda process=process: run_loop(process)) for process in loops))
        ours.append(measure(daemon.process, lambda n=n: run_daemon(f"round-{n}")))
    (rate, cost), (best_rate, best_cost) = zip(*ours, strict=True), zip(*best, strict=True)
    yield Row("archived, no latency", "bare loop, 1, 4, 8 threads", "/s", rate, best_rate, least=0.9)
    yield Row("processor time, webhook to S3", "the same loop", "ms", cost, best_cost, most=1.15)


def latency(place):
    """Archiving where S3 and Threat Stack take their time."""
    s3, api = place.upstream(S3_SECONDS), place.upstream(API_SECONDS)
    daemon = place.daemon(s3, api, archive__workers=WORKERS)
    settings = environment(
        S3_URL=s3, TS_AWS_S3_BUCKET=BUCKET, THREATSTACK_BASE_URL=api, THREATSTACK_API_KEY=threatstack.KEY
    )
    apps = {}
    for threads in (16, 1):
        apps[threads] = port = free_port()
        command = [sys.executable, "-m", "gunicorn", "-w", 2, "--threads", threads, "-b", f"127.0.0.1:{port}"]
        place.start(*command, "bench:tutorial()", env=settings, cwd=Path(__file__).parent)
        until(lambda port=port: listening(port), what="gunicorn")
    rates = {"ts3d": [], 16: [], 1: []}
    for n in range(ROUNDS):
        begin = archived(s3)
        post(daemon, f"round-{n}", 850)
        until(lambda begin=begin: archived(s3) >= begin + 150, what="archived alerts")
        rates["ts3d"].append(count(s3, 550))
        until(lambda begin=begin: archived(s3) >= begin + 850, what="archived alerts")
        for threads, port in apps.items():
            url = f"http://127.0.0.1:{port}/api/v1/s3/alert"
            rates[threads].append(place.load(url, connections=4 * threads, seconds=4)["rate"])
    law = [WORKERS / (2 * S3_SECONDS + API_SECONDS)] * ROUNDS
    yield Row("archived, 32 workers, 30 and 120 ms", "Little's law", "/s", rates["ts3d"], law, least=0.95)
    yield Row(
        "archived, 32 workers, 30 and 120 ms", "tutorial, 2 x 16 threads", "/s", rates["ts3d"], rates[16], least=4
    )
    yield Row("archived, 32 workers, 30 and 120 ms", "tutorial, 2 processes", "/s", rates["ts3d"], rates[1], least=15)


def backlog(place):
    """What 100,000 alerts in the queue change."""
    url = place.upstream()
    both = full, empty = [place.daemon(url, start=False, archive__workers="0") for _ in range(2)]
    fill(full, BACKLOG)
    rates = {full: [], empty: []}
    for daemon in both:
        daemon.start()
    for _ in range(ROUNDS):
        for daemon in both:
            rates[daemon].append(place.load(address(daemon))["rate"])
    yield Row("acknowledged, 100,000 queued", "none", "/s", rates[full], rates[empty], least=0.9)
    empty.kill()
    full.kill()
    empty.queue.unlink()
    for daemon in both:
        daemon.set(archive__workers=None)
        daemon.start()
        rates[daemon] = []
        count(url, 200) if daemon is full else post(daemon, "warm", 200)
        daemon.process.send_signal(signal.SIGSTOP)
    for n in range(ROUNDS):
        for daemon in both:
            with running(daemon.process):
                begin, began = archived(url), time.monotonic()
                post(daemon, f"round-{n}", ALERTS)
                until(lambda begin=begin: archived(url) >= begin + ALERTS, what="archived alerts")
                rates[daemon].append(ALERTS / (time.monotonic() - began))
    yield Row("archived, 100,000 queued", "none", "/s", rates[full], rates[empty], least=0.9)


def memory(place):
    """Resident memory: idle, with 100,000 alerts queued while the upstreams are away, and while 50,000 are archived."""
    code = "import boto3, time; client = boto3.client('s3'); time.sleep(1000)"
    bare = settled(place.start(sys.executable, "-c", code))
    port = free_port()
    daemon = place.daemon(f"http://127.0.0.1:{port}")
    idle = settled(daemon.process)
    yield Row("memory, idle", "boto3's S3 client", "MB", [idle], [bare], most=15, figure="difference")
    post(daemon, "outage", BACKLOG, batch=100)
    queued = settled(daemon.process)
    yield Row("memory, 100,000 queued", "idle", "MB", [queued], [idle], most=15, figure="difference")
    url = place.upstream(port=port)
    samples = []
    while not samples or samples[-1][0] < ARCHIVED:
        time.sleep(0.5)
        samples.append((archived(url), resident(daemon.process)))
    steady = [sample for sample in samples if sample[0] > ARCHIVED / 5]
    slope = statistics.linear_regression(*zip(*steady, strict=True)).slope * ARCHIVED
    yield Row("memory, growth over 50,000 archived", "", "MB", [slope], [], most=1, figure="alone")


PARTS = {part.__name__: part for part in (start, receive, busy, archive, latency, backlog, memory)}


def machine(folder):
    """What it was measured on."""
    import boto3

    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0] or "?"
    python = ".".join(map(str, sys.version_info[:3]))
    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True, check=True).stdout.split()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": python,
        "boto3": boto3.__version__,
        "sqlite": sqlite3.sqlite_version,
        "disk": disk[-1],
        "command": " ".join(["sh tests/bench", *sys.argv[1:]]),
    }


def main():
    parser = argparse.ArgumentParser(prog="tests/bench", description="Measure ts3d against others, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of the table: {', '.join(PARTS)}; by default all")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with what each round measured")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}: {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended
    about, rows = machine(tempfile.gettempdir()), []
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    print(f"\n{'what':<35} {'measured':>14}  {'against':<26}{'':>8} {'figure':>7} {'reach':>8}", flush=True)
    for name in chosen.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="ts3d-bench-") as folder:
            place = Place(Path(folder))
            try:
                with place.stack:
                    for row in PARTS[name](place):
                        print(row.line(), flush=True)
                        rows.append({**row._asdict(), "value": row.value(), "reached": row.reached()})
            except Missing as error:
                print(f"{name}: {error}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
