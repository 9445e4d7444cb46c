"""The configuration: what is wrong is said in one line, with exit 78, and ts3d.conf says the same as the table."""

import re
import subprocess
import sys

import pytest
import threatstack
import trustme
from conftest import ROOT, TOKEN, TS3D, alert, environment, keys_of, until

import ts3d

LEAVE = {"server__webhook_token": None}


def wrong(daemon):
    """Start it, expect exit 78, and return the one line that it says."""
    result = daemon.run("serve")
    assert (result.returncode, result.stdout) == (78, ""), result
    # What only boto3 knows is found when the daemon is up already, so that there may be log lines before.
    *_, line = lines = result.stderr.splitlines()
    assert [line for line in lines if not re.match("....-..-.. ", line)] == [line]
    assert line.startswith("ts3d: ")
    for secret in (TOKEN, threatstack.KEY):
        assert secret not in line
    return line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"server__listen": "8080"}, ["[server] listen = '8080'", "HOST:PORT"]),
        ({"server__listen": "127.0.0.1:65536"}, ["[server] listen = '127.0.0.1:65536'"]),
        ({"server__listen": "192.0.2.1:8080"}, ["[server] listen", "192.0.2.1:8080"]),
        ({"server__wait": "31"}, ["[server] wait = '31'", "0 to 30 seconds"]),
        ({"server__wait": "-1"}, ["[server] wait = '-1'"]),
        ({"server__max_body": "8 megabytes"}, ["[server] max_body = '8 megabytes'", "K M G T"]),
        ({"server__webhook_token": ""}, ["[server] webhook_token", "empty"]),
        ({"server__webhook_token": "open\u00e9"}, ["[server] webhook_token", "ASCII"]),
        ({"server__webhook_token": "open-sesame ; a comment"}, ["[server] webhook_token", "one a line"]),
        ({"server__max_connections": "0"}, ["[server] max_connections = '0'"]),
        ({"server__tls_key": "x.pem"}, ["[server] tls_certificate is not set"]),
        ({"server__tls_certificate": "no.pem", "server__tls_key": "no.pem"}, ["[server] tls_certificate", "no.pem"]),
        ({"threatstack__auth": "basic"}, ["[threatstack] auth = 'basic'", "key or hawk"]),
        ({"threatstack__base_url": "ftp://x/"}, ["[threatstack] base_url = 'ftp://x/'"]),
        ({"threatstack__api_key": None}, ["[threatstack] api_key is not set", "THREATSTACK_API_KEY"]),
        ({"threatstack__api_key": "two words"}, ["[threatstack] api_key"]),
        ({"threatstack__api_key_file": "api_key"}, ["api_key", "api_key_file", "both"]),
        ({"threatstack__events": "maybe"}, ["[threatstack] events = 'maybe'"]),
        ({"threatstack__timeout": "0"}, ["[threatstack] timeout = '0'"]),
        ({"s3__bucket": None}, ["[s3] bucket is not set", "TS_AWS_S3_BUCKET"]),
        ({"s3__bucket": "s3://evidence"}, ["[s3] bucket = 's3://evidence'"]),
        ({"s3__prefix": "/a/"}, ["[s3] prefix = '/a/'", "slash"]),
        ({"s3__endpoint_url": "localhost"}, ["[s3] endpoint_url = 'localhost'"]),
        ({"put_object__Bucket": "x"}, ["[s3:put_object] Bucket", "itself"]),
        ({"put_object__ContentMD5": "x"}, ["[s3:put_object] ContentMD5", "itself"]),
        ({"put_object__ChecksumAlgorithm": "CRC32"}, ["[s3:put_object] ChecksumAlgorithm", "itself"]),
        ({"threatstack__base_url": "http://127.0.0.1:99999/"}, ["[threatstack] base_url = 'http://127.0.0.1:99999/'"]),
        ({"put_object__StorageClas": "x"}, ["[s3:put_object]", "StorageClas", "did you mean StorageClass?"]),
        ({"put_object__BucketKeyEnabled": "maybe"}, ["[s3:put_object] BucketKeyEnabled = 'maybe'", "boolean"]),
        ({"put_object__Metadata": "[1]"}, ["[s3:put_object] Metadata = '[1]'", "map"]),
        ({"put_object__Expires": "soon"}, ["[s3:put_object] Expires = 'soon'", "timestamp"]),
        ({"threatstack__base_url": "http://a..b/x"}, ["[threatstack] base_url = 'http://a..b/x'"]),
        ({"threatstack__base_url": "http://127.0.0.1/\u00e9"}, ["[threatstack] base_url"]),
        ({"queue__path": "/nowhere/queue.db"}, ["/nowhere/queue.db", "[queue] path"]),
        ({"queue__max_size": "0"}, ["[queue] max_size = '0'"]),
        ({"archive__workers": "many"}, ["[archive] workers = 'many'"]),
        ({"archive__give_up_after": "1w"}, ["[archive] give_up_after = '1w'", "s m h d"]),
        ({"log__level": "LOUD"}, ["[log] level = 'LOUD'", "DEBUG"]),
        ({"server__webhok_token": "x"}, ["[server]", "webhok_token", "did you mean webhook_token?"]),
        ({"server__Listen": "x"}, ["[server]", "Listen", "did you mean listen?"]),
        ({"severs__listen": "x"}, ["[severs]", "did you mean server?"]),
        ({"threatstack__auth": "hawk"}, ["[threatstack] user_id is not set"]),
        ({"threatstack__auth": "hawk", "threatstack__user_id": "u"}, ["[threatstack] organization_id is not set"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(new_daemon, options, says):
    line = wrong(new_daemon(start=False, **options))
    for part in says:
        assert part in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"listen = x\n", ["line 1"]),
        (b"[server]\nwebhook_token open-sesame\n", ["line 2"]),
        (b"[server]\nwait = 1\nwait = 2\n", ["line 3: [server] wait is there twice"]),
        (b"[server]\n[server]\n", ["line 2: [server] is there twice"]),
        (b"[server]\nwait = \xff\n", ["UTF-8"]),
        (b"[DEFAULT]\nwait = 1\n", ["[DEFAULT]"]),
    ],
)
def test_what_is_no_ini_file(new_daemon, text, says):
    daemon = new_daemon(start=False)
    daemon.config.write_bytes(text)
    line = wrong(daemon)
    for part in (str(daemon.config), *says):
        assert part in line


def test_a_second_token_that_is_not_indented_is_not_shown(new_daemon):
    daemon = new_daemon(start=False)
    daemon.config.write_text("[server]\nwebhook_token = one\nc2VjcmV0c2VjcmV0=\n")
    assert "c2V" not in wrong(daemon)


def test_secrets_that_contain_each_other_are_redacted_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(ts3d, "SECRETS", [])
    (tmp_path / "ts3d.conf").write_text("[server]\nwebhook_token = abc\n  abcdef\n  abcd\n")
    ts3d.load_config(str(tmp_path / "ts3d.conf"))
    assert ts3d.redact("x abcdef abc abcd x") == "x *** *** *** x"


def test_a_broken_boto3(new_daemon):
    daemon = new_daemon(start=False)
    package = daemon.folder / "broken" / "boto3"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no luck')")
    daemon.environment["PYTHONPATH"] = package.parent
    assert "no luck" in wrong(daemon)
    result = daemon.run("check")
    assert result.returncode == 1
    assert [line.split()[:2] for line in result.stdout.splitlines()][2:] == [
        ["FAIL", "credentials"],
        ["FAIL", "s3"],
        ["ok", "threatstack"],
        ["ok", "clock"],
    ]


def test_a_missing_file(new_daemon):
    daemon = new_daemon(start=False)
    daemon.config.unlink()
    assert "No such file" in wrong(daemon)


def test_without_a_token_only_loopback_is_listened_on(new_daemon):
    for everywhere in ("0.0.0.0:0", "*:0", "[::]:0"):
        assert "webhook_token" in wrong(new_daemon(start=False, server__listen=everywhere, **LEAVE))
    daemon = new_daemon(**LEAVE)
    assert daemon.post({"alerts": [alert(0)]}, token=None)[0] == 200


def test_the_port_is_in_use(new_daemon, daemon):
    line = wrong(new_daemon(start=False, server__listen=f"127.0.0.1:{daemon.address[1]}"))
    assert "[server] listen" in line
    assert "in use" in line


def test_a_second_daemon_on_the_same_queue(new_daemon, daemon):
    assert "another" in wrong(new_daemon(start=False, queue__path=daemon.queue))


def test_the_tutorials_variables_override_the_file(new_daemon, s3, api):
    daemon = new_daemon(start=False, threatstack__base_url="http://127.0.0.1:9", s3__bucket="x" * 5, s3__prefix="y")
    daemon.set(threatstack__api_key=None)
    daemon.environment |= {
        "THREATSTACK_BASE_URL": f"{api.url}/api/v1/",
        "THREATSTACK_API_KEY": threatstack.KEY,
        "TS_AWS_S3_BUCKET": "evidence",
        "TS_AWS_S3_PREFIX": "z",
    }
    daemon.start().post({"alerts": [alert(0)]})
    assert list(s3.objects()) == ["z/" + key for key in keys_of("alert-000000", "2017/01/17/13/51")]


def test_a_variable_that_is_wrong_is_named(new_daemon):
    daemon = new_daemon(start=False)
    daemon.environment["THREATSTACK_BASE_URL"] = "x"
    assert "THREATSTACK_BASE_URL = 'x'" in wrong(daemon)


@pytest.mark.parametrize("credentials", [False, True])
def test_secrets_in_files(new_daemon, credentials):
    daemon = new_daemon(start=False, threatstack__api_key=None, threatstack__api_key_file="api_key", **LEAVE)
    daemon.set(server__webhook_token_file="tokens", threatstack__user_id_file="user_id")
    folder = daemon.folder / ("credentials" if credentials else "secrets")
    folder.mkdir()
    if credentials:
        daemon.environment["CREDENTIALS_DIRECTORY"] = folder
    assert str(folder / "tokens") in wrong(daemon)
    (folder / "api_key").write_text(threatstack.KEY + "\n")
    (folder / "user_id").write_text("\n")
    (folder / "tokens").write_text(f"{TOKEN}\nnew-token\n")
    daemon.start()
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    assert daemon.post({"alerts": []}, token="new-token")[0] == 200
    assert daemon.post({"alerts": []}, token="")[0] == 401


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_token_file_opens_no_door(new_daemon, text):
    daemon = new_daemon(start=False, server__webhook_token_file="token", **LEAVE)
    (daemon.folder / "secrets").mkdir()
    (daemon.folder / "secrets" / "token").write_text(text)
    assert "[server] webhook_token_file = 'token': empty: write a secret there" in wrong(daemon)


def test_an_empty_secret_is_asked_for_where_it_belongs(new_daemon):
    daemon = new_daemon(start=False, threatstack__api_key=None, threatstack__api_key_file="api_key")
    (daemon.folder / "secrets").mkdir()
    file = daemon.folder / "secrets" / "api_key"
    file.write_text("\n")
    assert f"[threatstack] api_key: {file} is empty: write it there" in wrong(daemon)


def test_a_password_with_percent_signs(new_daemon, api):
    assert new_daemon(server__webhook_token="50%(x)s#;").post({"alerts": []}, token="50%(x)s#;")[0] == 200


def test_the_queue_is_in_the_state_directory(new_daemon, tmp_path):
    daemon = new_daemon(start=False)
    daemon.environment["STATE_DIRECTORY"] = tmp_path
    daemon.start()
    assert (tmp_path / "queue.db").stat().st_mode & 0o777 == 0o600


def test_https(new_daemon, tmp_path):
    import ssl

    authority = trustme.CA()
    pem = tmp_path / "both.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    daemon = new_daemon(server__tls_certificate=pem, server__tls_key=pem)
    assert daemon.logged("https://")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    import http.client

    connection = http.client.HTTPSConnection("localhost", daemon.address[1], context=context)
    # A handshake that never ends keeps nobody waiting: it is in its connection's own thread.
    import socket

    with socket.create_connection(daemon.address):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert response.status == 200
        response.read()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    connection.close()
    connection.request("GET", "/healthz")
    assert connection.sock.version() == "TLSv1.2"
    connection.close()


def test_a_handshake_that_never_ends_is_ended(new_daemon, tmp_path):
    import socket

    pem = tmp_path / "both.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    daemon = new_daemon(server__tls_certificate=pem, server__tls_key=pem, server__request_timeout="1")
    with socket.create_connection(daemon.address, 15) as sock:
        sock.sendall(b"\x16\x03\x01")
        assert sock.recv(100) == b""


def test_a_key_that_does_not_fit_its_certificate(new_daemon, tmp_path):
    for name in ("a", "b"):
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / name)
    line = wrong(new_daemon(start=False, server__tls_certificate=tmp_path / "a", server__tls_key=tmp_path / "b"))
    assert "tls_certificate, tls_key" in line


def test_ts3d_conf_says_what_the_table_says():
    """Every option, in the table's order, commented out, with its default, after a comment that holds its meaning."""
    text = (ROOT / "ts3d.conf").read_text()
    listed, section, comment = [], "", ""
    for line in text.splitlines():
        if match := re.fullmatch(r"\[(.+)\]", line):
            section, comment = match[1], ""
        elif match := re.fullmatch(r"#([a-z_]+) =(.*)", line):
            listed.append((section, match[1], match[2].strip()))
            option = next(o for o in ts3d.OPTIONS if o[:2] == (section, match[1]))
            assert option.help in comment, f"{option.name}: {option.help}"
            comment = ""
        elif line.startswith("#"):
            comment += " ".join(line.lstrip("#").split()) + " "
            comment = comment.replace("  ", " ")
        else:
            assert line == "", line
            comment = ""
    assert listed == [(o.section, o.name, o.default or "") for o in ts3d.OPTIONS]
    for option in ts3d.OPTIONS:
        assert not option.secret or f"{option.name}_file" in text


def test_ts3d_conf_is_valid_and_means_the_defaults(monkeypatch):
    for name in ts3d.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    config = ts3d.load_config(str(ROOT / "ts3d.conf"))
    assert (config.listen, config.wait, config.max_size) == (("127.0.0.1", 8080), 2, 1 << 30)


def test_usage():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, TS3D, *arguments], capture_output=True, text=True, check=False, env=environment()
        )

    assert run("--version").stdout.startswith("ts3d ")
    assert "serve" in run("--help").stdout
    assert run("nonsense").returncode == 2
    assert run("--nonsense").returncode == 2


def test_the_file_is_a_script_with_metadata():
    head = TS3D.read_text()[:400]
    assert "SPDX-License-Identifier: MIT" in head
    assert re.search(r'# /// script\n# requires-python = ">=3.10"\n# dependencies = \["boto3>=1.26"\]\n# ///\n', head)


def test_check(new_daemon, s3, api):
    daemon = new_daemon(start=False)
    result = daemon.run("check")
    assert result.returncode == 0, result
    lines = [line.split()[:2] for line in result.stdout.splitlines()]
    assert lines == [["ok", name] for name in ("configuration", "queue", "credentials", "s3", "threatstack", "clock")]
    assert list(s3.objects()) == ["ts3d-check"]
    assert api.paths() == ["/api/v1/alerts?count=1"]
    assert not daemon.queue.exists()
    daemon.start()
    assert "0 queued" in daemon.run("check").stdout
    assert list(s3.objects()) == ["ts3d-check"]


@pytest.mark.parametrize(
    ("options", "name", "says"),
    [
        ({"s3__bucket": "elsewhere"}, "s3", "NoSuchBucket"),
        ({"s3__endpoint_url": "http://127.0.0.1:9"}, "s3", "Could not connect"),
        ({"threatstack__api_key": "wrong"}, "threatstack", "api_key"),
        ({"threatstack__base_url": "http://127.0.0.1:9"}, "threatstack", "refused"),
        ({"queue__path": "/nowhere/queue.db"}, "queue", "/nowhere"),
        ({"server__wait": "x"}, "configuration", "[server] wait"),
        ({"s3__bucket": None}, "configuration", "[s3] bucket"),
        ({"server__listen": "0.0.0.0:0", "server__webhook_token": None}, "configuration", "webhook_token"),
        ({"put_object__ACl": "x"}, "s3", "did you mean ACL?"),
    ],
)
def test_check_says_what_is_wrong(new_daemon, options, name, says):
    result = new_daemon(start=False, **options).run("check")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert result.returncode == 1
    assert result.stderr == ""
    assert line.split()[1] == name
    assert says in line


def test_if_none_match_leaves_what_is_there(new_daemon, tmp_path):
    """On moto: rclone's S3 has no conditional writes."""
    import boto3

    if "IfNoneMatch" not in str(
        boto3.client("s3", region_name="us-east-1").meta.service_model.operation_model("PutObject").input_shape.members
    ):
        pytest.skip(f"boto3 {boto3.__version__} has no IfNoneMatch")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket="evidence")
    daemon = new_daemon(s3__endpoint_url=f"http://{host}:{port}", put_object__IfNoneMatch="*")
    for severity in (1, 2):
        answer = daemon.post({"alerts": [alert(0, severity=severity)]})[1]["alerts"]
        assert answer == [{"id": "alert-000000", "state": "archived"}]
    body = client.get_object(Bucket="evidence", Key="webhooks/2017/01/17/13/51/alert-000000")["Body"].read()
    assert b'"severity": 1' in body
    server.stop()
    until(lambda: daemon.health()["queued"] == 0)
