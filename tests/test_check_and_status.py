"""What `check`, `status` and `retry` say and do, as an administrator uses them."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import boto3
import pytest
import threatstack
import trustme
from conftest import AWS, BUCKET, CREDENTIALS, TOKEN, Daemon, alert, aws_client, fill, free_port, listening, until
from threatstack import s3_error

import ts3d

NOTHING = "No current problems."
QUICK = {"server__wait": "0", "threatstack__timeout": "1"}
SECRETS = (TOKEN, threatstack.KEY, threatstack.USER, AWS["AWS_SECRET_ACCESS_KEY"])
DAY = timedelta(days=1)
NO_KEYS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
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
    """What `status` says, in lines of at most 80 columns, but for words that are longer: none is broken."""
    result = daemon.run("status", *arguments)
    text = said_by(result)
    assert result.stderr == ""
    assert "--failed" in arguments or result.returncode == int(NOTHING not in text)
    assert [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()] == []
    return text


def assert_refused(daemon, pattern, *arguments):
    """A command ends with 78, and says why."""
    result = daemon.run(*arguments)
    assert (result.returncode, result.stdout) == (78, "")
    assert re.search(pattern, result.stderr)


def flat(text):
    """Without its line breaks."""
    return " ".join(text.split())


def glance(daemon, *arguments):
    """What `status --json` says, in this process, as it costs less; the exit code says whether that is a problem."""
    secrets, output = list(ts3d.SECRETS), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = ts3d.main(["status", "--json", *arguments, "-c", str(daemon.config)])
    ts3d.SECRETS[:] = secrets
    found = json.loads(output.getvalue())
    assert code == int(bool(found["causes"]))
    assert [secret for secret in SECRETS if secret in output.getvalue()] == []
    return found


def causes(daemon):
    return {cause["type"]: cause for cause in glance(daemon)["causes"]}


def post(daemon, *alerts):
    """POST a webhook; the status."""
    return daemon.post({"alerts": alerts})[0]


def settled(daemon):
    """Wait until nothing is queued, or in the way."""
    until(lambda: (now := glance(daemon))["queued"] == 0 and now["causes"] == [], what="end of all problems")
    assert NOTHING in status(daemon)


# Faults: each is injected into a daemon that has an alert to archive, found by `check` and `status`, and corrected ----


class World(NamedTuple):
    """What there is to break; the daemon is not started yet."""

    daemon: Daemon
    s3: Any
    api: Any
    bucket: Any
    clock: Any
    request: Any


def option(name, wrong):
    """An option that is wrong until it is corrected in the configuration, with a restart."""

    def fault(world):
        right = world.daemon.options.get(tuple(name.split("__")))
        world.daemon.set(**{name: wrong})
        yield
        world.daemon.restart(**{name: right})

    return fault


def wrong_secret(world):
    """AWS's, as the server sees it that knows the right one."""
    world.daemon.environment["AWS_SECRET_ACCESS_KEY"] = "another"
    yield
    world.daemon.environment["AWS_SECRET_ACCESS_KEY"] = AWS["AWS_SECRET_ACCESS_KEY"]
    world.daemon.restart()


def no_permission(world):
    world.bucket.mode = s3_error(403, "AccessDenied", DENIED.format("s3:PutObject"))
    world.daemon.set(s3__endpoint_url=world.bucket.url)
    yield
    world.bucket.mode = None


def s3_down(world):
    world.s3.stop()
    yield
    world.s3.start()


def api_down(world):
    world.api.stop()
    yield
    world.api.__init__(world.api.port)


def rate_limited(world):
    world.api.mode = lambda handler: handler.send(429, b"slow down", [("x-rate-limit-remaining", "0")])
    yield
    world.api.mode = None


def disk_full(world):
    place = world.request.getfixturevalue("disk")
    world.daemon.set(queue__path=place / "queue.db")
    world.daemon.start()
    fill(place)
    yield
    (place / "filler").unlink()
    until(lambda: world.daemon.request("GET", "/healthz")[0] == 200)


def clock_wrong(jump):
    def fault(world):
        world.clock.use(world.daemon)
        world.clock.set(jump=jump)
        yield
        world.clock.set()

    return fault


def poisoned(world):
    world.api.modes["alert-000000"] = 500
    yield
    world.api.modes.clear()


class Fault(NamedTuple):
    name: str
    inject: Callable[[World], Any]  # breaks it, yields, and corrects it
    line: str | None  # of `check`, that fails
    says: tuple[str, ...]  # there
    type: str  # of the cause in `status`
    message: tuple[str, ...]  # there
    options: dict = {}
    posted: int = 200
    queued: int = 2  # of two alerts, in the end


SIGNATURE, WRONG = "SignatureDoesNotMatch", ("401", "[threatstack] api_key", "auth = hawk")
NO_SUCH_BUCKET = ("bucket elsewhere ", "NoSuchBucket", "[s3] bucket")
CLOCK, HAWKS_ERROR = ("Threat Stack", "ntp"), "threatstack_(clock|unauthorized)"
FAULTS = [
    Fault(
        "wrong key", option("threatstack__api_key", "another"), "threatstack", WRONG, "threatstack_unauthorized", WRONG
    ),
    Fault("wrong AWS key", wrong_secret, "s3", ("credentials", SIGNATURE), f"s3_{SIGNATURE}", ("credentials",)),
    Fault("wrong bucket", option("s3__bucket", "elsewhere"), "s3", NO_SUCH_BUCKET, "s3_NoSuchBucket", NO_SUCH_BUCKET),
    Fault("no permission", no_permission, "s3", ("s3:PutObject", "evidence"), "s3_AccessDenied", ("s3:PutObject",)),
    Fault("S3 down", s3_down, "s3", ("http://127.0.0.1:",), "s3_EndpointConnectionError", ("127.0.0.1:",)),
    Fault(
        "API down", api_down, "threatstack", ("http://127.0.0.1:", "refused"), "threatstack_unreachable", ("refused",)
    ),
    Fault("rate limited", rate_limited, "threatstack", ("429",), "threatstack_rate_limited", ("429",)),
    Fault("disk full", disk_full, "queue", ("16M",), "disk_full", ("16M",), posted=503, queued=0),
    Fault("clock wrong", clock_wrong(7200), "clock", ("S3", "720", *CLOCK), HAWKS_ERROR, ("clock",), threatstack.HAWK),
    # Near enough for S3, and not for Hawk.
    Fault("clock two minutes fast", clock_wrong(120), "clock", CLOCK, HAWKS_ERROR, ("clock",), threatstack.HAWK),
    Fault("poisoned alert", poisoned, None, (), "threatstack_500", ("1 queued", "alert-000000"), queued=1),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_faults(request, new_daemon, s3, api, bucket, clock, fault):
    daemon = new_daemon(start=False, **{**QUICK, **fault.options})
    if fault.options:
        daemon.set(threatstack__base_url=f"{api.url}/v2")
    with contextlib.contextmanager(fault.inject)(World(daemon, s3, api, bucket, clock, request)):
        if not daemon.process:
            daemon.start()
        assert post(daemon, alert(0), alert(1)) == fault.posted
        until(lambda: [type_ for type_ in causes(daemon) if re.fullmatch(fault.type, type_)], what="cause")
        until(lambda: glance(daemon)["queued"] == fault.queued)
        until(lambda: [part for part in fault.message if part not in flat(status(daemon))] == [])
        found = check(daemon)
        wrong = {name: text for name, (verdict, text) in found.items() if verdict == "FAIL"}
        if fault.line:
            assert [part for part in fault.says if part.lower() not in wrong[fault.line].lower()] == [], wrong
        # What is right is not blamed; but a clock that is wrong is seen in what signs with it.
        signed = {"clock wrong": {"threatstack", "s3"}, "clock two minutes fast": {"threatstack"}}.get(
            fault.name, set()
        )
        assert set(wrong) - signed == {fault.line} - {None}
        assert "two minutes" not in fault.name or "threatstack" in wrong
    assert post(daemon, alert(2)) == 200
    settled(daemon)
    assert failures(daemon) == {}


DENIED = (
    "User: arn:aws:sts::123456789012:assumed-role/ts3d-instance-role-of-some-length/i-0123456789abcdef0 is not "
    "authorized to perform: {} on resource: &quot;arn:aws:s3:::evidence/ts3d-check&quot; because no identity-based "
    "policy allows the action"
)


def page(status, text=b"<!DOCTYPE html><html><head><meta charset=utf-8></head><body>Log in<br></html>"):
    return lambda handler: handler.send(status, text, [("Content-Type", "text/html")])


REGION, ENDPOINT, OPTIONS = "[s3] region", "[s3] endpoint_url", "[s3:put_object]"
KEYS, PUT, KMS_KEY = "credentials", "s3:PutObject", "SSEKMSKeyId"


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
        assert "wJalrXUtnFEMI" not in output
        lines = [(line[:4], line[6:20].rstrip(), line[20:]) for line in output.splitlines()]
        wrong = {name: text for verdict, name, text in lines if verdict == "FAIL"}
        assert code == int(bool(wrong))
        assert "internal error" not in output
        for secret in SECRETS:
            assert secret not in output
        return wrong, output

    return run


def refuses_checksums(status, code):
    """A store that knows no SHA-256 checksums; without one it takes the object."""
    name = "x-amz-checksum-sha256"

    def answer(handler):
        found = [header for header in handler.headers if header.lower() == name]
        s3_error(status, code, f"{name} is not supported")(handler) if found else handler.succeed("")

    return answer


def refusal(says, *answer, options=None, **members):
    """A part of what `check` says, an answer of S3's, and options that lead to it."""
    return says, s3_error(*answer, **members), options or {}


CHECKSUMS = [(501, "NotImplemented"), (400, "InvalidArgument"), (400, "NotImplemented"), (400, "InvalidRequest")]
NOT_MEANT = "the region 'us-east-1' is wrong"
LOCK = {"put_object__ObjectLockMode": "COMPLIANCE"}
TO_LOGIN = [("Location", "http://x/login")]


@pytest.mark.parametrize(
    ("says", "answer", "options"),
    [
        refusal(f"{REGION} = eu-1", 301, "PermanentRedirect", headers=[("x-amz-bucket-region", "eu-1")], Endpoint="x"),
        refusal(f"{REGION} = eu-west-3", 400, "AuthorizationHeaderMalformed", NOT_MEANT, Region="eu-west-3"),
        refusal("region", 301, "PermanentRedirect", Endpoint="x"),
        refusal("region", 400, "IllegalLocationConstraintException"),
        ("region", lambda handler: handler.send(302, b"", TO_LOGIN), {}),
        refusal("[s3] bucket", 404, "NoSuchBucket"),
        refusal(f"bucket {BUCKET} ", 404, "NoSuchBucket", "The specified bucket does not exist"),
        refusal("[s3] bucket", 400, "InvalidBucketName"),
        refusal(KEYS, 403, "InvalidAccessKeyId"),
        refusal(KEYS, 403, "SignatureDoesNotMatch"),
        refusal(KEYS, 400, "ExpiredToken"),
        refusal("clock", 403, "RequestTimeTooSkewed"),
        refusal(PUT, 403, "AccessDenied", DENIED.format("s3:PutObject")),
        refusal(PUT, 403, "AccessDenied"),
        refusal("perform: kms:GenerateDataKey on", 403, "AccessDenied", DENIED.format("kms:GenerateDataKey")),
        refusal(
            KMS_KEY, 400, "KMS.NotFoundException", "Key 'arn:x' does not exist", options={f"put_object__{KMS_KEY}": "a"}
        ),
        refusal(KMS_KEY, 400, "KMS.DisabledException"),
        refusal(OPTIONS, 400, "InvalidRequest", "Bucket is missing Object Lock Configuration", options=LOCK),
        refusal(OPTIONS, 400, "InvalidArgument", "The retain until date must be in the future!"),
        refusal(OPTIONS, 400, "InvalidStorageClass", options={"put_object__StorageClass": "COLD"}),
        *(("SHA-256" if each[0] == 501 else "sha256", refuses_checksums(*each), {}) for each in CHECKSUMS),
        refusal(ENDPOINT, 405, "MethodNotAllowed"),
        *((ENDPOINT, page(status), {}) for status in (405, 404, 200)),
        *((str(status), page(status), {}) for status in (403, 502)),
    ],
)
def test_what_s3_refuses(checked_here, bucket, says, answer, options):
    bucket.mode = answer
    wrong, _ = checked_here({"s3__endpoint_url": bucket.url, **options})
    assert set(wrong) == {"s3"}, wrong
    assert says in wrong["s3"], wrong
    assert bucket.objects == {}


HAWK = threatstack.HAWK
KEY, HAWKS, URL = WRONG, ("401", "user_id", "api_key", "organization_id", "clock"), ("[threatstack] base_url",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threatstack__api_key": "another"}, KEY),
        ({**HAWK, "threatstack__api_key": "one-of-v1"}, HAWKS),
        ({**HAWK, "threatstack__user_id": "another"}, HAWKS),
        ({**HAWK, "threatstack__organization_id": "another"}, HAWKS),
        ({"threatstack__base_url": "/api/v9/x"}, URL),
        ({**HAWK, "threatstack__base_url": "/v9"}, URL),
        ({**HAWK, "threatstack__base_url": ""}, URL),
    ],
)
@pytest.mark.parametrize("status", [404, "garbage"])
def test_what_threat_stack_refuses(checked_here, s3, api, options, says, status):
    """A wrong path, too, whether that is answered with 404 or with a page; Hawk's probe is at the host's root."""
    path = options.get("threatstack__base_url", "/v2" if "threatstack__auth" in options else "/api/v1")
    if status == 404 and path in ("/v9", ""):
        pytest.skip("version 2 answers so where it lists nothing")
    if path not in ("/v2", "/api/v1"):
        api.modes["alerts"] = status
    wrong, _ = checked_here({"s3__endpoint_url": s3.url, **options, "threatstack__base_url": api.url + path})
    assert set(wrong) == {"threatstack"}, wrong
    assert [part for part in says if part not in wrong["threatstack"]] == [], wrong


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (NO_KEYS, "credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "Partial credentials found in env"),
        ({"AWS_PROFILE": "nobody"}, "The config profile (nobody) could not be found"),
        ("aws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = x\n", "Unable to parse config file"),
        ("[default]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = y\n", 'The source_profile "y"'),
        ("[default]\ncredential_process = /bin/false\n", "Error when retrieving credentials from custom-process"),
    ],
)
def test_credentials_that_are_none(checked_here, s3, tmp_path, environment, says):
    """In the environment, or in the file of the secrets."""
    if isinstance(environment, str):
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets" / "aws_credentials").write_text(environment)
        environment = NO_KEYS
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, HOME=str(tmp_path), **environment)
    assert set(wrong) == {"credentials", "s3"}, wrong
    assert says in wrong["credentials"], wrong
    assert "AKIDEXAMPLE" not in str(wrong)  # the line that cannot be parsed may hold a secret


def test_a_secret_in_the_place_of_the_key_is_not_shown(checked_here, s3):
    """Of credentials whose two parts are swapped."""
    swapped = {"AWS_ACCESS_KEY_ID": AWS["AWS_SECRET_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": AWS["AWS_ACCESS_KEY_ID"]}
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, **swapped)
    assert set(wrong) == {"s3"}


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
    wrong, _ = checked_here({"s3__endpoint_url": s3.url}, **NO_KEYS, AWS_ENDPOINT_URL_STS=bucket.url)
    assert set(wrong) - {"credentials"} == {"s3"}
    for text in wrong.values():
        assert "sts:AssumeRole" in text


def test_where_credentials_come_from(checked_here, moto, tmp_path):
    found = []
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "aws_credentials").write_text(f"[default]\n{CREDENTIALS}")
    for nothing in ({}, NO_KEYS):
        wrong, output = checked_here({"s3__endpoint_url": moto}, **nothing)
        assert wrong == {}
        found += re.findall("^ok +credentials .*\\b(env|shared-credentials-file)\\b", output, re.MULTILINE)
    assert found == ["env", "shared-credentials-file"]


@pytest.mark.parametrize("mode", ["the bucket's default", "an option"])
def test_object_lock(checked_here, moto, mode):
    """A bucket that retains what is written to it: by its own default, or as [s3:put_object] says."""
    s3, bucket = aws_client("s3", moto), f"locked-{len(mode)}"
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
    iam = aws_client("iam", moto)
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
        wrong, _ = checked_here(options, **pair)
        assert set(wrong) == {"s3"}
        assert PUT in wrong["s3"]
        enforce(b"1")
        iam.put_user_policy(UserName="archivist", PolicyName="p", PolicyDocument=document)
        enforce(b"0")
        assert checked_here(options, **pair)[0] == {}
        wrong, _ = checked_here(options, **{**pair, "AWS_SECRET_ACCESS_KEY": "x" * 40})
        assert KEYS in wrong["s3"]
    finally:
        enforce(b"1000000000")


def test_each_line_in_order_and_nothing_written(new_daemon, s3, api, certificate):
    daemon = new_daemon(start=False, log__level="DEBUG", **certificate.options)
    before = sorted(daemon.folder.iterdir())
    found = check(daemon)
    assert list(found) == ["configuration", "listen", "queue", "credentials", "s3", "threatstack", "clock"]
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert str(daemon.config) in found["configuration"][1]
    assert re.search(r"ahead of S3 and Threat Stack: -?\d, -?\d", found["clock"][1])
    assert list(s3.objects()) == ["ts3d-check"]
    assert api.paths() == ["/api/v1/alerts?count=1"]
    assert sorted(daemon.folder.iterdir()) == before
    daemon.start()
    assert "0 queued" in check(daemon)["queue"][1]


@pytest.mark.parametrize(
    ("options", "name", "says"),
    [
        ({"server__wait": "x"}, "configuration", "[server] wait = 'x'"),
        ({"s3__bucket": None}, "configuration", "[s3] bucket"),
        ({"server__listen": "0.0.0.0:0", "server__webhook_token": None}, "listen", "webhook_token"),
        ({"put_object__ACl": "x"}, "s3", "did you mean ACL?"),
        ({"queue__path": "/nowhere/queue.db"}, "queue", "/nowhere"),
        ({"queue__path": "/proc/queue.db"}, "queue", "written"),
        ({"server__listen": "192.0.2.1:8080"}, "listen", "192.0.2.1:8080"),
        ({"server__listen": "nonexistent.invalid:8080"}, "listen", "nonexistent.invalid"),
    ],
)
def test_a_wrong_option(new_daemon, options, name, says):
    daemon = new_daemon(start=False, **options)
    found = check(daemon)
    assert [line for line, (verdict, _) in found.items() if verdict == "FAIL"] == [name]
    assert says.lower() in found[name][1].lower()
    if says.startswith("[server] wait"):
        assert list(found) == ["configuration"]
        for command in ("status", "retry"):
            assert_refused(daemon, re.escape(says), command)


def test_a_port_in_use(new_daemon, daemon):
    """By another program; by this daemon itself it is right."""
    other = new_daemon(start=False, server__listen="{}:{}".format(*daemon.address))
    found = failures(other)
    assert list(found) == ["listen"]
    assert re.search(r"\[server\] listen.*in use", found["listen"])
    daemon.set(server__listen=other.options["server", "listen"])
    assert failures(daemon) == {}
    daemon.stop()
    assert failures(other) == {}
    other.start()  # for `check` has left the port


OVERRIDES = {
    "THREATSTACK_BASE_URL": "{}/api/v1",
    "THREATSTACK_API_KEY": threatstack.KEY,
    "TS_AWS_S3_BUCKET": BUCKET,
    "TS_AWS_S3_PREFIX": "x/y",
}


def test_what_overrides_the_file_is_named(new_daemon, api):
    daemon = new_daemon(start=False, s3__bucket="another-one", threatstack__api_key="another-key")
    daemon.environment |= {name: value.format(api.url) for name, value in OVERRIDES.items()}
    verdict, text = check(daemon)["configuration"]
    assert verdict == "ok"
    assert [name for name in (str(daemon.config), *OVERRIDES) if name not in text] == []
    for name in list(OVERRIDES)[1:]:
        del daemon.environment[name]
    daemon.environment["TS_AWS_S3_PREFIX"] = ""  # an empty one overrides nothing
    text = check(daemon)["configuration"][1]
    assert [name for name in OVERRIDES if name in text] == ["THREATSTACK_BASE_URL"]


def test_options_that_are_not_at_their_default_are_named(new_daemon):
    daemon = new_daemon(start=False, archive__workers="3", log__level="INFO")
    text = check(daemon)["configuration"][1]
    for name in ("listen", "wait", "base_url", "endpoint_url", "workers"):
        assert re.search(rf"\b{name}\b", text), name
    for name in ("max_body", "auth", "prefix", "max_size", "give_up_after", "level"):
        assert not re.search(rf"\b{name}\b", text), name


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
@pytest.mark.parametrize("inside", [True, False])
def test_a_program_that_gives_credentials(new_daemon, tmp_path, inside):
    """`check` by root runs what the service, in its sandbox, could not: nothing but what is under /usr is there."""
    keys = {"AccessKeyId": AWS["AWS_ACCESS_KEY_ID"], "SecretAccessKey": AWS["AWS_SECRET_ACCESS_KEY"], "Version": 1}
    (tmp_path / "keys").write_text(json.dumps(keys))
    program = tmp_path / "opt" / "program"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/keys\n")
    program.chmod(0o755)
    daemon = new_daemon(start=False)
    (daemon.folder / "secrets").mkdir()
    command = f"/usr/bin/cat {tmp_path}/keys" if inside else program
    text = f"[default]\ncredential_process = {command}\n"
    (daemon.folder / "secrets" / "aws_credentials").write_text(text)
    daemon.without_keys()
    verdict, said = check(daemon)["credentials"]
    assert inside or "/usr" in said
    assert not inside or verdict == "ok"


PASSWORD = "the-password-of-the-proxy"


def test_a_proxy_without_a_scheme(new_daemon, new_proxy):
    """As many programs take it."""
    daemon = new_daemon(start=False)
    daemon.environment["http_proxy"] = f"127.0.0.1:{new_proxy().port}"
    found = check(daemon)
    assert {verdict for verdict, _ in found.values()} == {"ok"}, found
    assert "through proxy" in found["threatstack"][1]


@pytest.mark.parametrize(("status", "words"), [(407, "407"), (403, "403"), (502, "502"), ("reset", ""), (None, "")])
def test_a_proxy_that_refuses(checked_here, monkeypatch, status, words):
    """It is named, with its answer: neither upstream is to blame."""
    monkeypatch.setattr(threatstack.Handler, "do_CONNECT", threatstack.Handler.do_GET, raising=False)
    proxy = threatstack.Faulty(mode=status)
    if not status:
        proxy.stop()
    options = {"threatstack__base_url": "https://threatstack.test/api/v1", "s3__endpoint_url": "https://s3.test"}
    wrong, output = checked_here(options, HTTPS_PROXY=f"http://ts3d:{PASSWORD}@127.0.0.1:{proxy.port}")
    proxy.stop()
    assert "unknown, since neither answered" in output
    assert set(wrong) == {"s3", "threatstack"}
    for text in wrong.values():
        assert f"127.0.0.1:{proxy.port}" in text
        assert "proxy" in text.lower()
        assert words in text
        assert PASSWORD not in text


def test_an_instances_role_that_a_proxy_hides(new_daemon, new_proxy):
    """Without NO_PROXY boto3 asks the proxy for what only this machine can see."""
    proxy, daemon = new_proxy(), new_daemon(start=False)
    daemon.without_keys()
    del daemon.environment["AWS_EC2_METADATA_DISABLED"]
    daemon.environment["HTTP_PROXY"] = f"http://127.0.0.1:{proxy.port}"
    found = failures(daemon)
    assert "169.254.169.254" in proxy.log()
    assert "NO_PROXY=169.254.169.254" in found["credentials"]
    assert f"http://127.0.0.1:{proxy.port}" in found["credentials"]


@pytest.mark.parametrize("upstream", ["threatstack", "s3"])
@pytest.mark.parametrize(
    ("days", "says"), [(-1, "expired"), (None, "(?i)CERTIFICATE_VERIFY|doesn't match|mismatch"), (0, "{bundle}")]
)
def test_an_upstreams_certificate(checked_here, api, bucket, certificate, tmp_path, upstream, days, says):
    """One that has expired, one for another name, and one of a private authority: where its certificate belongs."""
    server = api if upstream == "threatstack" else bucket
    ca = certificate.authority if days != 0 else trustme.CA()
    last = datetime.now(UTC) + DAY * (days or 1)
    server.speak_tls(ca.issue_cert("elsewhere.example" if days is None else "127.0.0.1", not_after=last))
    options = {"threatstack__base_url": f"{api.url}/api/v1", "s3__endpoint_url": bucket.url}
    for name, url in options.items():
        options[name] = url.replace("http:", "https:") if server.url in url else url
    certificate.authority.cert_pem.write_to_path(certificate.file)
    wrong, _ = checked_here(options, SSL_CERT_FILE=str(certificate.file), AWS_CA_BUNDLE=str(certificate.file))
    assert set(wrong) == {upstream}, wrong
    variable = "SSL_CERT_FILE" if upstream == "threatstack" else "AWS_CA_BUNDLE"
    assert re.search(says.format(bundle=variable), wrong[upstream]), wrong


@pytest.mark.parametrize("content", [None, "no certificate"])
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_bundle_of_certificates_that_cannot_be_read(checked_here, api, bucket, tmp_path, variable, content):
    """The message names the file, and the variable that does."""
    file = tmp_path / "bundle.pem"
    if content:
        file.write_text(content)
    options = {"threatstack__base_url": f"{api.url}/api/v1", "s3__endpoint_url": bucket.url}
    for server, name in (api, "threatstack__base_url"), (bucket, "s3__endpoint_url"):
        server.speak_tls(trustme.CA().issue_cert("127.0.0.1"))
        options[name] = options[name].replace("http:", "https:")
    wrong, _ = checked_here(options, **{variable: str(file)})
    text = wrong["threatstack" if variable == "SSL_CERT_FILE" else "s3"]
    assert variable in text
    assert content or str(file) in text


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_clock_that_signs_nothing(checked_here, s3, api, ahead):
    api.ahead = ahead
    wrong, _ = checked_here({"s3__endpoint_url": s3.url})
    assert set(wrong) == {"clock"}
    assert re.search(f"{'-' if ahead > 0 else ''}(3599|3600|3601)\\b.*(?i:ntp)", wrong["clock"]), wrong


def test_before_the_first_start(new_daemon):
    daemon = new_daemon(start=False)
    for arguments in (["status"], ["status", "--json"], ["status", "--failed"], ["retry"]):
        assert_refused(daemon, "(?i)no queue.*(start the daemon|ts3d serve)", *arguments)
    result = daemon.run("backfill")  # which prints its summary, too
    assert (result.returncode, "there is no queue yet, start the daemon" in result.stderr) == (78, True)
    assert list(daemon.folder.iterdir()) == [daemon.config]


def test_whether_a_daemon_runs(new_daemon):
    daemon = new_daemon(archive__workers="0", **QUICK)
    post(daemon, alert(0), alert(1))
    for end in (daemon.stop, daemon.kill):
        assert (glance(daemon)["running"], glance(daemon)["queued"], causes(daemon)) == (True, 2, {})
        end()
        assert (glance(daemon)["running"], glance(daemon)["queued"], [*causes(daemon)]) == (False, 2, ["not_running"])
        assert re.match("daemon   not running\n(.*\n)+\nCurrent problems:\n", status(daemon))
        daemon.start()


def test_the_text_of_status(new_daemon, s3):
    daemon = new_daemon(**QUICK)
    used = rf"disk     \S+ of \S+ used, \S+ free:\s+{daemon.queue}\n"
    nothing = f"daemon   running\nqueued   0\nfailed   0\n{used}\nNo current problems.\n"
    until(lambda: re.fullmatch(nothing, status(daemon)), what="clean status")
    s3.stop()
    post(daemon, alert(0))
    until(lambda: causes(daemon))
    problem = r"Current problems:\ns3.*\n(\s+\S.*\n)*( {4}\S.*\n)+"
    said = rf"daemon   running\nqueued   1, oldest .+\nfailed   0\n{used}\n{problem}"
    assert re.fullmatch(said, status(daemon))


def test_words_and_urls_stay_whole(new_daemon, api):
    """However long: a URL that is broken cannot be copied."""
    host, path = f"127.0.0.1:{api.port}", "/".join(f"part-{n}-of-a-long-path" for n in range(6))
    daemon = new_daemon(**QUICK, threatstack__base_url=f"http://{host}/{path}")
    words = [f"word-{n}-{'x' * 10 * n}" for n in range(9)]
    api.mode = lambda handler: handler.send(
        400, " ".join([*words, handler.path, "https://example.com/a-b?c=d"]).encode()
    )
    post(daemon, alert(0))
    until(lambda: "threatstack_400" in causes(daemon))
    said = status(daemon).split()
    message = causes(daemon)["threatstack_400"]["message"].split()
    assert len(message) > 5
    assert [word for word in message if word not in said] == []


def test_an_outage_from_its_begin_to_its_end(new_daemon, s3):
    daemon = new_daemon(**QUICK)
    s3.stop()
    before = time.time()
    post(daemon, alert(0))
    until(lambda: "s3_EndpointConnectionError" in causes(daemon))
    post(daemon, alert(1), alert(2))
    cause = until(lambda: (found := causes(daemon)["s3_EndpointConnectionError"])["queued"] == 3 and found)
    since = datetime.fromisoformat(cause["since"].replace("Z", "+00:00")).timestamp()
    assert before - 1 < since < time.time()
    until(lambda: glance(daemon)["oldest_seconds"] > 3)
    for _ in range(2):  # while it lasts, and when the daemon does no more
        later = causes(daemon)["s3_EndpointConnectionError"]
        assert (later["since"], later["queued"]) == (cause["since"], 3)
        assert cause["since"][:19] in flat(status(daemon))
        if daemon.process:
            daemon.kill()
    s3.start()
    daemon.start()
    settled(daemon)


def test_an_error_is_over_once_its_step_succeeds(new_daemon, s3, api):
    """Also for alerts that then wait for the other upstream."""
    daemon = new_daemon(**QUICK)
    s3.stop()
    post(daemon, *(alert(n) for n in range(20)))
    until(lambda: "s3_EndpointConnectionError" in causes(daemon))
    api.mode = 401
    s3.start()
    until(lambda: causes(daemon).keys() == {"threatstack_unauthorized"}, 20)


def test_a_daemon_that_starts_while_status_looks_is_never_refused(new_daemon):
    daemon = new_daemon(**QUICK)
    daemon.stop()
    done = threading.Event()

    def look():
        while not done.is_set():
            ts3d.running(str(daemon.queue))

    with ThreadPoolExecutor(4) as pool:
        looks = [pool.submit(look) for _ in range(4)]
        try:
            for _ in range(5):
                assert daemon.start().kill() < 0
        finally:
            done.set()
    assert [each.result() for each in looks] == [None] * 4


def jobs(path, queued, failed, errors, text="because"):
    """Put jobs into a queue, with errors of so many types."""
    rows = []
    for n in range(queued + failed):
        error = f"threatstack_{n % errors}", f"Threat Stack: {text} {n}", 1484661065.5 + n
        rows.append((alert(n)["id"], time.time(), *error))
    columns = "id, minute, source, step, received, error_type, error_message, error_since, body, tries"
    sql = f"INSERT INTO jobs ({columns}) VALUES (?, '', 'webhooks', 'alerts', ?, ?, ?, ?, '{{}}', 3)"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(sql, rows)
        db.execute("UPDATE jobs SET failed = 1 WHERE number > ?", [queued])


@pytest.mark.parametrize("folder", ["x", "long-" * 40, "a folder with blanks " * 9])
def test_it_fits_80_columns_but_for_words_that_do_not(new_daemon, tmp_path, folder):
    (tmp_path / folder).mkdir()
    daemon = new_daemon(archive__workers="0", queue__path=tmp_path / folder / "queue.db")
    jobs(tmp_path / folder / "queue.db", 300, 300, 100, "m\u00e9ssage\x1b[31m " * 30 + "x" * 300)
    for arguments, lines in ([], 500), (["--failed"], 1000):
        text = status(daemon, *arguments)
        assert len(text.splitlines()) > lines
        assert "\x1b" not in text
    assert len(glance(daemon)["causes"]) == 100


def test_100000_queued_and_10000_failed(new_daemon):
    daemon = new_daemon(archive__workers="0", queue__max_size="1G")
    jobs(daemon.queue, 100_000, 10_000, 3)
    found = glance(daemon, "--failed")
    assert (found["queued"], found["failed"], len(found["failures"])) == (100_000, 10_000, 10_000)
    assert sum(cause["queued"] for cause in found["causes"]) == 100_000
    first = min(found["causes"], key=lambda cause: cause["since"])
    assert first["since"] == "2017-01-17T13:51:05.500Z"
    assert {entry["id"] for entry in found["failures"]} == {alert(n)["id"] for n in range(100_000, 110_000)}
    assert "queued   100000, oldest " in status(daemon)
    assert daemon.run("retry").stdout == "10000 queued again\n"
    assert glance(daemon)["queued"] == 110_000


def test_full_by_max_size_and_drained(new_daemon, s3):
    daemon = new_daemon(queue__max_size="1M", **QUICK)
    s3.stop()
    n = next(n for n in range(100) if post(daemon, alert(n, text="x" * 20_000)) == 503)
    assert 20 < n < 60
    for method, path in (("POST", "/api/v1/s3/alert"), ("GET", "/healthz")):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        code, answer, headers = daemon.request(method, path, json.dumps(alert(n, text="x" * 20_000)), headers)
        assert (code, answer["error"]["type"], int(headers["Retry-After"]) > 0) == (503, "queue_unavailable", True)
        assert "max_size" in answer["error"]["message"]
    assert (answer["success"], answer["queued"], answer["failed"]) == (False, n, 0)
    cause = until(lambda: causes(daemon).get("queue_full"))
    assert "[queue] max_size" in cause["message"]
    assert "queue_full" in status(daemon)
    assert re.search(r"full.*\[queue\] max_size", failures(daemon)["queue"])
    s3.start()
    settled(daemon)
    assert failures(daemon) == {}
    assert len(s3.objects("alerts/")) == n
    assert (post(daemon, alert(n)), daemon.request("GET", "/healthz")[0]) == (200, 200)


def test_a_disk_that_is_full(new_daemon, disk):
    """While no daemon runs: the cause is named also where SQLite has files to make, and cannot."""
    daemon = new_daemon(archive__workers="0", queue__path=disk / "queue.db", **QUICK)
    post(daemon, alert(0))
    daemon.kill()
    fill(disk)
    assert "16M" in causes(daemon)["disk_full"]["message"]
    assert "16M" in status(daemon)
    assert "16M" in failures(daemon)["queue"]
    (disk / "filler").unlink()
    assert (failures(daemon), [*causes(daemon)]) == ({}, ["not_running"])
    daemon.start()
    assert daemon.stop() == 0
    fill(disk)
    for command in ("status", "retry"):
        assert_refused(daemon, f"{disk}/queue.db.*16M", command)
    assert "16M" in failures(daemon)["queue"]
    (disk / "filler").unlink()
    assert (failures(daemon), glance(daemon)["queued"]) == ({}, 1)


NASTY = "\x1b[31mred\x07\r\n\u2028\u0085caf\u00e9 \u65e5\u672c \U0001f512"


def test_a_message_drives_no_terminal(new_daemon, api):
    daemon = new_daemon(**QUICK)
    api.mode = lambda handler: handler.send(400, NASTY.encode())
    post(daemon, alert(0))
    until(lambda: "threatstack_400" in causes(daemon))
    for encoding, arguments in itertools.product(("utf-8", "ascii", "latin-1"), ([], ["--json"])):
        command = daemon.command("status", *arguments)
        daemon.environment["PYTHONIOENCODING"] = encoding
        result = subprocess.run(command, env=daemon.environment, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (1, b"")
        text = result.stdout.decode(encoding)
        assert "red" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text)


def test_a_reader_that_leaves(new_daemon):
    """`ts3d status | head -1`: no traceback, however much there is to say."""
    daemon = new_daemon(archive__workers="0")
    jobs(daemon.queue, 10, 1000, 3)
    daemon.environment.pop("PYTHONUNBUFFERED", None)
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["status"], ["status", "--failed"], ["status", "--json"], ["retry"]):
        command = daemon.command(*arguments)
        result = subprocess.run(command, env=daemon.environment, stdout=writer, stderr=subprocess.PIPE, check=False)
        assert (result.returncode, result.stderr) == (1, b""), arguments
    os.close(writer)


@pytest.mark.parametrize("content", [b"not a database" * 300, "PRAGMA user_version = 99", "CREATE TABLE other (x)"])
def test_a_file_that_is_not_ours_is_refused(new_daemon, content):
    daemon = new_daemon(start=False)
    if isinstance(content, str):
        with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
            db.execute(content)
    else:
        daemon.queue.write_bytes(content)
    before = daemon.queue.read_bytes()
    # `serve` moves aside what is no database.
    for arguments in (["status"], ["status", "--json"], ["retry"], *[["serve"]] * isinstance(content, str)):
        assert_refused(daemon, rf"^ts3d: .*{daemon.queue}.*(not a database|not ts3d's|other|version).*\n\Z", *arguments)
    assert re.search("not a database|not ts3d's|other|version", failures(daemon)["queue"])
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
    daemon.stop()
    daemon.config.chmod(0o644)
    for mode, name in itertools.product((0o700, 0o755), ("serve", "status", "retry")):
        state.chmod(mode)
        for path in (daemon.folder, *daemon.folder.parents):  # each time: any pytest that starts closes its folders
            if path.stat().st_uid == os.getuid() and path != path.parent:
                path.chmod(path.stat().st_mode | 0o055)
        command = ["setpriv", "--reuid=65534", "--clear-groups", *daemon.command(name)]
        result = subprocess.run(
            command, env=daemon.environment, capture_output=True, text=True, timeout=20, check=False
        )
        if result.returncode in (126, 127) or "can't open file" in result.stderr:
            pytest.skip(f"nobody else can run this: {result.stderr}")
        said_by(result)
        assert (result.returncode, str(state / "queue.db") in result.stderr) == (78, True), result
        assert re.search("(?i)permission denied|may not read|readonly|read-only|unable to open", result.stderr)


def fail(daemon, api, *numbers):
    """Have these alerts fail for good, and no more."""
    for n in numbers:
        api.modes[alert(n)["id"]] = 404
    post(daemon, *map(alert, numbers))
    until(lambda: glance(daemon)["failed"] == len(numbers), what="failure")


GIVES_UP = {**QUICK, "archive__give_up_after": "0"}


def test_retry(new_daemon, s3, api):
    """Beside the daemon: one, those named, all; each is archived once its cause is gone."""
    daemon = new_daemon(**GIVES_UP)
    fail(daemon, api, 0, 1, 2, 3)
    said = flat(status(daemon))
    assert "failed 4: `ts3d status --failed` lists them, `ts3d retry` retries them" in said
    assert causes(daemon)["threatstack_not_found"]["failed"] == 4
    listed = status(daemon, "--failed")
    for n in range(4):
        assert re.search(rf"^alert-00000{n}\b", listed, re.MULTILINE)
    api.modes.clear()
    result = daemon.run("retry", "alert-000000", "alert-000000")
    assert (result.returncode, result.stdout, result.stderr) == (0, "1 queued again\n", "")
    until(lambda: len(s3.objects("alerts/")) == 1)
    api.mode = 503
    post(daemon, alert(9))
    result = daemon.run("retry", "nowhere", "alert-000009", "alert-000001", "alert-000002")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "2 queued again")
    assert re.search("^ts3d: .*nowhere.*ts3d status --failed", result.stderr, re.MULTILINE)
    assert "alert-000009" in result.stdout + result.stderr
    api.mode = None
    until(lambda: len(s3.objects("alerts/")) == 4)
    assert glance(daemon)["failed"] == 1
    assert daemon.run("retry").stdout == "1 queued again\n"
    until(lambda: len(s3.objects("alerts/")) == 5)
    settled(daemon)
    assert (daemon.run("retry").returncode, daemon.run("retry").stdout) == (0, "0 queued again\n")
    assert "alert-" not in status(daemon, "--failed")
    assert glance(daemon)["failed"] == 0


def test_retry_without_a_daemon(new_daemon, s3, api):
    """It is tried at the next start, with its tries and its error forgotten."""
    daemon = new_daemon(**GIVES_UP)
    fail(daemon, api, 0)
    daemon.stop()
    assert daemon.run("retry", "alert-000000").stdout == "1 queued again\n"
    assert (glance(daemon)["queued"], glance(daemon)["failed"], [*causes(daemon)]) == (1, 0, ["not_running"])
    api.modes.clear()
    daemon.start()
    settled(daemon)
    assert set(s3.objects()) == {"alerts/al/er/alert-000000", "webhooks/2017/01/17/13/51/alert-000000"}


def test_whatever_has_failed_is_retried(new_daemon, s3):
    """A refused body, and two bodies of one id."""
    daemon = new_daemon(archive__workers="0", **QUICK)
    assert daemon.post(b"not JSON")[0] == 400
    post(daemon, alert(0))
    post(daemon, alert(0, text="another body"))
    assert daemon.stop() == 0
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db, db:
        db.execute("UPDATE jobs SET failed = 1, error_type = 's3_X', error_message = 'x', tries = 9")
        digest = db.execute("SELECT id FROM jobs WHERE step = 'rejected'").fetchone()[0]
    assert glance(daemon, "--failed")["failures"][0]["id"] == digest
    assert daemon.run("retry", digest).stdout == "1 queued again\n"
    assert daemon.run("retry", "alert-000000").stdout == "2 queued again\n"
    daemon.set(archive__workers=None)
    daemon.start()
    settled(daemon)
    assert len(s3.objects("rejected/")) == 1
    assert len(s3.objects("alerts/")) == 1


@pytest.mark.parametrize("arguments", [["check", "x"], ["status", "--xml"], ["status", "x"], ["retry", "--all"]])
def test_wrong_usage(new_daemon, arguments):
    result = new_daemon(start=False).run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ts3d")


def test_a_command_without_standard_error(new_daemon, api, s3):
    """As cron jobs are written, and programs start others."""
    daemon = new_daemon(archive__workers="0", **QUICK)
    for n, closed in enumerate(("2>&-", ">&- 2>&-", "<&- >&- 2>&-")):
        id_ = f"alert-{time.time_ns()}"  # rclone remembers for minutes what was in the bucket
        api.lists["active"] = [threatstack.entry(id_, int(time.time() * 1000) - 60_000, version=1)]
        for command in ("check", "status", "retry", "backfill"):
            shell = ["sh", "-c", f'"$@" {closed}', "sh", *daemon.command(command)]
            result = subprocess.run(shell, env=daemon.environment, capture_output=True, text=True, check=False)
            assert (result.returncode, result.stderr) == (0, ""), command
            assert ">&-" in closed.partition("2")[0] or result.stdout
            assert glance(daemon)["queued"] == n + (command == "backfill")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_daemon_without_standard_error(new_daemon, s3, closed):
    """No file that it opens may become its standard error."""
    daemon = new_daemon(start=False)
    daemon.address = ("127.0.0.1", free_port())
    daemon.set(server__listen="{}:{}".format(*daemon.address))
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *daemon.command("serve")]
    daemon.process = subprocess.Popen(shell, env=daemon.environment)
    until(lambda: listening(daemon.address[1]) or daemon.process.poll() is not None, what="daemon")
    assert daemon.post({"alerts": [alert(0)]})[1]["alerts"][0]["state"] == "archived"
    assert daemon.post(b"nonsense")[0] == 400
    assert daemon.stop() == 0
    with contextlib.closing(sqlite3.connect(daemon.queue)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
