"""ts3d on Debian 12: installed, monitored, upgraded and removed as the README says, under a booted systemd.

The tests share one machine. Each continues from the state that the one before it left.
"""

import json
import re

import pytest
import threatstack
from conftest import ROOT, TUTORIAL_ID, alert, keys_of, readme, until
from machine import quoted

import ts3d

pytestmark = [pytest.mark.systemd, pytest.mark.usefixtures("silent")]
RELEASE = "bookworm"
UNITS = "ts3d.socket ts3d.service ts3d-backfill.service ts3d-backfill.timer"
# What an installation is: owner, mode, size, time, path and link of each file, and the contents.
SNAPSHOT = """
find /etc/ts3d /etc/systemd/system /usr/local/bin /usr/local/lib /var/lib/private -printf '%U %m %s %T@ %p %l\\n' | sort
find /etc/ts3d /etc/systemd/system /usr/local/lib -type f -exec cksum {} + | sort
"""


def restarts(machine):
    """How often systemd has restarted the service by itself."""
    return int(machine.show("ts3d.service", "NRestarts"))


def active(machine):
    return machine.show("ts3d.service", "ActiveState")


def test_manual_reference_and_rules_are_installed(machine):
    files = machine.run("ls /usr/local/lib/ts3d").stdout.split()
    assert files == ["README.md", "ts3d.conf", "ts3d.py", "ts3d.rules.yml"]
    for unit in UNITS.split():
        name = machine.show(unit, "Documentation")
        assert machine.path(name.removeprefix("file:")).read_text() == (ROOT / "README.md").read_text()
    for name in ("ts3d.conf", "systemd/ts3d.rules.yml"):
        machine.run(f"cmp /root/ts3d/{name} /usr/local/lib/ts3d/{name.rpartition('/')[2]}")


def test_the_first_connection_starts_it_and_its_alert_arrives(machine):
    machine.run("systemctl stop ts3d.service")
    assert machine.run("systemctl is-enabled ts3d.socket ts3d.service").stdout.split() == ["enabled", "enabled"]
    machine.post(1)
    until(lambda: set(keys_of(alert(1)["id"], "2017/01/17/13/52")) <= machine.objects())
    assert active(machine) == "active"
    until(lambda: machine.show("ts3d.service", "StatusText") == "0 queued, 0 failed")
    log = machine.run("journalctl --no-pager --output=json -u ts3d.service").stdout
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["PRIORITY"] for line in lines if "archived id=alert-000001" in line["MESSAGE"]] == ["6"]


def test_the_timer_closes_a_gap(machine):
    machine.run("systemctl stop ts3d.service; systemctl enable --now ts3d-backfill.timer")
    assert machine.show("ts3d-backfill.timer", "NextElapseUSecRealtime")
    machine.run("systemctl start ts3d-backfill.service")
    until(lambda: f"alerts/mi/ss/{machine.MISSED}" in machine.objects(), 60, "alert that the API lists")
    said = machine.run("journalctl --no-pager --output=cat -u ts3d-backfill.service").stdout
    assert re.search("backfill: 1 listed, 0 .*1 queued", said), said
    machine.run("systemctl start ts3d-backfill.service; ts3d backfill")


def test_it_is_watched_as_the_readme_says(machine):
    until(lambda: "\nqueued   0\n" in machine.run("ts3d status").stdout, what="empty queue")
    until(lambda: machine.show("ts3d.service", "StatusText") == "0 queued, 0 failed", what="word to systemd")
    said = {
        line.partition(" #")[0].strip(): machine.run(line).stdout for line in readme("Monitoring", "sh").splitlines()
    }
    expected = {
        "ts3d status": "daemon   running\nqueued   0\nfailed   0\ndisk ",
        "journalctl -u ts3d": "archived id=alert-000001 tries=1 ",
        "curl -sS http://127.0.0.1:8080/healthz": '{"success": true, ',
        "curl -sS http://127.0.0.1:8080/metrics": "\nts3d_queue_depth 0\n",
    }
    assert said.keys() == expected.keys()
    for command, part in expected.items():
        assert part in said[command]
    assert 'Status: "0 queued, 0 failed"' in machine.run("systemctl status ts3d").stdout
    assert json.loads(machine.run("ts3d status --json").stdout)["running"] is True


def test_prometheus(machine):
    """A real one, with the README's scrape configuration and the installed rules."""
    machine.run(
        "DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install prometheus >/dev/null 2>&1"
    )
    config = "global: {scrape_interval: 1s}\n" + readme("Monitoring", "yaml")
    machine.path("/root/prometheus.yml").write_text(config)
    machine.run(
        "promtool check config /root/prometheus.yml; curl -sS http://127.0.0.1:8080/metrics | promtool check metrics"
    )
    machine.run("systemctl stop prometheus")
    machine.start("watcher", "prometheus --config.file=/root/prometheus.yml --storage.tsdb.path=/root/tsdb")

    def query(expression):
        command = f"curl -sS --data-urlencode 'query={expression}' http://127.0.0.1:9090/api/v1/query"
        return json.loads(machine.run(command).stdout)["data"]["result"]

    ready = "curl -sS --fail http://127.0.0.1:9090/-/ready"
    until(lambda: machine.run(ready, check=False).returncode == 0, 60, "Prometheus")
    until(lambda: [entry for entry in query("up") if entry["value"][1] == "1"], 60, "scrape")
    assert query("ts3d_alerts_archived_total")
    groups = json.loads(machine.run("curl -sS http://127.0.0.1:9090/api/v1/rules").stdout)["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 8
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    machine.run("systemctl stop watcher")


def test_awss_own_tools_read_the_archive(machine):
    machine.run("DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install awscli >/dev/null 2>&1")
    body = json.dumps({"alerts": [alert(id=TUTORIAL_ID)]})
    machine.run(f"curl -sS -d '{body}' 'http://127.0.0.1:8080/api/v1/s3/alert?token={machine.token}'")
    until(lambda: f"alerts/58/7c/{TUTORIAL_ID}" in machine.objects(), what="alert")
    settings = (
        "cd /root; export AWS_SHARED_CREDENTIALS_FILE=/etc/ts3d/secrets/aws_credentials AWS_DEFAULT_REGION=us-east-1"
    )
    detail, minute = quoted(
        "S3 objects",
        f"aws s3 cp s3://my-evidence/alerts/58/7c/{TUTORIAL_ID} -",
        "aws s3 cp s3://my-evidence/webhooks/2017/01/17/13/51/ . --recursive",
    )
    there = "aws --endpoint-url http://127.0.0.1:9000 s3"
    said = machine.run(f"{settings}; {detail.replace('aws s3', there)}").stdout
    assert said == threatstack.detail(TUTORIAL_ID).decode().replace("\r", "")  # read as text
    machine.run(f"{settings}; {minute.replace('aws s3', there)}")
    assert json.loads(machine.path(f"/root/{TUTORIAL_ID}").read_text())["id"] == TUTORIAL_ID


def test_it_listens_for_a_load_balancer(machine):
    """On another address: with the drop-in of HTTPS, as the README says."""
    folder, write = [line for line in readme("HTTPS", "sh").splitlines() if "ts3d.socket.d" in line]
    assert "ListenStream=443" in write
    [address] = quoted("High availability", "0.0.0.0:8080")
    machine.run(f"{folder}; {write.replace('=443', f'={address}')}")
    machine.run("systemctl daemon-reload; systemctl restart ts3d.socket")
    assert '"success": true' in machine.run("curl -sS http://127.0.0.2:8080/healthz").stdout
    machine.run("rm -r /etc/systemd/system/ts3d.socket.d; systemctl daemon-reload; systemctl restart ts3d.socket")


def test_a_forward_proxys_drop_in(machine):
    """Both upstreams are on this machine, so NO_PROXY must keep them from the proxy."""
    for unit in ("ts3d", "ts3d-backfill"):
        machine.run(f"mkdir /etc/systemd/system/{unit}.service.d")
        machine.path(f"/etc/systemd/system/{unit}.service.d/proxy.conf").write_text(readme("Installation", "systemd"))
    machine.run("systemctl daemon-reload; systemctl restart ts3d")
    environ = machine.path(f"/proc/{machine.show('ts3d.service', 'MainPID')}/environ").read_text()
    assert {"HTTPS_PROXY", "NO_PROXY"} <= {line.partition("=")[0] for line in environ.split("\0")}
    machine.archive(15)
    machine.run("systemctl start ts3d-backfill.service")
    machine.run("rm -r /etc/systemd/system/ts3d*.service.d; systemctl daemon-reload; systemctl restart ts3d")


def test_restart_and_stop(machine):
    for command in quoted("Installation", "systemctl restart ts3d", "systemctl stop ts3d.socket"):
        machine.run(command)
    assert machine.run("systemctl is-active ts3d.socket ts3d", check=False).stdout.split() == ["inactive"] * 2
    machine.run("systemctl start ts3d.socket")
    assert '"success": true' in machine.run("curl -sS http://127.0.0.1:8080/healthz").stdout


def test_systemd_finds_nothing_to_say_of_the_units_and_of_the_sandbox(machine):
    result = machine.run(f"systemd-analyze verify {UNITS}")
    assert result.stdout + result.stderr == ""
    for unit in ("ts3d.service", "ts3d-backfill.service"):
        verdict = machine.run(f"systemd-analyze --no-pager security {unit}").stdout
        assert float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", verdict)[1]) <= 1.2, verdict


def test_both_services_have_the_same_sandbox_and_secrets(machine):
    units = [machine.path(f"/etc/systemd/system/{name}.service").read_text() for name in ("ts3d", "ts3d-backfill")]
    lines = [[line for line in unit.partition("DynamicUser")[2].splitlines() if "=" in line] for unit in units]
    assert [line for line in lines[0] if line[0] != "#" and line != "WantedBy=multi-user.target"] == lines[1]


def test_another_user_reads_neither_secrets_nor_queue(machine):
    pid = machine.show("ts3d.service", "MainPID")
    files = machine.run("ls /etc/ts3d/secrets/* /var/lib/private/ts3d/* /run/credentials/ts3d.service/*").stdout.split()
    assert len(files) > 12
    for file in (*files, f"/proc/{pid}/environ", f"/proc/{pid}/mem"):
        assert machine.run(f"runuser -u nobody -- cat {file} >/dev/null", check=False).returncode, file
    said = machine.run(f"cat /proc/{pid}/environ /proc/{pid}/cmdline; ls -l /proc/{pid}/fd").stdout
    said += machine.run(f"runuser -u nobody -- systemctl show {UNITS}; runuser -u nobody -- ps -ef || :").stdout
    assert not [secret for secret in machine.secrets() if secret in said]


def test_restarts_and_a_kill_under_load_refuse_nothing_and_lose_nothing(machine):
    before, url = restarts(machine), f"http://127.0.0.1:8080/api/v1/s3/alert?token={machine.token}"
    machine.start("sender", f"python3 /root/ts3d/tests/sender.py '{url}' load /root/sent")

    def sent():
        return [json.loads(line) for line in machine.path("/root/sent").read_text().splitlines(keepends=False)[:-1]]

    def more():
        count = len(machine.path("/root/sent").read_text().splitlines())
        until(lambda: len(machine.path("/root/sent").read_text().splitlines()) > count + 50, 60, "more alerts")

    until(lambda: machine.path("/root/sent").exists())
    more()
    for _ in range(2):
        machine.run("systemctl restart ts3d.service")
        more()
    assert {error for _, error in sent()} == {None}
    machine.run("systemctl kill --signal=KILL ts3d.service")
    until(lambda: restarts(machine) == before + 1)
    more()
    machine.run("systemctl stop sender")
    assert not [error for _, error in sent() if error and "refused" in error.lower()]
    acknowledged = {id_ for id_, error in sent() if not error}
    assert len(acknowledged) > 200
    until(lambda: machine.show("ts3d.service", "StatusText") == "0 queued, 0 failed", 60, "empty queue")
    assert {f"alerts/lo/ad/{id_}" for id_ in acknowledged} <= machine.objects()
    assert restarts(machine) == before + 1


def test_a_frozen_daemon_is_restarted(machine):
    before = restarts(machine)
    machine.run("systemctl kill --signal=STOP ts3d.service")
    until(lambda: restarts(machine) == before + 1, 60, "restart")
    machine.archive(2)
    assert "Failed with result 'watchdog'" in machine.run("journalctl --no-pager -u ts3d.service").stdout


def test_a_full_disk_is_no_reason_for_a_restart(machine):
    machine.run("""
        systemctl stop ts3d.socket
        mkdir -p /run/systemd/system/ts3d.service.d
        printf '[Service]\\nWatchdogSec=2\\n' >/run/systemd/system/ts3d.service.d/watchdog.conf
        systemctl daemon-reload
        mount -t tmpfs -o size=30M,mode=700 tmpfs /var/lib/private/ts3d
        systemctl start ts3d.socket
    """)
    machine.archive(3)
    pid = machine.show("ts3d.service", "MainPID")
    machine.run("dd if=/dev/zero of=/var/lib/private/ts3d/filler bs=1M || :")

    def fed():
        return int(machine.show("ts3d.service", "WatchdogTimestampMonotonic"))

    begin = fed()
    until(lambda: fed() > begin + 5_000_000, 60, "watchdog that was fed for more than two of its periods")
    answer = json.loads(machine.run("curl -sS http://127.0.0.1:8080/healthz").stdout)
    assert not answer["success"]
    assert re.search("full|free", answer["error"]["message"])
    assert machine.show("ts3d.service", "MainPID") == pid
    machine.run("rm /var/lib/private/ts3d/filler")
    health = "curl -sS http://127.0.0.1:8080/healthz"
    until(lambda: '"success": true' in machine.run(health).stdout, what="room")
    machine.archive(4)
    assert machine.show("ts3d.service", "MainPID") == pid
    machine.run("""
        systemctl stop ts3d.socket
        umount /var/lib/private/ts3d
        rm -r /run/systemd/system/ts3d.service.d
        systemctl daemon-reload
        systemctl start ts3d.socket
    """)
    machine.archive(5)


def test_a_wrong_configuration_keeps_the_socket_and_says_why(machine):
    machine.run("sed -i 's/^bucket =/buket =/' /etc/ts3d/ts3d.conf")
    assert machine.run("systemctl restart ts3d.service", check=False).returncode
    body = json.dumps({"alerts": [alert(6)]})
    url = f"http://127.0.0.1:8080/api/v1/s3/alert?token={machine.token}"
    sender = machine.popen(f"curl -sS -m 100 -d '{body}' '{url}'")
    reason = re.compile(r"/etc/ts3d/ts3d\.conf: \[s3\] .*\bbuket\b.*\bbucket\b")
    before = restarts(machine)
    until(lambda: restarts(machine) >= before + 2, 60, "second try")
    assert machine.show("ts3d.socket", "ActiveState") == "active"
    until(lambda: reason.search(machine.run("systemctl status ts3d", check=False).stdout), what="reason")
    upgrade = "cd /root/ts3d; echo '# new' >>ts3d.py; sh systemd/install"
    upgraded = machine.run(upgrade, check=False)
    assert (upgraded.returncode, "ts3d.service does not start" in upgraded.stderr) == (1, True)
    machine.run("sed -i 's/^buket =/bucket =/' /etc/ts3d/ts3d.conf")
    out, err = sender.communicate(timeout=60)
    assert json.loads(out)["success"], err
    until(lambda: machine.archived(6))


def test_a_dependency_that_fails_does_not_close_the_socket(machine):
    machine.run("""
        systemctl stop ts3d.service
        mkdir -p /run/systemd/system/ts3d.service.d
        printf '[Unit]\\nRequires=disk.service\\nAfter=disk.service\\n' >/run/systemd/system/ts3d.service.d/disk.conf
        printf '[Service]\\nType=oneshot\\nExecStart=test -e /run/disk\\n' >/run/systemd/system/disk.service
        systemctl daemon-reload
    """)
    sender = machine.popen(f"curl -sS -m 100 -d '{{}}' 'http://127.0.0.1:8080/api/v1/s3/alert?token={machine.token}'")
    tries = "journalctl --no-pager --output=cat -u disk.service | grep -c 'Failed to start'"
    until(lambda: int(machine.run(tries, check=False).stdout) > 25, 60, "tries beyond systemd's usual limit")
    assert machine.show("ts3d.socket", "ActiveState") == "active"
    machine.run("touch /run/disk")
    assert "alert" in sender.communicate(timeout=60)[0]
    machine.run("rm -r /run/systemd/system/ts3d.service.d /run/systemd/system/disk.service; systemctl daemon-reload")
    machine.archive(13)


def test_a_secret_that_is_missing_is_an_empty_one(machine):
    machine.run("cd /etc/ts3d/secrets; rm metrics_token user_id; systemctl restart ts3d.service")
    machine.run("cd /etc/ts3d/secrets; mv webhook_token kept")
    assert machine.run("systemctl restart ts3d.service", check=False).returncode
    said = "[server] webhook_token_file = 'webhook_token': empty"
    assert said in machine.run("systemctl status ts3d.service", check=False).stdout
    machine.run("cd /etc/ts3d/secrets; mv kept webhook_token")
    machine.archive(7)
    machine.run("cd /root/ts3d; sh systemd/install; ls /etc/ts3d/secrets/user_id")


def test_stopping_the_socket_stops_all_of_it(machine):
    units = "ts3d.socket ts3d.service ts3d-backfill.timer"
    machine.run("systemctl stop ts3d.socket")
    assert machine.run(f"systemctl is-active {units}", check=False).stdout.split() == ["inactive"] * 3
    machine.run("systemctl start ts3d.socket; systemctl start ts3d.service")
    assert machine.run(f"systemctl is-active {units}", check=False).stdout.split() == ["active"] * 3


def test_commands_by_hand_leave_nothing_that_the_service_cannot_read(machine):
    machine.run("systemctl stop ts3d.socket; rm /var/lib/ts3d/queue.db*")
    assert "FAIL" not in machine.run("ts3d check").stdout
    daemon = machine.popen("echo $$ >/root/pid; exec ts3d serve")
    until(lambda: "success" in machine.run("curl -s http://127.0.0.1:8080/healthz", check=False).stdout)
    machine.archive(8)
    assert "FAIL" not in machine.run("ts3d check").stdout
    machine.run("kill -KILL $(cat /root/pid)")
    daemon.wait(10)
    machine.run("systemctl start ts3d.socket")
    machine.archive(9)
    machine.run("systemctl stop ts3d.service; ts3d check; systemctl start ts3d.service")
    machine.archive(10)


def test_install_again_changes_nothing(machine):
    machine.run("systemctl stop ts3d.service; systemctl start ts3d.service")
    machine.archive(14)  # with which it has written all that it writes after a start
    health = "curl -sS http://127.0.0.1:8080/healthz"
    until(lambda: '"queued": 0' in machine.run(health).stdout, what="empty queue")
    pid, before = machine.show("ts3d.service", "MainPID"), machine.run(SNAPSHOT).stdout
    result = machine.run("cd /root/ts3d; sh systemd/install")
    assert result.stderr == ""
    assert machine.run(SNAPSHOT).stdout == before
    assert machine.show("ts3d.service", "MainPID") == pid
    assert not [secret for secret in machine.secrets() if secret in result.stdout]


def test_an_upgrade_that_was_cut_short_is_finished_by_the_next(machine):
    pid, mine = machine.show("ts3d.service", "MainPID"), "cksum /etc/ts3d/ts3d.conf /etc/ts3d/secrets/*"
    before = machine.run(mine).stdout
    machine.run("""cd /root/ts3d; sed -i 's/^VERSION = .*/VERSION = "9.9.9"/' ts3d.py""")
    machine.run("""
        cd /root/ts3d; sed -i 's/^WatchdogSec=30/WatchdogSec=31/' systemd/ts3d.service
        systemctl disable --quiet ts3d.service
        mkdir /etc/systemd/system/ts3d.service.new
    """)
    assert machine.run("cd /root/ts3d; sh systemd/install", check=False).returncode
    assert machine.show("ts3d.service", "MainPID") == pid
    machine.run("rm -r /etc/systemd/system/ts3d.service.new; cd /root/ts3d; sh systemd/install")
    assert machine.show("ts3d.service", "MainPID") not in (pid, "0")
    assert machine.show("ts3d.service", "WatchdogUSec") == "31s"
    assert machine.run(mine).stdout == before
    assert machine.run("ts3d --version").stdout.startswith("ts3d 9.9.9")
    assert machine.run("systemctl is-enabled ts3d.service", check=False).stdout == "disabled\n"
    machine.archive(11)


def test_an_upgrade(machine):
    """To another version and back, as the README says."""
    install, check = quoted("Upgrading", "sh systemd/install", "ts3d check")
    for version in ("9.9.10", ts3d.VERSION):
        machine.run(f"""cd /root/ts3d; sed -i 's/^VERSION = .*/VERSION = "{version}"/' ts3d.py""")
        assert machine.run(f"cd /root/ts3d; {install}").stdout == "ts3d is installed. Run: ts3d check\n"
        assert machine.run("ts3d --version").stdout.startswith(f"ts3d {version}")
        assert "FAIL" not in machine.run(check).stdout
    machine.archive(13)


def test_an_upgrade_prints_the_new_options_once(machine):
    machine.run("sed -i 's/^#bucket =$/#shade =\\n&/; s/^#wait = .*/&\\n#hue = 5m/' /root/ts3d/ts3d.conf")
    said = [machine.run("cd /root/ts3d; sh systemd/install").stdout for _ in range(2)]
    assert "):\n  [server] hue = 5m\n  [s3] shade =\n\n" in said[0]
    assert said[1] == "ts3d is installed. Run: ts3d check\n"


def test_remove_leaves_configuration_secrets_and_queue(machine):
    machine.run("systemctl stop s3")
    assert machine.post(12) == "queued"
    kept = "cksum /etc/ts3d/ts3d.conf /etc/ts3d/secrets/*; ls /var/lib/ts3d/queue.db; readlink /var/lib/ts3d"
    before = machine.run(kept).stdout
    status, remove = quoted("Uninstalling", "ts3d status", "sh systemd/install --remove")
    assert "queued   1, oldest " in machine.run(status, check=False).stdout
    machine.run(f"cd /root/ts3d; {remove}")
    assert machine.run(kept).stdout == before
    assert "ts3d" not in machine.run("systemctl --no-pager list-units --all 'ts3d*'").stdout
    left = machine.run("find / -xdev -name '*ts3d*' -not -path '/root/*' -not -path '/srv/*' 2>/dev/null").stdout
    assert set(left.split()) == {"/etc/ts3d", "/etc/ts3d/ts3d.conf", "/var/lib/ts3d", "/var/lib/private/ts3d"}
    assert machine.run("curl -s http://127.0.0.1:8080/healthz", check=False).returncode == 7  # refused
    machine.run("cd /root/ts3d; sh systemd/install --remove")
    machine.start_s3()
    machine.run("cd /root/ts3d; sh systemd/install; systemctl start ts3d.service")
    until(lambda: machine.archived(12), 60, "alert that waited")


def test_it_is_uninstalled(machine):
    delete = "rm -r /etc/ts3d /var/lib/ts3d /var/lib/private/ts3d"
    for command in quoted("Uninstalling", "sh systemd/install --remove", delete):
        machine.run(f"cd /root/ts3d; {command}")
    left = machine.run("find / -xdev -name '*ts3d*' -not -path '/root/*' -not -path '/srv/*' 2>/dev/null").stdout
    assert left == ""
