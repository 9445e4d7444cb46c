"""The queue: what was answered 200 survives, and what it cannot keep is answered 503."""

import re
import shutil
import sqlite3
import subprocess
import threading
import time
import tracemalloc

import pytest
from conftest import alert, until

import ts3d


def test_archived_is_there_when_it_is_said(new_daemon, s3):
    daemon = new_daemon(server__wait="10")
    for n in range(30):
        assert daemon.post({"alerts": [alert(n)]})[1]["alerts"][0]["state"] == "archived"
        assert f"alerts/al/er/alert-{n:06}" in s3.objects()


def test_a_full_queue_is_503_and_drains(new_daemon, s3, api):
    daemon = new_daemon(server__wait="0", queue__max_size="1M")
    s3.stop()
    n = 0
    while True:
        status, answer = daemon.post({"alerts": [alert(n, text="x" * 20_000)]})
        if status != 200:
            break
        n += 1
    assert (status, answer["error"]["type"]) == (503, "queue_unavailable")
    assert "max_size" in answer["error"]["message"]
    assert 20 < n < 60
    status, answer, headers = daemon.request("GET", "/healthz")
    assert (status, int(headers["Retry-After"]) > 0) == (503, True)
    assert (answer["success"], answer["queued"], answer["failed"]) == (False, n, 0)
    s3.start()
    until(lambda: len(s3.objects("alerts/")) == n)
    until(lambda: daemon.request("GET", "/healthz")[0] == 200)
    assert daemon.post({"alerts": [alert(n)]})[0] == 200


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
        assert daemon.logged("CRITICAL the queue was malformed", begin)
        assert daemon.health()["queued"] == 0
        kept = max(daemon.folder.glob("queue.db.malformed-*"), key=lambda path: path.stat().st_mtime)
        assert kept.read_bytes() == content
        daemon.stop()
    assert len(list(daemon.folder.glob("queue.db.malformed-*Z"))) == 3


def test_sqlite3_shows_what_can_still_be_read(new_daemon):
    """As the log and the README say, of a file of which two pages are lost. (Debian 12's has no `.recover`.)"""
    if not shutil.which("sqlite3"):
        pytest.skip("no sqlite3")
    daemon = new_daemon(archive__workers="0", server__wait="0")
    daemon.post({"alerts": [alert(n, note="x" * 1000) for n in range(50)]})
    daemon.stop()
    whole = daemon.queue.read_bytes()
    daemon.queue.write_bytes(whole[:32768] + b"\xff" * 8192 + whole[40960:])
    command = ["sqlite3", daemon.queue, ".dump"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert 30 < len(set(re.findall("alert-0000[0-9]{2}", said))) < 50


@pytest.mark.parametrize("sql", ["PRAGMA user_version = 99", "CREATE TABLE other (x)"])
def test_a_file_that_is_not_ours_is_refused(new_daemon, sql):
    daemon = new_daemon(start=False)
    with sqlite3.connect(daemon.queue) as db:
        db.execute(sql)
    db.close()
    before = daemon.queue.read_bytes()
    result = daemon.run("serve")
    assert result.returncode == 78
    assert str(daemon.queue) in result.stderr
    assert daemon.queue.read_bytes() == before


def test_another_process_puts_jobs(new_daemon, s3):
    daemon = new_daemon()
    queue = ts3d.Queue(str(daemon.queue), 1 << 30)
    queue.put([ts3d.Arrival("elsewhere", "2017/01/17/13/51", "webhooks", b"{}")])
    queue.close()
    until(lambda: len(s3.objects()) == 2, 5)
    until(lambda: daemon.health()["queued"] == 0)


def test_a_webhook_that_no_queue_could_take_says_nothing_of_others(new_daemon):
    daemon = new_daemon(queue__max_size="1M")
    assert daemon.post({"alerts": [alert(0, text="x" * 2_000_000)]})[0] == 503
    assert daemon.request("GET", "/healthz")[0] == 200
    assert daemon.post({"alerts": [alert(0)]})[0] == 200


def test_only_the_daemon_makes_a_queue(tmp_path):
    with pytest.raises(ts3d.ConfigError, match="no queue yet"):
        ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30)


@pytest.fixture
def queue(tmp_path):
    queue = ts3d.Queue(str(tmp_path / "queue.db"), 1 << 30, create=True)
    yield queue
    queue.close()


def arrivals(*names):
    return [ts3d.Arrival(name, "2017/01/17/13/51", "webhooks", name.encode()) for name in names]


def test_what_is_queued_with_an_id_is_not_read_whole_for_another_body(queue):
    queue.put([ts3d.Arrival("same", "2017/01/17/13/51", "webhooks", bytes([n]) * 1_000_000) for n in range(40)])
    tracemalloc.start()
    try:
        assert queue.put(arrivals("same")) == [41]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_order_and_steps(queue):
    queue.put(arrivals("one", "two", "three"))
    one, two = queue.take(["webhooks"], 2)
    assert (one.id, two.id, queue.taken()) == ("one", "two", 2)
    assert queue.body(two) == b"two"
    one.step = "alerts"
    queue.retry(one)
    assert [job.id for job in queue.take(["webhooks"], 9)] == ["three"]
    assert [job.id for job in queue.take(["alerts"], 9)] == ["one"]
    queue.retry(two, time.monotonic() + 60, "{}")
    assert queue.take(["webhooks", "alerts"], 9) == []
    queue.retry(one, 0, '{"type": "x"}', failed=True)
    queue.done(two)
    queue.prove_writable()  # a transaction, with which both are written
    assert queue.counts()[:2] == (1, 1)
    assert queue.states([1, 2, 3]) == {1: ("alerts", '{"type": "x"}'), 3: ("webhooks", None)}


def test_one_that_failed_goes_behind_those_that_did_not(queue):
    queue.put(arrivals("bad", "good"))
    (bad,) = queue.take(["webhooks"], 1)
    queue.retry(bad, time.monotonic(), "{}")
    assert [job.id for _ in range(2) for job in queue.take(["webhooks"], 1)] == ["good", "bad"]


def test_every_answer_that_waits_for_a_job_is_woken(queue):
    (number,) = queue.put(arrivals("one"))
    (job,) = queue.take(["webhooks"], 1)
    states = []
    waiters = [
        threading.Thread(target=lambda s=seconds: states.append(queue.wait([number], s, lambda: False)))
        for seconds in (0.1, 60, 60)
    ]
    for thread in waiters:
        thread.start()
    waiters[0].join()
    assert states == [{number: ("webhooks", None)}]
    queue.done(job)
    for thread in waiters:
        thread.join(10)
    assert states[1:] == [{}, {}]
    assert queue.wait([number], 60, lambda: False) == {}


def test_take_sorts_nothing(queue):
    sql = "SELECT number FROM jobs WHERE failed = 0 AND step = 'x' AND due <= 1 ORDER BY due, number LIMIT 9"
    plan = str(queue._reader.execute("EXPLAIN QUERY PLAN " + sql).fetchall())
    assert "jobs_by_due" in plan
    assert "TEMP" not in plan


def test_numbers_are_not_used_again(queue):
    (number,) = queue.put(arrivals("one"))
    (job,) = queue.take(["webhooks"], 1)
    queue.done(job)
    assert queue.put(arrivals("two"))[0] > number


def test_a_checkpoint_keeps_the_log_small(queue, tmp_path):
    for n in range(60):
        queue.put([ts3d.Arrival(f"id-{n}", "2017/01/17/13/51", "webhooks", b"x" * 500_000)])
    assert (tmp_path / "queue.db-wal").stat().st_size < 8 << 20
    queue.put([ts3d.Arrival("big", "2017/01/17/13/51", "webhooks", b"x" * 30_000_000)])
    queue.put(arrivals("small"))
    assert (tmp_path / "queue.db-wal").stat().st_size < 8 << 20


def test_requests_that_wait_share_a_commit(queue, monkeypatch):
    batches, commit, gate = [], queue._commit, threading.Event()

    def commit_at_the_gate(writes):
        batches.append(len(writes))
        gate.wait(20)
        commit(writes)

    monkeypatch.setattr(queue, "_commit", commit_at_the_gate)
    threads = [threading.Thread(target=queue.put, args=(arrivals(f"id-{n}"),)) for n in range(21)]
    threads[0].start()
    until(lambda: batches)
    for thread in threads[1:]:
        thread.start()
    until(lambda: queue._inbox.qsize() == 20)
    gate.set()
    for thread in threads:
        thread.join()
    assert batches == [1, 20]
