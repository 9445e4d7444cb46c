"""Clients that are slow, many or hungry: real webhooks are answered beside them, and memory stays bounded."""

import contextlib
import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import threatstack
from conftest import AWS, TOKEN, alert, peak_memory, until
from test_http import message, talk


@contextlib.contextmanager
def connections(daemon, count, data=b""):
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            socks.append(stack.enter_context(socket.create_connection(daemon.address, 20)))
            socks[-1].sendall(data)
        yield socks


@pytest.mark.parametrize("mode", ["-H", "-B"])
def test_800_slow_connections_keep_nobody_waiting(new_daemon, mode):
    """slowhttptest: headers, or a body behind the right token, a few bytes at a time."""
    if not shutil.which("slowhttptest"):
        pytest.skip("no slowhttptest")
    daemon = new_daemon(server__wait="0", archive__workers="0")
    url = "http://{}:{}/api/v1/s3/alert?token={}".format(*daemon.address, TOKEN)
    options = f"{mode} -c 800 -r 800 -i 1 -l 60 -s 8192 -t POST -u {url}"
    command = ["slowhttptest", *options.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as attack:
        fds = Path(f"/proc/{daemon.process.pid}/fd")
        until(lambda: len(list(fds.iterdir())) > 700, what="attack")
        for n in range(50):
            assert daemon.post({"alerts": [alert(n)]})[0] == 200
        attack.terminate()
    assert daemon.health()["queued"] == 50
    assert peak_memory(daemon) < 150 << 20


def test_more_connections_than_there_is_room_for(new_daemon):
    """Each new one is served, at the cost of one that makes us wait for longer."""
    daemon = new_daemon(server__max_connections="20", server__request_timeout="60", archive__workers="0")
    with connections(daemon, 100, b"POST /api/v1/s3/alert HTTP/1.1\r\n"):
        for n in range(20):
            assert daemon.post({"alerts": [alert(n)]})[0] == 200


def test_no_room_while_all_are_being_answered(new_daemon, s3, api):
    """A client that waits for an answer is not cut off: the new one is."""
    api.mode = "hang"
    daemon = new_daemon(server__max_connections="3", server__wait="30", archive__workers="4")
    data = json.dumps({"alerts": [alert(0)]}).encode()
    with connections(daemon, 3, message([b"Content-Length: %d" % len(data)], data)) as socks:
        until(lambda: len(s3.objects("webhooks/")) == 1)
        with connections(daemon, 1) as (late,), contextlib.suppress(ConnectionResetError):
            assert late.recv(100) == b""
        api.mode = None
        api.released.set()
        for sock in socks:
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_file_descriptors_are_left_for_the_archive(new_daemon, s3):
    """Where a process may open few files, connections do not take all of them."""
    daemon = new_daemon(start=False, server__wait="10", server__request_timeout="60")
    command = daemon.command
    daemon.command = lambda *arguments: ["prlimit", "--nofile=160:160", *command(*arguments)]
    daemon.start()
    with connections(daemon, 300):
        answer = daemon.post({"alerts": [alert(n) for n in range(40)]})[1]
        assert {state["state"] for state in answer["alerts"]} == {"archived"}
    assert not daemon.logged("unavailable")


def test_handshakes_that_never_end(new_daemon, certificate):
    daemon = new_daemon(server__request_timeout="60", archive__workers="0", **certificate.options)
    assert daemon.logged("listens on https://")
    # A hello's beginning, and nothing at all.
    with connections(daemon, 100, b"\x16\x03\x01\x02\x00"), connections(daemon, 100):
        for _ in range(5):
            plain = socket.create_connection(daemon.address, 20)
            with certificate.context.wrap_socket(plain, server_hostname="localhost") as sock:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert sock.recv(65536).startswith(b"HTTP/1.1 200")


HUNGRY = {
    "empty lists": b"[" + b"[]," * (8_000_000 // 3 - 100) + b"1]",
    "empty objects": b"[" + b"{}," * (8_000_000 // 3 - 100) + b"1]",
    "short members": b"{" + b",".join(b'"%06x":{}' % n for n in range(660_000)) + b"}",
    "wide text": '"{}"'.format("🔒" + "x" * 7_999_000).encode(),
}


@pytest.mark.parametrize("what", HUNGRY)
def test_memory_is_bounded_whatever_is_sent(new_daemon, what):
    """Bodies of 8M, the default bound, from eight clients with the token at once."""
    daemon = new_daemon(server__wait="0", server__request_timeout="60", archive__workers="0")
    body = b'{"id": "abcd", "created_at": 0, "more": %s}' % HUNGRY[what]
    assert len(body) <= 8 << 20
    with ThreadPoolExecutor(8) as pool:
        statuses = set(pool.map(lambda _: daemon.post(body)[0], range(8)))
    assert statuses in ({200}, {200, 503})
    print(f"{what}: {peak_memory(daemon) >> 20}M")
    assert peak_memory(daemon) < 1 << 30


def test_memory_is_bounded_without_the_token(new_daemon):
    """1,024 connections, each with as many bytes of headers as are read."""
    daemon = new_daemon(server__request_timeout="60", archive__workers="0")
    head = b"POST /api/v1/s3/alert HTTP/1.1\r\n" + b"A: %s\r\n" % (b"x" * 600) * 99
    with connections(daemon, 1000, head):
        assert daemon.post({"alerts": [alert(0)]})[0] == 200
        print(f"{peak_memory(daemon) >> 20}M")
        assert peak_memory(daemon) < 400 << 20


def echo(handler):
    """An upstream that quotes what it was sent, in its error."""
    handler.send(500, "".join(f"{name}: {value}\n" for name, value in handler.headers.items()).encode())


def test_secrets_are_nowhere(new_daemon, api, tmp_path):
    """Whatever fails, at the most talkative level: in no line, answer or argument, nor what `check` says."""
    api.mode = echo
    tokens = ["first-webhook-token", "second+webhook/token"]
    secrets = [*tokens, "the-metrics-token", threatstack.KEY, AWS["AWS_SECRET_ACCESS_KEY"]]
    daemon = new_daemon(
        server__webhook_token="\n  ".join(["", *tokens]),
        server__metrics_token="the-metrics-token",
        server__wait="0",
        log__level="DEBUG",
        s3__endpoint_url=api.url,
    )
    check = daemon.run("check")
    said = [check.stdout, check.stderr]
    for token in tokens:
        said.append(str(daemon.post({"alerts": [alert(0)]}, token)))
        for data in (
            f"POST /api/v1/s3/alert?token={token} HTTP/9.9\r\n\r\n",
            f"POST /api/v1/s3/alert?token={token}\r\n\r\n",
            f"POST /api/v1/s3/alert?token={token} \x01 HTTP/1.1\r\n\r\n",
            f"POST /{token} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
            f"POST /api/v1/s3/alert&token={token} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
            f"POST /{token}\x1b[2J HTTP/1.1\r\n\r\n",
            f"{token} / HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {token}\r\n\r\n",
            f"GET /healthz HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer\r\n {token}\r\n\r\n",
            f"POST /api/v1/s3/alert HTTP/1.1\r\nHost: {token}\r\nAuthorization: Basic {token}\r\n\r\n",
            f"POST /api/v1/s3/alert?token=x{token} HTTP/1.1\r\nHost: x\r\n{token}: {token}\r\n\r\n",
        ):
            said.append(talk(daemon, data.encode(), 20, shut=True).decode())
    until(lambda: daemon.logged("Threat Stack: 500|s3 unavailable"))
    said += [str(daemon.post({"alerts": [alert(0)]}, token)) for token in tokens]
    assert "'error'" in said[-1]
    process = Path(f"/proc/{daemon.process.pid}")
    said.append((process / "cmdline").read_text())
    daemon.stop()
    said.append(daemon.log())
    assert "\x1b" not in said[-1]
    assert [(secret, text) for secret in secrets for text in said if secret in text] == []
