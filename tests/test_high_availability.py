"""Two daemons behind nginx, as the README says. They share nothing but the bucket."""

import http.client
import itertools
import json
import threading

import pytest
from conftest import TOKEN, alert, free_port, keys_of, readme, until
from test_http import PATH, reverse_proxy


@pytest.fixture
def daemons(new_daemon):
    return [new_daemon(server__listen=f"127.0.0.1:{free_port()}") for _ in range(2)]


def post(port, number):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=40)
    connection.request("POST", f"{PATH}?token={TOKEN}", json.dumps({"alerts": [alert(number)]}))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_two_behind_a_load_balancer(daemons, s3, tmp_path):
    """Each takes what the other does not: because it is down, or its queue is full."""
    one, two = daemons
    block, pause = readme("High availability", "nginx"), threading.Event()
    for daemon, address in zip(daemons, ("192.0.2.11:8080", "192.0.2.12:8080"), strict=True):
        assert address in block
        block = block.replace(address, f"127.0.0.1:{daemon.address[1]}")
    with reverse_proxy("nginx", tmp_path, block) as port:
        for number in range(4):
            assert post(port, number)["alerts"][0]["state"] == "archived"
        assert one.logged("archived id=")
        assert two.logged("archived id=")
        one.stop()
        for number in range(4, 8):
            assert post(port, number)["success"]
        one.set(queue__max_size="1")
        one.start()
        sent = itertools.count(8)

        def asked():
            """nginx tries one that has failed again after `fail_timeout`."""
            assert post(port, next(sent))["success"]
            return one.logged(r"POST /api/v1/s3/alert 503 .*max_size") or pause.wait(0.2)

        until(asked, 30, "refusal")
    expected = {f"alerts/al/er/{alert(number)['id']}" for number in range(next(sent))}
    until(lambda: expected <= set(s3.objects()), what="all alerts")


def test_an_alert_that_reaches_both_is_one(daemons, s3):
    for daemon in daemons:
        assert daemon.post({"alerts": [alert(1)]})[1]["alerts"][0]["state"] == "archived"
    assert set(s3.objects()) == set(keys_of(alert(1)["id"], "2017/01/17/13/52"))
