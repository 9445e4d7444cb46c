"""A Debian machine with a booted systemd: debootstrap makes it once, systemd-nspawn runs it, changes stay in memory.

It has no network but loopback. Packages that tests install were downloaded when it was made.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import threatstack
from conftest import AWS, CREDENTIALS, KEY_PAIR, ROOT, Rclone, alert, readme, until

PACKAGES = "systemd systemd-sysv dbus curl"
DOWNLOADED = (
    "ca-certificates python3-boto3 python3-venv nginx-light caddy apache2 certbot pebble awscli prometheus sqlite3"
)
HOSTS = "127.0.0.1 localhost ts3d.example.com\n::1 localhost\n"
BASES = ROOT / ".venv" / "machines"
COMMAND = ["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]


def base(release):
    """The folder of a release's files, which the first call makes with this machine's settings of apt and pip."""
    folder, stamp = BASES / release, f"{PACKAGES} / {DOWNLOADED} / {HOSTS}"
    BASES.mkdir(parents=True, exist_ok=True)
    with open(BASES / f"{release}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = folder / "complete"
        if complete.exists() and complete.read_text() == stamp:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        make(["debootstrap", "--variant=minbase", f"--include={PACKAGES.replace(' ', ',')}", release, str(folder)])
        shutil.copy("/etc/resolv.conf", folder / "etc" / "resolv.conf")
        make(["chroot", folder, "apt-get", "-qq", "update"])
        download = ["apt-get", "-qq", "-y", "--no-install-recommends", "--download-only", "install"]
        make(["chroot", folder, *download, *DOWNLOADED.split()])
        wheels = ["--only-binary=:all:", "--python-version=3.11", "--dest", folder / "root" / "wheels", "boto3"]
        make([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *wheels])
        (folder / "etc" / "hosts").write_text(HOSTS)
        (folder / "etc" / "resolv.conf").unlink()
        (folder / "etc" / "hostname").write_text("ts3d\n")
        complete.write_text(stamp)
    return folder


def make(command):
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    if result.returncode:
        pytest.skip(f"{command[0]} fails here: {(result.stdout + result.stderr)[-500:]}")


def quoted(section, *commands):
    """These commands, which the README's section must have as they are, in a block or in a sentence."""
    text = " ".join((ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0].split())
    for command in commands:
        assert " ".join(command.split()) in text, command
    return commands


class Machine:
    """A booted one, with the checkout in /root/ts3d; S3 and Threat Stack's stand-in run in it."""

    BUCKET = "my-evidence"  # the README's
    MISSED = "missed-000001"  # the alert that the API lists

    def __init__(self, release, folder):
        self.release, self.console = release, folder / "console"
        self.name = f"ts3d-{os.getpid()}-{release}"
        self.process = self.leader = None

    def boot(self):
        rclone = Rclone.binary()
        # A cgroup of its own: `--keep-unit` takes that of its caller, and two systemds in one would kill each other's.
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        self.groups = [
            Path(mount[1]) / self.name for mount in mounts if mount[2] == "cgroup2" or "name=systemd" in mount[3]
        ]
        for group in self.groups:
            group.mkdir(exist_ok=True)
        command = ["systemd-nspawn", "--quiet", "--boot", "--directory", base(self.release), "--machine", self.name]
        command += "--volatile=overlay --private-network --register=no --keep-unit --link-journal=no".split()
        command += ["--console=pipe", "--bind-ro", f"{rclone}:/usr/local/bin/rclone"]
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=lambda: [(group / "cgroup.procs").write_text("0") for group in self.groups],
                # Where the host's own cgroups are of the old kind, systemd 257 would not boot with them.
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")

        def leader():
            """The machine's first process, which systemd-nspawn has become."""
            found = children.read_text().split() if self.process.poll() is None else [0]
            return [pid for pid in found if not pid or Path(f"/proc/{pid}/comm").read_text() == "systemd\n"]

        (self.leader,) = until(leader, 30, "first process")
        if not self.leader:
            pytest.skip(f"systemd-nspawn cannot boot here: {self.console.read_text()[-500:]}")
        until(lambda: "running" in self.run("systemctl is-system-running", check=False).stdout, 60, "boot")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".hypothesis")
        shutil.copytree(ROOT, self.path("/root/ts3d"), ignore=ignored)

    def path(self, inside):
        """Where a path inside is to be found from outside."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def popen(self, script, **options):
        command = ["nsenter", "--all", f"--target={self.leader}", "--", *COMMAND, "sh", "-c", script]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def run(self, script, check=True, input="", timeout=120):
        """Run a script as root, and return what came of it."""
        process = self.popen(script, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if check:
            assert process.returncode == 0, (script, out, err)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def start(self, name, command):
        """Run a command as a service, until the machine is stopped."""
        self.run(f"systemd-run --quiet --collect --unit={name} --description={name} {command}")

    def start_s3(self):
        """On port 9000."""
        self.run(f"mkdir -p /srv/s3/{self.BUCKET}")
        self.start("s3", f"rclone serve s3 --auth-key {KEY_PAIR} --addr 127.0.0.1:9000 /srv/s3")

    def objects(self):
        """The keys in S3."""
        top = self.path(f"/srv/s3/{self.BUCKET}")
        return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}

    def install(self, **environment):
        """Follow the README's installation, with upstreams in the machine."""
        first, *rest = readme("Installation", "sh", 1).splitlines()
        settings = "".join(f"export {name}='{value}'; " for name, value in environment.items())
        self.run(f"cd /root/ts3d; {settings} {first}", timeout=300)
        self.start_s3()
        self.start("threatstack", f"python3 /root/ts3d/tests/threatstack.py 9001 {self.MISSED}")
        self.run(
            "sed -i 's,^#endpoint_url =$,endpoint_url = http://127.0.0.1:9000,; "
            "s,^#base_url =$,base_url = http://127.0.0.1:9001/api/v1,' /etc/ts3d/ts3d.conf"
        )
        self.path("/etc/ts3d/secrets/aws_credentials").write_text(f"[default]\n{CREDENTIALS}")
        for line in rest:
            self.run(line, input=threatstack.KEY + "\n")

    @property
    def token(self):
        return self.path("/etc/ts3d/secrets/webhook_token").read_text().strip()

    def post(self, number, url="http://127.0.0.1:8080", options=""):
        """Post an alert with curl, and return its state."""
        body = json.dumps({"alerts": [alert(number)]})
        command = f"curl -sS -m 100 {options} -d @- '{url}/api/v1/s3/alert?token={self.token}'"
        return json.loads(self.run(command, input=body).stdout)["alerts"][0]["state"]

    def archive(self, number, **options):
        """Post an alert, and wait until it is in S3."""
        self.post(number, **options)
        until(lambda: self.archived(number), 60, "archived alert")

    def archived(self, number):
        return f"alerts/al/er/{alert(number)['id']}" in self.objects()

    def show(self, unit, name):
        """A property of a unit."""
        return self.run(f"systemctl show --value -p {name} {unit}").stdout.strip()

    def secrets(self):
        return [self.token, threatstack.KEY, AWS["AWS_SECRET_ACCESS_KEY"]]

    def stop(self):
        if self.process and self.process.poll() is None:
            os.kill(int(self.leader or self.process.pid), signal.SIGKILL)
            self.process.wait(30)
            for group in self.groups:
                for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
                    folder.rmdir()
                group.rmdir()
