"""Two daemons behind nginx, as the README says. They share nothing but the bucket."""

import itertools
import json
import shutil
import subprocess

import pytest
from conftest import TOKEN, alert, environment, free_port, keys_of, listening, readme, until

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {block}
    server {{
        listen 127.0.0.1:{port};
        location = /api/v1/s3/alert {{ proxy_pass http://ts3d; }}
    }}
}}
"""


@pytest.fixture
def balancer(new_daemon, tmp_path):
    """Two daemons, and the port of nginx before them."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or pytest.skip("no nginx")
    daemons = [new_daemon(server__listen=f"127.0.0.1:{free_port()}") for _ in range(2)]
    port = free_port()
    block = readme("High availability", "nginx")
    for daemon, address in zip(daemons, ("192.0.2.11:8080", "192.0.2.12:8080"), strict=True):
        assert address in block
        block = block.replace(address, f"127.0.0.1:{daemon.address[1]}")
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, block=block, port=port))
    with subprocess.Popen([nginx, "-c", config, "-e", tmp_path / "error.log"], env=environment()) as process:
        until(lambda: listening(port), what="nginx")
        yield daemons, port
        process.terminate()


def post(port, number):
    url = f"http://127.0.0.1:{port}/api/v1/s3/alert?token={TOKEN}"
    body = json.dumps({"alerts": [alert(number)]})
    result = subprocess.run(["curl", "-sS", "-m", "40", "-d", body, url], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_two_behind_a_load_balancer(balancer, s3):
    """Each takes what the other does not: because it is down, or its queue is full."""
    (one, two), port = balancer
    for number in range(4):
        assert post(port, number)["alerts"][0]["state"] == "archived"
    assert one.logged("archived id=")
    assert two.logged("archived id=")
    one.stop()
    for number in range(4, 8):
        assert post(port, number)["success"]
    one.set(queue__max_size="1")
    one.start()
    full = r"POST /api/v1/s3/alert 503 .*max_size"
    sent = itertools.count(8)

    def asked():
        """nginx tries one that has failed again after `fail_timeout`."""
        assert post(port, next(sent))["success"]
        return one.logged(full)

    until(asked, 30, "refusal")
    expected = {f"alerts/al/er/{alert(number)['id']}" for number in range(next(sent))}
    until(lambda: expected <= set(s3.objects()), what="all alerts")


def test_an_alert_that_reaches_both_is_one(balancer, s3):
    (one, two), _ = balancer
    for daemon in (one, two):
        assert daemon.post({"alerts": [alert(1)]})[1]["alerts"][0]["state"] == "archived"
    assert set(s3.objects()) == set(keys_of(alert(1)["id"], "2017/01/17/13/52"))
