"""At every system call: strace kills the daemon at it, or makes it fail, and nothing that was answered 200 is lost.

So SQLite tests itself. A case is a scene, a kind of call, what happens to it, and to the how manieth of each thread.
A seeded sample of the cases runs with the other tests, all of them with `sh tests/run -m sweep`.
"""

import functools
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

import pytest
import threatstack
from conftest import alert, keys_of, until

SEED = 3
SAMPLE = 16
KILL = "KILL"
WHEN = (1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 28, 40, 60, 90)  # until no thread makes so many calls of the kind
# Kinds of calls, each under every name that it may have, and the errors that are tried besides the kill.
DISK = {
    "close": "EIO",
    "fcntl": "EIO ENOLCK",
    "fdatasync": "EIO ENOSPC",
    "newfstatat/fstat/stat/statx": "EIO",
    "pread64": "EIO",
    "pwrite64": "EIO ENOSPC",
}
START = {
    **DISK,
    "flock": "EIO ENOLCK",
    "ftruncate": "EIO",
    "lseek": "EIO",
    "mmap": "ENOMEM",
    "openat": "EMFILE ENOSPC EIO",
    "unlink/unlinkat": "EIO",
}
SCENES = {
    # Webhooks, from the first byte to the end of their alerts.
    "passage": {
        **DISK,
        "accept4": "EMFILE ECONNABORTED",
        "clone3/clone": "EAGAIN",
        "connect": "ETIMEDOUT ECONNRESET",
        "fcntl": "EIO",  # an unlock that fails ends the daemon
        "getrandom": "",  # does not fail
        "getsockname": "ENOBUFS",
        "getsockopt": "ENOBUFS",
        "ioctl": "EIO",
        "mmap": "",  # Python loses the new thread of a connection where memory is used up
        "mprotect": "ENOMEM",
        "munmap": "",  # glibc aborts if it fails
        "poll/ppoll": "ENOMEM",
        "recvfrom": "ECONNRESET ETIMEDOUT EIO",
        "sendto": "ECONNRESET ETIMEDOUT",
        "setsockopt": "ENOBUFS",
        "shutdown": "ENOTCONN",
        "socket": "EMFILE",
        "statfs": "EIO",
        "write": "EIO ENOSPC",
    },
    # The first start, and one that finds alerts: only calls that have to do with the queue's files are counted.
    "create": START,
    "open": START,
    "listen": {"bind": "EADDRINUSE", "clone3/clone": "EAGAIN", "listen": "EADDRINUSE", "socket": "EMFILE"},
    # A thread imports boto3 after the start: too many calls for a sweep.
    "import": {"getdents64": "EIO", "openat": "EIO EMFILE", "read": "EIO"},
    # SIGTERM, with alerts in the queue.
    "stop": {**DISK, "ftruncate": "EIO", "munmap": "", "unlink/unlinkat": "EIO", "write": "EIO"},
}
# What the passage also does, with no effect outside the process and no way to fail.
HARMLESS = """
    rt_sigreturn brk clock_nanosleep exit exit_group futex getpid gettid madvise prctl restart_syscall rseq rt_sigaction
    pselect6 rt_sigpending rt_sigprocmask sched_yield select set_robust_list
""".split()


class Case(NamedTuple):
    scene: str
    kind: str
    what: str
    when: int

    def __str__(self):
        return f"{self.scene}-{self.kind.partition('/')[0]}-{self.what}-{self.when}"


CASES = [
    Case(scene, kind, what, when)
    for scene, kinds in SCENES.items()
    for kind, errors in kinds.items()
    for what in [KILL, *errors.split()]
    for when in ((1, 10, 100, 300) if scene == "import" else WHEN)
]


class Strace:
    """strace, to be attached to a daemon or to start one."""

    def __init__(self, folder, *options):
        self.trace = folder / "trace"
        self.trace.unlink(missing_ok=True)
        self.command = ["strace", "-f", "-o", str(self.trace), *options]
        self.process = None

    @classmethod
    def on(cls, case, folder, paths=()):
        """That does what the case says, counting only calls that have to do with these paths, if any."""
        names = ",".join(f"?{name}" for name in case.kind.split("/"))  # `?`: not every machine has all
        what = f"signal={case.what}" if case.what == KILL else f"error={case.what}"
        only = [option for path in paths for option in ("-P", str(path))]
        return cls(folder, "-e", f"trace={names}", "-e", f"inject={names}:{what}:when={case.when}", *only)

    def attach(self, daemon):
        command = [*self.command, "-p", str(daemon.process.pid)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        if b"attached" not in (line := self.process.stderr.readline()):
            pytest.skip(f"strace cannot attach: {line.decode()}")
        return self

    def detach(self):
        self.process.terminate()
        try:
            self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # it waits for a thread that it killed just now
            self.process.kill()
            self.process.communicate()

    def start(self, daemon):
        """Start the daemon, and wait until it listens or has ended."""
        begin = len(daemon.log()) if daemon.log_file.exists() else 0
        # -D: the daemon is a child of this process, not of strace.
        command = [*self.command, "-D", "-qqq", *daemon.command("serve")]
        with daemon.log_file.open("ab") as log:
            daemon.process = subprocess.Popen(command, stderr=log, env=daemon.environment)
        until(lambda: daemon.process.poll() is not None or daemon.logged("listens on", begin), 30, "start")
        return self

    def struck(self):
        """Whether there was such a call."""
        return bool(re.search("INJECTED|killed by SIGKILL", self.trace.read_text()))


class Sender:
    """Sends webhooks as Threat Stack does: what is not answered 200 is sent again, three times in all."""

    def __init__(self, s3):
        self.s3 = s3
        self.alerts = {}
        self.acknowledged = set()

    def post(self, daemon, alerts):
        for _ in range(3):
            try:
                status, answer = daemon.post({"alerts": alerts})
            except (ConnectionError, http.client.HTTPException):  # no TimeoutError: the daemon must not hang
                continue
            if status == 200:
                self.acknowledged.update(one["id"] for one in answer["alerts"])
                done = [one["id"] for one in answer["alerts"] if one["state"] == "archived"]
                assert self.archived(done), answer
                return
            assert status in (408, 503), answer

    def send(self, daemon, numbers):
        """Send these alerts, two in each webhook, all webhooks at once."""
        alerts = [alert(number) for number in numbers]
        self.alerts.update((one["id"], one) for one in alerts)
        webhooks = [alerts[i : i + 2] for i in range(0, len(alerts), 2)]
        with ThreadPoolExecutor(len(webhooks)) as pool:
            list(pool.map(functools.partial(self.post, daemon), webhooks))

    def send_the_rest(self, daemon):
        for id_ in self.alerts.keys() - self.acknowledged:
            self.post(daemon, [self.alerts[id_]])
        assert self.acknowledged == self.alerts.keys()

    def archived(self, ids):
        """Whether all of these are in S3; what is there must be whole."""
        objects, complete = self.s3.objects(), True
        for one in map(self.alerts.get, ids):
            minute = f"{datetime.fromtimestamp(one['created_at'] / 1000, UTC):%Y/%m/%d/%H/%M}"
            bodies = (threatstack.detail(one["id"]), json.dumps(one).encode())
            for key, body in zip(keys_of(one["id"], minute), bodies, strict=True):
                assert objects.get(key, body) == body, key
                complete = complete and key in objects
        return complete

    def all_archived(self, daemon):
        """Wait for it, and for the queue to be empty."""
        until(lambda: daemon.health().get("queued") == 0, 60, "empty queue")
        assert daemon.health()["failed"] == 0
        assert self.archived(self.alerts)


def ends(daemon):
    """Whether it has ended, or is about to: its main thread looks for that four times a second."""
    threading.Event().wait(1)
    return daemon.process.poll() is not None or daemon.logged("INFO stopping")


def restart_if_it_ends(case, daemon, strace):
    """Crash-only: it may end with exit 1 and one line that says why, and a restart continues its work."""
    if case.what == KILL and (strace.struck() or daemon.process.poll() is not None):
        assert daemon.process.wait(10) == -signal.SIGKILL
    elif ends(daemon):
        assert daemon.process.wait(20) == 1, daemon.log()
        assert len(re.findall("^ts3d: .+", daemon.log(), re.MULTILINE)) == 1, daemon.log()
    else:
        return
    daemon.start()


def passage(case, sender, new_daemon, folder):
    # Two workers: each makes many calls, and few of them fail.
    daemon = new_daemon(archive__workers="2", server__wait="2")
    if case.scene == "passage":  # boto3 is imported once the first is archived
        sender.send(daemon, [9])
        until(lambda: sender.archived(sender.alerts))
    strace = Strace.on(case, folder).attach(daemon)
    sender.send(daemon, range(6))
    until(lambda: daemon.process.poll() is not None or sender.archived(sender.acknowledged), 60, "archive")
    strace.detach()  # each connection is a new thread: their calls would fail without end
    restart_if_it_ends(case, daemon, strace)
    sender.send_the_rest(daemon)
    sender.all_archived(daemon)
    # Main, queue, acceptor, dispatcher, a store worker and two detail workers; no connection is left.
    until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/task")) == 7, what="seven threads")
    assert daemon.stop() == 0
    return strace.struck()


def start(case, sender, new_daemon, folder):
    daemon = new_daemon(start=False, archive__workers="0")
    if case.scene != "create":
        daemon.start()
        sender.send(daemon, range(4))
        daemon.kill()
    daemon.set(archive__workers="2")
    paths = [daemon.queue.with_name(f"queue.db{end}") for end in ("", "-wal", "-shm", ".lock")]
    strace = Strace.on(case, folder, [] if case.scene == "listen" else paths).start(daemon)
    if daemon.process.poll() is None:
        daemon.process.terminate()
    code = daemon.process.wait(20)
    if case.what == KILL:
        assert code == (-signal.SIGKILL if strace.struck() else 0), daemon.log()
    else:  # it may end, if it says why
        ends = code == -signal.SIGTERM and re.search("^ts3d: ", daemon.log(), re.MULTILINE)  # it was ending already
        assert code in (0, 1, 78) or ends, daemon.log()
    assert not list(daemon.folder.glob("*.malformed-*"))  # a read that fails is damage, says SQLite
    daemon.start()
    sender.send(daemon, range(4, 6))
    sender.send_the_rest(daemon)
    sender.all_archived(daemon)
    return strace.struck()


def stop(case, sender, new_daemon, folder):
    daemon = new_daemon(archive__workers="0")
    sender.send(daemon, range(6))
    strace = Strace.on(case, folder).attach(daemon)
    daemon.process.terminate()
    code = daemon.process.wait(20)
    strace.process.communicate(timeout=20)
    assert code == (-signal.SIGKILL if case.what == KILL and strace.struck() else 0), daemon.log()
    daemon.set(archive__workers="2")
    daemon.start()
    sender.all_archived(daemon)
    return strace.struck()


over = set()  # cases without their `when`: no thread makes so many calls


@pytest.fixture
def strike(new_daemon, s3, tmp_path):
    """Runs a case."""
    if not shutil.which("strace"):
        pytest.skip("no strace")

    def strike(case):
        play = {"passage": passage, "import": passage, "stop": stop}.get(case.scene, start)
        if case[:3] in over or not play(case, Sender(s3), new_daemon, tmp_path):
            over.add(case[:3])
            pytest.skip("never reached")

    return strike


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_call(case, strike):
    strike(case)


@pytest.mark.parametrize("case", random.Random(SEED).sample([c for c in CASES if c.when < 3], SAMPLE), ids=str)
def test_a_sample_of_the_calls(case, strike):
    strike(case)


def test_no_kind_of_call_is_missing(new_daemon, s3, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("no strace")
    daemon, sender = new_daemon(server__wait="2"), Sender(s3)
    sender.send(daemon, [9])
    strace = Strace(tmp_path).attach(daemon)
    sender.send(daemon, range(6))
    daemon.stop()
    strace.process.communicate(timeout=20)
    known = {name for scene in ("passage", "stop") for kind in SCENES[scene] for name in kind.split("/")}
    seen = set(re.findall(r"(?m)^[0-9]+ +([a-z0-9_]+)\(", strace.trace.read_text()))
    assert "fdatasync" in seen
    assert seen - known - set(HARMLESS) == set()
