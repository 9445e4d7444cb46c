"""The queue: what was answered 200 survives, and what it cannot keep is answered 503."""

import contextlib
import errno
import os
import random
import re
import shutil
import sqlite3
import subprocess
import time
import tracemalloc

import pytest
from conftest import alert, until

import ts3d


def job(name, body=None, source="webhooks"):
    return ts3d.Job(name, "2017/01/17/13/51", source, source, name.encode() if body is None else body)


def test_small_webhooks_fill_a_queue_only_with_themselves(new_daemon, s3, api):
    """The write-ahead log is emptied on the way, so that it does not eat what max_size gives."""
    daemon = new_daemon(server__wait="0", queue__max_size="600K", archive__workers="0")
    for n in range(300):
        assert daemon.post({"alerts": [alert(n)]})[0] == 200, n


def test_a_malformed_queue_is_moved_aside(new_daemon, s3):
    daemon = new_daemon(archive__workers="0", server__wait="0")
    for n in range(50):
        daemon.post({"alerts": [alert(n)]})
    assert daemon.stop() == 0
    whole = daemon.queue.read_bytes()
    broken = whole[:4096] + b"\xff" * 8192 + whole[12288:]
    for content in (broken, b"this is not a database" * 1000, whole[:9000]):
        daemon.queue.write_bytes(content)
        begin = len(daemon.log())
        daemon.start()
        assert daemon.logged("CRITICAL .*malformed", begin)
        assert daemon.health()["queued"] == 0
        kept = max(daemon.folder.glob("queue.db.malformed-*Z"), key=lambda path: path.stat().st_mtime)
        assert kept.read_bytes() == content
        daemon.stop()
    assert len(list(daemon.folder.glob("queue.db.malformed-*Z"))) == 3


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace")
@pytest.mark.parametrize("renames", [None, 1, 2, 3])
def test_a_malformed_queue_is_moved_aside_in_an_order_that_survives_a_kill(new_daemon, renames):
    """The write-ahead log goes first: SQLite would write it into whatever file has the name afterwards."""

    daemon = new_daemon(archive__workers="0", server__wait="0")
    for n in range(50):
        daemon.post({"alerts": [alert(n, text="x" * 9000)]})
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    daemon.post({"alerts": [alert(50, text="x" * 9000)]})
    daemon.kill()
    log = daemon.folder / "queue.db-wal"
    os.truncate(daemon.queue, 5000)  # such a file SQLite leaves as it is when it is closed, and its log beside it
    before = {daemon.queue.read_bytes(), log.read_bytes()}
    trace, calls = daemon.folder / "trace", "rename,renameat,renameat2"
    inject = ["-e", f"inject={calls}:signal=KILL:when={renames}"] if renames else []
    command = ["strace", "-D", "-f", "-o", trace, "-e", f"trace={calls}", *inject, *daemon.command("serve")]
    begin = len(daemon.log())
    with daemon.log_file.open("ab") as log_file:
        process = subprocess.Popen(command, env=daemon.environment, stderr=log_file)
    until(lambda: process.poll() is not None or daemon.logged("listens on", begin), 30, "start")
    process.terminate()
    process.wait(20)
    if renames is None:
        moved = re.findall(rf'rename\w*\((?:AT_FDCWD, )?"{daemon.queue}(-\w+)?"', trace.read_text())
        assert moved.index("-wal") < moved.index(""), moved
    daemon.start()
    assert daemon.post({"alerts": [alert(60)]})[0] == 200
    assert daemon.health()["queued"] == 1
    kept = {path.read_bytes() for path in daemon.folder.glob("queue.db*malformed*")}
    assert before <= kept, "both files are kept as they were"


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3")
def test_sqlite3_shows_what_can_still_be_read(new_daemon):
    """As the log and the README say, of a file of which two pages are lost. (Debian 12's has no `.recover`.)"""

    daemon = new_daemon(archive__workers="0", server__wait="0")
    daemon.post({"alerts": [alert(n, note="x" * 1000) for n in range(50)]})
    daemon.stop()
    whole = daemon.queue.read_bytes()
    daemon.queue.write_bytes(whole[:32768] + b"\xff" * 8192 + whole[40960:])
    command = ["sqlite3", daemon.queue, ".dump"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert 30 < len(set(re.findall("alert-0000[0-9]{2}", said))) < 50


def test_another_process_puts_jobs(new_daemon, s3):
    daemon = new_daemon()
    queue = ts3d.Queue(str(daemon.queue), 1 << 30)
    daemon.archive()
    queue.put([job("elsewhere")])
    queue.close()
    until(lambda: len(s3.objects()) == 4, 5)
    until(lambda: daemon.health()["queued"] == 0)


@pytest.fixture
def queue(tmp_path):
    queue = ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30, "s3://evidence/")
    yield queue
    queue.close()


def committed(queue):
    """What is queued and failed, after a transaction, with which all outcomes are written."""
    queue.retry("nothing")
    return queue.facts["queued"], queue.facts["failed"]


def test_what_is_queued_with_an_id_is_not_read_whole_for_another_body(queue):
    queue.put([job("same", bytes([n]) * 1_000_000) for n in range(40)])
    tracemalloc.start()
    try:
        again = job("same")
        queue.put([again])
        assert again.number == 41
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_lanes_steps_and_outcomes(queue):
    """A job goes on at its step, behind those that are due earlier; what became of it is seen before it is on disk."""
    queue.put(put := [job("one"), job("two"), job("three")])
    one, two = queue.take("store", 2)
    assert [(each.id, each.body) for each in (one, two)] == [("one", b""), ("two", b"")], "bodies stay on disk"
    one.step = "alerts"
    queue.settle(one)
    assert [each.id for each in queue.take("store", 9)] == ["three"]
    assert [(each.id, each.step) for each in queue.take("detail", 9)] == [("one", "alerts")]
    two.due = time.monotonic() + 60
    queue.settle(two)
    assert queue.take("store", 9) == queue.take("detail", 9) == []
    one.failed, one.error_type, one.error_message = True, "x", "because"
    queue.settle(one)
    queue.refresh(put)
    assert [each.error_message or each.done for each in put] == ["because", False, False]
    two.done = True
    queue.settle(two)
    for _ in ("in memory", "on disk"):
        queue.refresh(put)
        assert [each.error_message or each.done for each in put] == ["because", True, False]
        assert committed(queue) == (1, 1)
    assert [queue.retry(name) for name in ("one", "three", "four")] == [1, 0, 0]
    assert committed(queue) == (2, 0)
    assert [each.id for each in queue.take("detail", 9)] == ["one"]
    queue.put([job("bad"), job("good")])
    (bad,) = queue.take("store", 1)
    bad.due = time.monotonic()
    queue.settle(bad)
    assert [each.id for _ in range(2) for each in queue.take("store", 1)] == ["good", "bad"]


def test_a_taken_job_is_due_again_after_a_crash(queue, tmp_path):
    queue.put([job("taken"), job("put-off")])
    _, put_off = queue.take("store", 2)
    put_off.step, put_off.due, put_off.tries = "alerts", time.monotonic() + 9999, 3
    queue.settle(put_off)
    committed(queue)
    for suffix in ("", "-wal"):
        shutil.copy(f"{tmp_path}/queue.db{suffix}", f"{tmp_path}/copy.db{suffix}")
    with contextlib.closing(ts3d.Queue(str(tmp_path / "copy.db"), 1 << 30, "s3://evidence/")) as copy:
        assert [each.id for each in copy.take("store", 9)] == ["taken"]
        assert [(each.id, each.tries) for each in copy.take("detail", 9)] == [("put-off", 3)]


def test_take_sorts_nothing_and_the_counts_scan_nothing(queue):
    names = dict.fromkeys(("now", "excess", "max_size", "disk"), 0)
    for sql, values in ((queue.TAKE, ("store", 1, "[]", 9)), (queue.LOOK, names)):
        plan = str([tuple(row) for row in queue._reader.execute(f"EXPLAIN QUERY PLAN {sql}", values)])
        assert "TEMP" not in plan
        assert "SCAN jobs'" not in plan
    assert "jobs_by_lane" in str(
        [tuple(r) for r in queue.read(f"EXPLAIN QUERY PLAN {queue.TAKE}", "store", 1, "[]", 9)]
    )


def test_counts_are_those_of_the_rows(queue):
    """However jobs come and go; another process's commits are counted too."""
    rng = random.Random(5)
    for n in range(40):
        queue.put([job(f"id-{n}-{i}") for i in range(rng.randrange(4))])
        for each in queue.take("store", 3):
            each.done, each.failed = rng.choice([(True, False), (False, True), (False, False)])
            each.due = time.monotonic() + 9 * rng.random()
            queue.settle(each)
        if n % 9 == 8:
            queue.retry()
    ((total, failed),) = queue.read("SELECT count(*), coalesce(sum(failed), 0) FROM jobs") if committed(queue) else ()
    assert committed(queue) == (total - failed, failed)


def test_numbers_are_not_used_again(queue):
    first, second = job("one"), job("two")
    queue.put([first])
    (one,) = queue.take("store", 1)
    one.done = True
    queue.settle(one)
    queue.put([second])
    assert second.number > first.number


def test_a_checkpoint_keeps_the_log_small(queue, tmp_path):
    for n in range(60):
        queue.put([job(f"id-{n}", b"x" * 500_000)])
    assert (tmp_path / "queue.db-wal").stat().st_size < 8 << 20
    queue.put([job("big", b"x" * 30_000_000)])
    queue.put([job("small")])
    assert (tmp_path / "queue.db-wal").stat().st_size < 8 << 20


def test_outcomes_wait_for_a_commit_that_succeeds(queue, monkeypatch):
    """And what was settled anew during a commit is not forgotten."""
    queue.put([job("one"), job("two")])
    begin, broken = queue._begin, [True]

    def fail():
        if broken[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        begin()

    monkeypatch.setattr(queue, "_begin", fail)
    one, two = queue.take("store", 2)
    one.done, two.step = True, "alerts"
    queue.settle(one)
    queue.settle(two)
    with pytest.raises(ts3d.QueueError, match="No space left"):
        queue.put([job("three")])
    assert queue.take("store", 9) == []
    (two,) = queue.take("detail", 9)
    two.failed = True
    queue.settle(two)
    broken[0] = False
    assert committed(queue) == (0, 1)
    assert not ts3d.FATAL
