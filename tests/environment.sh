# Sourced by tests/run and tests/demo, from the project's folder: makes the virtual environment $env, once for each
# Python and boto3, and sets $python in it. PYTHON=… and BOTO3=… choose them; pip's own variables (PIP_CERT,
# PIP_INDEX_URL …) and apt's configuration are obeyed.

BOTO3=${BOTO3:-1.44.5}

say() { printf '%s\n' "$*" >&2; }

# need COMMAND-THAT-PROVES-IT PACKAGE: install Debian's package where that can be done without asking, else name it
need() {
    eval "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $2 (apt-get install $2)"
        apt-get -qq update >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$2" >/dev/null
        eval "$1" >/dev/null 2>&1 && return
    fi
    say "$2 is missing: install the package $2 (on Debian: apt install $2)"
    exit 1
}

base=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        base=$candidate
        break
    fi
done
if [ -z "$base" ]; then
    say "Python 3.10 or newer is missing: install the package python3 (on Debian: apt install python3)"
    exit 1
fi

version=$("$base" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
env=.venv/python-$version-boto3-$BOTO3
python=$env/bin/python
stamp=$(cksum <tests/requirements.txt)
if [ "$(cat "$env/complete" 2>/dev/null)" != "$stamp" ]; then
    need "$base -c 'import ensurepip, venv'" python3-venv
    say "making $env (once)"
    rm -rf "$env"
    "$base" -m venv "$env"
    "$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt "boto3==$BOTO3" >&2
    printf '%s\n' "$stamp" >"$env/complete"
fi
