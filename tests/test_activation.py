"""What ts3d does for systemd: sockets that are handed over, what it tells, secrets and files that others share."""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import BUCKET, CREDENTIALS, TOKEN, alert, until
from test_http import CLOSE, message

import ts3d


@pytest.fixture
def told(request, tmp_path, new_daemon):
    """A daemon that is not started and archives nothing, and its messages to systemd, as a list that grows."""
    name = f"\0{tmp_path}/notify" if getattr(request, "param", "") == "abstract" else str(tmp_path / "notify")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(name)
    messages = []

    def receive():
        while message := sock.recv(65536):
            messages.append(message.decode())

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    daemon = new_daemon(start=False, archive__workers="0")
    daemon.environment["NOTIFY_SOCKET"] = name.replace("\0", "@")
    yield daemon, messages
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"", name)
    thread.join()
    sock.close()


def post(listening, number):
    """Post an alert to a listening socket; the answer."""
    with socket.socket(listening.family) as sock:
        sock.settimeout(30)
        sock.connect(listening.getsockname())
        send(sock, number)
        return receive(sock)


def send(sock, number):
    body = json.dumps({"alerts": [alert(number)]}).encode()
    sock.sendall(message([b"Content-Length: %d" % len(body), CLOSE], body))


def receive(sock):
    answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def test_several_sockets_of_each_kind(new_daemon, listener, tmp_path, s3):
    places = ["127.0.0.1:0", "127.0.0.1:0", "[::1]:0", str(tmp_path / "sock"), f"\0{tmp_path}"]
    daemon = new_daemon(start=False)
    daemon.handed = [listener(place) for place in places]
    daemon.start()
    for i, sock in enumerate(daemon.handed):
        assert post(sock, i)["alerts"][0]["state"] == "archived"
    first, second, third = [sock.getsockname()[1] for sock in daemon.handed[:3]]
    urls = [f"http://127.0.0.1:{first}", f"http://127.0.0.1:{second}", rf"http://\[::1\]:{third}"]
    assert daemon.logged(f"listens on {', ?'.join([*urls, f'unix:{places[3]}', f'unix:@{tmp_path}'])} ")
    assert daemon.logged("client=local")
    assert len(s3.objects()) == 10
    assert daemon.stop() == 0
    assert os.path.exists(places[3])  # it is systemd's


def test_what_waits_while_no_daemon_runs_is_answered_by_the_next(new_daemon, listener):
    daemon = new_daemon(start=False, archive__workers="0")
    daemon.handed = [listener("127.0.0.1:0")]
    for number in range(3):
        with socket.create_connection(daemon.handed[0].getsockname()) as client:
            send(client, number)
            daemon.start()
            assert receive(client)["success"]
        assert daemon.stop() == 0


def test_a_restart_under_load_refuses_and_resets_nothing(new_daemon, listener, s3):
    daemon = new_daemon(start=False, server__wait="0")
    daemon.handed = [listener("127.0.0.1:0")]
    daemon.start()
    done, answers, errors = threading.Event(), [], []

    def client(number):
        while not done.is_set():
            try:
                answers.append(post(daemon.handed[0], number))
            except (OSError, ValueError) as error:
                errors.append(error)
            number += 10

    with ThreadPoolExecutor(10) as pool:
        clients = pool.map(client, range(10))
        try:
            for _ in range(2):
                count = len(answers)
                until(lambda count=count: len(answers) > count + 50)
                daemon.restart()
        finally:
            done.set()
    assert (list(clients), errors) == ([None] * 10, [])
    ids = {answer["alerts"][0]["id"] for answer in answers}
    until(lambda: len(s3.objects("alerts")) == len(ids), 60, "archive")


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0"])
def test_a_handed_socket_that_others_reach_wants_a_token(new_daemon, listener, where):
    daemon = new_daemon(start=False, server__webhook_token=None, archive__workers="0")
    daemon.handed = [listener("127.0.0.1:0"), listener(where)]
    line = daemon.refused()
    assert re.search(r"^ts3d: .*tcp://\S+:[0-9]+.*\[server\] webhook_token", line), line
    daemon.set(server__webhook_token=TOKEN)
    assert daemon.start().stop() == 0


def test_a_unix_socket_needs_no_token(new_daemon, listener, tmp_path):
    daemon = new_daemon(start=False, server__webhook_token=None, archive__workers="0")
    daemon.handed = [listener(str(tmp_path / "sock"))]
    daemon.start()
    assert post(daemon.handed[0], 1)["success"]
    assert daemon.logged("WARNING .*webhook_token is not set")


@pytest.mark.parametrize("what", ["file", "datagrams", "connection"])
def test_what_is_no_listening_socket_is_refused(new_daemon, tmp_path, what):
    pair = socket.socketpair()
    handed = {"datagrams": socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "connection": pair[0]}
    daemon = new_daemon(start=False)
    with open(tmp_path / "file", "w") as file:
        daemon.handed = [handed.get(what, file)]
        line = daemon.refused()
    for sock in (*pair, handed["datagrams"]):
        sock.close()
    assert re.fullmatch("ts3d: .*(on non-socket|does not listen).*\n", line, re.IGNORECASE), line


def test_sockets_of_another_process_are_left_alone(new_daemon):
    daemon = new_daemon(start=False)
    daemon.environment.update(LISTEN_PID="1", LISTEN_FDS="1")
    assert daemon.start().health()["success"]


@pytest.mark.parametrize("told", ["path", "abstract"], indirect=True)
def test_from_ready_to_stopping(told, s3):
    daemon, messages = told
    daemon.set(archive__workers=None)
    daemon.environment.update(WATCHDOG_USEC="2000000")
    daemon.start()
    assert until(lambda: messages)[0] == "READY=1"
    until(lambda: "STATUS=0 queued, 0 failed" in messages and "WATCHDOG=1" in messages)
    s3.stop()
    daemon.set(server__wait="0")
    daemon.post({"alerts": [alert(1), alert(2)]})
    until(lambda: re.search(r"STATUS=2 queued, 0 failed; S3\b.*\nWATCHDOG=1$", "\n".join(messages)))  # fed all the same
    daemon.process.terminate()
    until(lambda: messages[-1] == "STOPPING=1\nSTATUS=stopping")


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}])
def test_no_watchdog_of_ours(told, environment):
    daemon, messages = told
    daemon.environment.update(environment)
    daemon.start()
    until(lambda: len(messages) > 2)
    assert daemon.stop() == 0
    assert messages[0] == "READY=1"


def test_ready_comes_before_boto3(told, tmp_path):
    daemon, messages = told
    (tmp_path / "boto3.py").write_text(
        "import os, socket\n"
        "name = os.environ['NOTIFY_SOCKET'].replace('@', '\\0')\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'boto3', name)\n"
        "raise ImportError('none here')\n"
    )
    daemon.environment["PYTHONPATH"] = str(tmp_path)
    daemon.set(archive__workers=None)
    daemon.refused()
    until(lambda: re.search("STATUS=.*none here", messages[-1]))
    assert messages[0] == "READY=1"
    assert messages.index("boto3") > 0


def test_a_wrong_configuration_is_the_status(told):
    daemon, messages = told
    daemon.set(s3__buket="x")
    line = daemon.refused()
    assert re.fullmatch(rf"ts3d: {daemon.config}: \[s3\] .*buket.*(?i:did you mean) bucket\?.*\n", line)
    assert until(lambda: messages) == [f"STATUS={line[6:-1]}"]


@pytest.mark.parametrize(
    ("option", "says"), [("s3__buket", "/.*buket"), ("put_object__Nonsense", ".*Nonsense: unknown to this boto3")]
)
def test_the_journal_is_told_how_bad_it_is(new_daemon, option, says):
    """Also where botocore's model refuses a configuration, which is known only while it runs."""
    daemon = new_daemon(start=False, **{option: "x"})
    with open(daemon.log_file, "w") as log:
        stat = os.fstat(log.fileno())
        daemon.environment["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
        assert daemon.popen(log).wait(20) == 78
    assert re.search(f"^<3>ts3d: {says}", daemon.log(), re.MULTILINE)


def test_a_thread_that_does_not_move_starves_the_watchdog(told, tracer):
    daemon, messages = told
    daemon.environment["WATCHDOG_USEC"] = "1000000"
    daemon.set(server__wait="0")
    daemon.start()
    until(lambda: messages and "WATCHDOG=1" in messages[-1])
    hang = "inject=fdatasync:delay_enter=600000000"  # a disk's, for so many microseconds
    with tracer(daemon, hang, end=signal.SIGKILL), socket.create_connection(daemon.address) as client:
        send(client, 1)
        until(lambda: daemon.logged("ERROR .*threads.*queue"), 60)
        until(lambda: "WATCHDOG=1" not in messages[-1])
    until(lambda: "WATCHDOG=1" in messages[-1])


def test_every_thread_declares_progress(monkeypatch, tmp_path):
    monkeypatch.setattr(ts3d, "PROGRESS_BY", {})
    (tmp_path / "ts3d.conf").write_text(f"[s3]\nbucket = {BUCKET}\nregion = us-east-1\n[archive]\nworkers = 1\n")
    config = ts3d.load_config(str(tmp_path / "ts3d.conf"))
    queue_ = ts3d.Queue(config.path, config.max_size, "a place")
    archiver = ts3d.Archiver(config, queue_)
    server = ts3d.Server(config, archiver)
    ts3d.start_thread("acceptor", server.accept, socket.create_server(("127.0.0.1", 0)))
    archiver.start()
    until(lambda: {"acceptor", "queue", "dispatcher"} <= ts3d.PROGRESS_BY.keys())
    for name in ("acceptor", "queue", "dispatcher"):
        before = ts3d.PROGRESS_BY[name]
        assert before < time.monotonic() + 900
        archiver.wake.set()
        until(lambda name=name, before=before: ts3d.PROGRESS_BY[name] != before, what=name)
    server.stopping = archiver.stopping = True
    archiver.stop(time.monotonic() + 30)
    queue_.close()


def test_aws_credentials_lie_with_the_secrets(new_daemon, s3):
    daemon = new_daemon(start=False, archive__workers="1")
    daemon.without_keys()
    (daemon.folder / "secrets").mkdir()
    file = daemon.folder / "secrets" / "aws_credentials"
    file.write_text("")
    (daemon.folder / ".aws").mkdir()  # root's own is not the service's
    (daemon.folder / ".aws" / "config").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    assert "FAIL  s3            S3: " in daemon.run("check").stdout
    file.write_text(f"[default]\n{CREDENTIALS}")
    assert daemon.run("check").returncode == 0
    credentials = daemon.folder / "credentials"
    shutil.move(daemon.folder / "secrets", credentials)
    daemon.environment["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert daemon.start().post({"alerts": [alert(1)]})[1]["alerts"][0]["state"] == "archived"


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_what_root_makes_belongs_to_the_folders_owner(new_daemon):
    daemon = new_daemon(start=False)
    nobody = pwd.getpwnam("nobody")
    folder = daemon.folder / "state"
    folder.mkdir()
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    daemon.set(queue__path=folder / "queue.db")
    daemon.start().post({"alerts": [alert(1)]})
    daemon.kill()
    assert daemon.run("check").returncode == 0
    files = {path.name: path.stat() for path in folder.iterdir()}
    assert files.keys() >= {"queue.db", "queue.db.lock"}
    assert {(stat.st_uid, stat.st_mode & 0o777) for stat in files.values()} == {(nobody.pw_uid, 0o600)}


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_root_follows_no_link_that_the_owner_has_laid(new_daemon, tmp_path):
    daemon = new_daemon(start=False)
    folder, shadow = daemon.folder / "state", tmp_path / "shadow"
    shadow.write_text("")
    folder.mkdir()
    os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    daemon.set(queue__path=folder / "queue.db")
    for target in (shadow, tmp_path / "nologin"):
        (folder / "queue.db.lock").symlink_to(target)
        assert "symbolic link" in daemon.refused()
        (folder / "queue.db.lock").unlink()
    assert shadow.stat().st_uid == 0
    assert not (tmp_path / "nologin").exists()


def test_the_program_runs_isolated(new_daemon):
    daemon = new_daemon(start=False)
    process = subprocess.run(
        [sys.executable, "-I", *daemon.command("check")[1:]], env=daemon.environment, capture_output=True, check=False
    )
    assert process.returncode == 0
