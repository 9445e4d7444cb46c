"""What the README says is what happens: its curl lines, its configurations, its policy, its two commands."""

import ast
import configparser
import http.server
import json
import re
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import BUCKET, ROOT, TOKEN, TUTORIAL_ID, alert, until

import ts3d

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if language == "sh" for line in block.replace("\\\n", "").splitlines()]
CURLS = [line for line in LINES if line.startswith("curl")]
BACKFILLS = [line for line in LINES if " backfill" in line]
COMMANDS = [line for line in LINES if line.startswith(("ts3d status", "ts3d retry", "ts3d check", "ts3d --version"))]
RUN_BY = {  # the test that runs a section's blocks of a language
    ("", ""): "test_the_demo",
    ("", "ini"): "test_configurations",
    ("Run it", "sh"): "install",  # of tests/machine.py
    ("Run it", ""): "install",
    ("HTTPS", "caddy"): "test_caddy",
    ("HTTPS", "nginx"): "test_nginx",
    ("HTTPS", "sh"): "test_its_own_tls_and_a_renewal",
    ("Watch it", "sh"): "test_it_is_watched_as_the_readme_says",
    ("Watch it", "yaml"): "test_prometheus",
    ("Mend it", "sh"): "test_commands",
    ("Upgrade it", "sh"): "test_an_upgrade",
    ("Run two of them", "systemd"): "test_it_listens_for_a_load_balancer",
    ("Run two of them", "nginx"): "test_two_behind_a_load_balancer",
    ("Take it away", "sh"): "test_it_is_taken_away",
    ("Webhooks", "sh"): "test_curl_lines",
    ("What is in S3", "sh"): "test_awss_own_tools_read_the_archive",
    ("What is in S3", "json"): "test_the_policies",
    ("API v2", "ini"): "test_configurations",
    ("What the webhook missed", "sh"): "test_backfills",
    ("Configuration", "ini"): "test_configurations",
}


def test_every_block_runs_in_a_test():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    parts = re.split(r"^## (.*)\n", "\n" + README, flags=re.MULTILINE)
    sections = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    found = {
        (name, kind) for name, text in sections.items() for kind in re.findall(r"^```(\w*)\n.*?^```", text, re.M | re.S)
    }
    assert found == set(RUN_BY)
    assert [name for name in RUN_BY.values() if f"def {name}(" not in sources] == []


def test_the_first_screen():
    screen = README.splitlines()[:45]
    for part in ("sh tests/demo", "sh tests/run", "webhook_token =", "api_key =", "bucket ="):
        assert [line for line in screen if part in line], part


@pytest.mark.parametrize("line", CURLS)
def test_curl_lines(new_daemon, line):
    assert TOKEN in line or "401" in line or "healthz" in line or "metrics" in line
    daemon = new_daemon()
    command, _, comment = line.replace(":8080", f":{daemon.address[1]}").partition(" #")
    result = subprocess.run(["sh", "-c", command + " -w ' %{http_code}'"], capture_output=True, text=True, check=True)
    answer, _, status = result.stdout.rpartition(" ")
    assert status == (re.match(r" (\d+)", comment) or re.match("(200)", "200"))[1]
    if "/metrics" not in line:
        assert json.loads(answer)["success"] is (status == "200")


def test_the_curl_lines_were_found():
    assert len(CURLS) == 5


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "ini"])
def test_configurations(tmp_path, monkeypatch, block):
    monkeypatch.setattr(ts3d, "load_tls", lambda config: None)
    monkeypatch.setattr(ts3d, "SECRETS", [])
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "webhook_token").write_text("x")
    (tmp_path / "ts3d.conf").write_text(block)
    config = ts3d.load_config(str(tmp_path / "ts3d.conf"))
    assert config.webhook_token
    parser = configparser.ConfigParser()
    parser.read_string(block)
    assert parser.sections()


def test_the_policies(new_daemon):
    """That of `serve`, and what `backfill` needs beside it, in the words in which it asks for that."""
    least, reading = [json.loads(block) for language, block in BLOCKS if language == "json"]
    assert [statement["Action"] for statement in least["Statement"]] == ["s3:PutObject"]
    config = ts3d.Config(file="", workers=0, prefix="", bucket="my-evidence", put_object={})
    said = str(ts3d.S3(config)._unreadable(SimpleNamespace(meta=SimpleNamespace(partition="aws"))))
    assert json.loads(said[said.index("{") :]) == reading


@pytest.mark.parametrize("line", BACKFILLS)
def test_backfills(new_daemon, s3, line):
    daemon = new_daemon()
    arguments, _, comment = line.removeprefix("python3 ts3d.py ").partition(" #")
    result = daemon.run(*arguments.split())
    assert (result.returncode, result.stdout) == (0, "backfill: 0 listed, 0 there already, 0 queued\n"), result.stderr
    assert comment
    assert re.search("^    backfill: 500 listed, 100 there already, 400 queued$", README, re.MULTILINE)


def test_the_backfills_were_found():
    assert len(BACKFILLS) == 4


@pytest.fixture
def failed(new_daemon, api):
    """A daemon that has given up the tutorial's alert."""
    api.modes[TUTORIAL_ID] = 500
    daemon = new_daemon(archive__give_up_after="1", server__wait="0")
    daemon.post({"alerts": [alert(id=TUTORIAL_ID)]})
    until(lambda: daemon.health()["failed"])
    return daemon


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(failed, line):
    command, _, _ = line.removeprefix("ts3d ").partition(" #")
    result = failed.run(*command.split())
    assert (result.returncode, result.stderr) == (0, ""), result
    expected = {
        "status --failed": TUTORIAL_ID,
        "status --json": '"failed": 1',
        "check": "1 failed",
        "--version": "ts3d ",
    }
    words = command.split()
    assert expected.get(" ".join(words), "1 queued again" if words[0] == "retry" else "failed   1") in result.stdout


def test_the_commands_were_found():
    assert len(COMMANDS) == 9


def test_what_is_mended_is_what_is_said():
    """The first column of the table names what the program, or S3, really says."""
    section = README.partition("\n## Mend it\n")[2].partition("\n## ")[0]
    names = [name for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE) for name in re.findall("`(.*?)`", row)]
    sources = (ROOT / "ts3d.py").read_text() + "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(names) > 30
    for name in names:
        known = name.removeprefix("s3_").removeprefix("threatstack_").removesuffix("…").removeprefix("status=")
        assert known in sources, name


def test_s3_is_laid_out_as_the_table_says(daemon, s3):
    daemon.post({"alerts": [alert(0), 1]})
    until(lambda: len(s3.objects()) == 3)
    for key in s3.objects():
        kind = key.partition("/")[0]
        assert kind in ts3d.OBJECTS
        assert f"| `{kind}/" in README


def test_the_demo():
    result = subprocess.run(["sh", "tests/demo", "--once"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result
    for part in ("webhook_token = ", "$ curl ", '"state": "archived"', f"s3://{BUCKET}/alerts/58/7c/", "curl -i"):
        assert part in result.stdout


def test_it_stands_on_the_standard_library_and_boto3():
    nodes = list(ast.walk(ast.parse((ROOT / "ts3d.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"boto3", "botocore"}
    assert issubclass(ts3d.Handler, http.server.BaseHTTPRequestHandler)
    assert issubclass(ts3d.ApiHandler, urllib.request.BaseHandler)


def test_nothing_else_stands_at_the_top():
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert top <= {"README.md", "systemd", "tests", "ts3d.conf", "ts3d.py"}


def test_every_promise_names_its_tests():
    section = re.search(r"^## What it promises\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) > 5
    for row in rows:
        names = re.findall("`(test_[a-z0-9_]+)`", row.split("|")[3])
        assert names, row
        assert [name for name in names if f"def {name}(" not in sources] == []
