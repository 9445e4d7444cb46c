"""ts3d on Debian 13: installed as the README says, and where its boto3 is too old or missing."""

import pytest
from conftest import alert, keys_of, until

pytestmark = [pytest.mark.systemd, pytest.mark.usefixtures("silent")]
RELEASE = "trixie"


def test_an_alert_arrives(machine):
    machine.archive(1)
    assert set(keys_of(alert(1)["id"], "2017/01/17/13/52")) <= machine.objects()
    assert machine.run("head -n 1 /usr/local/lib/ts3d/ts3d.py").stdout == "#!/usr/bin/python3 -I\n"


def test_systemd_finds_nothing_to_say_of_the_units(machine):
    result = machine.run("systemd-analyze verify ts3d.socket ts3d.service ts3d-backfill.service ts3d-backfill.timer")
    assert result.stdout + result.stderr == ""
    verdict = machine.run("systemd-analyze --no-pager security ts3d.service").stdout
    assert float(verdict.rpartition("ts3d.service: ")[2].split()[0]) <= 1.2, verdict


def test_a_kill_and_a_restart(machine):
    machine.run("systemctl kill --signal=KILL ts3d.service")
    machine.archive(2)
    machine.run("systemctl restart ts3d.service")
    machine.archive(3)


@pytest.mark.parametrize("case", ["missing", "too old"])
def test_without_the_distributions_boto3_there_is_a_virtual_environment(machine, case):
    if case == "missing":
        machine.run("""
            apt-get -qq -y purge python3-boto3 >/dev/null
            printf 'Package: python3-boto3\\nPin: version *\\nPin-Priority: -1\\n' >/etc/apt/preferences.d/boto3
        """)
    else:
        machine.run("""
            rm -r /usr/local/lib/ts3d/venv
            mkdir -p /usr/lib/python3/dist-packages/boto3
            echo '__version__ = "1.20.34"' >/usr/lib/python3/dist-packages/boto3/__init__.py
        """)
    wheels = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels"
    result = machine.run(f"cd /root/ts3d; {wheels} sh systemd/install", timeout=300)
    assert "pip install boto3 in /usr/local/lib/ts3d/venv" in result.stdout
    assert machine.run("head -n 1 /usr/local/bin/ts3d").stdout == "#!/usr/local/lib/ts3d/venv/bin/python -I\n"
    number = 4 + (case == "missing")
    machine.archive(number)
    pid = machine.show("ts3d.service", "MainPID")
    assert "venv/bin/python" in machine.run(f"tr '\\0' ' ' </proc/{pid}/cmdline").stdout
    assert machine.run("ts3d check").stdout.count("\nok ") == 6
    until(lambda: machine.archived(number))


def test_remove_takes_the_virtual_environment_along(machine):
    machine.run("cd /root/ts3d; sh systemd/install --remove; ! test -e /usr/local/lib/ts3d")


@pytest.mark.parametrize("arguments", ["--version", "--remove now"])
def test_wrong_usage(machine, arguments):
    result = machine.run(f"cd /root/ts3d; sh systemd/install {arguments}", check=False)
    assert (result.returncode, result.stderr) == (2, "usage: sh systemd/install [--remove | --help]\n")


def test_help_changes_nothing_and_needs_no_root(machine):
    result = machine.run("cp -r /root/ts3d/systemd /tmp; runuser -u nobody -- sh /tmp/systemd/install --help")
    assert result.stdout.startswith("usage: sh systemd/install [--remove | --help]\n\nInstalls ts3d ")
    assert max(map(len, result.stdout.splitlines())) <= 120
    machine.run("! test -e /usr/local/lib/ts3d")


@pytest.mark.parametrize("arguments", ["", " --remove"])
def test_it_needs_root(machine, arguments):
    result = machine.run(f"runuser -u nobody -- sh /tmp/systemd/install{arguments}", check=False)
    said = f"ts3d's installation needs root. Run: sudo sh systemd/install{arguments}\n"
    assert (result.returncode, result.stderr) == (1, said)


def test_an_old_python_is_refused(machine):
    """Before anything is installed."""
    machine.run("mv /usr/bin/python3 /usr/bin/kept")
    machine.path("/usr/bin/python3").write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho Python 3.10.12\n')
    machine.run("chmod 755 /usr/bin/python3")
    result = machine.run("cd /root/ts3d; sh systemd/install", check=False)
    machine.run("mv /usr/bin/kept /usr/bin/python3; ! test -e /usr/local/lib/ts3d")
    said = "ts3d needs Python 3.11 or newer: /usr/bin/python3 is Python 3.10.12\n"
    assert (result.returncode, result.stderr) == (1, said)
