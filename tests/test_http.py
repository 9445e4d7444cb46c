"""HTTP: tokens, errors, framing, deadlines, the bound on connections."""

import json
import socket
import ssl
import threading
import time

import pytest
import trustme
from conftest import TOKEN, alert, until

import ts3d

PATH = "/api/v1/s3/alert"


def talk(daemon, data, seconds=15, shut=False):
    """Send bytes, and return all that comes back until the connection closes."""
    with socket.create_connection(daemon.address, seconds) as sock:
        sock.sendall(data)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while piece := sock.recv(65536):
            received += piece
    return received


def message(headers=(), body=b"", method="POST", path=PATH, version="HTTP/1.1", host=b"Host: x\r\n"):
    lines = b"".join(header + b"\r\n" for header in headers)
    auth = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    return f"{method} {path} {version}\r\n".encode() + host + auth + lines + b"\r\n" + body


EMPTY = b'{"alerts": []}'
LENGTH = b"Content-Length: 14"
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b'1\r\n{\r\nD;x="y"\r\n"alerts": []}\r\n0\r\nTrailer: x\r\n\r\n'
CLOSE = b"Connection: close"


def error_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in head
    assert b"\r\nContent-Type: application/json\r\n" in head
    error = json.loads(body)
    assert error["success"] is False
    assert error["error"]["message"]
    return int(head.split()[1]), error["error"]["type"]


@pytest.mark.parametrize("where", ["header", "scheme", "query", "percent"])
def test_the_token(daemon, where):
    path = {"query": f"{PATH}?a=b&token={TOKEN}", "percent": f"{PATH}?token=%6Fpen-sesame"}.get(where, PATH)
    headers = {"header": {"Authorization": f"Bearer {TOKEN}"}, "scheme": {"Authorization": f"bEARER  {TOKEN}"}}
    assert daemon.request("POST", path, EMPTY, headers.get(where, {}))[0] == 200


@pytest.mark.parametrize(
    ("path", "authorization"),
    [
        (PATH, None),
        (PATH, "Bearer wrong"),
        (PATH, f"Basic {TOKEN}"),
        (PATH, TOKEN),
        (PATH, "Bearer "),
        (PATH, "Bearer \xe9"),
        (f"{PATH}?token=", None),
        (f"{PATH}?token", None),
        (f"{PATH}?token={TOKEN}x", None),
        (f"{PATH}?Token={TOKEN}", None),
    ],
)
def test_no_token(daemon, path, authorization):
    headers = {"Authorization": authorization} if authorization is not None else {}
    status, answer, fields = daemon.request("POST", path, EMPTY, headers)
    assert (status, answer["error"]["type"]) == (401, "unauthorized")
    assert fields["WWW-Authenticate"].startswith("Bearer")
    assert daemon.health()["queued"] == 0


def test_the_token_is_judged_before_the_body_is_read(daemon):
    data = message([b"Content-Length: 1000000"]).replace(TOKEN.encode(), b"wrong")
    assert error_of(talk(daemon, data, shut=True))[0] == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("POST", "/api/v1/s3/alert/", 404, None),
        ("POST", "/healthz/x", 404, None),
        ("GET", PATH, 405, "POST"),
        ("HEAD", PATH, 405, "POST"),
        ("PUT", PATH, 405, "POST"),
        ("BREW", PATH, 405, "POST"),
        ("POST", "/healthz", 405, "GET, HEAD"),
    ],
)
def test_errors(daemon, method, path, status, allow):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    got, answer, fields = daemon.request(method, path, EMPTY if method != "GET" else None, headers)
    assert got == status
    assert fields["Allow"] == allow
    assert method == "HEAD" or answer["success"] is False


def test_healthz(daemon):
    status, answer, _ = daemon.request("GET", "/healthz")
    assert (status, answer) == (200, {"success": True, "queued": 0, "failed": 0, "oldest_seconds": 0})
    assert daemon.request("HEAD", "/healthz")[:2] == (200, None)


@pytest.mark.parametrize(
    "data",
    [
        message([LENGTH, CLOSE], EMPTY),
        message([CHUNKED, CLOSE], CHUNKS),
        message([b"transfer-encoding:CHUNKED", CLOSE], CHUNKS),
        message([LENGTH], EMPTY, version="HTTP/1.0"),
        message([LENGTH], EMPTY, version="HTTP/1.0", host=b""),
        message([LENGTH, CLOSE], EMPTY, path="http://example.com" + PATH),
        message([LENGTH, b"connection: x, CLOSE"], EMPTY),
        b"\r\n" + message([LENGTH, CLOSE], EMPTY),
        message([LENGTH], EMPTY) * 3 + message([LENGTH, CLOSE], EMPTY),
    ],
    ids=range(9),
)
def test_messages_that_are_good(daemon, data):
    answer = talk(daemon, data)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b'{"success": true, "alerts": []}') == data.count(b"Bearer")


@pytest.mark.parametrize(
    "data",
    [
        message([LENGTH, LENGTH], EMPTY),
        message([b"Content-Length: 14, 14"], EMPTY),
        message([b"Content-Length: +14"], EMPTY),
        message([b"Content-Length: -14"], EMPTY),
        message([b"Content-Length: 1_4"], EMPTY),
        message([b"Content-Length: 0xE"], EMPTY),
        message([b"Content-Length: 1 4"], EMPTY),
        message([b"Content-Length:"], EMPTY),
        message([b"Content-Length: " + "١٤".encode()], EMPTY),
        message([LENGTH, CHUNKED], CHUNKS),
        message([CHUNKED, CHUNKED], CHUNKS),
        message([b"Transfer-Encoding: gzip, chunked"], CHUNKS),
        message([b"Transfer-Encoding: chunked, gzip"], CHUNKS),
        message([b"Transfer-Encoding: identity"], EMPTY),
        message([b"Transfer-Encoding: \x0bchunked"], CHUNKS),
        message([CHUNKED], CHUNKS, version="HTTP/1.0"),
        message([CHUNKED], b"+1\r\n{\r\n"),
        message([CHUNKED], b"0x1\r\n{\r\n"),
        message([CHUNKED], b"-1\r\n{\r\n"),
        message([CHUNKED], b" 1\r\n{\r\n"),
        message([CHUNKED], b"1 \r\n{\r\n"),
        message([CHUNKED], b"\r\n"),
        message([CHUNKED], b"1\r\n{}\r\n"),
        message([CHUNKED], b"1\n{\n"),
        message([CHUNKED], b"fffffffffffffffff\r\n"),
        message([LENGTH, b" folded: x"], EMPTY),
        message([LENGTH, b"Name : x"], EMPTY),
        message([LENGTH, b"no colon"], EMPTY),
        message([LENGTH, b"Name: a\x00b"], EMPTY),
        message([LENGTH, b"Name: a\rb"], EMPTY),
        message([LENGTH, b": x"], EMPTY),
        message([LENGTH], EMPTY, host=b""),
        message([LENGTH], EMPTY, host=b"Host: a\r\nHost: b\r\n"),
        message([LENGTH], EMPTY).replace(b"\r\n", b"\n"),
        message([LENGTH], EMPTY, version="HTTP/2.0"),
        message([LENGTH], EMPTY, version="http/1.1"),
        message([LENGTH], EMPTY, path="/api v1"),
        message([LENGTH], EMPTY, path="/\x01"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=lambda data: repr(data[-60:]),
)
def test_messages_that_can_be_read_in_two_ways(daemon, data):
    assert error_of(talk(daemon, data, shut=True))[0] == 400
    assert daemon.health()["queued"] == 0


def test_too_large(new_daemon):
    daemon = new_daemon(server__max_body="1K")
    assert daemon.post(b"[" + b" " * 1022 + b"]")[0] == 400
    assert daemon.post(b"[" + b" " * 1023 + b"]")[0] == 413
    big = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert error_of(talk(daemon, message([CHUNKED], big + big), shut=True)) == (413, "too_large")


def test_large_heads(daemon):
    assert error_of(talk(daemon, message([b"X: " + b"x" * 70_000]), shut=True))[0] == 431
    assert error_of(talk(daemon, message([b"X: x"] * 200), shut=True))[0] == 431
    assert error_of(talk(daemon, message(path="/" + "x" * 70_000), shut=True))[0] == 431


def test_blanks_without_end_cost_nothing(daemon):
    """A pattern that tries every way to split them would hold up the whole daemon for hours."""
    for value in (b" " * 60_000 + b"\x01", b"x" + b"\t " * 30_000 + b"\x01"):
        assert error_of(talk(daemon, message([b"X:" + value]), shut=True))[0] == 400


def test_an_early_error_is_read_by_a_client_that_still_sends(daemon):
    """The answer must not be lost in a reset: the client sends 8 MB before it reads."""
    data = message([b"Content-Length: 80000000"], b"x" * 8_000_000)
    assert error_of(talk(daemon, data, shut=True))[0] == 413


def test_expect_100_continue(daemon):
    with socket.create_connection(daemon.address, 5) as sock:
        sock.sendall(message([LENGTH, b"Expect: 100-continue", CLOSE]))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(EMPTY)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    wrong = message([LENGTH, b"Expect: 100-continue"]).replace(TOKEN.encode(), b"wrong")
    assert talk(daemon, wrong, shut=True).startswith(b"HTTP/1.1 401 ")


def test_keep_alive(daemon):
    with socket.create_connection(daemon.address, 5) as sock:
        for _ in range(3):
            sock.sendall(message([LENGTH], EMPTY))
            assert b" 200 OK" in sock.recv(65536)


def test_the_whole_request_has_one_deadline(new_daemon):
    daemon = new_daemon(server__request_timeout="1")
    begin = time.monotonic()
    with socket.create_connection(daemon.address, 10) as sock:
        sock.sendall(message([LENGTH]))
        sock.settimeout(0.2)
        received = b""
        while not received:
            try:
                received = sock.recv(65536)
            except TimeoutError:
                sock.sendall(b" ")  # a byte now and then
        assert error_of(received) == (408, "timeout")
    assert time.monotonic() - begin < 8
    with socket.create_connection(daemon.address, 10) as sock:  # an idle one is closed without a word
        assert sock.recv(100) == b""


def test_beyond_the_bound_the_longest_idle_connection_goes_first(new_daemon):
    daemon = new_daemon(server__max_connections="10", server__request_timeout="60")
    idle = []
    for _ in range(10):
        idle.append(socket.create_connection(daemon.address, 10))
        idle[-1].sendall(message([LENGTH], EMPTY))
        idle[-1].recv(65536)
    idle[0].sendall(message([LENGTH], EMPTY))  # now the second one is the longest idle
    idle[0].recv(65536)
    assert daemon.post(EMPTY)[0] == 200
    assert idle[1].recv(100) == b""
    for sock in (idle[0], *idle[2:]):
        sock.sendall(message([LENGTH], EMPTY))
        assert b" 200 OK" in sock.recv(65536)
        sock.close()


def test_bodies_being_received_are_bounded(new_daemon):
    daemon = new_daemon(server__max_body="30M", server__request_timeout="60")
    socks = [socket.create_connection(daemon.address, 30) for _ in range(2)]
    for sock in socks:
        sock.sendall(message([b"Content-Length: 30000000"]) + b" " * 20_000_000)
    with socket.create_connection(daemon.address, 30) as sock:
        until(lambda: daemon.health(), what="answer")
        try:
            sock.sendall(message([b"Content-Length: 30000000"]) + b" " * 20_000_000)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert error_of(answer) == (503, "busy")
    assert b"Retry-After" in answer
    for sock in socks:
        sock.close()
    until(lambda: daemon.post(EMPTY)[0] == 200)


def test_many_slow_connections_keep_nobody_waiting(new_daemon):
    daemon = new_daemon(server__wait="0", server__request_timeout="30")
    slow = [socket.create_connection(daemon.address, 10) for _ in range(300)]
    for sock in slow:
        sock.sendall(b"POST ")
    for n in range(20):
        assert daemon.post({"alerts": [alert(n)]})[0] == 200
    for sock in slow:
        sock.close()


def test_clients_that_vanish(daemon):
    whole = message([LENGTH], EMPTY)
    for n in range(0, len(whole), 20):
        with socket.create_connection(daemon.address, 10) as sock:
            sock.sendall(whole[:n])
    assert daemon.post(EMPTY)[0] == 200
    until(lambda: daemon.logged("POST /api/v1/s3/alert - client=127.0.0.1 error=closed in the middle of a body"))


def test_a_secret_is_in_no_log_line_whatever_the_request_is(new_daemon):
    daemon = new_daemon(log__level="DEBUG")
    for data in (
        message([LENGTH], EMPTY, path=f"/api/v1/s3/alert&token={TOKEN}"),
        f"POST {PATH}?token={TOKEN} nonsense\r\n\r\n".encode(),
        f"POST /{TOKEN}\x1b[2J HTTP/1.1\r\n\r\n".encode(),
        message([b"Bad header " + TOKEN.encode()]),
    ):
        assert TOKEN.encode() not in talk(daemon, data, shut=True)
    daemon.stop()
    assert "\x1b" not in daemon.log()


def test_a_connection_that_is_shut_down_stays_encrypted(tmp_path):
    """ssl.SSLSocket.shutdown takes TLS away: its thread would go on in plain text."""
    authority = trustme.CA()
    contexts = [ssl.create_default_context(purpose) for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH)]
    authority.issue_cert("localhost").configure_cert(contexts[0])
    authority.configure_trust(contexts[1])
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    served = []
    thread = threading.Thread(target=lambda: served.append(contexts[0].wrap_socket(ours, server_side=True)))
    thread.start()
    with contexts[1].wrap_socket(theirs, server_hostname="localhost") as client:
        thread.join()
        wire = ts3d.Wire(served[0], time.monotonic() + 10)
        wire.shutdown(socket.SHUT_RD)
        wire.sendall(b"x")
        assert client.recv(1) == b"x"
        served[0].close()


def test_concurrent_clients(new_daemon, s3):
    daemon = new_daemon()
    results = []

    def client(number):
        for n in range(10):
            results.append(daemon.post({"alerts": [alert(number * 100 + n)]})[0])

    clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert results == [200] * 160
    until(lambda: len(s3.objects("alerts/")) == 160)
