"""An administrator's day: what `check`, `status` and `retry` say and do, alone, as whoever runs ts3d would use them."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import sqlite3
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import boto3
import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, TOKEN, Daemon, alert, free_port, keys_of, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from moto.server import ThreadedMotoServer
from test_durability import Clock

import ts3d

NOTHING = "Nothing stands in the way."
QUICK = {"server__wait": "0", "threatstack__timeout": "1"}
SECRETS = (TOKEN, threatstack.KEY, threatstack.USER, AWS["AWS_SECRET_ACCESS_KEY"])
DAY = timedelta(days=1)
OLD_BOTO3 = tuple(map(int, boto3.__version__.split(".")[:2])) < (1, 28)


def said_by(result):
    """What a command printed, which is no traceback and holds no secret."""
    both = result.stdout + result.stderr
    assert "Traceback" not in both, both
    assert "internal error" not in both, both
    for secret in SECRETS:
        assert secret not in both
    return result.stdout


def check(daemon):
    """What `check` found: (verdict, text) by line, and its exit code, which must fit them."""
    result = daemon.run("check")
    lines = {}
    for line in said_by(result).splitlines():
        verdict, name, text = line[:6].rstrip(), line[6:20].rstrip(), line[20:]
        assert verdict in ("ok", "FAIL"), result
        lines[name] = verdict, text
    assert result.returncode == int(any(verdict == "FAIL" for verdict, _ in lines.values())), result
    return lines


def failures(daemon):
    """The lines of `check` that are not ok."""
    return {name: text for name, (verdict, text) in check(daemon).items() if verdict != "ok"}


def status(daemon, *arguments):
    """What `status` says, in lines of at most 80 columns."""
    result = daemon.run("status", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    text = said_by(result)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    return text


def flat(text):
    """Without its line breaks."""
    return " ".join(text.split())


def facts(daemon, *arguments):
    """What `status --json` says."""
    result = daemon.run("status", "--json", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(said_by(result))


def glance(daemon):
    """The same, in this process, as it costs less to look again and again."""
    secrets, output = list(ts3d.SECRETS), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert ts3d.main(["status", "--json", "-c", str(daemon.config)]) == 0
    ts3d.SECRETS[:] = secrets
    return json.loads(output.getvalue())


def causes(daemon):
    return {cause["type"]: cause for cause in glance(daemon)["causes"]}


def post(daemon, *alerts):
    """POST a webhook, by HTTPS where the daemon speaks that; the status."""
    if not daemon.options.get(("server", "tls_certificate")):
        return daemon.post({"alerts": alerts})[0]
    connection = http.client.HTTPSConnection(*daemon.address, context=ssl._create_unverified_context())
    body = json.dumps({"alerts": alerts})
    connection.request("POST", "/api/v1/s3/alert", body, {"Authorization": f"Bearer {TOKEN}"})
    code = connection.getresponse().status
    connection.close()
    return code


def settled(daemon):
    """Wait until nothing is queued, or in the way."""
    until(lambda: (now := glance(daemon))["queued"] == 0 and now["causes"] == [], what="clear way")
    assert NOTHING in status(daemon)


# ---------------------------------------------------------------------------------------------------------------------
# Ten faults: each is injected into a daemon that has an alert to archive, found by `check` and `status`, and mended
# ---------------------------------------------------------------------------------------------------------------------


class World:
    """What there is to break; the daemon is not started yet."""

    def __init__(self, daemon, s3, api, folder):
        self.daemon, self.s3, self.api, self.folder = daemon, s3, api, folder


def option(name, wrong):
    """An option that is wrong until it is mended in the configuration, with a restart."""

    @contextlib.contextmanager
    def fault(world):
        section, _, of_section = name.partition("__")
        right = world.daemon.options.get((section, of_section))
        world.daemon.set(**{name: wrong})
        world.daemon.start()
        yield
        world.daemon.set(**{name: right})
        assert world.daemon.stop() == 0
        world.daemon.start()

    return fault


@contextlib.contextmanager
def wrong_secret(world):
    """AWS's, as the server sees it that knows the right one."""
    world.daemon.environment["AWS_SECRET_ACCESS_KEY"] = "another"
    world.daemon.start()
    yield
    world.daemon.environment["AWS_SECRET_ACCESS_KEY"] = AWS["AWS_SECRET_ACCESS_KEY"]
    assert world.daemon.stop() == 0
    world.daemon.start()


@contextlib.contextmanager
def no_permission(world):
    bucket = threatstack.Faulty(mode=s3_says(403, "AccessDenied", DENIED.format("s3:PutObject")))
    try:
        world.daemon.set(s3__endpoint_url=bucket.url)
        world.daemon.start()
        yield
        bucket.mode = None
        settled(world.daemon)
        world.daemon.set(s3__endpoint_url=world.s3.url)
        assert world.daemon.stop() == 0
        world.daemon.start()
    finally:
        bucket.stop()


@contextlib.contextmanager
def s3_down(world):
    world.s3.stop()
    world.daemon.start()
    yield
    world.s3.start()


@contextlib.contextmanager
def threat_stack_down(world):
    port = world.api.port
    world.api.stop()
    world.daemon.start()
    yield
    world.api.__init__(port)


@contextlib.contextmanager
def rate_limited(world):
    world.api.mode = lambda handler: handler.send(429, b"slow down", [("x-rate-limit-remaining", "0")])
    world.daemon.start()
    yield
    world.api.mode = None


@contextlib.contextmanager
def disk_full(world):
    place = world.folder / "disk"
    with small_disk(place):
        world.daemon.set(queue__path=place / "queue.db")
        world.daemon.start()
        fill(place)
        yield
        (place / "filler").unlink()
        until(lambda: world.daemon.request("GET", "/healthz")[0] == 200)
        post(world.daemon, alert(0))
        settled(world.daemon)
        world.daemon.kill()
        world.daemon.set(queue__path=None)
        world.daemon.start()


@contextlib.contextmanager
def clock_wrong(world):
    clock = Clock(world.folder, world.daemon, FAKETIME_DONT_FAKE_MONOTONIC="1")
    clock.set("+2h")
    world.daemon.start()
    yield
    clock.set("+0")


@contextlib.contextmanager
def certificate_expired(world):
    pem, ca = world.folder / "both.pem", trustme.CA()
    over = ca.issue_cert("localhost", not_after=datetime.now(timezone.utc) - DAY)
    over.private_key_and_cert_chain_pem.write_to_path(pem)
    world.daemon.set(server__tls_certificate=pem, server__tls_key=pem)
    world.daemon.start()
    yield
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    assert world.daemon.stop() == 0
    world.daemon.start()


@contextlib.contextmanager
def poisoned(world):
    world.api.modes["alert-000000"] = 500
    world.daemon.start()
    yield
    world.api.modes.clear()


@contextlib.contextmanager
def small_disk(place):
    """A disk of its own, which can be filled."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40M,mode=755", "tmpfs", place]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def fill(place):
    """Take the disk's last byte."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class Fault(NamedTuple):
    name: str
    inject: Callable[[World], Any]
    line: str | None  # of `check`, that fails
    says: str  # there
    type: str | None  # of the cause in `status`
    message: str  # there
    options: dict = {}
    posted: int = 200
    queued: int = 2  # of two alerts, in the end


FAULTS = [
    Fault(
        "wrong key",
        option("threatstack__api_key", "another"),
        "threatstack",
        r"is \[threatstack\] api_key right\?.*401",
        "threatstack_unauthorized",
        r"threatstack is held: .*is \[threatstack\] api_key right\?",
    ),
    Fault(
        "wrong AWS key",
        wrong_secret,
        "s3",
        "are the credentials right where boto3 looks for them.*SignatureDoesNotMatch",
        "s3_SignatureDoesNotMatch",
        "s3 is held: .*credentials right",
    ),
    Fault(
        "wrong bucket",
        option("s3__bucket", "elsewhere"),
        "s3",
        r"is \[s3\] bucket right\?.*NoSuchBucket",
        "s3_NoSuchBucket",
        r"s3 is held: .*is \[s3\] bucket right\?",
    ),
    Fault(
        "no permission",
        no_permission,
        "s3",
        r"it takes s3:PutObject on evidence/\*.*not authorized to perform: s3:PutObject",
        "s3_AccessDenied",
        r"it takes s3:PutObject on evidence/\*",
    ),
    Fault(
        "S3 down",
        s3_down,
        "s3",
        "does this machine reach it.*Could not connect to the endpoint URL",
        "s3_EndpointConnectionError",
        "s3 is held: .*Could not connect",
    ),
    Fault(
        "Threat Stack down",
        threat_stack_down,
        "threatstack",
        "does this machine reach it.*Connection refused",
        "threatstack_unreachable",
        "threatstack is held: .*refused",
    ),
    Fault(
        "rate limited",
        rate_limited,
        "threatstack",
        "too many calls.*it passes by itself.*429",
        "threatstack_rate_limited",
        "threatstack is held: .*too many calls",
    ),
    Fault(
        "disk full",
        disk_full,
        "queue",
        "disk has less than 16M free",
        "queue_full|disk_full",
        "less than 16M free",
        posted=503,
        queued=0,
    ),
    Fault(
        "clock wrong",
        clock_wrong,
        "clock",
        "is 7(199|200|201) s ahead of S3's and .*Threat Stack's: set it right, by NTP",
        "s3_RequestTimeTooSkewed",
        "s3 is held: .*is this machine's clock right",
        options=threatstack.HAWK,
    ),
    Fault(
        "certificate expired",
        certificate_expired,
        "certificate",
        r"its last day is \d{4}-\d\d-\d\d, which is over.* Renew it, and restart",
        "tls_certificate",
        r"the certificate of \[server\] tls_certificate has expired",
        queued=0,
    ),
    Fault(
        "poisoned alert",
        poisoned,
        None,
        "",
        "threatstack_500",
        "threatstack_500, since .*: 1 queued, such as alert-000000",
        queued=1,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_ten_faults(new_daemon, s3, api, tmp_path, fault):
    daemon = new_daemon(start=False, **{**QUICK, **fault.options})
    if fault.options:
        daemon.set(threatstack__base_url=f"{api.url}/v2")
    with fault.inject(World(daemon, s3, api, tmp_path)):
        assert post(daemon, alert(0), alert(1)) == fault.posted
        until(
            lambda: any(
                re.fullmatch(fault.type, type_) and ("is held" not in fault.message or "held" in cause)
                for type_, cause in causes(daemon).items()
            ),
            what="cause",
        )
        until(lambda: glance(daemon)["queued"] == fault.queued)
        assert re.search(fault.message, flat(status(daemon)))
        found = check(daemon)
        wrong = {name: text for name, (verdict, text) in found.items() if verdict == "FAIL"}
        if fault.line:
            assert re.search(fault.says, wrong[fault.line]), wrong
        # What is right is not blamed; but a clock that is wrong is seen in what signs with it.
        assert set(wrong) - ({"threatstack", "s3"} if fault.line == "clock" else set()) == {fault.line} - {None}
    assert post(daemon, alert(2)) == 200
    settled(daemon)
    assert failures(daemon) == {}


# ---------------------------------------------------------------------------------------------------------------------
# What new users get wrong: S3's answers that no server here gives
# ---------------------------------------------------------------------------------------------------------------------

DENIED = (
    "User: arn:aws:sts::123456789012:assumed-role/ts3d-instance-role-of-some-length/i-0123456789abcdef0 is not "
    "authorized to perform: {} on resource: &quot;arn:aws:s3:::evidence/ts3d-check&quot; because no identity-based "
    "policy allows the action"
)


def s3_says(status, code, text="because", headers=(), **members):
    """S3's own error. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in members.items())
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{text}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    ).encode()
    return lambda handler: handler.send(status, body, [("Content-Type", "application/xml"), *headers])


def page(status, text=b"<!DOCTYPE html><html><head><meta charset=utf-8></head><body>Log in<br></html>"):
    return lambda handler: handler.send(status, text, [("Content-Type", "text/html")])


@pytest.fixture
def bucket():
    """S3's stand-in."""
    server = threatstack.Faulty()
    yield server
    server.stop()


REGION = "are [s3] region and endpoint_url right?"
KEYS = "are the credentials right where boto3 looks for them?"
ENDPOINT = "is [s3] endpoint_url right"
PUT = "it takes s3:PutObject"


@pytest.fixture
def checked_here(tmp_path, monkeypatch, capsys, api):
    """`check` in this process, which is faster: what is not ok, by line."""
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):  # which ts3d sets, to be unset at the end
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)

    def run(options, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
        monkeypatch.setattr(ts3d, "SECRETS", [])
        options = {
            "threatstack__base_url": f"{api.url}/api/v1",
            "threatstack__api_key": threatstack.KEY,
            "s3__bucket": BUCKET,
            **options,
        }
        daemon = Daemon(tmp_path, **options)
        code = ts3d.main(["check", "-c", str(daemon.config)])
        output = capsys.readouterr().out
        lines = [(line[:4], line[6:20].rstrip(), line[20:]) for line in output.splitlines()]
        wrong = {name: text for verdict, name, text in lines if verdict == "FAIL"}
        assert code == int(bool(wrong))
        assert "internal error" not in output
        for secret in (*SECRETS, "wJalrXUtnFEMI"):
            assert secret not in output
        return wrong, output

    return run


@pytest.mark.parametrize(
    ("answer", "options", "says"),
    [
        (
            s3_says(301, "PermanentRedirect", headers=[("x-amz-bucket-region", "eu-central-1")], Endpoint="x"),
            {},
            "the bucket is in eu-central-1: set [s3] region = eu-central-1",
        ),
        (
            s3_says(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong", Region="eu-west-3"),
            {},
            "the bucket is in eu-west-3: set [s3] region = eu-west-3",
        ),
        (s3_says(301, "PermanentRedirect", Endpoint="x"), {}, REGION),
        (s3_says(400, "IllegalLocationConstraintException"), {}, REGION),
        (lambda handler: handler.send(302, b"", [("Location", "http://x/login")]), {}, REGION),
        (s3_says(404, "NoSuchBucket"), {}, "is [s3] bucket right?"),
        (s3_says(400, "InvalidBucketName"), {}, "is [s3] bucket right?"),
        (s3_says(403, "InvalidAccessKeyId"), {}, KEYS),
        (s3_says(403, "SignatureDoesNotMatch"), {}, KEYS),
        (s3_says(400, "ExpiredToken"), {}, KEYS),
        (s3_says(403, "RequestTimeTooSkewed"), {}, "is this machine's clock right?"),
        (s3_says(403, "AccessDenied", "difference between the request time and the server's"), {}, "clock right?"),
        (s3_says(403, "AccessDenied", DENIED.format("s3:PutObject")), {}, f"{PUT} on evidence/*"),
        (s3_says(403, "AccessDenied"), {"s3__prefix": "a/b"}, f"{PUT} on evidence/a/b/*"),
        (s3_says(403, "AccessDenied"), {"put_object__Tagging": "a=b"}, f"{PUT}, s3:PutObjectTagging on"),
        (s3_says(403, "AccessDenied"), {"put_object__ACL": "private"}, f"{PUT}, s3:PutObjectAcl on"),
        (s3_says(403, "AccessDenied"), {"put_object__GrantRead": "id=1"}, f"{PUT}, s3:PutObjectAcl on"),
        (
            s3_says(403, "AccessDenied"),
            {"put_object__ObjectLockMode": "GOVERNANCE", "put_object__ObjectLockLegalHoldStatus": "ON"},
            f"{PUT}, s3:PutObjectRetention, s3:PutObjectLegalHold on",
        ),
        (
            s3_says(403, "AccessDenied", DENIED.format("kms:GenerateDataKey")),
            {"put_object__ServerSideEncryption": "aws:kms", "put_object__SSEKMSKeyId": "alias/evidence"},
            f"{PUT}, kms:GenerateDataKey (on the key) on",
        ),
        (s3_says(403, "AccessDenied", DENIED.format("kms:GenerateDataKey")), {}, "perform: kms:GenerateDataKey on"),
        (
            s3_says(400, "KMS.NotFoundException", "Key 'arn:x' does not exist"),
            {"put_object__SSEKMSKeyId": "alias/evidence"},
            "is SSEKMSKeyId of [s3:put_object] an enabled symmetric key of the bucket's region?",
        ),
        (s3_says(400, "KMS.DisabledException"), {}, "is SSEKMSKeyId of [s3:put_object] an enabled"),
        (
            s3_says(400, "InvalidRequest", "Bucket is missing Object Lock Configuration"),
            {"put_object__ObjectLockMode": "COMPLIANCE"},
            "has the bucket Object Lock?",
        ),
        (
            s3_says(400, "InvalidArgument", "The retain until date must be in the future!"),
            {"put_object__ObjectLockRetainUntilDate": "2020-01-01T00:00:00Z"},
            "Its own default retention is better than [s3:put_object]'s, whose date passes",
        ),
        (s3_says(400, "InvalidStorageClass"), {"put_object__StorageClass": "COLD"}, "is [s3:put_object] right"),
        (s3_says(405, "MethodNotAllowed"), {}, ENDPOINT),
        (page(405), {}, ENDPOINT),
        (page(403), {}, f"{PUT} on evidence/*"),
        (page(404), {}, ENDPOINT),
        (page(502), {}, ENDPOINT),
        (page(200), {}, ENDPOINT),
    ],
)
def test_what_s3_refuses(checked_here, bucket, answer, options, says):
    bucket.mode = answer
    wrong, _ = checked_here({"s3__endpoint_url": bucket.url, **options})
    assert set(wrong) == {"s3"}, wrong
    assert says in wrong["s3"], wrong
    assert bucket.objects == {}


HAWK = threatstack.HAWK
V1, V2 = ("is [threatstack] api_key right? One of API v1", "One of API v1, that is: one of v2 takes auth = hawk")
OF_V2 = "are [threatstack] user_id, api_key and organization_id right, and of API v2? A key of v1: auth = key"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threatstack__api_key": "another"}, V1),
        ({"threatstack__api_key": "one-of-v2"}, V2),
        ({**HAWK, "threatstack__api_key": "one-of-v1"}, OF_V2),
        ({**HAWK, "threatstack__user_id": "another"}, OF_V2),
        ({**HAWK, "threatstack__organization_id": "another"}, OF_V2),
        ({"threatstack__base_url": "/api/v9/x"}, "is [threatstack] base_url right?"),
        ({**HAWK, "threatstack__base_url": "/v9"}, "is [threatstack] base_url right?"),
        ({**HAWK, "threatstack__base_url": ""}, "is [threatstack] base_url right?"),
    ],
)
@pytest.mark.parametrize("status", [404, "garbage"])
def test_what_threat_stack_refuses(checked_here, s3, api, options, says, status):
    """A wrong path, too, whether that is answered with 404 or with a page; Hawk's probe is at the host's root."""
    path = options.get("threatstack__base_url", "/v2" if "threatstack__auth" in options else "/api/v1")
    if path not in ("/v2", "/api/v1"):
        api.modes["alerts"] = status
    wrong, _ = checked_here({"s3__endpoint_url": s3.url, **options, "threatstack__base_url": api.url + path})
    assert set(wrong) == {"threatstack"}, wrong
    assert says in wrong["threatstack"], wrong


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": "ASIAIOSFODNN7EXAMPLE"}, "env has a temporary key (ASIAIOSFODNN7EXAMPLE) without its"),
        (
            {"AWS_ACCESS_KEY_ID": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
             "AWS_SECRET_ACCESS_KEY": "AKIAIOSFODNN7EXAMPLE"},
            "env has the access key's id for its secret: the two are swapped",
        ),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "boto3 finds no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "Partial credentials found in env"),
        ({"AWS_PROFILE": "nobody"}, "The config profile (nobody) could not be found"),
    ],
)  # fmt: skip
def test_credentials_that_are_none(checked_here, s3, tmp_path, environment, says):
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, HOME=str(tmp_path), **environment)
    assert set(wrong) == {"credentials", "s3"}, wrong
    assert says in wrong["credentials"], wrong
    assert KEYS in wrong["credentials"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("aws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = x\n", "Unable to parse config file"),
        ("[default]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = y\n", 'The source_profile "y"'),
        ("[default]\ncredential_process = /bin/false\n", "Error when retrieving credentials from custom-process"),
    ],
)
def test_a_file_of_credentials_that_is_wrong(checked_here, s3, tmp_path, text, says):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "aws_credentials").write_text(text)
    nothing = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, HOME=str(tmp_path), **nothing)
    assert set(wrong) == {"credentials", "s3"}, wrong
    assert says in wrong["credentials"], wrong
    assert KEYS in wrong["credentials"]


def test_a_secret_in_the_place_of_the_key_is_not_shown(checked_here, s3):
    """Also where it is none of AWS's, so that nobody knows that the two are swapped."""
    swapped = {"AWS_ACCESS_KEY_ID": AWS["AWS_SECRET_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": AWS["AWS_ACCESS_KEY_ID"]}
    wrong, output = checked_here({"s3__endpoint_url": s3.url}, **swapped)
    assert set(wrong) == {"s3"}
    assert "access key ***; who that is could not be asked" in output


@pytest.mark.skipif(OLD_BOTO3, reason="this boto3 does not know AWS_ENDPOINT_URL_STS")
def test_a_role_that_may_not_be_assumed(checked_here, s3, tmp_path, monkeypatch, bucket):
    """botocore asks for it not when it finds it, but when it is used."""

    def refuse(handler):
        error = b"<Code>AccessDenied</Code><Message>not authorized to perform: sts:AssumeRole</Message>"
        handler.send(403, b"<ErrorResponse><Error>%s</Error></ErrorResponse>" % error, [("Content-Type", "text/xml")])

    monkeypatch.setattr(threatstack.Handler, "do_POST", refuse, raising=False)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "aws_credentials").write_text(
        "[default]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = y\n"
        "[y]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = x\n"
    )
    more = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_ENDPOINT_URL_STS": bucket.url}
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, **more)
    assert set(wrong) == {"credentials", "s3"}
    for text in wrong.values():
        assert re.match("S3 .*: An error occurred .AccessDenied. when calling the AssumeRole operation: not", text), (
            text
        )


@pytest.mark.skipif(OLD_BOTO3, reason="this boto3 does not know AWS_ENDPOINT_URL_STS")
def test_aws_is_asked_who_that_is(checked_here, monkeypatch, bucket):
    """Where S3 is AWS's. The proxy, which is none, keeps S3 itself from being asked."""

    def refuse(handler):
        body = (
            b"<ErrorResponse><Error><Code>InvalidClientTokenId</Code><Message>invalid</Message></Error></ErrorResponse>"
        )
        handler.send(403, body, [("Content-Type", "text/xml")])

    monkeypatch.setattr(threatstack.Handler, "do_POST", refuse, raising=False)
    away = {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}", "AWS_ENDPOINT_URL_STS": bucket.url}
    wrong, _ = checked_here({}, **away)
    assert set(wrong) == {"credentials", "s3"}
    assert f"{KEYS}): An error occurred (InvalidClientTokenId)" in wrong["credentials"]


# ---------------------------------------------------------------------------------------------------------------------
# moto: who we are, and IAM
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto():
    """moto's AWS as a server; its address."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client("s3", url).create_bucket(Bucket=BUCKET)
    yield url
    server.stop()


def client(service, url):
    keys = {"aws_access_key_id": AWS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client(service, endpoint_url=url, region_name="us-east-1", **keys)


def test_who_we_are(checked_here, moto):
    wrong, output = checked_here({"s3__endpoint_url": moto})
    assert wrong == {}
    assert re.search(r"^ok +credentials +arn:aws:sts::123456789012:user/moto, from env$", output, re.MULTILINE)


@pytest.mark.parametrize("mode", ["the bucket's default", "an option"])
def test_object_lock(checked_here, moto, mode):
    """A bucket that retains what is written to it: by its own default, or as [s3:put_object] says."""
    s3, bucket = client("s3", moto), f"locked-{len(mode)}"
    s3.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    options = {"s3__endpoint_url": moto, "s3__bucket": bucket}
    if mode == "an option":
        options |= {
            "put_object__ObjectLockMode": "GOVERNANCE",
            "put_object__ObjectLockRetainUntilDate": "2099-01-01T00:00:00Z",
        }
    else:
        rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
        lock = {"ObjectLockEnabled": "Enabled", "Rule": rule}
        s3.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=lock)
    wrong, output = checked_here(options)
    assert not wrong, output
    assert s3.head_object(Bucket=bucket, Key="ts3d-check")["ObjectLockMode"] == "GOVERNANCE"


def test_iam(checked_here, moto):
    """A user without a permission, who gets one, and a secret that is wrong."""
    iam = client("iam", moto)
    iam.create_user(UserName="archivist")
    key = iam.create_access_key(UserName="archivist")["AccessKey"]
    pair = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    policy = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
    options = {"s3__endpoint_url": moto}

    def enforce(calls):
        request = urllib.request.Request(f"{moto}/moto-api/reset-auth", calls, {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).close()

    enforce(b"0")
    try:
        wrong, output = checked_here(options, **pair)
        assert set(wrong) == {"s3"}
        assert f"{PUT} on {BUCKET}/*" in wrong["s3"]
        assert "arn:aws:iam::123456789012:user/archivist, from env" in output
        enforce(b"1")
        iam.put_user_policy(UserName="archivist", PolicyName="p", PolicyDocument=document)
        enforce(b"0")
        assert checked_here(options, **pair)[0] == {}
        wrong, _ = checked_here(options, **{**pair, "AWS_SECRET_ACCESS_KEY": "x" * 40})
        assert KEYS in wrong["s3"]
    finally:
        enforce(b"1000000000")


# ---------------------------------------------------------------------------------------------------------------------
# check, beside the faults
# ---------------------------------------------------------------------------------------------------------------------


def test_each_line_in_order_and_nothing_written(new_daemon, s3, api, tmp_path):
    pem = tmp_path / "both.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    daemon = new_daemon(start=False, log__level="DEBUG", server__tls_certificate=pem, server__tls_key=pem)
    before = sorted(daemon.folder.iterdir())
    found = check(daemon)
    names = ["configuration", "queue", "credentials", "s3", "threatstack", "clock", "certificate"]
    assert list(found) == names
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert found["configuration"][1] == str(daemon.config)
    assert found["credentials"][1].startswith("access key AKIDEXAMPLE; who that is could not be asked (")
    assert re.fullmatch(
        r"this machine's is \d s (ahead of|behind) S3's and \d s (.*) Threat Stack's", found["clock"][1]
    )
    assert list(s3.objects()) == ["ts3d-check"]
    assert api.paths() == ["/api/v1/alerts?count=1"]
    assert sorted(daemon.folder.iterdir()) == before


def test_check_sees_the_path_of_version_2(new_daemon, api):
    daemon = new_daemon(start=False, **threatstack.HAWK, threatstack__base_url=f"{api.url}/v2")
    assert failures(daemon) == {}
    assert api.paths()[0] == "/help/hawk/self-test"
    (query,) = api.queries()
    assert query["status"] == "active"
    assert query["from"] < query["until"]


def test_a_server_that_knows_no_sts_and_answers_with_a_page(checked_here, bucket):
    """Python's own, to a POST: a page that is no XML."""
    wrong, output = checked_here({"s3__endpoint_url": bucket.url})
    assert wrong == {}
    assert "who that is could not be asked (ResponseParserError)" in output


@pytest.mark.parametrize("upstream", ["threatstack", "s3"])
@pytest.mark.parametrize(
    ("days", "says"),
    [
        (-1, "is this machine's clock right.*certificate has expired"),
        (None, "is it the right address.*CERTIFICATE_VERIFY|is .s3. endpoint_url right.*doesn't match"),
    ],
)
def test_an_upstreams_certificate(checked_here, api, bucket, tmp_path, upstream, days, says):
    """One that has expired, and one for another name."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = api if upstream == "threatstack" else bucket
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    last = datetime.now(timezone.utc) + DAY * (days or 1)
    ca.issue_cert("127.0.0.1" if days else "elsewhere.example", not_after=last).configure_cert(server.tls)
    options = {"threatstack__base_url": f"{api.url}/api/v1", "s3__endpoint_url": bucket.url}
    for name, url in options.items():
        options[name] = url.replace("http:", "https:") if server.url in url else url
    bundle = str(tmp_path / "ca.pem")
    wrong, _ = checked_here(options, SSL_CERT_FILE=bundle, AWS_CA_BUNDLE=bundle)
    assert set(wrong) == {upstream}, wrong
    assert re.search(says, wrong[upstream]), wrong


@pytest.mark.parametrize(("ahead", "says"), [(3600, "behind"), (-3600, "ahead of")])
def test_a_clock_that_signs_nothing(checked_here, s3, api, ahead, says):
    api.ahead = ahead
    wrong, _ = checked_here({"s3__endpoint_url": s3.url})
    assert set(wrong) == {"clock"}
    assert re.search(rf"(3599|3600|3601) s {says} Threat Stack's: set it right", wrong["clock"]), wrong


def test_a_clock_that_is_two_minutes_fast(new_daemon, s3, api, tmp_path):
    """Near enough for S3, and not for Hawk."""
    daemon = new_daemon(start=False, **QUICK, **threatstack.HAWK, threatstack__base_url=f"{api.url}/v2")
    Clock(tmp_path, daemon, FAKETIME_DONT_FAKE_MONOTONIC="1").set("+2m")
    daemon.start()
    post(daemon, alert(0))
    until(lambda: "threatstack_clock" in causes(daemon))
    assert re.search("set this machine's clock right.*: it is 1(19|20) s fast", flat(status(daemon)))
    assert set(failures(daemon)) == {"threatstack", "clock"}


def certificate(path, last, key=None, before=()):
    """A file of a certificate that ends at `last`, another certificate, and its key; `before` comes first."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.not_valid_before(datetime(2001, 1, 1)).not_valid_after(last)
    ours = builder.serial_number(x509.random_serial_number()).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(b"".join(before) + ours + trustme.CA().cert_pem.bytes() + pem)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (datetime(2036, 2, 29, 12), "ECDSA"),
        (datetime(2049, 12, 31, 23, 59, 59), "RSA"),
        (datetime(2050, 1, 1), "RSA"),
        (datetime(9999, 12, 31, 23, 59, 59), "ECDSA"),
        (datetime(2020, 2, 29), "RSA"),
        (datetime(2020, 2, 29), "ECDSA"),
    ],
    ids=str,
)
def test_the_last_day_of_a_certificate(checked_here, s3, tmp_path, last, kind):
    """Until 2049 it has two digits for the year, afterwards four; the chain's others have dates of their own."""
    key = rsa.generate_private_key(65537, 2048) if kind == "RSA" else None
    certificate(tmp_path / "both.pem", last, key, before=[b"# a comment\n"])
    pair = {"server__tls_certificate": tmp_path / "both.pem", "server__tls_key": tmp_path / "both.pem"}
    wrong, output = checked_here({"s3__endpoint_url": s3.url, **pair})
    assert f"{tmp_path}/both.pem: its last day is {last:%Y-%m-%d}, " in output
    assert set(wrong) == ({"certificate"} if last.year == 2020 else set())
    assert ("which is over" in output) == (last.year == 2020)


def test_a_renewed_certificate_that_the_daemon_has_not_read(new_daemon, tmp_path):
    pem = tmp_path / "both.pem"
    now = datetime.now(timezone.utc)
    certificate(pem, now - DAY)
    daemon = new_daemon(server__tls_certificate=pem, server__tls_key=pem)
    until(lambda: "tls_certificate" in causes(daemon))
    certificate(pem, now + 90 * DAY)
    assert "the daemon still has the one before, which is over" in failures(daemon)["certificate"]
    assert "tls_certificate" in causes(daemon)
    daemon.stop()
    daemon.start()
    until(lambda: causes(daemon) == {})
    assert failures(daemon) == {}


# ---------------------------------------------------------------------------------------------------------------------
# status
# ---------------------------------------------------------------------------------------------------------------------


def test_before_the_first_start(new_daemon):
    daemon = new_daemon(start=False)
    for arguments in (["status"], ["status", "--json"], ["status", "--failed"], ["retry"]):
        result = daemon.run(*arguments)
        assert (result.returncode, result.stdout) == (78, "")
        assert "there is no queue yet: `ts3d serve` makes it" in result.stderr
    assert not daemon.queue.exists()


def test_whether_a_daemon_runs(new_daemon):
    daemon = new_daemon(archive__workers="0", **QUICK)
    post(daemon, alert(0), alert(1))
    assert (facts(daemon)["running"], glance(daemon)["queued"]) == (True, 2)
    assert status(daemon).splitlines()[0] == "daemon   runs"
    for end in (daemon.stop, daemon.kill):
        end()
        assert (facts(daemon)["running"], glance(daemon)["queued"]) == (False, 2)
        said = status(daemon)
        assert said.splitlines()[0] == "daemon   does not run"
        assert "Nothing stands in the way, as of when the daemon ran last." in said
        daemon.start()
    assert re.search(r"^queued   2, the oldest for \d+ s$", status(daemon), re.MULTILINE)


def test_an_outage_from_its_begin_to_its_end(new_daemon, s3):
    daemon = new_daemon(**QUICK)
    s3.stop()
    before = time.time()
    post(daemon, alert(0))
    until(lambda: "held" in causes(daemon).get("s3_EndpointConnectionError", {}))
    post(daemon, alert(1), alert(2))
    (cause,) = facts(daemon)["causes"]
    assert (cause["held"], cause["queued"]) == ("s3", 3)
    since = datetime.fromisoformat(cause["since"].replace("Z", "+00:00")).timestamp()
    assert before - 1 < since < time.time()
    probes = daemon.log().count("; try ")
    until(lambda: facts(daemon)["oldest_seconds"] > 3 or daemon.log().count("; try ") > probes)
    for _ in range(2):  # while it lasts, and when the daemon does no more
        (later,) = facts(daemon)["causes"]
        assert (later["since"], later["queued"]) == (cause["since"], 3)
        if daemon.process:
            assert f"since {cause['since'][:19]}Z" in flat(status(daemon))
            daemon.kill()
    assert "What stands in the way, as of when the daemon ran last:" in status(daemon)
    s3.start()
    daemon.start()
    settled(daemon)


def test_a_daemon_that_starts_while_status_looks_is_never_refused(new_daemon):
    daemon = new_daemon(**QUICK)
    daemon.stop()
    done = threading.Event()

    def look():
        queue = ts3d.Queue(str(daemon.queue), 1 << 30)
        while not done.is_set():
            queue.running()
        queue.close()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert daemon.start().kill() < 0
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_queue_of_an_older_version(new_daemon):
    """Which notes no obstacles, and no `since` with its errors."""
    daemon = new_daemon(archive__workers="0", **QUICK)
    post(daemon, alert(0), alert(1))
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
        db.execute("DROP TABLE IF EXISTS obstacles")
        db.execute("""UPDATE jobs SET error = '{"type": "s3_X", "message": "S3: because"}'""")
        db.execute("UPDATE jobs SET failed = 1 WHERE number = 1")
    assert "s3_X: 1 queued, 1 failed, such as alert-00000" in status(daemon)
    (cause,) = facts(daemon)["causes"]
    assert (cause["since"], cause["queued"], cause["failed"]) == (None, 1, 1)
    assert "s3_X: S3: because" in status(daemon, "--failed")
    daemon.start()
    assert glance(daemon)["queued"] == 1


def jobs(path, queued, failed, errors, text="because"):
    """Put jobs into a queue, with errors of so many types."""
    rows = []
    for n in range(queued + failed):
        error = {"type": f"threatstack_{n % errors}", "message": f"Threat Stack: {text} {n}", "since": 1484661065.5 + n}
        rows.append((alert(n)["id"], time.time(), n >= queued, json.dumps(error)))
    columns = "id, minute, step, received, failed, error, body, tries"
    sql = f"INSERT INTO jobs ({columns}) VALUES (?, '', 'alerts', ?, ?, ?, '{{}}', 3)"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(sql, rows)


@pytest.mark.parametrize("folder", ["x", "long-" * 40, "a folder with blanks " * 9])
def test_it_fits_80_columns(new_daemon, tmp_path, folder):
    (tmp_path / folder).mkdir()
    daemon = new_daemon(archive__workers="0", queue__path=tmp_path / folder / "queue.db")
    jobs(tmp_path / folder / "queue.db", 300, 300, 100, "m\u00e9ssage\x1b[31m " * 30 + "x" * 300)
    for arguments, lines in ([], 500), (["--failed"], 1000):
        text = status(daemon, *arguments)
        assert len(text.splitlines()) > lines
        assert "\x1b" not in text
    assert len(facts(daemon)["causes"]) == 100


def test_100000_queued_and_10000_failed(new_daemon):
    daemon = new_daemon(archive__workers="0", queue__max_size="1G")
    jobs(daemon.queue, 100_000, 10_000, 3)
    found = facts(daemon, "--failed")
    assert (found["queued"], found["failed"], len(found["failures"])) == (100_000, 10_000, 10_000)
    assert sum(cause["queued"] for cause in found["causes"]) == 100_000
    first = min(found["causes"], key=lambda cause: cause["since"])
    assert first["since"] == "2017-01-17T13:51:05.500Z"
    assert {entry["id"] for entry in found["failures"]} == {alert(n)["id"] for n in range(100_000, 110_000)}
    assert "queued   100000, the oldest for" in status(daemon)
    assert daemon.run("retry").stdout == "10000 queued again\n"
    assert glance(daemon)["queued"] == 110_000


def test_full_by_max_size_and_drained(new_daemon, s3):
    daemon = new_daemon(queue__max_size="1M", **QUICK)
    s3.stop()
    n = next(n for n in range(100) if post(daemon, alert(n, text="x" * 250_000)) == 503)
    cause = until(lambda: causes(daemon).get("queue_full"))
    assert "[queue] max_size is 1048576 bytes" in cause["message"]
    assert "queue_full, since" in status(daemon)
    wrong = failures(daemon)
    assert (
        f"{daemon.queue}: the queue is full: [queue] max_size is 1048576 bytes: webhooks are answered" in wrong["queue"]
    )
    s3.start()
    settled(daemon)
    assert failures(daemon) == {}
    assert len(s3.objects("alerts/")) == n


@pytest.mark.parametrize("running", [True, False])
def test_a_disk_that_is_full(new_daemon, tmp_path, running):
    place = tmp_path / "disk"
    with small_disk(place):
        daemon = new_daemon(archive__workers="0", queue__path=place / "queue.db", **QUICK)
        post(daemon, alert(0))
        if not running:
            daemon.kill()
        fill(place)
        (cause,) = facts(daemon)["causes"]
        assert (cause["type"], cause["message"]) == ("disk_full", "the queue's disk has less than 16M free")
        assert "disk has less than 16M free" in status(daemon)
        assert f"{place}/queue.db: the queue's disk has less than 16M free: webhooks are" in failures(daemon)["queue"]
        (place / "filler").unlink()
        assert failures(daemon) == {}
        assert glance(daemon)["causes"] == []


def test_a_disk_that_is_full_to_its_last_byte(new_daemon, tmp_path):
    """After a daemon that ended in order, SQLite has files to make, and cannot: the cause is named all the same."""
    place = tmp_path / "disk"
    with small_disk(place):
        daemon = new_daemon(archive__workers="0", queue__path=place / "queue.db", **QUICK)
        post(daemon, alert(0))
        assert daemon.stop() == 0
        fill(place)
        for command in ("status", "retry"):
            result = daemon.run(command)
            assert (result.returncode, result.stdout) == (78, "")
            assert f"{place}/queue.db: disk I/O error; the queue's disk has less than 16M free" in result.stderr
        assert "the queue's disk has less than 16M free" in failures(daemon)["queue"]
        (place / "filler").unlink()
        assert (failures(daemon), facts(daemon)["queued"]) == ({}, 1)


NASTY = "\x1b[31mred\x07\r\n\u2028\u0085caf\u00e9 \u65e5\u672c \U0001f512"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_message_drives_no_terminal(new_daemon, api, encoding):
    daemon = new_daemon(**QUICK)
    api.mode = lambda handler: handler.send(400, NASTY.encode())
    post(daemon, alert(0))
    until(lambda: "threatstack_400" in causes(daemon))
    daemon.environment["PYTHONIOENCODING"] = encoding
    for arguments in ([], ["--json"]):
        command = daemon.command("status", *arguments)
        result = subprocess.run(command, env=daemon.environment, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")
        text = result.stdout.decode(encoding)
        assert "red" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text)


@pytest.mark.parametrize("arguments", [["status"], ["status", "--failed"], ["status", "--json"], ["retry"]])
def test_a_reader_that_leaves(new_daemon, arguments):
    """`ts3d status | head -1`: no traceback, however much there is to say."""
    daemon = new_daemon(archive__workers="0")
    jobs(daemon.queue, 10, 1000, 3)
    daemon.environment.pop("PYTHONUNBUFFERED", None)
    reader, writer = os.pipe()
    os.close(reader)
    command = daemon.command(*arguments)
    result = subprocess.run(command, env=daemon.environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.parametrize("content", [b"not a database at all" * 300, "another"])
def test_a_file_that_is_no_queue(new_daemon, content):
    daemon = new_daemon(start=False)
    if content == "another":
        with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
            db.execute("CREATE TABLE x (y)")
    else:
        daemon.queue.write_bytes(content)
    before = daemon.queue.read_bytes()
    for arguments in (["status"], ["status", "--json"], ["retry"]):
        result = daemon.run(*arguments)
        assert (result.returncode, result.stdout) == (78, "")
        assert re.fullmatch(
            r"ts3d: .*queue\.db: (file is not a database|some other SQLite file) \(.*\)\n", result.stderr
        )
    assert re.search("not a database|some other SQLite file", failures(daemon)["queue"])
    assert daemon.queue.read_bytes() == before


def test_another_user(new_daemon):
    """Who may read the configuration, and neither the queue nor its folder."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    daemon = new_daemon(start=False)
    state = daemon.folder / "state"
    state.mkdir(mode=0o700)
    daemon.set(queue__path=state / "queue.db")
    daemon.start()
    for path in (daemon.folder, *daemon.folder.parents):
        if path.stat().st_uid == os.getuid() and path != path.parent:
            path.chmod(path.stat().st_mode | 0o055)
    daemon.config.chmod(0o644)
    for mode in (0o700, 0o755):
        state.chmod(mode)
        for command in ("status", "retry"):
            command = ["setpriv", "--reuid=65534", "--clear-groups", *daemon.command(command)]
            result = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, check=False)
            if result.returncode in (126, 127) or "can't open file" in result.stderr:
                pytest.skip(f"nobody else can run this: {result.stderr}")
            assert result.returncode == 78
            assert re.search("this user may not read it|Permission denied", result.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# retry
# ---------------------------------------------------------------------------------------------------------------------


def fail(daemon, api, *numbers):
    """Have these alerts fail for good, and no more."""
    for n in numbers:
        api.modes[alert(n)["id"]] = 404
    post(daemon, *map(alert, numbers))
    until(lambda: glance(daemon)["failed"] == len(numbers), what="failure")


GIVES_UP = {**QUICK, "archive__give_up_after": "0"}


def test_retry(new_daemon, s3, api):
    """Beside the daemon: one, those named, all; each is archived once its cause is mended."""
    daemon = new_daemon(**GIVES_UP)
    fail(daemon, api, 0, 1, 2, 3)
    said = status(daemon)
    assert "failed   4: `ts3d status --failed` lists them, `ts3d retry` tries them" in said
    assert "threatstack_not_found" in said
    listed = status(daemon, "--failed")
    for n in range(4):
        assert re.search(rf"^alert-00000{n} came \S+Z, and failed after 1 tries$", listed, re.MULTILINE)
    api.modes.clear()
    result = daemon.run("retry", "alert-000000", "alert-000000")
    assert (result.returncode, result.stdout, result.stderr) == (0, "1 queued again\n", "")
    until(lambda: len(s3.objects("alerts/")) == 1)
    assert daemon.run("retry", "alert-000001", "alert-000002").stdout == "2 queued again\n"
    until(lambda: len(s3.objects("alerts/")) == 3)
    assert glance(daemon)["failed"] == 1
    assert daemon.run("retry").stdout == "1 queued again\n"
    until(lambda: len(s3.objects("alerts/")) == 4)
    settled(daemon)
    assert (daemon.run("retry").returncode, daemon.run("retry").stdout) == (0, "0 queued again\n")
    assert status(daemon, "--failed") == "none has failed\n"
    assert glance(daemon)["failed"] == 0


def test_retry_without_a_daemon(new_daemon, s3, api):
    """It is tried at the next start, with its tries and its error forgotten."""
    daemon = new_daemon(**GIVES_UP)
    fail(daemon, api, 0)
    daemon.stop()
    assert daemon.run("retry", "alert-000000").stdout == "1 queued again\n"
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        row = db.execute("SELECT failed, tries, waited, due, error FROM jobs").fetchone()
    assert row == (0, 0, 0, 0, None)
    assert (glance(daemon)["queued"], glance(daemon)["failed"], glance(daemon)["causes"]) == (1, 0, [])
    api.modes.clear()
    daemon.start()
    settled(daemon)
    assert set(s3.objects()) == set(keys_of("alert-000000", "2017/01/17/13/51"))


def test_ids_that_have_not_failed(new_daemon, api):
    daemon = new_daemon(**GIVES_UP)
    fail(daemon, api, 0)
    api.mode = 503
    post(daemon, alert(1))
    result = daemon.run("retry", "nowhere", "alert-000001", "alert-000000")
    assert result.returncode == 1
    assert result.stdout == "alert-000001 has not failed: it is queued\n1 queued again\n"
    assert result.stderr == "ts3d: there is no failed alert nowhere: `ts3d status --failed` lists them\n"
    result = daemon.run("retry", "alert-000001")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "0 queued again")


def test_whatever_has_failed_is_retried(new_daemon, s3):
    """A refused body, and two bodies of one id."""
    daemon = new_daemon(archive__workers="0", **QUICK)
    assert daemon.post(b"not JSON")[0] == 400
    post(daemon, alert(0))
    post(daemon, alert(0, text="another body"))
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
        db.execute("""UPDATE jobs SET failed = 1, error = '{"type": "s3_X", "message": "x"}', tries = 9""")
        digest = db.execute("SELECT id FROM jobs WHERE step = 'rejected'").fetchone()[0]
    assert facts(daemon, "--failed")["failures"][0]["id"] == digest
    assert daemon.run("retry", digest).stdout == "1 queued again\n"
    assert daemon.run("retry", "alert-000000").stdout == "2 queued again\n"
    daemon.set(archive__workers=None)
    daemon.start()
    settled(daemon)
    assert len(s3.objects("rejected/")) == 1
    assert len(s3.objects("alerts/")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Usage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "status", "retry"])
def test_help(new_daemon, command):
    daemon = new_daemon(start=False)
    for order in ([command, "--help"], [command, "-h"]):
        result = daemon.run(*order)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"usage: ts3d {command}" in result.stdout
        assert {"status": "--failed", "retry": "[ID ...]"}.get(command, "-c FILE") in result.stdout
    assert not daemon.queue.exists()


@pytest.mark.parametrize("arguments", [["check", "x"], ["status", "--xml"], ["status", "x"], ["retry", "--all"]])
def test_wrong_usage(new_daemon, arguments):
    result = new_daemon(start=False).run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ts3d")


def test_a_wrong_configuration(new_daemon):
    daemon = new_daemon(start=False, server__wait="long")
    for command in ("status", "retry"):
        result = daemon.run(command)
        assert (result.returncode, result.stdout) == (78, "")
        assert "[server] wait = 'long'" in result.stderr
    assert "[server] wait = 'long'" in failures(daemon)["configuration"]
    assert list(check(daemon)) == ["configuration"]
