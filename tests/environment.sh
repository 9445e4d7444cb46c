# shellcheck shell=sh
# Sourced by tests/run, tests/bench and tests/demo, in the project's folder. Makes a virtual environment for this Python
# and boto3, once, and sets $env to its folder and $python to its Python. PYTHON=… and BOTO3=… choose the versions. With
# $only set, the environment has that package and boto3 alone. The settings of pip (PIP_CERT …) and apt apply.

BOTO3=${BOTO3:-1.44.5}

say() { printf '%s\n' "$*" >&2; }

# need TEST PACKAGE [NAME]: if TEST fails, root installs Debian's PACKAGE; any other user gets an instruction.
need() {
    eval "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "apt-get install $2"
        [ "${updated:-}" ] || apt-get -qq update >/dev/null
        updated=yes
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$2" >/dev/null
        eval "$1" >/dev/null 2>&1 && return
    fi
    say "${3:-$2} is missing. Install the package $2 (Debian: apt install $2)"
    exit 1
}

find_python() {
    for base in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && return
    done
    return 1
}

need find_python python3-venv "Python 3.11 or newer"
version=$("$base" -c 'import platform; print(platform.python_version())')
env=.venv/${only:+only-$only-}python-$version-boto3-$BOTO3
python=$env/bin/python
stamp=$(cksum <tests/requirements.txt)
if [ "$(cat "$env/complete" 2>/dev/null)" != "$stamp" ]; then
    need "$base -c 'import ensurepip, venv'" python3-venv
    if [ "${only:-}" ]; then
        set_of_packages="$only -c tests/requirements.txt"
    else
        set_of_packages='-r tests/requirements.txt'
    fi
    say "making $env: pip install boto3==$BOTO3 $set_of_packages"
    rm -rf "$env"
    "$base" -m venv "$env"
    # shellcheck disable=SC2086 # options
    "$python" -m pip install --quiet --disable-pip-version-check "boto3==$BOTO3" $set_of_packages >&2
    printf '%s\n' "$stamp" >"$env/complete"
fi
