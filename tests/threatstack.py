"""A stand-in for Threat Stack's API, versions 1 and 2: details, events, the lists, the rate limit, and every way in
which it may fail. It checks each Hawk header with mohawk. It takes S3's place too: what is PUT is kept in `objects`.

By hand: `python tests/threatstack.py PORT [ID …]`; its list has these, as of now.
"""

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

KEY = "threat-stack-api-key"
USER = "563b7bf374c815ce60e67e50"
ORGANIZATION = "5537c4284e9684df7e000014"
HAWK = {  # a daemon's options
    "threatstack__auth": "hawk",
    "threatstack__user_id": USER,
    "threatstack__organization_id": ORGANIZATION,
}


def detail(alert_id):
    """An alert's detail, with blanks, escapes and numbers that would not survive being encoded again."""
    return (
        b'{ "id":"%s", "title" : "caf\\u00e9 \xf0\x9f\x94\x92", "severity": 1.50,\r\n'
        b'  "rule": {"id": "r-1"}, "events": [ 1e2 ,{"exe": "\\/bin\\/sh"} ] }\n'
    ) % alert_id.encode()


def events(alert_id):
    """Its contributing events, version 2."""
    return (
        b'{"events" :[ {"id":"e-1", "of": "%s", "exe":"\\/bin\\/sh", "n": 1E+2} ],\t"token":null}\n' % alert_id.encode()
    )


def entry(alert_id, milliseconds, version=2):
    """An alert as the list shows it, and the time by which that is asked for."""
    if version == 1:
        return milliseconds, b'{"id": "%s" ,"created_at":%d, "severity":2.0}' % (alert_id.encode(), milliseconds)
    when = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
    literal = b'{"id": "%s" ,"createdAt":"%s", "severity":2.0}'
    return milliseconds, literal % (alert_id.encode(), when.replace("+00:00", "Z").encode())


def s3_error(status, code, text="because", headers=(), **members):
    """A mode: S3's own error. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in members.items())
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{text}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    ).encode()
    return lambda handler: handler.send(status, body, [("Content-Type", "application/xml"), *headers])


class Faulty(ThreadingHTTPServer):
    """A server that, while `mode` is set, fails: a status, "hang", "garbage", "reset", or a function of the handler."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port=0, mode=None):
        self.mode = mode
        self.tls = None
        self.objects = {}  # bodies by path
        self.modes = {}  # by alert
        self.calls = []  # (time, path, headers)
        self.lists = {"active": [], "dismissed": []}  # entries, newest first; version 1 lists the active
        self.limit = None  # calls, and in how many seconds
        self.allowed = []  # when calls were, as far as the limit counts them
        self.limited = 0  # calls that were refused for it
        self.ahead = 0  # seconds that its clock is before the machine's
        self.misused = []  # what mohawk had against headers
        self.nonces = set()
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.connections = []
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def paths(self):
        return [path for _, path, _ in self.calls]

    def queries(self):
        """What the lists were asked for."""
        return [
            dict(parse_qsl(urlsplit(path).query)) for path in self.paths() if path.partition("?")[0].endswith("/alerts")
        ]

    def seconds_to_wait(self):
        """0, or in how many seconds the rate limit lets a call pass again."""
        with self.lock:
            if not self.limit:
                return 0
            now, (calls, seconds) = time.monotonic(), self.limit
            self.allowed = [when for when in self.allowed if when > now - seconds]
            if len(self.allowed) < calls:
                self.allowed.append(now)
                return 0
            self.limited += 1
            return self.allowed[0] + seconds - now

    def seen(self, sender, nonce, timestamp):
        """Whether a nonce comes again."""
        with self.lock:
            known = (sender, nonce, timestamp) in self.nonces
            self.nonces.add((sender, nonce, timestamp))
            return known

    def get_request(self):
        sock, address = super().get_request()
        self.connections.append(sock)
        return self.tls.wrap_socket(sock, server_side=True) if self.tls else sock, address

    def speak_tls(self, certificate):
        """With a certificate of trustme's."""
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.tls)

    def handle_error(self, request, client_address):
        pass

    def stop(self):
        """Close it, with every connection."""
        self.released.set()
        self.shutdown()
        self.server_close()
        for sock in self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.server.ahead)

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in (("Content-Length", len(body)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((time.monotonic(), self.path, dict(self.headers)))
        name = self.path.partition("?")[0].rpartition("/")[2]
        mode = self.server.modes.get(name, self.server.mode)
        if callable(mode):
            mode(self)
        elif mode == "hang":
            self.server.released.wait(60)
            self.close_connection = True
        elif mode == "reset":
            self.close_connection = True
        elif mode == "garbage":
            self.send(200, b"<html>Please log in</html>")
        elif isinstance(mode, int):
            self.send(mode, b'{"status": "error", "message": "because"}')
        else:
            self.succeed(name)

    do_PUT = do_HEAD = do_GET

    def succeed(self, name):
        path = self.path.partition("?")[0]
        if self.command == "PUT":
            self.server.objects[self.path] = self.body
            self.send(200, b"", [("ETag", '"a-tag"')])
        elif self.command == "HEAD":
            self.send(200 if path in self.server.objects else 404, b"")
        elif wait := self.server.seconds_to_wait():
            self.send(429, b"slow down", [("x-rate-limit-reset", int(wait * 1000) + 1)])
        elif path.startswith("/v2/") or name == "self-test":
            self.version_2(name)
        elif self.headers.get("Authorization") != KEY:
            self.send(401, b'{"status": "error", "message": "unauthorized"}')
        elif name == "alerts":
            query = {"start": "1970-01-01T00:00:00Z", "end": "9999-01-01T00:00:00Z", "count": "20", "page": "0"}
            query |= parse_qsl(urlsplit(self.path).query)
            count = int(query["count"])
            found = self.found("active", query["start"], query["end"])[int(query["page"]) * count :][:count]
            self.send(200, b"[ " + b" ,".join(found) + b"]\n")
        else:
            self.send(200, detail(name), [("Content-Type", "application/json")])

    def version_2(self, name):
        if not self.is_signed():
            return
        query = dict(parse_qsl(urlsplit(self.path).query))
        if name == "self-test":
            self.send(200, b'{"ok":true}')
        elif name == "events":
            self.send(200, events(self.path.split("/")[-2]))
        elif name != "alerts":
            self.send(200, detail(name))
        elif query.get("status") not in self.server.lists:
            self.send(400, b'{"errors": ["status: required"]}')
        else:
            found = self.found(query["status"], query["from"], query["until"])
            # As a cursor of a database: behind the last alert that was given, wherever that is now.
            before = query.get("token", "")
            begin = found.index(bytes.fromhex(before)) + 1 if before else 0
            page = found[begin : begin + 100]
            token = f'"{page[-1].hex()}"' if begin + 100 < len(found) else "null"
            body = b'{"alerts" : [\n' + b",\n".join(page) + b'], "token":' + token.encode() + b"}"
            self.send(200, body, [("Content-Type", "application/json")])

    def found(self, status, since, until):
        first, last = (
            datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp() * 1000 for when in (since, until)
        )
        return [literal for when, literal in self.server.lists[status] if first <= when <= last]

    def is_signed(self):
        """Whether the request's Hawk header is right, down to its nonce; answers it where it is not."""
        import mohawk  # only version 2 needs it

        try:
            receiver = mohawk.Receiver(
                {USER: {"id": USER, "key": KEY, "algorithm": "sha256"}}.__getitem__,
                self.headers.get("Authorization"),
                f"http{'s' if self.server.tls else ''}://{self.headers['Host']}{self.path}",
                "GET",
                content="",
                content_type="",
                accept_untrusted_content=True,
                seen_nonce=self.server.seen,
                localtime_offset_in_seconds=self.server.ahead,
            )
            assert receiver.parsed_header["ext"] == ORGANIZATION
        except (mohawk.exc.HawkFail, AssertionError, ValueError) as error:
            self.server.misused.append(repr(error))
            stale = getattr(error, "www_authenticate", None)
            self.send(401, b'{"errors": ["unauthorized"]}', [("WWW-Authenticate", stale or "Hawk")])
            return False
        return True


if __name__ == "__main__":
    server = Faulty(int(sys.argv[1]))
    server.lists["active"] = [entry(alert_id, int(time.time() * 1000), version=1) for alert_id in sys.argv[2:]]
    print(json.dumps({"url": server.url}), flush=True)
    threading.Event().wait()
