#!/usr/bin/env bash
# Makes .venv with the pinned dependencies. Costs nothing when there is nothing to do, and goes on
# where an earlier call was cut off.
#
#   scripts/setup.sh         what training needs; a missing C++ compiler is told and left at that
#   scripts/setup.sh test    what the tests need: a missing C++ compiler is an error; also Slurm, ssh
#                            and MPI for the tests on virtual hosts, where they may be installed
#
# Missing system packages are installed where that is possible without asking: as root on Debian or
# Ubuntu. Elsewhere one line says what to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
purpose="${1:-train}"

fail() {
    echo "setup: $*" >&2
    exit 1
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

# Installs the packages named, quietly; shows what apt said only where it failed.
install() {
    local log
    log="$(mktemp)"
    echo "setup: installing $* with apt-get ..."
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        fail "apt-get install $* failed"
    fi
    rm -f "$log"
}

# The tests start daemons of their own, on virtual networks. None may start on this machine's own,
# neither now (a policy-rc.d that was there before stays) nor when it is started next.
install_without_daemons() {
    local policy=/usr/sbin/policy-rc.d package
    if [ ! -e "$policy" ]; then
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    install "$@"
    if [ -n "$(trap -p EXIT)" ]; then
        rm -f "$policy"
        trap - EXIT
    fi
    for package in "$@"; do
        case "$package" in
            slurmctld | slurmd | munge) disable "$package.service" ;;
            openssh-server) disable ssh.service && disable ssh.socket ;;
        esac
    done
}

disable() {
    ! command -v systemctl >/dev/null || systemctl --quiet disable "$1" >/dev/null 2>&1 || true
}

has_venv() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null
}

# Python: a .venv that exists keeps its own.
if [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null; then
    python="$(.venv/bin/python -c 'import sys; print(sys._base_executable)')"
else
    python="$(find_python)"
    if [ -z "$python" ] && can_install; then
        install python3 python3-venv
        python="$(find_python)"
    fi
    [ -n "$python" ] || fail "Python 3.11 or newer is needed; install it (apt-get install python3 python3-venv)"
fi
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"

# Fatal when missing: without venv and pip there is nothing to install into.
if [ ! -x .venv/bin/pip ] && ! has_venv; then
    can_install || fail "this Python has no venv; run: apt-get install python$version-venv (as root)"
    install "python$version-venv"
    has_venv || fail "$python still has no venv; try another Python"
fi

# DeepSpeed compiles its CPU optimizer and its NVMe reader. Training without offload needs neither.
missing=()
command -v "${CXX:-c++}" >/dev/null || missing+=(g++)
[ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] \
    || missing+=("python$version-dev")
if ! echo '#include <libaio.h>' | "${CC:-cc}" -E - >/dev/null 2>&1; then
    missing+=(libaio-dev)
fi
if [ "${#missing[@]}" -gt 0 ]; then
    if can_install; then
        install "${missing[@]}"
    elif [ "$purpose" = test ]; then
        fail "the tests compile DeepSpeed's ops; run: apt-get install ${missing[*]} (as root)"
    else
        echo "setup: offload recipes will not run before: apt-get install ${missing[*]} (as root)" >&2
    fi
fi

# What tests/cluster runs on virtual hosts: a program of each package, and the package. Looked for at
# each call: a machine whose .venv is complete may still lack them.
if [ "$purpose" = test ]; then
    missing=()
    for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge sshd:openssh-server \
        ssh:openssh-client pdsh:pdsh mpirun:openmpi-bin tc:iproute2; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        if can_install; then
            install_without_daemons "${missing[@]}"
        else
            echo "setup: tests/cluster will fail before: apt-get install ${missing[*]} (as root)" >&2
        fi
    fi
fi

# The stamp is written last: a set-up that was cut off is done again, and pip keeps what it has.
files=(requirements.txt)
[ "$purpose" = train ] || files+=(requirements-dev.txt)
stamp=".venv/setup-$purpose"
wanted="$({ cat "${files[@]}"; "$python" --version; } | sha256sum | cut -d' ' -f1)"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

echo "setup: installing the pinned dependencies to $purpose into .venv, a minute or more ..."
if [ ! -x .venv/bin/pip ] || ! .venv/bin/pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear .venv
    # The one that Python 3.11 brings takes twice the time for the rest.
    .venv/bin/pip install --quiet --disable-pip-version-check --no-compile pip==26.3
fi

# pip would compile on one core. A file that some package has for another Python may fail, and Python
# compiles what is left out here when it is first imported.
.venv/bin/pip install --quiet --disable-pip-version-check --no-compile "${files[@]/#/--requirement=}"
seldom="tests|pip|setuptools|networkx|fontTools|mypyc?|pygments/lexers|sympy/(physics|stats|parsing)"
seldom+="|torch/(testing|onnx)|transformers/(models|exporters|pipelines)|huggingface_hub/(cli|inference)"
.venv/bin/python -m compileall -q -j 0 .venv/lib -x "/($seldom|numpy/(distutils|f2py))/" \
    >/dev/null || true
echo "$wanted" >"$stamp"
echo "setup: done"
