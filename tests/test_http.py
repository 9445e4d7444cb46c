"""HTTP: tokens, errors, framing, deadlines, the bound on connections."""

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TOKEN, alert, environment, free_port, listening, until

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


def trickle(sock, byte):
    """Send a byte now and then until an answer comes, and return that."""
    sock.settimeout(0.2)
    while True:
        try:
            return sock.recv(65536)
        except TimeoutError:
            sock.sendall(byte)


def message(headers=(), body=b"", method="POST", path=PATH, version="HTTP/1.1", host=b"Host: x\r\n"):
    lines = b"".join(header + b"\r\n" for header in headers)
    auth = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    return f"{method} {path} {version}\r\n".encode() + host + auth + lines + b"\r\n" + body


@pytest.fixture
def daemon(new_daemon):
    """One that archives nothing, and so needs no boto3."""
    return new_daemon(archive__workers="0")


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


def test_a_token_that_is_right(daemon):
    for path, authorization in (
        (PATH, f"Bearer {TOKEN}"),
        (PATH, f"bEARER  {TOKEN}"),
        (f"{PATH}?a=b&token={TOKEN}", None),
        (f"{PATH}?token=%6F{TOKEN[1:]}", None),
    ):
        headers = {"Authorization": authorization} if authorization else {}
        assert daemon.request("POST", path, EMPTY, headers)[0] == 200, (path, authorization)


def test_a_token_that_is_missing_or_wrong(daemon):
    texts = (None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer \xe9", f"Basic {TOKEN}", TOKEN)
    queries = ("token=", "token", "token=&token=", f"token={TOKEN}x", f"Token={TOKEN}")
    for path, authorization in (*((PATH, text) for text in texts), *((f"{PATH}?{query}", None) for query in queries)):
        headers = {"Authorization": authorization} if authorization is not None else {}
        status, answer, fields = daemon.request("POST", path, EMPTY, headers)
        assert (status, answer["error"]["type"]) == (401, "unauthorized"), (path, authorization)
        assert fields["WWW-Authenticate"].startswith("Bearer")
    assert daemon.health()["queued"] == 0


def test_the_token_is_judged_before_the_body_is_read(daemon):
    data = message([b"Content-Length: 1000000"]).replace(TOKEN.encode(), b"wrong")
    assert error_of(talk(daemon, data, shut=True))[0] == 401


def test_paths_and_methods(daemon):
    for method, path, status, allow in (
        ("GET", "/", 404, None),
        *(("POST", path, 404, None) for path in (f"/{PATH}", f"{PATH}//", f"{PATH}/x", PATH.upper(), "/healthz/x")),
        *((method, PATH, 405, "POST") for method in ("GET", "HEAD", "PUT", "BREW")),
        ("GET", PATH + "/", 405, "POST"),
        ("POST", "/healthz", 405, "GET, HEAD"),
    ):
        body = EMPTY if method != "GET" else None
        got, answer, fields = daemon.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"})
        assert (got, fields["Allow"]) == (status, allow), (method, path)
        assert method == "HEAD" or answer["success"] is False


def test_healthz(daemon):
    status, answer, _ = daemon.request("GET", "/healthz")
    assert (status, answer) == (200, answer | {"success": True, "queued": 0, "failed": 0, "oldest_seconds": 0})
    assert daemon.request("HEAD", "/healthz")[:2] == (200, None)


GOOD = [
    message([LENGTH, CLOSE], EMPTY),
    message([b"CONTENT-LENGTH:\t14 \t", CLOSE], EMPTY),
    message([b"Content-Length:014", CLOSE], EMPTY),
    message([CHUNKED, CLOSE], CHUNKS),
    message([b"transfer-encoding:CHUNKED", CLOSE], CHUNKS),
    message([CHUNKED, CLOSE], b"00000000000000e\r\n" + EMPTY + b"\r\n000\r\n\r\n"),
    message([CHUNKED, CLOSE], b'E ; a = "b;\xe9\t" ; c\r\n' + EMPTY + b"\r\n0;x\r\n\r\n"),
    message(
        [CHUNKED, CLOSE], b"e\r\n" + EMPTY + b"\r\n0\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\nHost: y\r\n\r\n"
    ),
    message([LENGTH], EMPTY, version="HTTP/1.0"),
    message([LENGTH, b"Connection: keep-alive"], EMPTY, version="HTTP/1.0"),
    message([LENGTH], EMPTY, version="HTTP/1.0", host=b""),
    message([LENGTH, CLOSE], EMPTY, path="http://example.com" + PATH),
    message([LENGTH, CLOSE], EMPTY, path=PATH + "/"),
    message([LENGTH, CLOSE], EMPTY, path=f"{PATH}/?token={TOKEN}"),
    *(message([LENGTH, b"Content-Encoding: " + coding, CLOSE], EMPTY) for coding in (b"identity", b"Identity", b"")),
    message([LENGTH, b"connection: x, CLOSE"], EMPTY),
    message([LENGTH, b"X:", b"X: \xff\t\x80", CLOSE], EMPTY),
    *(message([LENGTH, CLOSE], EMPTY, host=b"Host:" + host + b"\r\n") for host in (b"", b"a_b:", b"[::1]:80", b"%61")),
    b"\r\n" + message([LENGTH, CLOSE], EMPTY),
    message([LENGTH], EMPTY) * 3 + message([LENGTH, CLOSE], EMPTY),
    (message([CHUNKED], CHUNKS) + message([LENGTH], EMPTY)) * 20 + message([CHUNKED, CLOSE], CHUNKS),
]


def test_messages_that_are_good(daemon):
    for data in GOOD:
        answer = talk(daemon, data)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), data
        assert answer.count(b'{"success": true, "alerts": []}') == data.count(b"Bearer"), data


def test_a_coded_body_is_named_and_kept(new_daemon, s3):
    """Nothing that presented the token is lost: what arrived is kept, as it came, however it was sent."""
    daemon, bodies = new_daemon(), {}
    of_headers = [[b"gzip"], [b"GZIP"], [b"x-gzip"], [b"deflate"], [b"br"], [b"identity, gzip"], [b"gzip", b"identity"]]
    for number, codings in enumerate(of_headers):
        body = gzip.compress(json.dumps({"alerts": [alert(number)]}).encode())
        headers = [b"Content-Encoding: " + coding for coding in codings]
        whole = message([*headers, b"Content-Length: %d" % len(body)], body)
        for data in (whole, message([*headers, CHUNKED], b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))):
            head, _, answer = talk(daemon, data, shut=True).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 415 "), codings
            error = json.loads(answer)["error"]
            assert error["type"] == "unsupported_encoding"
            assert "Content-Encoding" in error["message"]
        bodies[hashlib.sha256(body).hexdigest()] = body
        wrong = whole.replace(TOKEN.encode(), b"wrong")
        assert talk(daemon, wrong, shut=True).startswith(b"HTTP/1.1 401 ")
    until(lambda: len(s3.objects("rejected/")) == len(bodies))
    assert {key[-64:]: body for key, body in s3.objects().items()} == bodies


def of_alert(number, headers=(), chunked=False):
    """A message with an alert of its own."""
    body = json.dumps({"alerts": [alert(number)]}).encode()
    if chunked:
        body = b"".join(b"%x;x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\nT: x\r\n\r\n"
    return message([*headers, CHUNKED if chunked else b"Content-Length: %d" % len(body)], body)


def read_until_closed(sock):
    """All answers; after them what was sent behind the close may be reset."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("step", [1, 7, 1000, 100_000])
def test_a_pipeline_is_answered_in_order_however_it_is_cut(daemon, step):
    host = b"Host: x\r\n"
    data = of_alert(1) + of_alert(2, chunked=True) + b"GET /healthz HTTP/1.1\r\n" + host + b"\r\n\r\n"
    data += b"HEAD /healthz HTTP/1.1\r\n" + host + b"\r\nGET / HTTP/1.1\r\n" + host + b"\r\n"
    data += message([b"Content-Length: 1"], b"{") + of_alert(3) + of_alert(4, [CLOSE]) + of_alert(5)
    with socket.create_connection(daemon.address, 15) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        with ThreadPoolExecutor(1) as pool:  # a reset by what is sent behind the close must find all answers read
            answers = pool.submit(read_until_closed, sock)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for at in range(0, len(data), step):
                    sock.sendall(data[at : at + step])
            answer = answers.result()
    seen = re.findall(rb"HTTP/1\.1 (\d+) |(alert-\d+)|(malformed_webhook)|(\"queued\": \d)", answer)
    seen = [b"".join(groups).decode() for groups in seen]
    expected = '200 alert-000001 200 alert-000002 200 "queued":2 200 404 400 malformed_webhook 200 alert-000003 200'
    assert [text.replace(" ", "") for text in seen] == [*expected.split(), "alert-000004"]
    assert daemon.health()["queued"] == 5  # four alerts and what was refused


TWO_WAYS = [
    # Lengths
    message([LENGTH, LENGTH], EMPTY),
    message([LENGTH, b"content-length: 15"], EMPTY),
    message([b"Content-Length: 0", LENGTH], EMPTY),
    *(
        message([b"Content-Length:" + value], EMPTY)
        for value in (
            *(b"14, 14", b"14,14", b"14,", b",14", b"14, 15", b"14;", b'"14"', b"+14", b"-14", b"-0", b"1 4", b"1\t4"),
            *(b"", b"x", b"1_4", b"_14", b"14_", b"0xE", b"0o16", b"0b1110", b"E", b"14.0", b"1.4e1", b"1e1", b"\xb2"),
            *(b"14\x00", b"\x0b14", b"14\x0c", b"14\x1f", b"14\xa0", b"\x8514", "\u3000".encode() + b"14", b"9" * 16),
            *("\u0661\u0664".encode(), "\uff11\uff14".encode(), "\u0967\u096a".encode(), b"9" * 30, b"1" * 5000),
        )
    ),
    message([b"Content-Length:", b" 14"], EMPTY),
    message([b"Content-Length :14"], EMPTY),
    message([b"Content-Length\t:14"], EMPTY),
    message([b" Content-Length: 14"], EMPTY),
    message([b"Content-Length\x00: 14"], EMPTY),
    message([b"\x0bContent-Length: 14"], EMPTY),
    # Transfer codings
    *(message(lines, CHUNKS) for lines in ([LENGTH, CHUNKED], [CHUNKED, LENGTH], [CHUNKED, CHUNKED])),
    message([CHUNKED, b"Content-Length: 0"], CHUNKS),
    message([CHUNKED, b"transfer-encoding: identity"], CHUNKS),
    message([b"Transfer-Encoding: identity", CHUNKED], CHUNKS),
    *(
        message([b"Transfer-Encoding:" + value, *more], CHUNKS)
        for value in (
            *b"chunked, ,chunked identity x".split(),
            *(b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b""),
            *(b"xchunked", b"chunkedx", b"chun ked", b"chunked;q=1", b'"chunked"', b"\x0bchunked", b"chunked\x00"),
            *(b"chunked\xa0", b"\x85chunked", b"chun\xe7ked", "\uff43hunked".encode(), b"chun\xe2\x84\xaaed"),
        )
        for more in ([], [LENGTH])
    ),
    message([b"Transfer-Encoding:", b" chunked"], CHUNKS),
    message([b"Transfer-Encoding : chunked"], CHUNKS),
    message([b"Transfer-Encoding\t: chunked", LENGTH], EMPTY),
    message([CHUNKED], CHUNKS, version="HTTP/1.0"),
    message([CHUNKED, LENGTH], CHUNKS, version="HTTP/1.0"),
    message([b"Transfer-Encoding: identity", LENGTH], EMPTY, version="HTTP/1.0"),
    # Chunks
    *(
        message([CHUNKED], size + b"\r\n" + EMPTY + b"\r\n0\r\n\r\n")
        for size in (
            *b"+e -e 0xe 0XE xe #e eh e_ 0_e ; e,e".split(),
            *(b" e", b"\te", b"e ", b"e\t", b""),
            *(b"e\x00", b"\x0be", b"e\r", b"e;\x00", b"e;a\rb", b"e;\x7f", b"e x", b"\xb2", "\u0661".encode(), b"1.4"),
            *(b"d", b"f", b"1", b"1000000000000000e", b"1000000000000000" + b"0", b"f" * 16, b"f" * 4000),
        )
    ),
    *(
        message([CHUNKED], b"e\r\n" + EMPTY + end + b"0\r\n\r\n")
        for end in (b"", b"xx", b"\n\n", b"\n\r", b"\r\r", b"\n", b"\r", b"\r\r\n", b" \r\n", b"x\r\n")
    ),
    message([CHUNKED], b"e\n" + EMPTY + b"\r\n0\r\n\r\n"),
    *(message([CHUNKED], b"e\r\n" + EMPTY + b"\r\n" + last) for last in (b"-0\r\n\r\n", b"+0\r\n\r\n", b"0x0\r\n\r\n")),
    *(
        message([CHUNKED], b"e\r\n" + EMPTY + b"\r\n0\r\n" + trailer + b"\r\n\r\n")
        for trailer in (
            b" T: x",
            b"T: x\r\n folded",
            b"T : x",
            b"T",
            b": x",
            b"T: \x00",
            b"T: a\rb",
            b"T: x\n",
            b"x y: z",
        )
    ),
    # Lines
    *(message([b"X: y", fold, LENGTH], EMPTY) for fold in (b" folded", b"\tfolded", b" X: folded", b" ", b"\t")),
    message([LENGTH], EMPTY, host=b" folded\r\nHost: x\r\n"),
    *(
        message([name + b": x", LENGTH], EMPTY)
        for name in (b"Name ", b"Name\t", b"Na me", b"", b"(", b"a/b", b"\xe9", b'"a"')
    ),
    # A pattern that tries every way to split the blanks would hold up the whole daemon for hours.
    *(message([b"X:" + value + b"\x01"]) for value in (b" " * 60_000, b"x" + b"\t " * 30_000)),
    *(
        message([LENGTH, line.replace(b"?", bytes([control]))], EMPTY)
        for control in (*range(9), *range(11, 32), 127)
        for line in (b"X: a?b", b"X:?", b"X?: a")
    ),
    message([LENGTH, b"X: a\rTransfer-Encoding: chunked"], EMPTY),
    *(message([LENGTH, line], EMPTY) for line in (b"X: a\nY: b", b"X: a\r", b"\r", b"no colon")),
    message([LENGTH], EMPTY).replace(b"\r\n", b"\n"),
    message([LENGTH], EMPTY).replace(b"\r\n\r\n", b"\r\n\n"),
    b"\r\n\r\n" + message([LENGTH], EMPTY),
    b"\n" + message([LENGTH], EMPTY),
    # Hosts
    message([LENGTH], EMPTY, host=b""),
    *(
        message([LENGTH], EMPTY, host=host + b"\r\n", version=version)
        for host in (
            *(b"Host: a\r\nHost: b", b"Host: a\r\nhost: a", b"Host:\r\nHost:"),
            *(b"Host: a, b", b"Host: a b", b"Host: a/b"),
        )
        for version in ("HTTP/1.1", "HTTP/1.0")
    ),
    *(
        message([LENGTH], EMPTY, host=b"Host: " + host + b"\r\n")
        for host in (b"a@b", b"a?b", b"a#b", b"a\\b", b"\xe9", b"<a>")
    ),
    # Request lines
    *(
        message([LENGTH], EMPTY, version=version)
        for version in (
            *"HTTP/2.0 HTTP/0.9 http/1.1 HTTP/1.10 HTTP/1 HTTP/1.\u0661 HTTP/+1.1".split(),
            *("HTTP/1.1 ", ""),
        )
    ),
    *(message([LENGTH], EMPTY, path=path) for path in ("/api v1", "/\x01", "/\x7f", "/\xe9", "/\t", " /", "", "/\r")),
    *(
        message([LENGTH], EMPTY, method=method)
        for method in (" POST", "PO ST", "POST\t", "PO\x00ST", "", "P(ST", "\xe9", "X" * 65)
    ),
    b"GET /healthz\r\n",
    b"nonsense\r\n",
    bytes(range(256)) * 4,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


def test_messages_that_can_be_read_in_two_ways(daemon):
    """Each is refused, its connection closed, and what comes behind it, though in order, is not read."""
    for data in TWO_WAYS:
        answer = talk(daemon, data + of_alert(1))
        assert answer.count(b"HTTP/1.1 ") == 1, (data, answer)
        assert error_of(answer) == (400, "malformed_request"), (data, answer)
    assert b"a line does not end with CRLF" in talk(daemon, b"GET /healthz HTTP/1.1\n\n")
    assert daemon.health()["queued"] == 0
    assert daemon.post({"alerts": [alert(1)]})[0] == 200


def test_a_message_cut_short_is_no_message(daemon):
    """A body that does not all arrive is neither taken nor answered with success."""
    for data in (of_alert(1), of_alert(1, chunked=True)):
        for n in (*range(1, 14), 17, 30):
            assert b" 200 " not in talk(daemon, data[:-n], shut=True), n
    assert daemon.health()["queued"] == 0


def test_a_tls_hello_on_the_plain_port(new_daemon):
    daemon = new_daemon(server__request_timeout="1", archive__workers="0")
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(coming, going, server_hostname="example.com").do_handshake()
    hello = going.read()
    for data in (hello, hello.replace(b"\n", b"x"), bytes(1000)):
        assert error_of(talk(daemon, data))[0] in (400, 408)  # by whether there is a line feed in it


def test_too_large(new_daemon):
    daemon = new_daemon(server__max_body="1K", archive__workers="0")
    assert daemon.post(b"[" + b" " * 1022 + b"]")[0] == 400
    assert daemon.post(b"[" + b" " * 1023 + b"]")[0] == 413
    big = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert error_of(talk(daemon, message([CHUNKED], big + big), shut=True)) == (413, "too_large")


def test_large_heads(daemon):
    for data in (
        message([b"X: " + b"x" * 70_000]),
        message([b"x" * 70_000 + b": x"]),
        message([b"x" * 70_000]),
        message([b"X: x"] * 200),
        message([b"X: " + b"x" * 1000] * 70),
        message([b"X:"] * 200),
        message(path="/" + "x" * 70_000),
        message(method="x" * 70_000),
        b"x" * 70_000,
        message([CHUNKED], b"e;" + b"x" * 70_000 + b"\r\n" + EMPTY + b"\r\n0\r\n\r\n"),
        message([CHUNKED], b"0" * 70_000 + b"\r\n\r\n"),
        message([CHUNKED], CHUNKS[:-2] + b"T: x\r\n" * 200 + b"\r\n"),
        message([CHUNKED], CHUNKS[:-2] + b"T: " + b"x" * 70_000 + b"\r\n\r\n"),
    ):
        answer = talk(daemon, data + of_alert(1))
        assert answer.count(b"HTTP/1.1 ") == 1, data[:200]
        assert error_of(answer) == (431, "head_too_large"), data[:200]
    assert daemon.health()["queued"] == 0


def test_an_early_error_is_read_by_a_client_that_still_sends(daemon):
    """The answer must not be lost in a reset: the client sends 8 MB before it reads."""
    body = b"x" * 8_000_000
    large = [b"Content-Length: 80000000"]
    for status, data in (
        (413, message(large, body)),
        (413, message([CHUNKED], b"fffffff\r\n" + body)),
        (401, message(large, body).replace(TOKEN.encode(), b"wrong")),
        (401, message([CHUNKED], b"f\r\n" + body).replace(TOKEN.encode(), b"wrong")),
        (404, message(large, body, path="/")),
        (405, message(large, body, method="PUT")),
        (400, message([LENGTH, LENGTH], body)),
        (400, message([CHUNKED], b"+f\r\n" + body)),
        (431, message([b"X: x"] * 200, body)),
    ):
        assert error_of(talk(daemon, data, shut=True))[0] == status


def test_expect_100_continue(daemon):
    with socket.create_connection(daemon.address, 5) as sock:
        sock.sendall(message([LENGTH, b"Expect: 100-continue", CLOSE]))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(EMPTY)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    wrong = message([LENGTH, b"Expect: 100-continue"]).replace(TOKEN.encode(), b"wrong")
    assert talk(daemon, wrong, shut=True).startswith(b"HTTP/1.1 401 ")
    # RFC 9110, section 10.1.1: a client of HTTP/1.0 would take `100 Continue` for the answer.
    old = message([LENGTH, b"Expect: 100-continue"], EMPTY, version="HTTP/1.0")
    assert talk(daemon, old).startswith(b"HTTP/1.1 200 ")


def test_the_body_of_a_client_that_is_gone_is_not_read_as_the_next_request(new_daemon, tmp_path):
    """Writing `100 Continue` to a Unix socket whose other end was closed fails, and what was sent can still be read."""
    daemon, inner = new_daemon(start=False, archive__workers="0"), of_alert(1)
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "sock"))
        unix.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            client.sendall(message([b"Content-Length: %d" % len(inner), b"Expect: 100-continue"], inner))
        daemon.handed = [unix, tcp]
        daemon.start()
        daemon.address = tcp.getsockname()
        until(lambda: daemon.logged("client=local"))
        assert daemon.post(EMPTY)[0] == 200
        assert daemon.health()["queued"] == 0
        assert len(re.findall("client=local", daemon.log())) == 1


def test_the_whole_request_has_one_deadline(new_daemon):
    daemon = new_daemon(server__request_timeout="1", archive__workers="0")
    begin = time.monotonic()
    with socket.create_connection(daemon.address, 10) as sock:
        sock.sendall(message([LENGTH]))
        assert error_of(trickle(sock, b" ")) == (408, "timeout")
    assert time.monotonic() - begin < 8


def test_an_idle_connection_is_kept_for_longer_than_a_request_may_take(new_daemon):
    """A proxy that finds it closed in the moment in which it uses it answers 502, and a batch of alerts is lost."""
    daemon = new_daemon(server__request_timeout="0.3", archive__workers="0")
    with contextlib.ExitStack() as stack:
        used, fresh, slow = [stack.enter_context(socket.create_connection(daemon.address, 10)) for _ in range(3)]
        used.sendall(message([LENGTH], EMPTY))
        assert b" 200 OK" in used.recv(65536)
        for _ in range(2):
            slow.sendall(message([LENGTH]))
            assert b"HTTP/1.1 408 " in slow.recv(65536)
            slow = stack.enter_context(socket.create_connection(daemon.address, 10))
            for sock in (used, fresh):
                sock.sendall(message([LENGTH], EMPTY))
                assert b" 200 OK" in sock.recv(65536)


def test_an_idle_connection_is_closed_in_the_end(new_daemon):
    """Without a word, used or not; a request that has begun by then has the time that a request has."""
    daemon = new_daemon(server__request_timeout="60", server__keepalive_timeout="0.5", archive__workers="0")
    with contextlib.ExitStack() as stack:
        fresh, used, begun = [stack.enter_context(socket.create_connection(daemon.address, 10)) for _ in range(3)]
        begun.sendall(message([LENGTH]))
        used.sendall(message([LENGTH], EMPTY))
        assert used.recv(65536).endswith(EMPTY.replace(b"{", b'{"success": true, '))
        for idle in (fresh, used):
            assert idle.recv(100) == b""
        begun.sendall(EMPTY)
        assert b" 200 OK" in begun.recv(65536)


PROXIES = {
    "caddy": """{{
    admin off
    auto_https off
    storage file_system {folder}
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    reverse_proxy {upstream}
}}
""",
    "nginx": """pid {folder}/pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    {upstream}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://ts3d;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
}}
""",
}


@contextlib.contextmanager
def reverse_proxy(name, folder, upstream):
    """A running reverse proxy; the value is its port."""
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
    if not program:
        pytest.skip(f"no {name}")
    port, file = free_port(), folder / "proxy.conf"
    file.write_text(PROXIES[name].format(folder=folder, port=port, upstream=upstream))
    arguments = ["run", "--adapter=caddyfile", "--config", file]
    if name == "nginx":
        arguments = ["-p", folder, "-e", "stderr", "-c", file, "-g", "daemon off; master_process off;"]
    with subprocess.Popen([program, *arguments], stderr=subprocess.DEVNULL, env=environment(HOME=folder)) as process:
        try:
            until(lambda: listening(port), what=name)
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("name", "upstream"),
    [("caddy", "127.0.0.1:{}"), ("nginx", "upstream ts3d {{ server 127.0.0.1:{}; keepalive 100; }}")],
)
def test_webhooks_through_a_reverse_proxy(new_daemon, tmp_path, name, upstream):
    """A proxy uses a connection again in the moment in which a daemon that counted idle time so would close it."""
    daemon = new_daemon(archive__workers="0", server__request_timeout="0.5", server__wait="0")
    statuses, pause = [], threading.Event()

    def send(port, source="127.0.0.1", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=(source, 0))
        connection.request("POST", f"{PATH}?token={TOKEN}", EMPTY, headers)
        statuses.append(connection.getresponse().status)
        connection.close()

    def client(port, number):
        for _ in range(8):
            send(port)
            pause.wait(0.49 + number / 4000)

    with reverse_proxy(name, tmp_path, upstream.format(daemon.address[1])) as port, ThreadPoolExecutor(40) as pool:
        list(pool.map(client, [port] * 40, range(40)))
        send(port, "127.0.0.7", **{"X-Forwarded-For": "203.0.113.9"})
    assert statuses == [200] * 321
    # The last is what the proxy itself saw; the sender may have sent any other.
    until(lambda: daemon.logged(r"POST \S+ 200 .*client=127.0.0.1 .*forwarded_for=127.0.0.7 "))


def test_beyond_the_bound_the_longest_idle_connection_goes_first(new_daemon):
    daemon = new_daemon(server__max_connections="10", server__request_timeout="60", archive__workers="0")
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


def test_bodies_that_do_not_arrive_end_with_their_deadline(new_daemon):
    """Few large bodies are read at once, so that memory is bounded: one more waits for them, a small one does not."""
    daemon = new_daemon(server__max_body="30M", server__request_timeout="1", archive__workers="0")
    large = message([b"Content-Length: 30000000"]) + b" " * 2_000_000
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(socket.create_connection(daemon.address, 30)).sendall(large)
        assert daemon.request("GET", "/healthz")[0] == 200
        assert daemon.post(EMPTY)[0] == 200
        # Once those are late it is the turn of others.
        until(lambda: daemon.post({"alerts": [alert(1, text="x" * 200_000)]})[0] == 200)


def test_a_connection_that_is_shut_down_stays_encrypted(certificate):
    """ssl.SSLSocket.shutdown takes TLS away: its thread would go on in plain text."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.file)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    with ThreadPoolExecutor(1) as pool:
        serve = pool.submit(context.wrap_socket, ours, server_side=True)
        client = certificate.context.wrap_socket(theirs, server_hostname="localhost")
        with client, serve.result() as served:
            ts3d.shut_down(served, socket.SHUT_RD)
            served.sendall(b"x")
            assert client.recv(1) == b"x"
