"""The main job on this machine alone: rclone as S3, Threat Stack's stand-in, ts3d, and the tutorial's webhook."""

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import threatstack
from conftest import BUCKET, TOKEN, TUTORIAL_ID, Daemon, Rclone, until

WEBHOOK = {
    "alerts": [
        {
            "id": TUTORIAL_ID,
            "title": "CloudTrail Activity (IAM Policy Changes) : CreatePolicy by demo",
            "created_at": 1484661065000,
            "severity": 3,
            "organization_id": "5a2f3c9d1e8b7a6f4c0d2e1b",
            "server_or_region": "us-east-1",
            "source": "CLOUDTRAIL",
        }
    ]
}
KEYS = [f"webhooks/2017/01/17/13/51/{TUTORIAL_ID}", f"alerts/58/7c/{TUTORIAL_ID}"]


def say(title, text=""):
    print(f"\n# {title}\n{text}".rstrip(), flush=True)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is stopped
    once = sys.argv[1:] == ["--once"]
    if sys.argv[1:] and not once:
        print("usage: sh tests/demo [--once]", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ts3d-demo-") as name:
        folder = Path(name)
        s3, api = Rclone(folder / "s3"), threatstack.Faulty()
        daemon = Daemon(folder, threatstack__base_url=f"{api.url}/api/v1", s3__endpoint_url=s3.url)
        try:
            s3.start()
            daemon.start()
            return show(folder, s3, daemon, once)
        except KeyboardInterrupt:
            return 0
        except (AssertionError, ValueError) as error:  # `until` waited in vain, or the answer was no JSON
            print(error, file=sys.stderr)
            return 1
        finally:
            if daemon.process:
                daemon.stop()
            s3.stop()
            api.stop()


def show(folder, s3, daemon, once):
    say(f"{daemon.config}", daemon.config.read_text())
    url = f"http://127.0.0.1:{daemon.address[1]}/api/v1/s3/alert"
    webhook = folder / "webhook.json"
    webhook.write_text(json.dumps(WEBHOOK))
    command = ["curl", "-sS", "-H", f"Authorization: Bearer {TOKEN}", "-d", f"@{webhook}", url]
    say("The tutorial's webhook", f"$ {shlex.join(command)}")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    print(answer.stdout + answer.stderr, flush=True)
    until(lambda: len(s3.objects()) == 2, what="objects in S3")
    objects = s3.objects()
    for key, body in objects.items():
        say(f"s3://{BUCKET}/{key}", body.decode())
    expected = {"success": True, "alerts": [{"id": TUTORIAL_ID, "state": "archived"}]}
    bodies = [json.dumps(WEBHOOK["alerts"][0]).encode(), threatstack.detail(TUTORIAL_ID)]
    good = json.loads(answer.stdout) == expected and objects == dict(zip(KEYS, bodies, strict=True))
    say("archived, byte for byte" if good else "this is not what was expected", f"The log: {daemon.log_file}")
    body = '{"id": "an-alert-of-mine", "created_at": "1484661065000"}'
    say("Try it by hand", f"$ curl -i '{url}?token={TOKEN}' -d '{body}'")
    if once:
        return 0 if good else 1
    say("Ctrl-C ends it")
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
