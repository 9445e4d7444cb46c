"""At every system call: strace kills the daemon at it, or makes it fail, and nothing that was answered 200 is lost.

So SQLite tests itself. A case is a scene, a kind of call, what happens at it, and at the how manieth of each thread.
A seeded sample runs with the other tests, all cases with `sh tests/run -m sweep`.
"""

import contextlib
import functools
import http.client
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import threatstack
from conftest import alert, keys_of, until

SEED = 1
SAMPLE = 14
KILL = "KILL"
# The how manieth call of a thread: a kind's row of cases ends where there is no such call any more.
WHEN = (1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 28, 40, 60, 90)
# Kinds of calls, each under all names that it has, and how they fail where they do.
FILES = {
    "fdatasync": "EIO ENOSPC",
    "pwrite64": "EIO ENOSPC",
    "pread64": "EIO",
    "ftruncate": "EIO",
    "fcntl": "EIO ENOLCK",
    "newfstatat/fstat/stat/statx": "EIO",
    "statfs": "EIO",
    "openat": "EMFILE ENOSPC EIO",
    "unlink/unlinkat": "EIO",
    "close": "EIO",
    "mmap": "ENOMEM",
    "munmap": "ENOMEM",
}
SOCKETS = {
    "accept4": "EMFILE ECONNABORTED",
    "socket": "EMFILE",
    "connect": "ETIMEDOUT ECONNRESET",
    "sendto": "ECONNRESET ETIMEDOUT",
    "recvfrom": "ECONNRESET ETIMEDOUT EIO",
    "poll/ppoll": "ENOMEM",
    "ioctl": "EIO",
    "setsockopt": "ENOBUFS",
    "getsockopt": "ENOBUFS",
    "getsockname": "ENOBUFS",
    "shutdown": "ENOTCONN",
}
OTHERS = {"write": "EIO ENOSPC", "clone3/clone": "EAGAIN", "mprotect": "ENOMEM"}
SCENES = {
    # From a webhook to the end of its alerts.
    "passage": {**FILES, **SOCKETS, **OTHERS},
    # The first start, and one that finds alerts; only calls that have to do with the queue's files are counted.
    "create": {**FILES, "flock": "EIO ENOLCK", "lseek": "EIO", "read": "EIO"},
    "open": {**FILES, "flock": "EIO ENOLCK", "lseek": "EIO", "read": "EIO"},
    "listen": {"socket": "EMFILE", "bind": "EADDRINUSE", "listen": "EADDRINUSE", "clone3/clone": "EAGAIN"},
    "stop": {**FILES, "shutdown": "ENOTCONN", "write": "EIO"},
}


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
    for when in WHEN
]
# boto3 is imported by a thread, after the start: too many calls for a sweep.
CASES += [Case("import", kind, "EIO", when) for kind in ("openat", "read", "getdents64") for when in (1, 30, 300)]


class Strace:
    """strace on a daemon: either attached to it, or its `command` starts one."""

    def __init__(self, case, folder, paths=()):
        self.trace = folder / "trace"
        self.trace.unlink(missing_ok=True)
        kinds = ",".join(f"?{name}" for name in case.kind.split("/"))
        what = f"signal={case.what}" if case.what == KILL else f"error={case.what}"
        inject = f"inject={kinds}:{what}:when={case.when}"
        self.command = ["strace", "-f", "-o", str(self.trace), "-e", f"trace={kinds}", "-e", inject]
        self.command += itertools.chain(*(("-P", str(path)) for path in paths))

    def attach(self, daemon):
        command = [*self.command, "-p", str(daemon.process.pid)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        if b"attached" not in (line := self.process.stderr.readline()):
            pytest.skip(f"strace cannot attach: {line.decode()}")
        return self

    def detach(self):
        self.process.terminate()
        self.process.communicate(timeout=20)

    def start(self, daemon):
        """Start the daemon under strace, and wait until it listens or has ended."""
        begin = daemon.log_file.stat().st_size if daemon.log_file.exists() else 0
        with daemon.log_file.open("ab") as log:
            # -D: the daemon is this process's child, not strace's.
            command = [*self.command, "-D", "-qqq", "--seccomp-bpf", *daemon.command("serve")]
            daemon.process = subprocess.Popen(command, stderr=log, env=daemon.environment)
        until(lambda: daemon.process.poll() is not None or daemon.logged("listens on", begin), 30, "start")
        return self

    def struck(self):
        """Whether there was such a call."""
        return bool(re.search(r"INJECTED|killed by SIGKILL", self.trace.read_text()))


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
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                continue
            if status == 200:
                objects = self.s3.objects()
                for one in answer["alerts"]:
                    self.acknowledged.add(one["id"])
                    if one["state"] == "archived":
                        assert f"alerts/al/er/{one['id']}" in objects
                return
            assert status in (408, 503), answer

    def send(self, daemon, numbers):
        """Send these alerts, two in each webhook, all at once."""
        alerts = [alert(number) for number in numbers]
        self.alerts.update((one["id"], one) for one in alerts)
        webhooks = [alerts[i : i + 2] for i in range(0, len(alerts), 2)]
        with ThreadPoolExecutor(len(webhooks)) as pool:
            list(pool.map(functools.partial(self.post, daemon), webhooks))

    def send_the_rest(self, daemon):
        for one in [one for one in self.alerts.values() if one["id"] not in self.acknowledged]:
            self.post(daemon, [one])
        assert self.acknowledged == set(self.alerts)

    def archived(self, ids):
        """Whether all of these are in S3: each object there is must be whole."""
        objects = self.s3.objects()
        return all(self.in_s3(objects, self.alerts[id_]) for id_ in ids)

    @staticmethod
    def in_s3(objects, one):
        minute = one["created_at"] // 60000 - 1484661065000 // 60000 + 51
        detail, webhook = keys_of(one["id"], f"2017/01/17/{13 + minute // 60}/{minute % 60:02}")
        whole = {detail: threatstack.detail(one["id"]), webhook: json.dumps(one).encode()}
        found = {key: objects[key] for key in whole if key in objects}
        assert found == {key: whole[key] for key in found}
        return len(found) == 2


never = set()  # rows of cases that are over


@pytest.fixture
def run(new_daemon, s3, tmp_path):
    """Runs a case."""
    if not shutil.which("strace"):
        pytest.skip("no strace")

    def run(case):
        if case[:3] in never:
            pytest.skip("never reached")
        sender = Sender(s3)
        reached = {"passage": passage, "import": passage, "stop": stop}.get(case.scene, start)(
            case, sender, new_daemon, tmp_path
        )
        if not reached:
            never.add(case[:3])
            pytest.skip("never reached")

    return run


def passage(case, sender, new_daemon, folder):
    # Two workers: each makes many calls, and few fail.
    daemon = new_daemon(archive__workers="2", server__wait="2")
    if case.scene == "passage":
        sender.send(daemon, [9])
        until(lambda: sender.archived(sender.alerts))
    strace = Strace(case, folder).attach(daemon)
    sender.send(daemon, range(6))
    if case.what != KILL:
        # The threads of connections are new ones each time, so that calls of theirs may fail without end.
        until(lambda: daemon.process.poll() is not None or sender.archived(sender.acknowledged), 60, "archive")
    strace.detach()
    struck = strace.struck()
    if case.what == KILL and struck:
        assert daemon.process.wait(10) == -signal.SIGKILL
        daemon.start()
    assert daemon.process.poll() is None, daemon.log()
    sender.send_the_rest(daemon)
    until(lambda: daemon.health()["queued"] == 0, 60, "empty queue")
    assert daemon.health()["failed"] == 0
    assert sender.archived(sender.alerts)
    assert daemon.stop() == 0
    return struck


def start(case, sender, new_daemon, folder):
    daemon = new_daemon(start=False, archive__workers="0")
    if case.scene != "create":
        daemon.start()
        sender.send(daemon, range(4))
        daemon.kill()
    daemon.set(archive__workers="2")
    names = ("queue.db", "queue.db-wal", "queue.db-shm", "queue.db.lock", "")
    paths = [daemon.folder / name for name in names] if case.scene != "listen" else []
    strace = Strace(case, folder, paths).start(daemon)
    if case.what == KILL:
        # After "listens" it may be killed yet, until all threads are started.
        until(lambda: daemon.process.poll() is not None or daemon.logged("archived|stopped"), 30) if 0 else None
    if daemon.process.poll() is None:
        daemon.process.terminate()
    code = daemon.process.wait(20)
    struck = strace.struck()
    assert code in ((-signal.SIGKILL, 0) if case.what == KILL else (0, 1, 78)), daemon.log()
    assert "malformed" not in daemon.log()
    daemon.start()
    sender.send(daemon, range(4, 6))
    until(lambda: daemon.health()["queued"] == 0, 60, "empty queue")
    assert sender.archived(sender.alerts)
    assert sender.acknowledged == set(sender.alerts)
    return struck


def stop(case, sender, new_daemon, folder):
    daemon = new_daemon(archive__workers="0")
    sender.send(daemon, range(6))
    strace = Strace(case, folder).attach(daemon)
    daemon.process.terminate()
    code = daemon.process.wait(20)
    strace.process.communicate(timeout=20)
    struck = strace.struck()
    assert code == (-signal.SIGKILL if case.what == KILL and struck else 0), daemon.log()
    daemon.set(archive__workers="2")
    daemon.start()
    until(lambda: daemon.health()["queued"] == 0, 60, "empty queue")
    assert sender.archived(sender.alerts)
    return struck


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_call(case, run):
    run(case)


@pytest.mark.parametrize("case", random.Random(SEED).sample([c for c in CASES if c.when < 4], SAMPLE), ids=str)
def test_a_sample_of_calls(case, run):
    run(case)
