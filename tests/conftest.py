"""Real parts for the tests: rclone's S3 server, ts3d as a process of its own, and Threat Stack's stand-in."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import trustme

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import threatstack
from demo import AWS, BUCKET, KEY_PAIR, TOKEN, environment, free_port

# In the background a shell may ignore these signals, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
TS3D = ROOT / "ts3d.py"
CREDENTIALS = f"""\
aws_access_key_id = {AWS["AWS_ACCESS_KEY_ID"]}
aws_secret_access_key = {AWS["AWS_SECRET_ACCESS_KEY"]}
"""
TUTORIAL_ID = "587c0159a907346eccb84004"


def until(condition, seconds=60, what="that"):
    """Wait for `condition` to return something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)
    return value


def listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def readme(section, language, number=0):
    """A block of this language (`""`: of none) in a section of the README (`""`: before the first), counted from 0."""
    text = (ROOT / "README.md").read_text()
    text = (text.partition(f"\n## {section}\n")[2] if section else text).partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in blocks if kind == language][number]


class Rclone:
    """`rclone serve s3`: a real S3 server, signature checks included, on a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.process = None
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @staticmethod
    def binary():
        return shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"

    def start(self):
        options = ["--auth-key", KEY_PAIR, "--addr", f"127.0.0.1:{self.port}"]
        command = [self.binary(), "serve", "s3", *options, str(self.folder)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
        until(lambda: listening(self.port), what="rclone")

    def stop(self):
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def objects(self, under=""):
        """What S3 holds: bodies by key."""
        top = self.folder / BUCKET
        bodies = {}
        for path in sorted(top.rglob("*")):
            key = str(path.relative_to(top))
            if key.startswith(under) and path.is_file() and not path.name.startswith(".rclone_temp"):
                bodies[key] = path.read_bytes()
        return bodies

    def clear(self):
        """Empty the bucket, against a last write that may still be under way."""
        top = self.folder / BUCKET
        until(lambda: shutil.rmtree(top, ignore_errors=True) or not top.exists(), what="empty bucket")
        top.mkdir()


# sd_listen_fds(3): from 3 on, in the process that LISTEN_PID names, which is the one that calls exec.
HAND_OVER = """
import fcntl, os, sys
end = sys.argv.index("--")
copies = [fcntl.fcntl(int(file), fcntl.F_DUPFD, 100) for file in sys.argv[1:end]]
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
    os.close(copy)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(copies)))
os.execv(sys.argv[end + 1], sys.argv[end + 1:])
"""


class Daemon:
    """ts3d.py serve with a configuration of its own."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.process = None
        self.config = folder / "ts3d.conf"
        self.queue = folder / "queue.db"
        self.log_file = folder / "log"
        self.environment = environment()
        self.handed = ()  # listening sockets, for `hand_over`
        self.address = ("127.0.0.1", 0)
        self.options = {
            ("server", "listen"): "127.0.0.1:0",
            ("server", "webhook_token"): TOKEN,
            ("server", "wait"): "10",  # so that `archived` is said on a machine that has much else to do, too
            ("threatstack", "api_key"): threatstack.KEY,
            ("s3", "bucket"): BUCKET,
        }
        self.set(**options)

    def set(self, **options):
        """Change options, named section__option; None takes one away. Writes the file."""
        for name, value in options.items():
            section, _, option = name.partition("__")
            self.options[section.replace("put_object", "s3:put_object"), option] = value
        sections = {}
        for (section, option), value in self.options.items():
            if value is not None:
                sections.setdefault(section, []).append(f"{option} = {value}\n")
        self.config.write_text("\n".join(f"[{name}]\n" + "".join(lines) for name, lines in sections.items()))

    def command(self, *arguments):
        return [sys.executable, str(TS3D), *arguments, "-c", str(self.config)]

    def popen(self, stderr):
        """Start `serve`, with the sockets that are handed over, as systemd does it."""
        files = [str(sock.fileno()) for sock in self.handed]
        launch = [sys.executable, "-c", HAND_OVER, *files, "--"] if files else []
        return subprocess.Popen(
            [*launch, *self.command("serve")], stderr=stderr, env=self.environment, pass_fds=map(int, files)
        )

    def run(self, *arguments, timeout=30):
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def start(self):
        begin = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = self.popen(log)
        line = until(
            lambda: self.process.poll() is not None or self.logged(r"listens on (?:http\S*:(\d+))?", begin), 20, "start"
        )
        assert line is not True, f"ts3d ended with {self.process.returncode}: {self.log()}"
        self.address = ("127.0.0.1", int(line[1] or 0))
        return self

    def log(self, begin=0):
        return self.log_file.read_bytes()[begin:].decode()

    def logged(self, pattern, begin=0):
        return re.search(pattern, self.log(begin))

    def stop(self, sig=signal.SIGTERM):
        """Stop it and return its exit code."""
        self.process.send_signal(sig)
        code = self.process.wait(15)
        self.process = None
        return code

    def kill(self):
        return self.stop(signal.SIGKILL)

    def restart(self, **options):
        """Stop it in order, change options, and start it."""
        assert self.stop() == 0
        self.set(**options)
        return self.start()

    def refused(self):
        """Start it, expect exit code 78, and return what it says."""
        process = self.popen(subprocess.PIPE)
        assert process.wait(20) == 78
        return process.stderr.read().decode()

    def without_keys(self):
        """Take AWS's keys out of its environment; its home is its own folder."""
        del self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"]
        self.environment["HOME"] = str(self.folder)

    def archive(self, number=0):
        """Post an alert until it is archived: boto3 may not be imported yet."""
        body = {"alerts": [alert(number)]}
        until(lambda: self.post(body)[1]["alerts"][0]["state"] == "archived", what="archived alert")

    def request(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection(*self.address, timeout=40)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None, response.headers
        finally:
            connection.close()

    def post(self, body, token=TOKEN):
        """POST a webhook: bytes as they are, or something to encode. Status and answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self.request("POST", "/api/v1/s3/alert", data, headers)[:2]

    def health(self):
        return self.request("GET", "/healthz")[1]


@pytest.fixture(scope="session")
def rclone(tmp_path_factory):
    server = Rclone(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(rclone):
    rclone.clear()
    yield rclone
    if rclone.process:
        rclone.process.send_signal(signal.SIGCONT)
    else:
        rclone.start()


@pytest.fixture
def api():
    server = threatstack.Faulty()
    yield server
    server.stop()


@pytest.fixture
def bucket():
    """S3's stand-in, which keeps what is put as `objects`."""
    server = threatstack.Faulty()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def moto():
    """moto's AWS as a server, with a bucket; its address."""
    from moto.server import ThreadedMotoServer  # it takes a while

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    aws_client("s3", url).create_bucket(Bucket=BUCKET)
    yield url
    server.stop()


def aws_client(service, url, region="us-east-1"):
    keys = {"aws_access_key_id": AWS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client(service, endpoint_url=url, region_name=region, **keys)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, which can be filled and taken away."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40M,mode=755", "tmpfs", place]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr}")
    yield place
    subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)


def fill(place):
    """Take the disk's last byte."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.fixture
def listener():
    """Makes listening sockets, as systemd does: `HOST:0`, `[HOST]:0`, a path or an abstract name."""
    sockets = []

    def listen(where):
        if where.startswith(("/", "\0")):
            sock, address = socket.socket(socket.AF_UNIX), where
        else:
            host, _, port = where.rpartition(":")
            sock = socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
            address = host.strip("[]"), int(port)
        sockets.append(sock)
        sock.bind(address)
        sock.listen(100)
        return sock

    yield listen
    for sock in sockets:
        sock.close()


@pytest.fixture
def new_daemon(tmp_path, s3, api):
    """Makes daemons; none outlives its test, none may leave a traceback or a secret in its log."""
    daemons = []

    def make(start=True, **options):
        folder = tmp_path / f"ts3d-{len(daemons)}"
        folder.mkdir()
        options = {"threatstack__base_url": f"{api.url}/api/v1", "s3__endpoint_url": s3.url, **options}
        daemons.append(Daemon(folder, **options))
        return daemons[-1].start() if start else daemons[-1]

    yield make
    for daemon in daemons:
        if daemon.process:
            daemon.kill()
        log = daemon.log() if daemon.log_file.exists() else ""
        assert "Traceback" not in log, log
        assert "internal error" not in log, log
        for secret in (TOKEN, threatstack.KEY, AWS["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in log, log


@pytest.fixture
def daemon(new_daemon):
    return new_daemon()


@pytest.fixture(scope="module")
def machine(request, tmp_path_factory):
    """A Debian of the test file's RELEASE, on which ts3d is installed as the README says."""
    from machine import Machine  # which imports this file

    if os.geteuid() != 0:
        pytest.skip("a booted systemd needs root")
    for program in ("systemd-nspawn", "debootstrap"):
        if not shutil.which(program):
            pytest.skip(f"no {program}")
    machine = Machine(request.module.RELEASE, tmp_path_factory.mktemp("machine"))
    try:
        machine.boot()
        machine.install(**getattr(request.module, "SETTINGS", {}))
        yield machine
    finally:
        machine.stop()


@pytest.fixture
def silent(machine):
    """That no secret, and no traceback, is in the journal."""
    secrets = machine.secrets()
    yield
    journal = machine.run("journalctl --no-pager --output=cat").stdout
    assert not [secret for secret in (*secrets, "Traceback") if secret in journal]


@pytest.fixture
def certificate(tmp_path):
    """A certificate for this machine: a daemon's `options` for it, its PEM `file`, and a client's `context`."""
    authority, pem, context = trustme.CA(), tmp_path / "server.pem", ssl.create_default_context()
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    authority.configure_trust(context)
    options = {"server__tls_certificate": pem, "server__tls_key": pem}
    return SimpleNamespace(options=options, file=pem, context=context, authority=authority)


EVERY_NAME_IS_THIS_MACHINE = """
from proxy.http.proxy import HttpProxyBasePlugin

class Names(HttpProxyBasePlugin):
    def resolve_dns(self, host, port):
        return "127.0.0.1", None
"""


@pytest.fixture
def new_proxy(tmp_path):
    """Starts forward proxies, for which every name is this machine: their `port` and their `log`."""
    (tmp_path / "names.py").write_text(EVERY_NAME_IS_THIS_MACHINE)
    processes = []

    def start(*options):
        folder = tmp_path / f"proxy-{len(processes)}"
        folder.mkdir()
        command = [sys.executable, "-m", "proxy", "--port=0", f"--port-file={folder}/port", f"--data-dir={folder}"]
        command += ["--num-acceptors=1", "--num-workers=1", "--plugins=names.Names", *options]
        with (folder / "log").open("wb") as log:
            environ = environment(PYTHONPATH=tmp_path, PYTHONUNBUFFERED=1)
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
            processes.append(process)
        port = until(lambda: (folder / "port").exists() and (folder / "port").read_text().strip(), what="proxy")
        return SimpleNamespace(port=int(port), log=(folder / "log").read_text)

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)  # it has children, and does not always end by itself
        process.wait()


@pytest.fixture
def elsewhere():
    """An address of this machine's that is not loopback; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("198.51.100.1", 9))
        if not sock.getsockname()[0].startswith("127."):
            return sock.getsockname()[0]
    pytest.skip("this machine has no address but loopback")


@pytest.fixture
def tracer(tmp_path):
    """Runs strace on a daemon, with expressions as its `-e` has them; a context, whose value is the trace's file.

    `end` ends strace: SIGTERM waits for a delay that it makes.
    """
    if not shutil.which("strace"):
        pytest.skip("no strace")

    @contextlib.contextmanager
    def trace(daemon, *expressions, end=signal.SIGTERM):
        output = tmp_path / "trace"
        command = ["strace", "-f", "-s", "4000", "-o", output, "-p", str(daemon.process.pid)]
        for expression in expressions:
            command += ["-e", expression]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            if b"attached" not in (line := process.stderr.readline()):
                pytest.skip(f"strace cannot attach: {line.decode()}")
            try:
                yield output
            finally:
                process.send_signal(end)
                process.stderr.read()

    return trace


def alert(number=0, **members):
    """A valid alert, the number in its id and minute."""
    return {"id": f"alert-{number:06}", "created_at": 1484661065000 + number * 60000, "severity": 1, **members}


FAST_CLOCK = """
import threading, time
from pathlib import Path

file, lock = Path(__file__).with_name("speed"), threading.RLock()
real, sleep, wait, epoch, began = time.monotonic, time.sleep, threading.Condition.wait, time.time(), time.monotonic()
last, passed, speed, jump = began, 0.0, 1.0, 0.0

def monotonic():
    global last, passed, speed, jump
    with lock:
        now = real()
        last, passed = now, passed + (now - last) * speed
        speed, jump = map(float, file.read_text().split())
        return began + passed

def shorter(seconds):
    return max(seconds / speed, min(seconds, 0.001))

time.monotonic = threading._time = monotonic
time.time = lambda: epoch + monotonic() - began + jump
time.time_ns = lambda: int(time.time() * 1e9)  # Python 3.13's logging takes it
time.sleep = lambda seconds: sleep(shorter(seconds))
threading.Condition.wait = lambda self, timeout=None: wait(self, timeout if timeout is None else shorter(timeout))
"""


class Clock:
    """A daemon's clocks and pauses, `speed` times as fast, not its sockets'; the wall clock `jump` seconds ahead."""

    # Long enough at any speed.
    HOURS = {"server__request_timeout": "1h", "threatstack__timeout": "1h", "server__keepalive_timeout": "24h"}

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(FAST_CLOCK)
        self.set()

    def use(self, daemon):
        daemon.environment["PYTHONPATH"] = str(self.folder)

    def set(self, speed=1, jump=0):
        new = self.folder / "new"
        new.write_text(f"{speed} {jump}")
        new.rename(self.folder / "speed")


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path / "clock")


def problems_of(daemon):
    """What `status` finds: its exit code, and messages by type."""
    result = daemon.run("status", "--json")
    return result.returncode, {cause["type"]: cause["message"] for cause in json.loads(result.stdout)["causes"]}


def peak_memory(daemon):
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def error_of(daemon, number=0):
    """What an answer says that stands in an alert's way, once it says anything: nothing was tried before boto3."""
    body = {"alerts": [alert(number)]}
    return until(lambda: daemon.post(body)[1]["alerts"][0].get("error"), what="error")


def keys_of(alert_id, minute):
    return [f"alerts/{alert_id[:2]}/{alert_id[2:4]}/{alert_id}", f"webhooks/{minute}/{alert_id}"]
