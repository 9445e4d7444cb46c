"""Near-valid HTTP against a real daemon, near-valid JSON against the parser: FUZZ_SECONDS each, 600 if unset."""

import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sqlite3
import time

import pytest
from conftest import TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ts3d

pytestmark = pytest.mark.fuzz
SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
CALM = settings(
    max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def repeat(test):
    """Run a hypothesis test, with other examples each time, until the time is over."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        test()


@functools.cache  # making a strategy costs more than drawing from it
def one_of(*values):
    return st.sampled_from(values)


def mostly(usual, *values):
    """One value nearly always: a message with every oddity at once is refused for the first."""
    return one_of(*(usual,) * (12 * len(values)), *values)


SCRAPS = one_of(
    *(b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b"\x0b", b":", b",", b";", b"_", b"+", b"-", b"0", b"1"),
    *(b"a", b"\x85", b"\xa0", b"\xff", b"\r\n ", b"0\r\n\r\n", b"\r\nContent-Length: 0", b"\r\nTransfer-Encoding: x"),
    *("\u0661".encode(), b"\r\nTransfer-Encoding: chunked", b"HTTP/1.0", b"Host: y\r\n"),
)
SIZES = mostly(b"N", b"00N", b"+N", b"0xN", b" N", b"N0", b"-N", b"N_0", b"", "\u0661".encode())
EXTENSIONS = mostly(b"", b";", b";a=b", b' ; a="b;c"', b" ", b"\t", b";a\x00", b";\r", b"\r")
CHUNK_ENDS = mostly(b"\r\n", b"xx", b"\n\n", b"\n\r", b"\n", b"\r", b"", b"\r\r\n", b"x\r\n")
LAST = mostly(b"0", b"00", b"-0", b"0;x", b"", b"0 ", b"fffffffffffffffff", b"10000000000000000", b"ffffffff")
LINE_ENDS = mostly(b"\r\n", b"\n", b"", b"x\r\n", b"\r")
TRAILERS = mostly(b"", b"T: x\r\n", b"Content-Length: 5\r\n", b" x\r\n", b"T : x\r\n", b"x\r\n", b"T: \x00\r\n")


@st.composite
def chunks(draw, body):
    """A body in chunks, each part of the framing mostly right."""
    out = b""
    while body:
        n = draw(st.integers(1, len(body)))
        size = draw(SIZES).replace(b"N", draw(one_of(b"%x", b"%X")) % n)
        out += size + draw(EXTENSIONS) + draw(LINE_ENDS) + body[:n] + draw(CHUNK_ENDS)
        body = body[n:]
    return out + draw(LAST) + draw(LINE_ENDS) + draw(TRAILERS) + draw(TRAILERS) + draw(LINE_ENDS)


ALERTS = b'{"alerts": [{"id": "fuzz-00000000", "created_at": 0}]}'
BODIES = mostly(ALERTS, b"", b'{"alerts": []}', b"{", b"x" * 9000)
METHODS = mostly(b"POST", b"GET", b"HEAD", b"post", b"P\x00", b"PUT", b"PRI")
PATH = b"/api/v1/s3/alert"
TARGETS = mostly(PATH, b"/healthz", b"/", b"*", b"x:443", b"http://x" + PATH, b"//", b"/%00", b"", PATH + b"\x0b")
VERSIONS = mostly(
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.9", b"HTTP/2.0", b"HTTP/1.1 ", b"HTTP/1.11", b"", b"http/1.1", b"HTTP/0.9")
)
HOSTS = mostly(b"Host: x", b"host:x", b"Host:", b"Host: x, y", b"Host : x", b"X: x", b"Host: x\r\nHost: x", b" Host: x")
SECRETS = mostly(TOKEN.encode(), b"wrong", TOKEN.encode() + b"\x00")
FRAMINGS = one_of(*(b"length", b"chunked") * 8, b"length chunked", b"")
SPACES = mostly(b" ", b"", b"\t", b"\x0b", b"\r\n ", b"\x00", b"\x85", b"\xa0")
LENGTH_NAMES = mostly(b"Content-Length", b"content-length", b"Content-Length ", b"Content_Length", b"\tContent-Length")
LENGTHS = mostly(
    *(b"N", b"+N", b"0N", b"N ", b"N, N", b"N_0", b"0xN", b"", b"-N", b"-0", b"N0", b"0", b"N\x00", b"N;", b"N.0"),
    *(b"9" * 30, "\u0661".encode(), b"1", b"N 0", b"0 N", b"N,", b",N", b'"N"', b"N\xa0"),
)
CODING_NAMES = mostly(b"Transfer-Encoding", b"TRANSFER-ENCODING", b"Transfer-Encoding ", b"Transfer_Encoding")
CODINGS = mostly(
    *(b"chunked", b"CHUNKED", b"chunked ", b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"identity", b""),
    *b'xchunked "chunked" chunked;q=1 chunked, ,chunked'.split(),
    *(b"\x0bchunked", b"chunked\x00", b"chunked\xa0"),
)
EXTRAS = one_of(
    *(b"",) * 60,
    *(b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b" folded", b"X", b": x", b"X:\xff"),
    *(b"Content-Length: 54", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", b"X: \x7f"),
    *(b"Connection: content-length", b"Trailer: x", b"TE: trailers", b"Upgrade: h2c", b"X: " + b"x" * 9000),
)


@st.composite
def requests(draw):
    """A request whose every part is mostly right."""
    body, framing = draw(BODIES), draw(FRAMINGS)
    lines = [draw(HOSTS), b"Authorization: Bearer " + draw(SECRETS)]
    if b"length" in framing:
        lines.append(draw(LENGTH_NAMES) + b":" + draw(SPACES) + draw(LENGTHS).replace(b"N", b"%d" % len(body)))
    if b"chunked" in framing:
        lines.append(draw(CODING_NAMES) + b":" + draw(SPACES) + draw(CODINGS))
        body = draw(chunks(body))
    if extra := draw(EXTRAS):
        lines.insert(draw(st.integers(0, len(lines))), extra)
    head = b" ".join((draw(METHODS), draw(TARGETS), draw(VERSIONS)))
    return b"".join(line + b"\r\n" for line in (head, *lines, b"")) + body


@st.composite
def streams(draw):
    """What one connection sends, in pieces: a pipeline, perhaps damaged, and whether it ends there."""
    data = bytearray(b"".join([draw(requests()) for _ in range(draw(st.integers(1, 3)))]))
    for _ in range(draw(mostly(0, 1, 2, 3))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 3) | st.integers(0, 200))
        what = draw(one_of("cut", "insert", "replace", "twice"))
        if what == "cut":
            del data[at:]
        elif what == "twice":
            data[at:at] = data[at:end]
        else:
            data[at : end if what == "replace" else at] = draw(SCRAPS | st.binary(max_size=4))
    cuts = sorted(draw(st.integers(0, len(data))) for _ in range(draw(one_of(0, 0, 0, 1, 3))))
    pieces = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return pieces, draw(st.integers(0, 199)) != 77


def exchange(address, pieces, shut):
    """All that comes back until the connection closes, which it must."""
    with socket.create_connection(address, 10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        received = b""
        # A reset may follow the last answer of all, where there is more behind it; then it is not connected any more.
        with contextlib.suppress(OSError):
            for piece in pieces:
                sock.sendall(piece)
            if shut:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                received += piece
    return received


def answers(received, data):
    """Status, whether it was the last, and JSON of each answer."""
    while received:
        head, blank, rest = received.partition(b"\r\n\r\n")
        assert blank, received
        status = int(re.match(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+(\r\n|$)", head)[1])
        if status == 100:
            received = rest
            continue
        length = int(re.search(rb"\r\nContent-Length: (\d+)", head)[1])
        if rest[:1] != b"{":  # to HEAD
            length = 0
            assert b"HEAD" in data
        received = rest[length:]
        yield status, b"\r\nConnection: close" in head, json.loads(rest[:length] or "{}")


def model(h11, data):
    """Method, and body where it is whole, of each request that h11, an independent parser, finds before it refuses."""
    # h11 does not know of blanks before a chunk's extension (RFC 9112, section 7.1.1) …
    data = re.sub(rb"(?m)^([0-9A-Fa-f]+)[ \t]+;", rb"\1;", data)
    while data:
        # … nor of one empty line before a request, which is passed over (section 2.2).
        data = data[2:] if data.startswith(b"\r\n") else data
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data)
        method, body = None, bytearray()
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                event = h11.NEED_DATA
            if isinstance(event, h11.Request):
                method = event.method
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                break
        whole = isinstance(event, h11.EndOfMessage)
        if method is not None:
            yield method, bytes(body) if whole else None
        if not whole:
            return
        data = connection.trailing_data[0]


def test_http(new_daemon):
    h11 = pytest.importorskip("h11")
    limits = {"server__request_timeout": "1", "server__keepalive_timeout": "1", "server__max_body": "64K"}
    daemon = new_daemon(archive__workers="0", **limits)
    counts = {}
    numbers = itertools.count(1)
    taken = set()

    @CALM
    @given(streams())
    def one(stream):
        pieces, shut = stream
        pieces = [re.sub(rb"fuzz-0{8}", lambda _: b"fuzz-%08d" % next(numbers), piece) for piece in pieces]
        data = b"".join(pieces)
        received = exchange(daemon.address, pieces, shut)
        counts["streams"] = counts.get("streams", 0) + 1
        expected = model(h11, data)
        last = False
        for status, last_of_all, answer in answers(received, data):
            assert not last, "an answer after the last"
            last = last_of_all
            counts[status] = counts.get(status, 0) + 1
            assert status < 500, (data, received)
            kind = answer.get("error", {}).get("type", "")
            if kind in ("malformed_request", "head_too_large", "timeout") or (not answer and status in (400, 408, 431)):
                assert last, (data, received)
                next(expected, None)
                continue
            method, body = next(expected, (None, None))
            assert method is not None, ("h11 finds no such request", data, received)
            assert last or body is not None, ("h11 finds no such body", data, received)
            if method == b"POST" and (status == 200 or kind in ("malformed_webhook", "invalid_alert")):
                assert body is not None, ("h11 finds no such body", data, received)
                try:
                    ids = [alert.id or None for alert in ts3d.read_webhook(body)]
                except ts3d.Malformed:
                    assert kind == "malformed_webhook", (data, received)
                else:
                    assert ids == [alert["id"] for alert in answer["alerts"]], (data, received)
                    taken.update(ids)
        with contextlib.closing(sqlite3.connect(f"file:{daemon.queue}?mode=ro", uri=True)) as queue:
            jobs = queue.execute(
                "SELECT number, id, step FROM jobs WHERE number > ?", [counts.get("jobs", 0)]
            ).fetchall()
            counts["jobs"] = max((number for number, _, _ in jobs), default=counts.get("jobs", 0))
            queued = {id_ for _, id_, step in jobs if step == "webhooks"}
        assert queued <= taken, ("queued, and no answer says so", data, received)

    repeat(one)
    assert daemon.health()["queued"] > 0
    print("HTTP:", counts)


TOKENS = one_of(
    *'{}[],:"\\ \t\r\n',
    *("null", "true", "false", "NaN", "Infinity", "-Infinity", "-", "0", "-0", "01", "1.5", "1e3", "1E400", "1.", ".1"),
    *('"id"', '"created_at"', '"alerts"', '"\\u0069d"', '"abcd"', '"\\ud800"', '"\\u0000"', '"\0"', '""', '"1"'),
    *("\ufeff", "\x0c", "\xa0", "\u2028", "\u0661", '"2017-01-17T13:51:05Z"', '"x":', '"id":"abcd"', '"created_at":0'),
)
GOOD = '{"id": "abcd", "created_at": 1484661065000}'
TEXTS = one_of(GOOD, '{"alerts": [' + GOOD + "]}", '{"alerts":[' + GOOD + " ,\t" + GOOD + '], "x":[{}]}')


@st.composite
def bodies(draw):
    """A webhook of one or more alerts, tokens put in and taken out."""
    text = draw(TEXTS)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(text)))
        end = at + draw(st.integers(0, 12))
        what = draw(one_of("insert", "insert", "replace", "replace", "twice", "deep", "text"))
        if what == "twice":
            new = text[at:end]
        elif what == "deep":
            new = draw(one_of("[", "]", '{"x":', "}")) * draw(st.integers(1, 1200))
        else:
            new = draw(st.text(max_size=3) if what == "text" else TOKENS)
        text = text[:at] + new + text[end if what == "replace" else at :]
    body = text.encode(errors="surrogatepass")
    if draw(mostly(False, True)):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=4)) + body[at:]
    return body


def judge(body):
    """What the parser makes of a body must be what the json module does. Whether it was taken."""
    try:
        results = ts3d.read_webhook(body)
    except (ts3d.Malformed, RecursionError) as error:
        assert str(error)
        return False
    value = json.loads(body.decode(), parse_int=str, parse_float=str)
    elements = value.get("alerts", [value])
    assert len(results) == len(elements)
    for element, result in zip(elements, results, strict=True):
        if result.error_type:
            assert result.error_message
            continue
        assert re.fullmatch("[A-Za-z0-9_-]{4,128}", result.id)
        assert re.fullmatch("(19[7-9]|[2-9][0-9]{2})[0-9](/[0-9]{2}){4}", result.minute)
        assert result.body in body
        assert json.loads(result.body, parse_int=str, parse_float=str) == element
        assert element["id"] == result.id
    return bool(results)


def test_json():
    counts = {True: 0, False: 0}

    @CALM
    @given(bodies())
    def one(body):
        counts[judge(body)] += 1

    repeat(one)
    print("JSON:", counts)
