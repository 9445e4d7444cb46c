"""The configuration: what is wrong is said in one line, with exit 78, and ts3d.conf says the same as the table."""

import platform
import re
import socket
import sqlite3
import ssl
import subprocess
import sys

import boto3
import pytest
import threatstack
import trustme
from conftest import BUCKET, ROOT, TOKEN, TS3D, alert, aws_client, environment, keys_of, until
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from test_http import trickle

import ts3d

LEAVE = {"server__webhook_token": None}


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    """Of the configurations that tests load in this process."""
    monkeypatch.setattr(ts3d, "SECRETS", [])


def without_secrets(line):
    assert not [secret for secret in (TOKEN, threatstack.KEY) if secret in line]
    return line


def mistake(daemon):
    """What is said of its configuration, found as `serve` does it, but in this process, which is quicker."""
    with pytest.raises(ts3d.ConfigError) as raised:
        load(daemon)
    return without_secrets(ts3d.printable(str(raised.value)))


def load(daemon):
    """Its configuration, for which an S3 client could be made."""
    config = ts3d.load_config(str(daemon.config))
    ts3d.require_upstreams(config)
    ts3d.S3(config).client()
    return config


def in_a_file(daemon, option, text):
    """The daemon, with a secret in a file instead."""
    file = daemon.folder / "secrets" / "secret"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    daemon.set(**{option: None, f"{option}_file": file.name})
    return daemon


def wrong(daemon):
    """Start it, expect exit 78, and return the one line that it says."""
    result = daemon.run("serve")
    assert (result.returncode, result.stdout) == (78, ""), result
    # What only boto3 knows is found when the daemon is up already, so that there may be log lines before.
    *_, line = lines = result.stderr.splitlines()
    assert [line for line in lines if not re.match("....-..-.. ", line)] == [line]
    assert line.startswith("ts3d: ")
    return without_secrets(line)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"server__listen": "8080"}, ["[server] listen = '8080'", "HOST:PORT"]),
        ({"server__listen": "127.0.0.1:65536"}, ["[server] listen = '127.0.0.1:65536'"]),
        ({"server__wait": "31"}, ["[server] wait = '31'", "0 to 30"]),
        ({"server__max_body": "8 megabytes"}, ["[server] max_body = '8 megabytes'", "K M G T"]),
        ({"server__webhook_token": ""}, ["[server] webhook_token", "empty"]),
        ({"server__max_connections": "0"}, ["[server] max_connections = '0'"]),
        ({"server__tls_key": "x.pem"}, ["[server] tls_certificate is not set"]),
        ({"server__tls_certificate": "no.pem", "server__tls_key": "no.pem"}, ["[server] tls_certificate", "no.pem"]),
        ({"threatstack__auth": "basic"}, ["[threatstack] auth = 'basic'", "key or hawk"]),
        ({"threatstack__base_url": "ftp://x/"}, ["[threatstack] base_url = 'ftp://x/'"]),
        ({"threatstack__api_key": None}, ["[threatstack] api_key is not set"]),
        ({"threatstack__api_key": "two words"}, ["[threatstack] api_key"]),
        ({"threatstack__api_key_file": "api_key"}, ["api_key", "api_key_file", "both"]),
        ({"threatstack__events": "maybe"}, ["[threatstack] events = 'maybe'"]),
        ({"threatstack__timeout": "0"}, ["[threatstack] timeout = '0'"]),
        ({"s3__bucket": None}, ["[s3] bucket is not set"]),
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
        ({"queue__max_size": "0"}, ["[queue] max_size = '0'"]),
        ({"archive__workers": "many"}, ["[archive] workers = 'many'"]),
        ({"archive__workers": "1025"}, ["[archive] workers = '1025'", "not within 0 to 1024"]),
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
    line = mistake(new_daemon(start=False, **options))
    for part in says:
        assert part.lower() in line.lower()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("threatstack__api_key", "two words", ["[threatstack] api_key"]),
        ("server__listen", "192.0.2.1:8080", ["[server] listen", "192.0.2.1:8080"]),
        *(("queue__path", path, [path, "[queue] path"]) for path in ("/nowhere/queue.db", "/etc/hosts/queue.db")),
        *(("queue__path", path, [path, "[queue] path", "written"]) for path in ("/proc/queue.db", "/sys/queue.db")),
        ("queue__path", "/etc", ["/etc", "[queue] path", "directory"]),
        ("put_object__StorageClas", "x", ["[s3:put_object]", "StorageClas", "Did you mean StorageClass?"]),
    ],
)
def test_what_is_wrong_ends_the_daemon(new_daemon, option, value, says):
    """Whenever it is found: when the file is read, when the daemon listens, when boto3 has been imported."""
    line = wrong(new_daemon(start=False, **{option: value}))
    for part in says:
        assert part in line


def test_a_number_below_zero_is_out_of_range(new_daemon):
    """It is a number all the same: the message has the range."""
    for option in (
        *"server__wait server__max_body server__request_timeout server__keepalive_timeout".split(),
        *"server__max_connections threatstack__timeout queue__max_size archive__workers archive__give_up_after".split(),
    ):
        line = mistake(new_daemon(start=False, **{option: "-1"}))
        assert re.search(rf"{option.partition('__')[2]} = '-1': not within \S+ to \S+", line), line


@pytest.mark.parametrize("option", ["webhook_token", "metrics_token"])
def test_a_token_that_is_short_or_breaks_a_url(new_daemon, option):
    """It is pasted into a URL as it is: RFC 6750's characters alone pass there unchanged."""
    tokens = {f"open{character}{TOKEN}": "URL" for character in "&%?;:@,'(!*\\\u00e9"}
    tokens |= {"fifteen-letters": "16", "alert": "16", f"{TOKEN}\n  short": "16", f"{TOKEN}#": "URL"}
    for token, says in tokens.items():
        daemon = new_daemon(start=False, **{f"server__{option}": token})
        for line in (mistake(daemon), mistake(in_a_file(daemon, f"server__{option}", token.replace(" ", "")))):
            assert f"[server] {option}" in line
            assert says in line


def test_every_character_that_a_token_may_have(new_daemon):
    token = "ABYZabyz0189-._~+/=="
    daemon = new_daemon(server__webhook_token=token, archive__workers="0")
    assert daemon.post({"alerts": []}, token)[0] == 200
    # As pasted behind the URL, and as programs that escape query strings send it.
    for shown in (token, token.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")):
        assert daemon.request("POST", f"/api/v1/s3/alert?token={shown}", b'{"alerts": []}')[0] == 200


TEXTS = {
    "server__webhook_token": TOKEN,
    "server__metrics_token": TOKEN[::-1],
    "server__tls_certificate": "server.pem",
    "server__tls_key": "server.pem",
    "threatstack__api_key": "another-key",
    "threatstack__user_id": threatstack.USER,
    "threatstack__organization_id": threatstack.ORGANIZATION,
    "s3__prefix": "some/prefix",
    "s3__region": "eu-west-1",
    "queue__path": "queue.db",
    "put_object__StorageClass": "STANDARD_IA",
    "put_object__Tagging": "a=b",
}
QUOTED = "a value has no quotes around it and no comment after it"


@pytest.mark.parametrize(
    ("option", "form"),
    [
        *((option, form) for option in TEXTS for form in ('"{}"', "{} # mine")),
        *(("s3__prefix", form) for form in ("'{}'", "{} ; mine", '"" # mine')),
    ],
)
def test_neither_quotes_nor_comments_are_part_of_a_value(new_daemon, option, form):
    """Nor is the value without them what was written: an INI file has neither."""
    line = mistake(new_daemon(start=False, **{option: form.format(TEXTS[option])}))
    assert option.partition("__")[2] in line
    assert QUOTED in line


@pytest.mark.parametrize("option", ["server__webhook_token", "threatstack__api_key"])
def test_nor_of_a_secret_in_a_file(new_daemon, option):
    daemon = new_daemon(start=False)
    for form in ('"{}"', "'{}'", "{} # mine"):
        line = mistake(in_a_file(daemon, option, form.format(TEXTS[option]) + "\n"))
        assert option.partition("__")[2] in line
        assert QUOTED in line


def test_a_value_may_hold_what_looks_alike(new_daemon, s3, api):
    """Blanks, a # that begins no comment, an apostrophe, percent signs; JSON has quotes of its own."""
    daemon = new_daemon(start=False, s3__prefix="it's a#b/c;d", put_object__Metadata='{"a": "b # c"}')
    (daemon.folder / "a queue's").mkdir()
    daemon.set(queue__path=daemon.folder / "a queue's" / "queue#1.db", threatstack__api_key="50%(x)s#;%")
    daemon.start().post({"alerts": [alert(0)]})
    assert {key.rpartition("/webhooks/")[0] for key in until(s3.objects)} == {"it's a#b/c;d"}
    assert (daemon.folder / "a queue's" / "queue#1.db").exists()
    assert until(lambda: api.calls)[0][2]["Authorization"] == "50%(x)s#;%"


ARN = "arn:aws:s3:eu-west-1:123456789012"


def test_boto3s_own_forms_of_bucket(new_daemon):
    for bucket in (
        "my.evidence-1",
        "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap",
        f"{ARN}:accesspoint/evidence",
        f"{ARN}:accesspoint:evidence",
        "arn:aws-us-gov:s3:us-gov-west-1:123456789012:accesspoint/evidence",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/evidence",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01ac5d28a6a232904/accesspoint/evidence",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01ac5d28a6a232904:accesspoint:evidence",
        "evidence-metadata-ygg4ebhfsxqy4ckyvzhfn9ea5tkdpusw2b-s3alias",
    ):
        assert load(new_daemon(start=False, s3__bucket=bucket, s3__endpoint_url=None)).bucket == bucket


def test_a_buckets_arn_is_not_one_of_them(new_daemon):
    """It is what the console copies; boto3 takes it nowhere."""
    result = new_daemon(start=False, s3__bucket="arn:aws:s3:::evidence").run("check")
    assert re.search("^FAIL  (configuration|s3) .*arn:aws:s3:::evidence", result.stdout, re.MULTILINE)


def test_a_bucket_that_is_in_the_endpoint_too(new_daemon):
    """Each key would begin with the bucket's name once more, inside the bucket."""
    for url, instead in (
        ("https://evidence.s3.eu-west-1.amazonaws.com", "https://s3.eu-west-1.amazonaws.com"),
        ("https://evidence.s3.amazonaws.com/", "https://s3.amazonaws.com"),
        ("https://evidence.s3.us-west-000.backblazeb2.com", "https://s3.us-west-000.backblazeb2.com"),
        ("http://127.0.0.1:9000/evidence", "http://127.0.0.1:9000"),
        ("https://s3.eu-west-1.amazonaws.com/evidence/", "https://s3.eu-west-1.amazonaws.com"),
    ):
        line = mistake(new_daemon(start=False, s3__endpoint_url=url))
        assert "[s3] endpoint_url" in line
        assert re.search(rf"{re.escape(instead)}(?![/\w])", line), line
    # A host that is not a store's may be named like its bucket.
    assert load(new_daemon(start=False, s3__bucket="minio", s3__endpoint_url="https://minio.example.com"))


def test_what_is_no_ini_file(new_daemon):
    daemon = new_daemon(start=False)
    for text, says in (
        (b"listen = x\n", "line 1"),
        (b"[server]\nwebhook_token open-sesame\n", "line 2"),
        (b"[server]\nwait = 1\nwait = 2\n", "line 3"),
        (b"[server]\n[server]\n", "line 2"),
        (b"[server]\nwait = \xff\n", "UTF-8"),
        (b"[DEFAULT]\nwait = 1\n", "[DEFAULT]"),
        (f"[server]\nwebhook_token = {TOKEN}\nc2VjcmV0c2VjcmV0=\n".encode(), "not indented"),  # a second token
    ):
        daemon.config.write_bytes(text)
        line = mistake(daemon)
        assert str(daemon.config) in line
        assert says in line
        assert not re.search("sesame|c2V", line)


def test_secrets_that_contain_each_other_are_redacted_whole(new_daemon):
    daemon = new_daemon(server__webhook_token="{0}\n  {0}-two\n  {0}-t".format("sesame-" * 3), archive__workers="0")
    daemon.request("GET", "/x/{0}-two/{0}/{0}-t/x".format("sesame-" * 3))
    until(lambda: daemon.logged(r"/x/\*\*\*/\*\*\*/\*\*\*/x"))


def test_a_short_secret_is_not_searched_for(new_daemon):
    """Or `k` would be taken out of each bucket's name."""
    daemon = new_daemon(start=False, threatstack__api_key="k", threatstack__user_id="in", s3__bucket="bucket-in-london")
    result = daemon.run("check")
    assert "bucket-in-london" in result.stdout
    assert "***" not in result.stdout


def test_a_broken_boto3(new_daemon):
    daemon = new_daemon(start=False)
    package = daemon.folder / "broken" / "boto3"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no luck')")
    daemon.environment["PYTHONPATH"] = package.parent
    assert "no luck" in wrong(daemon)
    result = daemon.run("check")
    assert result.returncode == 1
    assert [line.split()[:2] for line in result.stdout.splitlines()][3:] == [
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
    daemon = new_daemon(archive__workers="0", **LEAVE)
    assert daemon.post({"alerts": [alert(0)]}, token=None)[0] == 200


def test_what_another_daemon_uses(new_daemon):
    daemon = new_daemon(archive__workers="0")
    line = wrong(new_daemon(start=False, server__listen=f"127.0.0.1:{daemon.address[1]}"))
    assert "[server] listen" in line
    assert "in use" in line
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
    assert re.search("THREATSTACK_BASE_URL.* = 'x'", wrong(daemon))


@pytest.mark.parametrize("place", ["credentials", "secrets"])
def test_secrets_in_files(new_daemon, place):
    daemon = new_daemon(start=False, threatstack__api_key=None, threatstack__api_key_file="api_key", **LEAVE)
    daemon.set(server__webhook_token_file="tokens", threatstack__user_id_file="user_id")
    folder = daemon.folder / place
    folder.mkdir()
    if place == "credentials":
        daemon.environment["CREDENTIALS_DIRECTORY"] = folder
    assert str(folder / "tokens") in wrong(daemon)
    write_secrets(folder, "\n", "\n\n")
    daemon.start()
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    assert daemon.post({"alerts": []}, token=f"{TOKEN}-new")[0] == 200
    assert daemon.post({"alerts": []}, token="")[0] == 401
    # Blank lines around a secret do not belong to it, however they end.
    if place == "secrets":
        for start, end in (("", ""), ("", "\r\n"), ("", "\n"), ("\r\n\r\n", "\r\n\r\n")):
            write_secrets(folder, start, end)
            config = load(daemon)
            assert (config.api_key, config.webhook_token) == (threatstack.KEY, f"{TOKEN}\n{TOKEN}-new")


def write_secrets(folder, start, end):
    (folder / "api_key").write_text(f"{start}{threatstack.KEY}{end}")
    (folder / "user_id").write_text(end)
    (folder / "tokens").write_text(f"{start}{TOKEN}\n{TOKEN}-new{end}")


def test_an_empty_token_file_opens_no_door(new_daemon):
    for text in ("", "\n", "\n\r\n", " \n"):
        daemon = in_a_file(new_daemon(start=False), "server__webhook_token", text)
        assert "webhook_token_file = 'secret'" in mistake(daemon)


def test_an_empty_secret_is_asked_for_where_it_belongs(new_daemon):
    daemon = in_a_file(new_daemon(start=False), "threatstack__api_key", "\n")
    assert re.search(rf"\[threatstack\] api_key\b.*({daemon.folder}/secrets/secret|api_key_file)", mistake(daemon))


def test_the_queue_is_in_the_state_directory(new_daemon, tmp_path):
    daemon = new_daemon(start=False, archive__workers="0")
    daemon.environment["STATE_DIRECTORY"] = tmp_path
    daemon.start()
    assert (tmp_path / "queue.db").stat().st_mode & 0o777 == 0o600


def test_a_handshake_that_never_ends_is_ended(new_daemon, certificate):
    daemon = new_daemon(server__request_timeout="1", archive__workers="0", **certificate.options)
    with socket.create_connection(daemon.address, 15) as sock:
        sock.sendall(b"\x16\x03\x01")
        assert sock.recv(100) == b""


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_request_that_is_late_is_answered_over_https_too(new_daemon, certificate, version):
    """Its bytes come now and then: each alone is in time."""
    daemon = new_daemon(server__request_timeout="1", archive__workers="0", **certificate.options)
    certificate.context.minimum_version = certificate.context.maximum_version = ssl.TLSVersion[version]
    plain = socket.create_connection(daemon.address, 15)
    with certificate.context.wrap_socket(plain, server_hostname="localhost") as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert trickle(sock, b"X").startswith(b"HTTP/1.1 408 ")


def test_a_certificate_that_cannot_be_used(new_daemon, tmp_path):
    """The message names the file and what is wrong there, in words: OpenSSL's own are `PEM lib`."""
    both = trustme.CA().issue_cert("localhost")
    cert, key = both.cert_chain_pems[0].bytes(), both.private_key_pem.bytes()
    der = ssl.PEM_cert_to_DER_cert(cert.decode())
    others = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
    encryption = BestAvailableEncryption(b"a-password")
    locked = load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    files = {"cert": tmp_path / "cert", "key": tmp_path / "key"}
    daemon = new_daemon(start=False, server__tls_certificate=files["cert"], server__tls_key=files["key"])
    for named, contents, says in (
        ("cert", (der, key), "(DER|PEM)"),
        ("key", (cert, der), "(DER|PEM)"),
        ("key", (cert, locked), "(encrypted|password|passphrase)"),
        ("cert", (key, cert), "(swapped|(private )?key)"),
        ("key", (cert, others), "(match|belong|fit|another)"),
        ("cert", (b"", key), "PEM"),
        ("key", (cert, b""), "PEM"),
        ("cert", (None, key), "no such file"),
        ("key", (cert, None), "no such file"),
        ("cert", (key, key), "PEM"),
    ):
        for file, content in zip(files.values(), contents, strict=True):
            file.write_bytes(content or b"")
            if content is None:
                file.unlink()
        line = mistake(daemon)
        assert str(files[named]) in line
        words = line.partition(str(files["key"]))[2]
        assert re.search(f"(?i){says}", words), line
        known = "certificate chain|private key|without a password|PEM file|no such file|mismatch"
        assert re.search(f"(?i){known}", words), line


def test_ts3d_conf_says_what_the_table_says():
    """Every option, in the table's order, commented out, with its default, after a comment that holds its meaning."""
    text = (ROOT / "ts3d.conf").read_text()
    helps = {f"{option.section}.{option.name}": option.meaning for option in ts3d.OPTIONS}
    listed, section, comment = [], "", ""
    for line in text.splitlines():
        if match := re.fullmatch(r"\[(.+)\]", line):
            section, comment = match[1], ""
        elif match := re.fullmatch(r"#([a-z_]+) =(.*)", line):
            listed.append((section, match[1], match[2].strip()))
            name = f"{section}.{match[1]}"
            assert helps[name] in comment, f"{name}: {helps[name]}"
            comment = ""
        elif line.startswith("#"):
            comment += " ".join(line.lstrip("#").split()) + " "
            comment = comment.replace("  ", " ")
        else:
            assert line == "", line
            comment = ""
    assert listed == [(o.section, o.name, o.default) for o in ts3d.OPTIONS]
    for option in ts3d.OPTIONS:
        assert not option.secret or f"{option.name}_file" in text


def test_ts3d_conf_is_valid_and_means_the_defaults(monkeypatch):
    for name in ts3d.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    config = ts3d.load_config(str(ROOT / "ts3d.conf"))
    assert (config.wait, config.max_size, config.auth) == (2, 1 << 30, "key")


def test_usage():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, TS3D, *arguments], capture_output=True, text=True, check=False, env=environment()
        )

    version = run("--version").stdout
    for part in ("ts3d 0.2.0", platform.python_version(), boto3.__version__, sqlite3.sqlite_version):
        assert part in version
    assert "serve" in run("--help").stdout
    assert run("nonsense").returncode == 2
    assert run("--nonsense").returncode == 2
    # Before the command and behind it, by its long name too.
    for option in (["-c", "x.conf"], ["--config", "x.conf"], ["--config=x.conf"]):
        for arguments in ([*option, "status"], ["status", *option]):
            chosen = ts3d.parse_arguments(arguments)
            assert (chosen["run"], chosen["config"]) == (ts3d.status, "x.conf")


def test_the_file_is_a_script_with_metadata():
    head = TS3D.read_text()[:400]
    assert "SPDX-License-Identifier: MIT" in head
    assert re.search(r'# /// script\n# requires-python = ">=3.11"\n# dependencies = \["boto3>=1.26"\]\n# ///\n', head)


def test_if_none_match_leaves_what_is_there(new_daemon, moto):
    """On moto: rclone's S3 has no conditional writes."""
    client = aws_client("s3", moto)
    if "IfNoneMatch" not in client.meta.service_model.operation_model("PutObject").input_shape.members:
        pytest.skip(f"boto3 {boto3.__version__} has no IfNoneMatch")
    daemon = new_daemon(s3__endpoint_url=moto, put_object__IfNoneMatch="*")
    for severity in (1, 2):
        answer = daemon.post({"alerts": [alert(0, severity=severity)]})[1]["alerts"]
        assert answer == [{"id": "alert-000000", "state": "archived"}]
    body = client.get_object(Bucket=BUCKET, Key="webhooks/2017/01/17/13/51/alert-000000")["Body"].read()
    assert b'"severity": 1' in body
    until(lambda: daemon.health()["queued"] == 0)
