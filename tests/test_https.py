"""HTTPS on port 443 in the ways that the README describes, with certificates from a real ACME server (pebble)."""

import contextlib
import json

import pytest
import trustme
from conftest import TUTORIAL_ID, alert, readme, until
from machine import quoted

pytestmark = [pytest.mark.systemd, pytest.mark.usefixtures("silent")]
RELEASE = "bookworm"
URL = "https://ts3d.example.com"
ACME = "https://localhost:14000/dir"
CURL = "--cacert /root/roots.pem"
WEBROOT = "certbot certonly --webroot -w /var/www/html -d ts3d.example.com --deploy-hook 'systemctl reload nginx'"


@pytest.fixture(scope="module")
def acme(machine):
    """A certificate authority that proves the name as Let's Encrypt does; curl in the machine trusts it."""
    own = trustme.CA()
    certificate = own.issue_cert("localhost")
    own.cert_pem.write_to_path(machine.path("/usr/local/share/ca-certificates/acme.crt"))
    certificate.private_key_and_cert_chain_pem.write_to_path(machine.path("/root/acme.pem"))
    settings = {
        "listenAddress": "127.0.0.1:14000",
        "managementListenAddress": "127.0.0.1:15000",
        "certificate": "/root/acme.pem",
        "privateKey": "/root/acme.pem",
        "httpPort": 80,
        "tlsPort": 443,
    }
    machine.path("/root/pebble.json").write_text(json.dumps({"pebble": settings}))
    packages = "nginx-light caddy apache2 certbot pebble"
    machine.run(f"""
        update-ca-certificates >/dev/null 2>&1
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install {packages} >/dev/null 2>&1
        systemctl disable --quiet --now nginx caddy apache2
        sed -i 's/^#wait = 2$/wait = 30/' /etc/ts3d/ts3d.conf; systemctl restart ts3d
    """)
    machine.start("pebble", "-E PEBBLE_VA_NOSLEEP=1 -E PEBBLE_WFE_NONCEREJECT=0 pebble -config /root/pebble.json")
    root = "curl -sS https://localhost:15000/roots/0 >/root/roots.pem"
    until(lambda: machine.run(root, check=False).returncode == 0, what="pebble")
    return machine


def certbot(machine, command):
    """Run a command of the README's, with this certificate authority in place of Let's Encrypt."""
    machine.run(
        f"rm -rf /etc/letsencrypt; REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt {command} --server {ACME} "
        "--agree-tos --non-interactive --register-unsafely-without-email --no-random-sleep-on-renew 2>&1"
    )


def caddy(machine):
    settings, _, site = readme("HTTPS", "caddy").partition("}\nts3d.example.com")
    own = f"\tacme_ca {ACME}\n\tacme_ca_root /usr/local/share/ca-certificates/acme.crt\n"
    machine.path("/etc/caddy/Caddyfile").write_text(f"{settings}{own}}}\nts3d.example.com{site}")
    machine.run("systemctl start caddy")


def nginx(machine, edit=str):
    machine.run("systemctl start nginx")
    certbot(machine, *quoted("HTTPS", WEBROOT))
    machine.path("/etc/nginx/conf.d/ts3d.conf").write_text(edit(readme("HTTPS", "nginx")))
    machine.run("nginx -t 2>&1; systemctl reload nginx")


def nginx_with_keepalive(machine):
    def edit(text):
        text = text.replace("http://127.0.0.1:8080;", "http://kept; proxy_http_version 1.1;")
        text = text.replace("proxy_set_header", "proxy_set_header Connection ''; proxy_set_header", 1)
        return "upstream kept { server 127.0.0.1:8080; keepalive 32; }\n" + text

    nginx(machine, edit)


def apache(machine):
    machine.run("systemctl start apache2")
    certbot(machine, WEBROOT.replace("nginx", "apache2"))
    machine.path("/etc/apache2/sites-available/ts3d.conf").write_text(readme("HTTPS", "apache"))
    for command in quoted("HTTPS", "a2enmod ssl proxy_http", "a2ensite ts3d"):
        machine.run(command)
    machine.run("systemctl reload apache2")


LOGS = {  # by unit
    "caddy": "journalctl --no-pager -u caddy",
    "nginx": "cat /var/log/nginx/*; journalctl --no-pager -u nginx",
    "apache2": "cat /var/log/apache2/*; journalctl --no-pager -u apache2",
}


@contextlib.contextmanager
def running(machine, start, unit):
    """A reverse proxy; the value returns what it has logged."""
    try:
        start(machine)
        # Caddy gets its certificate meanwhile, and a reload returns before nginx listens.
        works = f"curl -sS {CURL} {URL}/"
        until(lambda: machine.run(works, check=False).returncode == 0, 60, "HTTPS")
        yield lambda: machine.run(LOGS[unit]).stdout
    finally:
        machine.run(f"systemctl stop {unit}; rm -f /etc/nginx/conf.d/ts3d.conf /etc/apache2/sites-enabled/ts3d.conf")


def breaks_off(machine, number):
    """A daemon that ends in the middle of a request: reverse proxies like to write the request to their log."""
    until(lambda: machine.show("ts3d.service", "StatusText") == "0 queued, 0 failed", what="empty queue")
    machine.run("systemctl kill --signal=STOP s3.service")
    body = json.dumps({"alerts": [alert(number)]})
    sender = machine.popen(f"curl -sS -m 60 {CURL} -d '{body}' '{URL}/api/v1/s3/alert?token={machine.token}'")
    until(lambda: machine.show("ts3d.service", "StatusText").startswith("1 queued"), what="request under way")
    machine.run("systemctl kill --signal=KILL ts3d.service; systemctl kill --signal=CONT s3.service")
    sender.communicate(timeout=90)
    until(lambda: machine.archived(number), 60, "archived alert")


@pytest.mark.parametrize(
    ("start", "unit", "number"), [(caddy, "caddy", 30), (nginx, "nginx", 33), (apache, "apache2", 36)], ids=LOGS
)
def test_a_reverse_proxy(acme, start, unit, number):
    with running(acme, start, unit) as logs:
        acme.archive(number, url=URL, options=CURL)
        # GET is not forwarded; a POST to a wrong path is, so that ts3d counts it.
        for path in ("healthz", "metrics", "api/v1/s3/alert"):
            answer = acme.run(f"curl -sS -w ' %{{http_code}}' {CURL} {URL}/{path}").stdout
            assert "queue" not in answer
            assert answer[-3:] in ("403", "404", "405")
        assert "unauthorized" in acme.run(f"curl -sS {CURL} -d '{{}}' {URL}/api/v1/s3/alert").stdout
        for path in ("", "api/v1/s3/alert/x"):
            assert '"not_found"' in acme.run(f"curl -sS {CURL} -d '{{}}' {URL}/{path}").stdout
        acme.path("/root/large").write_text(json.dumps({"alerts": [alert(number + 1, note="x" * 7_000_000)]}))
        answer = acme.run(f"curl -sS {CURL} --data-binary @/root/large '{URL}/api/v1/s3/alert?token={acme.token}'")
        assert json.loads(answer.stdout)["success"]
        breaks_off(acme, number + 2)
        for status in (200, 502):
            assert unit == "caddy" or f'"POST /api/v1/s3/alert" {status}' in logs()
        assert acme.token not in logs()


def test_connecting_threat_stack(acme):
    with running(acme, caddy, "caddy"):
        url, empty, real, timer = readme("Connect Threat Stack", "sh").splitlines()
        assert "enable --now ts3d-backfill.timer" in timer
        said = acme.run(f"export CURL_CA_BUNDLE=/root/roots.pem; {url}\n{empty}\necho\n{real}\n{timer}")
        shown, *answers = said.stdout.splitlines()
        assert shown == f"{URL}/api/v1/s3/alert?token={acme.token}"
        assert [json.loads(answer)["success"] for answer in answers] == [True, True]
        until(lambda: f"alerts/58/7c/{TUTORIAL_ID}" in acme.objects(), what="alert")
        assert acme.show("ts3d-backfill.timer", "ActiveState") == "active"


# Bursts of webhooks. The pauses between them are a second, which was the idle limit, and up to 20 ms less or more. A
# connection is open before its burst, so that all of them are sent at once, and used once, as reverse proxies like to
# close those that they keep for clients.
BURSTS = """
import collections, concurrent.futures, http.client, ssl, sys, time

def connect(_):
    connection = http.client.HTTPSConnection(sys.argv[1], context=context)
    connection.connect()
    return connection

def post(connection):
    connection.request("POST", sys.argv[2], b'{"alerts": []}', {"Connection": "close"})
    answer = connection.getresponse()
    answer.read()
    return answer.status

context = ssl.create_default_context(cafile="/root/roots.pem")
statuses, end = collections.Counter(), time.monotonic()
with concurrent.futures.ThreadPoolExecutor(48) as pool:
    for number in range(21):
        connections = list(pool.map(connect, range(48)))
        time.sleep(max(0, end + 0.98 + number / 500 - time.monotonic()))
        statuses.update(pool.map(post, connections))
        end = time.monotonic()
print(dict(statuses))
"""


@pytest.mark.parametrize(
    ("start", "unit"), [(caddy, "caddy"), (nginx_with_keepalive, "nginx"), (apache, "apache2")], ids=LOGS
)
def test_a_kept_connection_is_not_closed_when_the_proxy_uses_it(acme, start, unit):
    """A closed connection becomes a 502, and Threat Stack sends the batch again."""
    acme.path("/root/bursts.py").write_text(BURSTS)
    acme.run("cp /etc/ts3d/ts3d.conf /root/kept.conf")
    acme.run("sed -i 's/^#request_timeout = 10$/request_timeout = 1/' /etc/ts3d/ts3d.conf; systemctl restart ts3d")
    with running(acme, start, unit):
        url = f"ts3d.example.com '/api/v1/s3/alert?token={acme.token}'"
        statuses = acme.run(f"python3 /root/bursts.py {url}").stdout
    acme.run("mv /root/kept.conf /etc/ts3d/ts3d.conf; systemctl restart ts3d")
    assert statuses == "{200: 1008}\n"


def test_nginx_and_a_unix_socket(acme):
    machine = acme
    lines = machine.path("/etc/systemd/system/ts3d.socket").read_text().splitlines()
    at = lines.index("#ListenStream=/run/ts3d.sock")
    drop_in = "[Socket]\n" + "\n".join(line[1:] for line in lines[at - 1 : at + 3])
    machine.run("mkdir -p /etc/systemd/system/ts3d.socket.d")
    machine.path("/etc/systemd/system/ts3d.socket.d/unix.conf").write_text(drop_in)
    machine.run("systemctl daemon-reload; systemctl restart ts3d.socket")

    def start(machine):
        nginx(machine, lambda text: text.replace("http://127.0.0.1:8080", "http://unix:/run/ts3d.sock"))

    with running(machine, start, "nginx"):
        machine.archive(6, url=URL, options=CURL)
        assert machine.run("curl -s http://127.0.0.1:8080/", check=False).returncode == 7  # refused
        nobody = "runuser -u nobody -- curl -s --unix-socket /run/ts3d.sock http://x/healthz"
        assert machine.run(nobody, check=False).returncode == 7
    machine.run("rm -r /etc/systemd/system/ts3d.socket.d; systemctl daemon-reload; systemctl restart ts3d.socket")


def test_its_own_tls_and_a_renewal(acme):
    machine = acme
    command, *rest = readme("HTTPS", "sh").splitlines()
    certbot(machine, command)
    for line in rest:
        machine.run(line)
    machine.archive(7, url=URL, options=CURL)
    said = machine.run("ts3d check").stdout.splitlines()
    assert said[-1].split()[:2] == ["ok", "clock"], said
    assert "listens on https://[::]:443" in machine.run("journalctl --no-pager -u ts3d.service").stdout
    key = "/etc/letsencrypt/live/ts3d.example.com/privkey.pem"
    assert machine.run(f"runuser -u nobody -- cat {key}", check=False).returncode

    def served():
        """The certificate's serial number."""
        show = f"curl -sS -v {CURL} {URL}/healthz 2>&1 | grep -i 'start date'; "
        show += "cksum /etc/letsencrypt/live/ts3d.example.com/fullchain.pem"
        return machine.run(show).stdout

    before, pid = served(), machine.show("ts3d.service", "MainPID")
    sender = f"python3 /root/ts3d/tests/sender.py '{URL}/api/v1/s3/alert?token={machine.token}' renew /root/sent"
    machine.start("sender", f"-E SSL_CERT_FILE=/root/roots.pem {sender}")
    sent = machine.path("/root/sent")
    until(lambda: sent.exists() and len(sent.read_text().splitlines()) > 20, what="webhooks")
    machine.run(
        "REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt "
        f"certbot renew --force-renewal --no-random-sleep-on-renew --server {ACME} 2>&1"
    )
    until(lambda: machine.show("ts3d.service", "MainPID") not in (pid, "0"), what="restart by the deploy hook")
    count = len(sent.read_text().splitlines())
    until(lambda: len(sent.read_text().splitlines()) > count + 20, what="webhooks after the restart")
    machine.run("systemctl stop sender")
    assert served() != before
    assert [line for line in sent.read_text().splitlines() if "null" not in line] == []


def test_only_these_addresses(acme):
    machine = acme
    lines = machine.path("/etc/systemd/system/ts3d.socket").read_text().splitlines()
    allow = next(line[1:] for line in lines if line.startswith("#IPAddressAllow="))
    deny = next(line[1:] for line in lines if line.startswith("#IPAddressDeny="))
    file = machine.path("/etc/systemd/system/ts3d.socket.d/senders.conf")
    apply = "systemctl daemon-reload; systemctl restart ts3d.socket"
    fetch = f"curl -sS -m 2 {CURL} {URL}/healthz"
    file.write_text(f"[Socket]\n{deny}\n{allow.replace('localhost ', '')}\n")
    machine.run(apply)
    if machine.run(fetch, check=False).returncode == 0:
        pytest.skip("this kernel or its cgroups let systemd filter no addresses")
    file.write_text(f"[Socket]\n{deny}\n{allow}\n")
    machine.run(apply)
    machine.archive(8, url=URL, options=CURL)
