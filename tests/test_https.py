"""HTTPS on port 443 in the ways that the README describes, with certificates from a real ACME server (pebble)."""

import json

import pytest
import trustme
from conftest import alert, readme, until

pytestmark = [pytest.mark.systemd, pytest.mark.usefixtures("silent")]
RELEASE = "bookworm"
URL = "https://ts3d.example.com"
ACME = "https://localhost:14000/dir"
CURL = "--cacert /root/roots.pem"


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
    packages = "nginx-light caddy certbot pebble"
    machine.run(f"""
        update-ca-certificates >/dev/null 2>&1
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install {packages} >/dev/null 2>&1
        systemctl disable --quiet --now nginx caddy
        rm /etc/nginx/sites-enabled/default
        sed -i 's/^#wait = 2$/wait = 30/' /etc/ts3d/ts3d.conf
    """)
    machine.start("pebble", "-E PEBBLE_VA_NOSLEEP=1 pebble -config /root/pebble.json")
    root = "curl -sS https://localhost:15000/roots/0 >/root/roots.pem"
    until(lambda: machine.run(root, check=False).returncode == 0, what="pebble")
    return machine


def certbot(machine):
    """What the README calls, with this certificate authority for Let's Encrypt."""
    command = readme("HTTPS", "sh").splitlines()[0]
    assert command.startswith("certbot certonly --standalone -d ts3d.example.com")
    machine.run(
        f"REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt {command} --server {ACME} --agree-tos "
        "--non-interactive --register-unsafely-without-email --no-random-sleep-on-renew 2>&1"
    )


def breaks_off(machine, number):
    """A daemon that ends in the middle of a request: proxies like to write to their log what it was."""
    until(lambda: machine.show("ts3d.service", "StatusText") == "0 queued, 0 failed", what="empty queue")
    machine.run("systemctl kill --signal=STOP s3.service")
    body = json.dumps({"alerts": [alert(number)]})
    sender = machine.popen(f"curl -sS -m 60 {CURL} -d '{body}' '{URL}/api/v1/s3/alert?token={machine.token}'")
    until(lambda: machine.show("ts3d.service", "StatusText").startswith("1 queued"), what="request under way")
    machine.run("systemctl kill --signal=KILL ts3d.service; systemctl kill --signal=CONT s3.service")
    sender.communicate(timeout=90)
    until(lambda: machine.archived(number), 60, "archived alert")


def only_webhooks_pass(machine):
    assert "queued" not in machine.run(f"curl -sS {CURL} {URL}/healthz").stdout
    assert "unauthorized" in machine.run(f"curl -sS {CURL} -d '{{}}' {URL}/api/v1/s3/alert").stdout


def test_caddy(acme):
    machine = acme
    settings, _, site = readme("HTTPS", "caddy").partition("}\nts3d.example.com")
    own = f"\tacme_ca {ACME}\n\tacme_ca_root /usr/local/share/ca-certificates/acme.crt\n"
    machine.path("/etc/caddy/Caddyfile").write_text(f"{settings}{own}}}\nts3d.example.com{site}")
    assert len(site.strip().splitlines()) == 1
    machine.run("systemctl start caddy")
    works = f"curl -sS {CURL} {URL}/"
    until(lambda: machine.run(works, check=False).returncode == 0, 60, "certificate of Caddy's")
    machine.archive(1, url=URL, options=CURL)
    only_webhooks_pass(machine)
    breaks_off(machine, 2)
    log = "journalctl --no-pager -u caddy"
    until(lambda: "http.log.error" in machine.run(log).stdout, what="error in Caddy's log")
    assert machine.token not in machine.run(log).stdout
    machine.run("systemctl stop caddy")


def test_nginx(acme):
    machine = acme
    certbot(machine)
    machine.path("/etc/nginx/conf.d/ts3d.conf").write_text(readme("HTTPS", "nginx"))
    machine.run("nginx -t 2>&1; systemctl start nginx")
    machine.archive(3, url=URL, options=CURL)
    only_webhooks_pass(machine)
    breaks_off(machine, 4)
    logs = machine.run("cat /var/log/nginx/*; journalctl --no-pager -u nginx").stdout
    assert '"POST /api/v1/s3/alert" 200 ' in logs
    assert '"POST /api/v1/s3/alert" 502 ' in logs
    assert machine.token not in logs
    large = {"alerts": [alert(5, note="x" * 7_000_000)]}
    machine.path("/root/large").write_text(json.dumps(large))
    answer = machine.run(f"curl -sS {CURL} --data-binary @/root/large '{URL}/api/v1/s3/alert?token={machine.token}'")
    assert json.loads(answer.stdout)["success"]


def test_nginx_and_a_unix_socket(acme):
    machine = acme
    lines = machine.path("/etc/systemd/system/ts3d.socket").read_text().splitlines()
    at = lines.index("#ListenStream=/run/ts3d.sock")
    drop_in = "[Socket]\n" + "\n".join(line[1:] for line in lines[at - 1 : at + 3])
    machine.run("mkdir -p /etc/systemd/system/ts3d.socket.d")
    machine.path("/etc/systemd/system/ts3d.socket.d/unix.conf").write_text(drop_in)
    machine.run("""
        sed -i 's,http://127.0.0.1:8080,http://unix:/run/ts3d.sock,' /etc/nginx/conf.d/ts3d.conf
        systemctl daemon-reload; systemctl restart ts3d.socket; systemctl restart nginx
    """)
    machine.archive(6, url=URL, options=CURL)
    assert machine.run("curl -s http://127.0.0.1:8080/", check=False).returncode == 7  # refused
    nobody = "runuser -u nobody -- curl -s --unix-socket /run/ts3d.sock http://x/healthz"
    assert machine.run(nobody, check=False).returncode == 7
    machine.run("rm -r /etc/systemd/system/ts3d.socket.d /etc/nginx/conf.d/ts3d.conf; systemctl stop nginx")
    machine.run("systemctl daemon-reload; systemctl restart ts3d.socket")


def test_its_own_tls_and_a_renewal(acme):
    machine = acme
    machine.run("rm -rf /etc/letsencrypt")
    certbot(machine)
    for line in readme("HTTPS", "sh").splitlines()[1:]:
        machine.run(line)
    machine.archive(7, url=URL, options=CURL)
    said = machine.run("ts3d check").stdout.splitlines()
    assert [line.split()[:2] for line in said][-2:] == [["ok", "clock"], ["ok", "certificate"]], said
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
