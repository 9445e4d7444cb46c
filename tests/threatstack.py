"""A stand-in for Threat Stack's API, version 1: details, the list, and every way in which it may fail. It takes S3's
place too: what is PUT is kept in `objects`.

By hand: `python tests/threatstack.py PORT`.
"""

import contextlib
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "threat-stack-api-key"


def detail(alert_id):
    """An alert's detail, with blanks, escapes and numbers that would not survive being encoded again."""
    return (
        b'{ "id":"%s", "title" : "caf\\u00e9 \xf0\x9f\x94\x92", "severity": 1.50,\r\n'
        b'  "rule": {"id": "r-1"}, "events": [ 1e2 ,{"exe": "\\/bin\\/sh"} ] }\n'
    ) % alert_id.encode()


class Faulty(ThreadingHTTPServer):
    """A server that, while `mode` is set, fails: a status, "hang", "garbage", "reset", or a function of the handler."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port=0, mode=None):
        self.mode = mode
        self.tls = None  # an ssl.SSLContext
        self.objects = {}  # bodies by path
        self.modes = {}  # by alert
        self.calls = []  # (time, path, headers)
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

    def get_request(self):
        sock, address = super().get_request()
        self.connections.append(sock)
        return self.tls.wrap_socket(sock, server_side=True) if self.tls else sock, address

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

    def send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in (("Content-Length", len(body)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((time.monotonic(), self.path, dict(self.headers)))
        name = self.path.rpartition("/")[2].partition("?")[0]
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
        if self.command == "PUT":
            self.server.objects[self.path] = self.body
            self.send(200, b"", [("ETag", '"a-tag"')])
        elif self.headers.get("Authorization") != KEY:
            self.send(401, b'{"status": "error", "message": "unauthorized"}')
        elif name == "alerts":
            self.send(200, b"[]")
        else:
            self.send(200, detail(name), [("Content-Type", "application/json")])


if __name__ == "__main__":
    server = Faulty(int(sys.argv[1]))
    print(json.dumps({"url": server.url}), flush=True)
    threading.Event().wait()
