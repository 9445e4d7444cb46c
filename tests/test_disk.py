"""The queue's disk: full, failing or read-only, webhooks get 503 and what is queued drains; gone, the daemon ends."""

import contextlib
import http.client
import json
import os
import re
import shutil
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest
import threatstack
from conftest import TOKEN, alert, fill, problems_of, until

MEGABYTE = 1 << 20


def assert_refuses(daemon, text):
    """A webhook and the probe get 503, with Retry-After, and say why."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for request in (("POST", "/api/v1/s3/alert", b'{"alerts": [%s]}' % LAST, headers), ("GET", "/healthz")):
        status, answer, headers = daemon.request(*request)
        assert (status, answer["error"]["type"]) == (503, "queue_unavailable"), answer
        assert re.search(text, answer["error"]["message"])
        assert int(headers["Retry-After"]) > 0


def post_until_it_ends(daemon):
    """Post until the daemon has ended, with exit code 1 and one line that says why; no 200 is for nothing."""

    def post():
        with contextlib.suppress(OSError, http.client.HTTPException):
            daemon.post({"alerts": [alert(n, text="x" * 9000) for n in range(40)]})
        return daemon.process.poll() is not None

    begin = len(daemon.log())
    until(post, 40, "end of the daemon")
    assert daemon.process.returncode == 1
    (line,) = re.findall("^ts3d: .*", daemon.log(begin), re.MULTILINE)
    return line


LAST = b'{"id": "the-last-one", "created_at": 1484661065000}'


def assert_recovers(daemon, s3, n):
    """It takes webhooks again by itself, and archives them and all that was queued: `n` alerts and this one."""
    until(lambda: daemon.request("GET", "/healthz")[0] == 200)
    until(lambda: daemon.post(LAST)[0] == 200)  # a checkpoint may take the last of the 16M meanwhile
    until(lambda: daemon.health()["queued"] == 0)
    ids = {f"alert-{i:06}" for i in range(n)} | {"the-last-one"}
    objects = s3.objects()
    assert {key.rpartition("/")[2] for key in objects if key.startswith("webhooks/")} == ids
    assert {key.rpartition("/")[2] for key in objects if key.startswith("alerts/")} == ids


def test_a_full_disk_halts_no_draining(new_daemon, s3, disk):
    """More alerts than workers are archived while not one byte can be written."""
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db", archive__workers="4")
    s3.stop()
    for n in range(60):
        assert daemon.post({"alerts": [alert(n, text="x" * 2000)]})[0] == 200
    fill(disk)
    assert_refuses(daemon, "")
    s3.start()
    until(lambda: len(s3.objects("alerts/")) == 60)
    assert_refuses(daemon, "16M free|full")
    assert daemon.process.poll() is None
    (disk / "filler").unlink()
    assert_recovers(daemon, s3, 60)


def test_a_disk_that_the_queue_itself_filled_is_used_again(new_daemon, s3, disk):
    """The file does not shrink: its free pages are room."""
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db")
    s3.stop()
    for n in range(30):
        status, answer = daemon.post({"alerts": [alert(n, text="x" * MEGABYTE)]})
        if status != 200:
            break
    assert (status, "less than 16M free" in answer["error"]["message"]) == (503, True)
    assert n > 10
    s3.start()
    assert_recovers(daemon, s3, n)


@pytest.mark.parametrize("error", ["EIO", "EROFS", "ENOSPC"])
@pytest.mark.parametrize("calls", ["pwrite64", "fdatasync", "pwrite64,fdatasync,ftruncate,openat"])
def test_a_disk_that_fails(new_daemon, s3, calls, error, tracer):
    """Every call fails, for as long as strace makes it so."""
    daemon = new_daemon(server__wait="0")
    s3.stop()
    for n in range(30):
        assert daemon.post({"alerts": [alert(n)]})[0] == 200
    until(lambda: daemon.logged("s3 unavailable"))  # boto3 has been imported
    with tracer(daemon, f"inject={calls}:error={error}"):
        assert_refuses(daemon, "the queue")
        if "openat" not in calls:  # boto3 reads files too
            s3.start()
            until(lambda: len(s3.objects("alerts/")) == 30)
        assert daemon.process.poll() is None
    if not s3.process:
        s3.start()
    assert_recovers(daemon, s3, 30)
    assert daemon.logged(' WARNING POST .* 503 .*error=".*the queue')
    assert daemon.log().count(" ERROR ") in (1, 2)  # a second if a commit passed while strace attached
    assert len(re.findall(" WARNING .*queue.*(works|recovered|again)", daemon.log())) in (1, 2)


@pytest.mark.parametrize("way", ["unmounted", "removed", "moved", "file removed", "file replaced"])
def test_a_queue_that_is_gone_ends_the_daemon(new_daemon, s3, disk, way):
    """An open file outlives its name, but the next process would not find it: nothing may be acknowledged into it."""
    place = disk / "state"
    place.mkdir()
    queue = place / "queue.db"
    daemon = new_daemon(server__wait="0", queue__path=queue)
    s3.stop()
    for n in range(30):
        assert daemon.post({"alerts": [alert(n)]})[0] == 200
    if way == "unmounted":
        subprocess.run(["umount", "-l", disk], check=True)
    elif way == "removed":
        shutil.rmtree(place)
    elif way == "moved":
        place.rename(disk / "elsewhere")
    else:
        queue.unlink()
        if way == "file replaced":
            queue.write_bytes(b"")
    assert "queue" in post_until_it_ends(daemon)
    if way == "moved":
        (disk / "elsewhere").rename(place)
    elif way in ("unmounted", "removed"):
        place.mkdir(parents=True)
    s3.start()
    daemon.start()
    until(lambda: daemon.health()["queued"] == 0)
    archived = set(s3.objects("alerts/"))
    assert way != "moved" or {f"alerts/al/er/alert-{n:06}" for n in range(30)} <= archived
    assert daemon.post(LAST)[0] == 200


def test_nothing_is_acknowledged_into_a_queue_that_is_gone(new_daemon, s3, disk):
    """What got a 200 before and after the file was removed, apart from what was in it, is archived."""
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db")
    for path in disk.iterdir():
        path.unlink()
    acknowledged = []

    def post():
        n = 100 + len(acknowledged)
        with contextlib.suppress(OSError, http.client.HTTPException):
            if daemon.post({"alerts": [alert(n)]})[0] == 200:
                acknowledged.append(alert(n)["id"])
        return daemon.process.poll() is not None

    until(post, 40, "end of the daemon")
    daemon.start()
    assert daemon.run("serve").returncode == 78
    s3.stop()
    assert not post()
    daemon.kill()
    s3.start()
    daemon.start()
    until(lambda: daemon.health()["queued"] == 0)
    assert acknowledged
    assert {f"alerts/al/er/{name}" for name in acknowledged} == set(s3.objects("alerts/"))


def test_another_program_that_reads_the_queue_and_does_not_end(new_daemon, s3, disk):
    """The write-ahead log cannot be emptied then. If webhooks are refused for it, the answer says whose fault it is."""
    daemon = new_daemon(queue__path=disk / "queue.db", queue__max_size="8M")
    with contextlib.closing(sqlite3.connect(disk / "queue.db", isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM jobs").fetchall()
        n = refused = 0
        while refused < 2:  # while nothing is queued
            until(lambda: daemon.health()["queued"] == 0)
            status, answer = daemon.post({"alerts": [alert(n, text="x" * MEGABYTE)]})
            n, refused = n + (status == 200), refused + (status != 200)
        assert (status, answer["error"]["type"]) == (503, "queue_unavailable")
        assert re.search("(another|other) program", answer["error"]["message"], re.IGNORECASE), answer
        code, problems = problems_of(daemon)
        assert code == 1
        assert re.search("(another|other) program", " ".join(problems.values()), re.IGNORECASE), problems
    assert_recovers(daemon, s3, n)
    assert problems_of(daemon) == (0, {})


def test_another_program_that_reads_the_queue_for_a_moment(new_daemon, s3):
    """It is no problem, and the size that `status` shows is that of the queued alerts."""
    daemon = new_daemon(queue__max_size="8M")
    with contextlib.closing(sqlite3.connect(daemon.queue, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM jobs").fetchall()
        for n in range(20):
            assert daemon.post({"alerts": [alert(n, text="x" * 100_000)]})[0] == 200
    assert problems_of(daemon) == (0, {})
    shown = json.loads(daemon.run("status", "--json").stdout)
    assert (shown["max_bytes"], shown["queue_bytes"] < MEGABYTE) == (8 * MEGABYTE, True)


def test_another_program_that_holds_the_queues_lock(new_daemon, s3):
    daemon = new_daemon(server__wait="0")
    s3.stop()
    assert daemon.post({"alerts": [alert(0)]})[0] == 200
    with contextlib.closing(sqlite3.connect(daemon.queue, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        status, answer = daemon.post({"alerts": [alert(1)]})
        assert (status, answer["error"]["type"]) == (503, "queue_unavailable")
        assert "lock" in answer["error"]["message"]
        code, problems = problems_of(daemon)
        assert (code, "queue_locked" in problems) == (1, True)
        assert re.search("(another|other) program", problems["queue_locked"])
        assert re.search("(another|other) program", daemon.run("status").stdout)
        result = daemon.run("retry")
        assert (result.returncode, result.stderr.count("\n"), "lock" in result.stderr) == (1, 2, True), result.stderr
        s3.start()
        until(lambda: s3.objects("alerts/"))  # draining goes on
        assert daemon.process.poll() is None
    assert_recovers(daemon, s3, 1)
    assert problems_of(daemon) == (0, {})


@pytest.fixture
def loop_mounted(tmp_path):
    """Mounts file systems of a kind, each in a file of its own; which those are."""
    places = []

    def mount(kind, options, make=()):
        if os.getuid() or not shutil.which(f"mkfs.{kind}"):
            pytest.skip(f"needs root and mkfs.{kind}")
        image, place = tmp_path / f"{kind}.img", tmp_path / kind
        with image.open("wb") as file:
            file.truncate(256 * MEGABYTE)
        place.mkdir()
        for command in (["mkfs." + kind, "-q", *make, image], ["mount", "-o", f"loop,{options}", image, place]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                pytest.skip(f"{command[0]} fails here: {result.stderr}")
        places.append(place)
        command = ["findmnt", "--noheadings", "--output=SOURCE", place]
        return place, Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).name

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=False)


def test_a_file_system_that_turns_read_only(new_daemon, s3, loop_mounted):
    """As ext4 does at an error: webhooks get 503, draining goes on, and `status` says it."""
    disk, device = loop_mounted("ext4", "errors=remount-ro")
    trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip(f"no {trigger}")
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db")
    s3.stop()
    for n in range(30):
        assert daemon.post({"alerts": [alert(n)]})[0] == 200
    trigger.write_text("test")
    assert_refuses(daemon, "the queue")
    s3.start()
    until(lambda: len(s3.objects("alerts/")) == 30)
    for running in (True, False):
        code, problems = problems_of(daemon)
        assert (code, "queue_unwritable" in problems, "not_running" in problems) == (1, True, not running), problems
        assert re.search("[Rr]ead-?only|writable|written", problems["queue_unwritable"])
        result = daemon.run("check")
        assert result.returncode == 1
        assert re.search("FAIL +queue .*([Rr]ead-?only|writable|written)", result.stdout)
        if running:
            assert daemon.stop() == 0
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk.with_name("ext4.img"), disk], check=True)
    daemon.start()
    assert_recovers(daemon, s3, 30)
    assert problems_of(daemon) == (0, {})


def test_a_quota_of_btrfs(new_daemon, s3, loop_mounted):
    """Over it a write to the mapped -shm is SIGBUS: the manual says that max_size must be below it. Nothing is lost."""
    if not shutil.which("btrfs"):
        pytest.skip("no btrfs")
    disk, _ = loop_mounted("btrfs", "defaults", ["--mixed"])
    for command in ("quota enable {}", "subvolume create {}/state", "qgroup limit 32M {}/state"):
        result = subprocess.run(["btrfs", *command.format(disk).split()], capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"btrfs {command} fails here: {result.stderr}")
    daemon = new_daemon(server__wait="0", queue__path=disk / "state" / "queue.db")
    s3.stop()
    text = os.urandom(100_000).hex()
    n = refused = 0
    with contextlib.suppress(OSError, http.client.HTTPException):
        while refused < 5:
            status, _ = daemon.post({"alerts": [alert(n, text=text)]})
            n, refused = n + (status == 200), refused + (status != 200)
    assert n > 50
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.process.wait(3)
    if daemon.process.poll() is None:
        daemon.kill()
    subprocess.run(["btrfs", "qgroup", "limit", "64M", disk / "state"], check=True)
    daemon.start()
    s3.start()
    until(lambda: daemon.health()["queued"] == 0, 60)
    assert {f"alerts/al/er/alert-{i:06}" for i in range(n)} <= set(s3.objects("alerts/"))
    assert daemon.post(LAST)[0] == 200


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace")
def test_a_queue_that_cannot_be_read_at_start_is_kept(new_daemon, s3):
    """An I/O error is not damage: nothing is moved aside, and the next start goes on with it."""
    daemon = new_daemon(archive__workers="0", server__wait="0")
    assert daemon.post({"alerts": [alert(0)]})[0] == 200
    daemon.kill()

    command = ["strace", "-f", "-o", "/dev/null", "-P", str(daemon.queue), "-e", "inject=pread64:error=EIO"]
    result = subprocess.run(
        [*command, *daemon.command("serve")],
        env=daemon.environment, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert result.returncode in (1, 78), result.stderr
    assert str(daemon.queue) in result.stderr
    assert not list(daemon.folder.glob("*malformed*"))
    daemon.start()
    assert daemon.health()["queued"] == 1


def damage(daemon):
    """Overwrite pages in the middle of the queue's file."""
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        # All of it, so that the next commit begins the log anew and the file is read again.
        until(lambda: len(set(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1:])) == 1)
    with daemon.queue.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(20 * 4096))


def test_a_queue_that_is_damaged_while_it_is_used_ends_the_daemon(new_daemon, s3):
    """It says so and exits with 1: the next start moves the file aside."""
    daemon = new_daemon(archive__workers="0", server__wait="0")
    for n in range(40):
        daemon.post({"alerts": [alert(n, text="x" * 9000)]})
    damage(daemon)
    assert "malformed" in post_until_it_ends(daemon)
    daemon.start()
    assert daemon.logged("CRITICAL .*malformed")
    assert daemon.post({"alerts": [alert(0)]})[0] == 200


@pytest.mark.parametrize("locks_fail", [False, True])
def test_what_is_acknowledged_after_damage_is_archived(new_daemon, s3, api, tracer, locks_fail):
    """Jobs of the damaged file are in flight when that is noticed, and end later: they touch no job of the new file."""
    bucket = threatstack.Faulty()
    released = threading.Event()

    def wait(handler):
        released.wait(60)
        handler.succeed("")

    bucket.modes = {alert(n)["id"]: wait for n in range(40)}
    daemon = new_daemon(server__wait="0", s3__endpoint_url=bucket.url)
    daemon.post({"alerts": [alert(n, text="x" * 9000) for n in range(40)]})
    until(lambda: bucket.calls)
    damage(daemon)
    api.mode = 503  # so that what comes then stays queued
    if locks_fail:
        with tracer(daemon, "inject=fcntl:error=EIO"), contextlib.suppress(OSError, http.client.HTTPException):
            until(lambda: daemon.post({"alerts": [alert(9000)]})[0] != 200, 30)

    def post(n=0):
        if daemon.process.poll() is not None:
            assert daemon.process.returncode == 1
            daemon.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return daemon.post({"alerts": [alert(n, text="x" * 9000)]})[0] == 200

    def noticed():
        if post() and (moved := list(daemon.folder.glob("*malformed*"))):
            return moved
        with contextlib.suppress(sqlite3.Error):  # again, since what is written meanwhile mends pages
            return damage(daemon)

    until(noticed, 60, "new queue")
    names = {alert(n)["id"] for n in range(5000, 5004) if post(n)}
    assert len(names) == 4
    released.set()
    until(lambda: names <= {path.rpartition("/")[2] for path in bucket.objects}, 30)
    api.mode = None
    until(lambda: daemon.health()["queued"] == 0, 60)
    assert names <= {path.rpartition("/")[2] for path in bucket.objects if "/alerts/" in path}
    bucket.stop()
