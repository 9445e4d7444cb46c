"""The main job on this machine: rclone as S3, the stand-in for Threat Stack, ts3d, and the tutorial's webhook."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import threatstack

TS3D = Path(__file__).parent.parent / "ts3d.py"
TOKEN = "open-sesame-open-sesame"
BUCKET = "evidence"
AWS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-access-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
KEY_PAIR = f"{AWS['AWS_ACCESS_KEY_ID']},{AWS['AWS_SECRET_ACCESS_KEY']}"
ALERT = {
    "id": "587c0159a907346eccb84004",
    "title": "CloudTrail Activity (IAM Policy Changes) : CreatePolicy by demo",
    "created_at": 1484661065000,
    "severity": 3,
    "organization_id": "5a2f3c9d1e8b7a6f4c0d2e1b",
    "server_or_region": "us-east-1",
    "source": "CLOUDTRAIL",
}
OBJECTS = {
    f"webhooks/2017/01/17/13/51/{ALERT['id']}": json.dumps(ALERT).encode(),
    f"alerts/58/7c/{ALERT['id']}": threatstack.detail(ALERT["id"]),
}
CONFIG = """\
[server]
listen = 127.0.0.1:{port}
webhook_token = {token}
wait = 10
[threatstack]
base_url = {threatstack}/api/v1
api_key = {api_key}
[s3]
bucket = {bucket}
endpoint_url = http://127.0.0.1:{s3}
"""


def show(title, text=""):
    print(f"\n# {title}\n{text}".rstrip(), flush=True)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(**more):
    """This shell's environment without its settings of AWS, ts3d and proxies, and with the S3 server's credentials."""
    ours = ("AWS_", "TS_AWS_", "THREATSTACK_", "CREDENTIALS_", "STATE_DIR", "JOURNAL_", "http", "HTTP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, **AWS, "RCLONE_CONFIG": os.devnull, **{name: str(value) for name, value in more.items()}}


@contextlib.contextmanager
def started(command, port, log):
    """Runs a server; it answers at its port when the block begins, and has ended when the block has."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
    try:
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        else:
            sys.exit(f"{shlex.join(map(str, command))} does not start:\n{log.read_text()}")
        yield
    finally:
        process.terminate()
        process.wait()


def archive(folder, port):
    """Sends the webhook with curl, and returns whether the answer and S3's objects are as expected."""
    url = f"http://127.0.0.1:{port}/api/v1/s3/alert"
    webhook = folder / "webhook.json"
    webhook.write_text(json.dumps({"alerts": [ALERT]}))
    command = ["curl", "-sS", "-H", f"Authorization: Bearer {TOKEN}", "-d", f"@{webhook}", url]
    show("The tutorial's webhook", f"$ {shlex.join(command)}")
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    print(answer.stdout + answer.stderr, flush=True)
    top = folder / "s3" / BUCKET
    objects = {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
    for key, body in objects.items():
        show(f"s3://{BUCKET}/{key}", body.decode())
    expected = {"success": True, "alerts": [{"id": ALERT["id"], "state": "archived"}]}
    good = answer.stdout.strip() == json.dumps(expected) and objects == OBJECTS
    show("Archived, byte for byte" if good else "This is not what was expected")
    return good


def main(once):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: every server is stopped
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ts3d-demo-")))
        api = threatstack.Faulty()
        stack.callback(api.stop)
        (folder / "s3" / BUCKET).mkdir(parents=True)
        s3, port = free_port(), free_port()
        rclone = [Path(sys.executable).parent / "rclone", "serve", "s3", "--auth-key", KEY_PAIR]
        rclone += ["--addr", f"127.0.0.1:{s3}", folder / "s3"]
        stack.enter_context(started(rclone, s3, folder / "rclone.log"))
        config = folder / "ts3d.conf"
        values = {"threatstack": api.url, "api_key": threatstack.KEY, "bucket": BUCKET, "s3": s3}
        config.write_text(CONFIG.format(port=port, token=TOKEN, **values))
        show(config, config.read_text())
        stack.enter_context(started([sys.executable, TS3D, "serve", "-c", config], port, folder / "ts3d.log"))
        good = archive(folder, port)
        if once:
            return 0 if good else 1
        body = '{"id": "an-alert-of-mine", "created_at": "1484661065000"}'
        url = f"http://127.0.0.1:{port}/api/v1/s3/alert?token={TOKEN}"
        show("Try it by hand", f"$ curl -i '{url}' -d '{body}'")
        show("Ctrl-C ends it", f"Log: {folder / 'ts3d.log'}")
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] == ["--once"]))
