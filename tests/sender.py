"""Sends webhooks as Threat Stack does, what is not answered 200 again, and writes down what became of each.

`python3 sender.py URL PREFIX FILE`, from the standard library alone: it runs on a bare machine, until it is ended. A
line of FILE is a JSON list: the alert's id, and null for a 200, else what happened.
"""

import itertools
import json
import sys
import threading
import urllib.request

THREADS = 8


def send(url, alert_id, write):
    body = json.dumps({"alerts": [{"id": alert_id, "created_at": "1484661065000"}]}).encode()
    while True:
        try:
            with urllib.request.urlopen(url, body, timeout=60) as answer:
                if answer.status == 200:
                    return write(alert_id, None)
        except (OSError, ValueError) as error:
            write(alert_id, f"{type(error).__name__}: {error}")


def main(url, prefix, path):
    numbers, lock = itertools.count(), threading.Lock()
    with open(path, "a") as file:

        def write(*record):
            with lock:
                print(json.dumps(record), file=file, flush=True)

        def work():
            while True:
                with lock:
                    number = next(numbers)
                send(url, f"{prefix}-{number:06}", write)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        threads[0].join()


if __name__ == "__main__":
    main(*sys.argv[1:])
