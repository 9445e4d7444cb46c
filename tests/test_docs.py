"""The manual: its size and words, and that each of its commands and configurations runs in a test."""

import ast
import http.server
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
import urllib.request

import machine
import pytest
from conftest import BUCKET, ROOT, TOKEN, TS3D, TUTORIAL_ID, alert, aws_client, environment, readme, until
from test_outages import archive_others

import ts3d

README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
SECTIONS = [
    *("Quick start", "Installation", "HTTPS", "Connect Threat Stack", "Configuration", "Commands", "Monitoring"),
    *("Troubleshooting", "Backfill", "Webhook API", "S3 objects", "Upgrading", "Uninstalling", "High availability"),
    *("Guarantees and limitations", "Security", "Performance", "Development"),
]
BLOCKS_RUN_BY = {  # the test that runs a section's block
    ("Quick start", "sh", 0): "test_the_demo",
    ("Installation", "sh", 0): "test_bucket_and_role",
    ("Installation", "systemd", 0): "test_a_forward_proxys_drop_in",
    ("Installation", "sh", 1): "install",  # of machine.py
    ("HTTPS", "caddy", 0): "caddy",
    ("HTTPS", "nginx", 0): "nginx",
    ("HTTPS", "apache", 0): "apache",
    ("HTTPS", "sh", 0): "test_its_own_tls_and_a_renewal",
    ("Connect Threat Stack", "sh", 0): "test_connecting_threat_stack",
    ("Monitoring", "sh", 0): "test_it_is_watched_as_the_readme_says",
    ("Monitoring", "yaml", 0): "test_prometheus",
    ("Backfill", "sh", 0): "test_backfills",
    ("High availability", "nginx", 0): "test_two_behind_a_load_balancer",
}
INLINE_RUN_BY = {  # the test that runs what begins so
    "sh tests/bench": "test_the_programs_of_the_tests",
    "sh tests/run": "test_the_programs_of_the_tests",
    "sh systemd/install --remove": "test_it_is_uninstalled",
    "sh systemd/install": "install",
    "python3 ts3d.py": "test_the_three_settings",
    "uv run ts3d.py": "test_the_file_is_a_script_with_metadata",
    "pipx run ts3d.py": "test_the_file_is_a_script_with_metadata",
    "python3 -m venv": "test_without_the_distributions_boto3_there_is_a_virtual_environment",
    "/usr/local/lib/ts3d/venv/bin/pip": "test_without_the_distributions_boto3_there_is_a_virtual_environment",
    "apt install": "test_debian_packages",
    "update-ca-certificates": "acme",
    "openssl rand": "test_the_three_settings",
    "systemctl edit": "test_a_forward_proxys_drop_in",  # whose files it writes
    "systemctl restart ts3d": "test_restart_and_stop",
    "systemctl stop ts3d.socket": "test_restart_and_stop",
    "systemctl start ts3d.socket ts3d": "test_restart_and_stop",
    "systemctl status ts3d": "test_a_wrong_configuration_keeps_the_socket_and_says_why",
    "systemctl reload caddy": "caddy",
    "certbot certonly --webroot": "certbot",  # of test_https.py
    "a2enmod": "apache",
    "a2ensite": "apache",
    "ts3d ": "test_commands",
    "sqlite3 FILE .dump": "test_sqlite3_shows_what_can_still_be_read",
    "timedatectl set-ntp yes": None,  # systemd's own
    "aws s3 cp": "test_awss_own_tools_read_the_archive",
    "rm -r": "test_it_is_uninstalled",
}
INLINE = [" ".join(code.split()) for code in re.findall("`([^`]+)`", PROSE)]
PROGRAMS = re.compile(
    r"(sh|python3|uv|pipx|apt|openssl|systemctl|certbot|a2\w+|ts3d|sqlite3|timedatectl|aws|rm|curl|/usr\S*/pip) \S"
    r"|update-ca-certificates"
)


def section(name):
    return README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def rows(name):
    """The cells of a section's table, without its head."""
    lines = [line for line in section(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_size():
    lines = README.splitlines()
    assert len(lines) <= 300
    assert re.findall(r"^## (.*)", PROSE, re.MULTILINE) == SECTIONS
    assert [line for line in PROSE.splitlines() if len(line) > 120] == []
    assert [cell for line in lines if line.startswith("|") for cell in line.split("|") if len(cell) > 160] == []
    assert 5 < len(rows("Troubleshooting")) <= 15
    assert [line for line in (ROOT / "ts3d.conf").read_text().splitlines() if len(line) > 120] == []
    for part in ("sh tests/demo", "sh tests/run", "webhook_token =", "api_key =", "bucket ="):
        assert [line for line in lines[:45] if part in line], part  # on the first screen


AVOID = {  # a word: what it looks like; the field's word
    "mend": (r"\bmend(s|ed|ing)?\b", "correct, fix"),
    "whoever": (r"\bwho(ever|m)?\b", "name the actor"),
    "somebody": (r"\b(some(body|one)|nobody|everybody)\b", "name the actor"),
    "held": (r"(?<!lock )\b(is|are|be|was|were|been) held\b|\bholds? (it|them) back\b", "unavailable"),
    "away": (r"\b(is|are|be|was|were|been|goes|went) away\b|\bt(ak(e|es|en|ing)|ook)( \w+){0,2} away\b", "remove"),
    "stand in the way": (r"\b(stand|stands|stood|standing|is|are) in (the|its|the alert's) way\b", "current problems"),
    "set aside": (r"\bset(s|ting)? (\w+ )?aside\b", "marked failed"),
    "over": (r"\b(is|are|be|was) over\b(?= *([.,;:)\"']|$))", "expired, ended"),
    "stir": (r"\bstir(s|red|ring)?\b", "notify, wake"),
    "hopeless": (r"\bhopeless", "failed"),
    "promise": (r"\bpromis(e|es|ed|ing)\b", "guarantee"),
    "one that": (r"\b(one|ones) (that|which|of (that|which))\b", "name it"),
    "none": (r"\b(that|which|it) (is|are) (?-i:none)\b", "name it"),
    "alone": (r"\w's alone\b", "only for NAME"),
    "look for": (r"\b(is|are) not looked (for|at)\b", "ignored"),
    "give up": (r"\bg(ive|ives|iven|ave|iving) (it |them )?up\b", "mark failed"),
    "lets go": (r"\blets? go\b", "release"),
    "tell apart": (r"\bbefall|\bhither|\bthereof|\bwherein|\bhenceforth|\bthus\b|\bere\b", "plain English"),
}
DO_NOT_AVOID = re.compile(r"give_up_after")  # an option's name


def found(text):
    """The words to avoid in a text, each with what is around it."""
    text = " ".join(re.sub(r"^\s*#+ ?|^- ", "", text, flags=re.MULTILINE).split())
    text = DO_NOT_AVOID.sub("", text)
    return [
        f"{word}: …{text[max(0, match.start() - 40) : match.end() + 40]}…; instead: {instead}"
        for word, (pattern, instead) in AVOID.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def words_of(path):
    """Docstrings, string literals and comments of a Python file; the whole text of any other."""
    if path.suffix != ".py":
        return path.read_text()
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    # The licence is not ours to write.
    source = path.read_text().partition("\n# MIT License\n")[0]
    return "\n\n".join(
        token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type in kinds
    )


WRITTEN = [
    *(ROOT / "README.md", ROOT / "ts3d.conf", TS3D, ROOT / "tests" / "demo.py"),
    *sorted((ROOT / "systemd").iterdir()),
    *sorted((ROOT / "tests").glob("*.md")),
    *(ROOT / "tests" / name for name in ("run", "demo", "environment.sh", "bench")),
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_to_avoid(path):
    assert found(words_of(path)) == []


NAMES = [command.__name__ for command in ts3d.COMMANDS]


@pytest.mark.parametrize("command", ["", *NAMES])
def test_help(command):
    """It says what a command does, its exit codes and an example, in plain English; the manual has all options."""
    run = [sys.executable, TS3D, *command.split(), "--help"]
    said = " ".join(subprocess.run(run, capture_output=True, text=True, check=True, env=environment()).stdout.split())
    assert found(said) == []
    for part in ("--config FILE", "78 ", *([f"ts3d {command}"] if command else NAMES)):
        assert part in said
    table = {re.match(r"`ts3d (\w+)", row[0])[1]: row for row in rows("Commands")}
    assert list(table) == NAMES
    if command:
        _, text, codes = table[command]
        assert set(re.findall(r"--[a-z]+", text)) == set(re.findall(r"--[a-z]+", said)) - {"--help", "--config"}
        assert codes.startswith("0 ")


def test_a_word_to_avoid_is_found_and_no_other():
    for text in (
        *("# what to mend", "Whoever sends it", "s3 is held: 503", "until somebody looks", "Threat Stack is away"),
        *(
            "take the option away",
            "What stands in the way",
            "set aside as failed",
            "its certificate is over.",
            "stir()",
        ),
        *("it is hopeless", "what it promises", "one that fails", "a time that is none", "root's alone"),
        *("is not looked for", "after 7 days it gives up"),
    ):
        assert len(found(text)) >= 1, text
    assert found("give_up_after = 7d; the answer is over 8 bytes; amend; the one") == []


def test_every_block_and_command_runs_in_a_test():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    blocks = set()
    for name in ("", *SECTIONS):
        text = section(name) if name else README.partition("\n## ")[0]
        languages = re.findall(r"^```(\w*)\n.*?^```", text, re.MULTILINE | re.DOTALL)
        blocks |= {(name, language, languages[:n].count(language)) for n, language in enumerate(languages)}
    assert blocks == set(BLOCKS_RUN_BY)
    commands = [code for code in INLINE if PROGRAMS.match(code)]
    assert len(commands) > 30
    claimed = {code: [start for start in INLINE_RUN_BY if code.startswith(start)] for code in commands}
    assert [code for code, starts in claimed.items() if not starts] == []
    assert set(INLINE_RUN_BY) == {start for starts in claimed.values() for start in starts}
    names = {*BLOCKS_RUN_BY.values(), *INLINE_RUN_BY.values()} - {None}
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_the_demo():
    commands = [line.split("#")[0].strip() for line in readme("Quick start", "sh").splitlines()]
    assert commands == ["sh tests/demo", "sh tests/run"]
    result = subprocess.run(["sh", "tests/demo", "--once"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result
    for part in ("webhook_token = ", "$ curl ", '"state": "archived"', f"s3://{BUCKET}/alerts/58/7c/"):
        assert part in result.stdout


def test_the_programs_of_the_tests():
    """Those that are too long to run here are at least there, and are shell."""
    for code in INLINE:
        if code.startswith("sh tests/"):
            subprocess.run(["sh", "-n", code.split()[1]], cwd=ROOT, check=True)


def test_the_three_settings(new_daemon, s3):
    """A configuration of nothing else is complete: check and serve use it."""
    settings = re.findall(r"`\[(\w+)\] (\w+) = (\S+)`", " ".join(section("Quick start").split()))
    assert [name for _, name, _ in settings] == ["webhook_token", "api_key", "bucket"]
    daemon = new_daemon(start=False)
    daemon.config.write_text("".join(f"[{section}]\n{name} = {value}\n" for section, name, value in settings))
    config = ts3d.load_config(str(daemon.config))
    assert (config.webhook_token, config.bucket) == ("a-long-random-word", "my-evidence")
    assert "ok    configuration" in daemon.run("check").stdout
    if shutil.which("openssl"):
        made = subprocess.run(["openssl", "rand", "-hex", "32"], capture_output=True, text=True, check=True).stdout
        daemon.set(server__webhook_token=made.strip())
        assert daemon.start().health()["success"]


def test_bucket_and_role(moto):
    """AWS's own command line runs the commands, and the policy is what the program asks for."""
    if not shutil.which("aws"):
        pytest.skip("no aws (Debian's package awscli)")
    no_files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    s3, ec2, iam = (aws_client(service, moto, "eu-west-1") for service in ("s3", "ec2", "iam"))
    image = ec2.describe_images()["Images"][0]["ImageId"]
    instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    script = readme("Installation", "sh").replace("i-0123456789abcdef0", instance)
    subprocess.run(
        ["sh", "-eu", "-c", script],
        env=environment(AWS_ENDPOINT_URL=moto, **no_files),
        check=True,
        capture_output=True,
        text=True,
    )
    assert s3.get_bucket_location(Bucket="my-evidence")["LocationConstraint"] == "eu-west-1"
    policy = iam.get_role_policy(RoleName="ts3d", PolicyName="ts3d")["PolicyDocument"]
    assert {statement["Action"]: statement["Resource"] for statement in policy["Statement"]} == {
        "s3:PutObject": "arn:aws:s3:::my-evidence/*",
        "s3:GetObject": "arn:aws:s3:::my-evidence/alerts/*",
        "s3:ListBucket": "arn:aws:s3:::my-evidence",
    }
    trust = iam.get_role(RoleName="ts3d")["Role"]["AssumeRolePolicyDocument"]
    assert trust["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}
    [profile] = ec2.describe_iam_instance_profile_associations()["IamInstanceProfileAssociations"]
    assert profile["IamInstanceProfile"]["Arn"].endswith(":instance-profile/ts3d")


def test_debian_packages():
    """The machines of the tests install what the README names: nginx as nginx-light."""
    named = {name for code in INLINE if code.startswith("apt install") for name in code.split()[2:]}
    assert {"python3-boto3", "nginx", "caddy", "certbot"} <= named
    assert named <= {name.removesuffix("-light") for name in machine.DOWNLOADED.split()}


def test_the_proxys_variables(monkeypatch):
    """As the drop-in sets them, S3 and Threat Stack are reached through the proxy, and the role's credentials not."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    lines = re.findall("^Environment=(.*)", readme("Installation", "systemd"), re.MULTILINE)
    for setting in shlex.split(" ".join(lines)):
        monkeypatch.setenv(*setting.split("=", 1))
    assert urllib.request.getproxies() | {"no": ""} == {"https": "http://proxy.example.com:3128", "no": ""}
    for host in ("app.threatstack.com", "api.threatstack.com", "my-evidence.s3.eu-west-1.amazonaws.com"):
        assert not urllib.request.proxy_bypass(host)
    for host in ("169.254.169.254", "localhost", "127.0.0.1"):
        assert urllib.request.proxy_bypass(host)


def test_curl_lines(daemon):
    """Those of *Connect Threat Stack* and *Monitoring*, on a daemon without a proxy in front."""
    url, empty, real, _ = readme("Connect Threat Stack", "sh").splitlines()
    url = url.replace("https://ts3d.example.com", f"http://127.0.0.1:{daemon.address[1]}")
    url = url.replace("cat /etc/ts3d/secrets/webhook_token", f"echo {TOKEN}")

    def run(line):
        return subprocess.run(["sh", "-c", f"{url}\n{line}"], capture_output=True, text=True, check=True).stdout

    assert TOKEN in run("")
    answers = [run(line).partition("\n")[2] for line in (empty, real)]
    assert [json.loads(answer) for answer in answers] == [
        {"success": True, "alerts": []},
        {"success": True, "alerts": [{"id": TUTORIAL_ID, "state": "archived"}]},
    ]
    for line in readme("Monitoring", "sh").splitlines():
        if line.startswith("curl"):
            command, _, comment = line.replace(":8080", f":{daemon.address[1]}").partition(" #")
            assert run(f"{command} -o /dev/null -w '%{{http_code}}'").endswith(f"\n{comment.split()[0].rstrip(',:')}")


def test_backfills(daemon):
    for line in readme("Backfill", "sh").splitlines():
        command, _, comment = line.removeprefix("ts3d ").partition(" #")
        others = [["backfill", "--from", time] for time in re.findall(r"2026-\S+T\S+", comment)]
        for arguments in (command.split(), *others):
            result = daemon.run(*arguments)
            assert result.returncode == 0, result
            assert re.search(r"\b0 listed\b.*\b0 queued\b", result.stdout)


COMMANDS = {  # of the text: exit code with a failed alert, and what is in the output
    "ts3d status": (1, "failed   1"),
    "ts3d status --failed": (1, TUTORIAL_ID),
    "ts3d check": (0, "1 failed"),
    "ts3d --version": (0, f"ts3d {ts3d.VERSION}"),
    "ts3d serve": (78, ""),
    "ts3d backfill": (0, "listed"),
    f"ts3d retry {TUTORIAL_ID}": (0, "1 queued again"),
    "ts3d retry": (0, "1 queued again"),
}


def test_commands(new_daemon, api):
    """With a failed alert, while others were archived, and a daemon running; and the members of `status --json`."""
    api.modes[TUTORIAL_ID] = 404
    daemon = new_daemon(archive__give_up_after="1", server__wait="0")
    daemon.post({"alerts": [alert(id=TUTORIAL_ID)]})
    archive_others(daemon, lambda: daemon.health()["failed"])
    until(lambda: daemon.health()["queued"] == 0, what="empty queue")
    named = set(re.findall("`([a-z_]+)`", section("Monitoring").partition("```")[0]))
    report = json.loads(daemon.run("status", "--json", "--failed").stdout)
    members = set(report).union(*report["causes"], *report["failures"])
    assert members <= named
    assert named - members <= {"since", "queued", "alert"}  # only while there is such a problem
    assert {code.replace("[ID …]", TUTORIAL_ID) for code in INLINE if code.startswith("ts3d ")} == set(COMMANDS)
    for code, (status, says) in COMMANDS.items():
        archive_others(daemon, lambda: daemon.health()["failed"])  # again, after `retry`
        result = daemon.run(*code.split()[1:])
        assert result.returncode == status, result
        assert says in result.stdout


def test_statuses():
    table = [status for row in rows("Webhook API") for status in re.findall(r"\d{3}", row[0])]
    assert table == ts3d.STATUSES


def test_symptoms_are_what_is_said():
    """The first column of *Troubleshooting* names what the program, or S3, says."""
    names = [name for row in rows("Troubleshooting") for name in re.findall("`(.*?)`", row[0])]
    sources = TS3D.read_text() + "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    sources = sources.replace(README, "").replace((ROOT / "tests" / "test_docs.py").read_text(), "")
    assert len(names) > 20
    for name in names:
        known = name.removeprefix("s3_").removeprefix("threatstack_").removesuffix("…").removeprefix("status=")
        assert " ".join(known.split()[-2:] if known.startswith("FAIL") else [known]).split("FAIL ")[-1] in sources, name


def test_s3_is_laid_out_as_the_table_says(daemon, s3):
    daemon.post({"alerts": [alert(0), 1]})
    until(lambda: len(s3.objects()) == 3)
    kinds = {row[0].strip("`").partition("/")[0] for row in rows("S3 objects")}
    assert {key.partition("/")[0] for key in s3.objects()} <= kinds
    assert "ts3d-check" in README


def test_options_and_variables():
    """Options and environment variables that the text names exist."""
    options = {option.name for option in ts3d.OPTIONS} | {f"{option.name}_file" for option in ts3d.OPTIONS}
    for name in re.findall(r"`([a-z][a-z_]+) = \S+`", PROSE):
        assert name in options, name
    assert set(ts3d.ENVIRONMENT.values()) <= set(INLINE)
    for section_, name in re.findall(r"`\[([a-z0-9:_]+)\] ([a-z_]+)", PROSE):
        assert (section_, name) in {option[:2] for option in ts3d.OPTIONS}, name


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_guarantee_names_its_tests():
    text = (ROOT / "tests" / "README.md").read_text().partition("\n## Guarantees\n")[2].partition("\n## ")[0]
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(table) > 5
    for row in table:
        names = re.findall("`(test_[a-z0-9_]+)`", row)
        assert names, row
        assert [name for name in names if f"def {name}(" not in sources] == []


def test_the_version_is_that_of_the_changes():
    assert f"**Changes in {ts3d.VERSION}**" in section("Upgrading")


def test_it_stands_on_the_standard_library_and_boto3():
    nodes = list(ast.walk(ast.parse(TS3D.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"boto3", "botocore"}
    assert issubclass(ts3d.Handler, http.server.BaseHTTPRequestHandler)


def test_nothing_else_stands_at_the_top():
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert top <= {"README.md", "systemd", "tests", "ts3d.conf", "ts3d.py"}


VERBS = "allow|check|correct|end|find|free|list|present|search|send|set|start|use"
INSTRUCTION = re.compile(rf"(?i)(^|[.:;,] |\}} )(no action needed|({VERBS})\b)")


def texts_of(name):
    """The texts of all `name(…)` in ts3d.py by error type, with `{}` for what is only known when it runs."""
    found = {}
    for function in ast.walk(ast.parse(TS3D.read_text())):
        values = {}  # of the function's local names, by line
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if isinstance(node, ast.Assign) and isinstance(node.targets[-1], ast.Name):
                values[node.lineno] = (node.targets[-1].id, node.value)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                place, type_ = (1, node.args[1].value) if name == "Refusal" else (0, f"line {node.lineno}")
                text = node.args[place + (name == "Refusal")]
                for line, (local, value) in sorted(values.items(), reverse=True):
                    if isinstance(text, ast.Name) and local == text.id and line <= node.lineno:
                        text = value
                if isinstance(text, ast.JoinedStr | ast.Constant):
                    parts = getattr(text, "values", [text])
                    found[type_] = "".join(
                        str(getattr(part, "value", ""))
                        if isinstance(part, ast.Constant)
                        else str(getattr(ts3d, ast.unparse(part.value), "{}"))
                        for part in parts
                    )
    return found


def test_every_error_says_what_to_do():
    texts = {f"s3, threatstack: {pattern}": text for pattern, text in ts3d.ADVICE}
    texts |= {type_: text for text, type_ in ts3d.KNOWN_FAILURES.values()}
    texts |= texts_of("Refusal") | texts_of("QueueError")
    assert {"unauthorized", "timeout", "too_large", "malformed_request", "queue_locked"} <= texts.keys()
    assert {type_: text for type_, text in texts.items() if not INSTRUCTION.search(text)} == {}
    # An error of an upstream that no pattern knows has an instruction too.
    for upstream in ts3d.TITLES:
        assert INSTRUCTION.search(str(ts3d.UpstreamError(upstream, "Unknown", "because")))
