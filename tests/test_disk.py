"""The queue's disk: full, failing, read-only or gone. Webhooks get 503, what is queued drains, and it all recovers."""

import contextlib
import errno
import http.client
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from conftest import TOKEN, alert, until

import ts3d

MEGABYTE = 1 << 20


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


def post_until_refused(daemon, size):
    """Webhooks of one alert each, until one gets no 200; how many did, and the refusal."""
    for n in range(10_000):
        status, answer = daemon.post({"alerts": [alert(n, text="x" * size)]})
        if status != 200:
            return n, (status, answer)
    raise AssertionError("never refused")


def assert_refuses(daemon, text):
    """A webhook and the probe get 503, with Retry-After, and say why."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for request in (("POST", "/api/v1/s3/alert", b'{"alerts": [%s]}' % LAST, headers), ("GET", "/healthz")):
        status, answer, headers = daemon.request(*request)
        assert (status, answer["error"]["type"]) == (503, "queue_unavailable"), answer
        assert text in answer["error"]["message"]
        assert int(headers["Retry-After"]) > 0


LAST = b'{"id": "the-last-one", "created_at": 1484661065000}'


def assert_recovers(daemon, s3, n):
    """It takes webhooks again by itself, and archives them and all that was queued: `n` alerts and this one."""
    until(lambda: daemon.request("GET", "/healthz")[0] == 200)
    assert daemon.post(LAST)[0] == 200
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
    assert_refuses(daemon, "full")
    assert daemon.process.poll() is None
    (disk / "filler").unlink()
    assert_recovers(daemon, s3, 60)


def test_a_disk_that_the_queue_itself_filled_is_used_again(new_daemon, s3, disk):
    """The file does not shrink: its free pages are room."""
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db")
    s3.stop()
    n, (status, answer) = post_until_refused(daemon, MEGABYTE)
    assert (status, "less than 16M free" in answer["error"]["message"]) == (503, True)
    assert 10 < n < 30
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
    with tracer(daemon, f"inject={calls}:error={error}"):
        assert_refuses(daemon, "the queue cannot be written")
        if "openat" not in calls:  # boto3 reads files too
            s3.start()
            until(lambda: len(s3.objects("alerts/")) == 30)
        assert daemon.process.poll() is None
    if not s3.process:
        s3.start()
    assert_recovers(daemon, s3, 30)
    assert len(daemon.log().split("the queue fails")) == 2
    assert daemon.logged("the queue works again")


@pytest.mark.parametrize("way", ["unmounted", "removed", "moved", "file removed"])
def test_a_queue_that_is_gone_is_drained_and_begun_anew(new_daemon, s3, disk, way):
    """An open file outlives its name, but the next process would not find it: nothing may be acknowledged into it."""
    place = disk / "state"
    place.mkdir()
    daemon = new_daemon(server__wait="0", queue__path=place / "queue.db")
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
        (place / "queue.db").unlink()
    assert_refuses(daemon, "the queue's file is gone from")
    s3.start()
    until(lambda: len(s3.objects("alerts/")) == 30)
    if way == "moved":
        (disk / "elsewhere").rename(place)
    elif way != "file removed":
        place.mkdir(parents=True)
    assert_recovers(daemon, s3, 30)
    assert daemon.stop() == 0
    assert (place / "queue.db").exists()


def test_a_new_queue_is_as_safe_as_the_first(new_daemon, s3, disk):
    """What is acknowledged after the file was lost survives a kill, and no second daemon works on it."""
    daemon = new_daemon(server__wait="0", queue__path=disk / "queue.db")
    for path in disk.iterdir():
        path.unlink()
    until(lambda: daemon.request("GET", "/healthz")[0] == 200)
    s3.stop()
    assert daemon.post({"alerts": [alert(0)]})[0] == 200
    assert daemon.run("serve").returncode == 78
    daemon.kill()
    s3.start()
    daemon.start()
    assert_recovers(daemon, s3, 1)


def test_a_queue_of_somebody_else_is_refused(new_daemon, tmp_path):
    """As another user than root, for whom there is no other user's file."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    daemon = new_daemon(start=False)
    daemon.queue.write_bytes(b"")
    daemon.queue.chmod(0o600)
    for path in (daemon.folder, *daemon.folder.parents):
        if path.stat().st_uid == os.getuid() and path != Path(path.anchor):
            path.chmod(path.stat().st_mode | 0o055)
    command = ["setpriv", "--reuid=65534", "--clear-groups", *daemon.command("serve")]
    result = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=20, check=False)
    if result.returncode in (126, 127) or "can't open file" in result.stderr:
        pytest.skip(f"nobody else can run this: {result.stderr}")
    assert result.returncode == 78
    assert f"{daemon.queue}" in result.stderr
    assert "Permission denied" in result.stderr or "unable to open" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_queue_that_cannot_be_read_at_start_is_kept(new_daemon, s3):
    """An I/O error is not damage: nothing is moved aside, and the next start goes on with it."""
    daemon = new_daemon(archive__workers="0", server__wait="0")
    assert daemon.post({"alerts": [alert(0)]})[0] == 200
    daemon.kill()
    if not shutil.which("strace"):
        pytest.skip("no strace")
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


def test_a_queue_that_is_damaged_while_it_is_used_ends_the_daemon(new_daemon, s3):
    """It says so and exits with 1: the next start moves the file aside."""
    daemon = new_daemon(archive__workers="0", server__wait="0")
    for n in range(40):
        daemon.post({"alerts": [alert(n, text="x" * 9000)]})
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        # All of it, so that the next commit begins the log anew and the file is read again.
        until(lambda: len(set(db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1:])) == 1)
    with daemon.queue.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(20 * 4096))
    with contextlib.suppress(OSError, http.client.HTTPException):
        daemon.post({"alerts": [alert(0, text="x" * 9000)]})
    assert daemon.process.wait(40) == 1
    assert daemon.logged("the queue is malformed")
    daemon.start()
    assert daemon.logged("CRITICAL the queue was malformed")
    assert daemon.post({"alerts": [alert(0)]})[0] == 200


def test_damage_is_believed_only_where_each_byte_can_be_read(tmp_path, monkeypatch):
    """A sector that fails is damage to SQLite, and none to us."""
    path = tmp_path / "queue.db"
    queue = ts3d.Queue(str(path), 1 << 30, create=True)
    for n in range(9):
        queue.put([ts3d.Arrival(f"id-{n}", "2017/01/17/13/51", "webhooks", b"x" * 9000)])
    queue.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(5 * 4096))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(ts3d.ConfigError, match="Input/output error"):
            ts3d.Queue(str(path), 1 << 30, create=True)
    assert not list(tmp_path.glob("*malformed*"))
    ts3d.Queue(str(path), 1 << 30, create=True).close()
    assert list(tmp_path.glob("*malformed*"))
