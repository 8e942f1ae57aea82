# Sourced by bin/demo, bin/test and .ci/run: a virtual environment from the lock file, the Debian packages that the
# lab needs, and a Docker on this machine. What is there already costs nothing.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

say() { printf '%s\n' "$*" >&2; }

# Arguments: further ones, each as PROGRAM:PACKAGE.
need_packages() {
    missing=
    for pair in dockerd:docker.io iptables:iptables mmdebstrap:mmdebstrap tcpdump:tcpdump ssh-keyscan:openssh-client "$@"; do
        command -v "${pair%%:*}" >/dev/null || [ -x "/usr/sbin/${pair%%:*}" ] || missing="$missing ${pair#*:}"
    done
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
    [ -z "$missing" ] && return
    if [ "$(id -u)" != 0 ]; then
        say "missing Debian packages; run: sudo apt-get install --no-install-recommends$missing"
        exit 1
    fi
    say "installing$missing"
    apt-get -qq update >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $missing >/dev/null
}

need_python() {
    python=
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
    [ -n "$python" ] || { say "Python 3.11 or newer is needed"; exit 1; }
    stamp=$(cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
    if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
        say "making the virtual environment .venv"
        rm -rf .venv
        "$python" -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
        echo "$stamp" >.venv/stamp
    fi
    PATH=$root/.venv/bin:$PATH
    export PATH
    # fab itself writes no bytecode (invoke's --write-pyc): each would compile everything again, 0.15 s
    python -m compileall -q swarmmail || true
}

# Docker: the machine's own if it answers; else one is started, and its process id is left in .docker-pid so that who
# started it can end it.
need_docker() {
    if ! docker_answers; then
        [ "$(id -u)" = 0 ] || { say "Docker does not answer for this user; start it, or run this as root"; exit 1; }
        if [ -d /run/systemd/system ]; then systemctl start docker || true; fi
        if ! docker_answers; then
            say "starting Docker (log: /var/log/swarmmail-dockerd.log)"
            rm -f /var/run/docker.pid
            setsid dockerd >/var/log/swarmmail-dockerd.log 2>&1 </dev/null &
            echo $! >.docker-pid
        fi
        tries=0
        until docker_answers; do
            tries=$((tries + 1))
            [ $tries -lt 60 ] || { say "Docker did not start; see /var/log/swarmmail-dockerd.log"; exit 1; }
            sleep 0.5
        done
    fi
}

# Three labs at once have more hosts than a stock kernel has room for.
need_room() {
    file=/proc/sys/fs/inotify/max_user_instances
    [ "$(cat $file)" -lt 512 ] || return 0
    [ "$(id -u)" = 0 ] || { say "run: sudo sysctl -w fs.inotify.max_user_instances=1024"; exit 1; }
    say "fs.inotify.max_user_instances: $(cat $file), now 1024"
    echo 1024 >$file
}

docker_answers() { python3 - <<'EOF' 2>/dev/null
import socket
with socket.socket(socket.AF_UNIX) as s:
    s.settimeout(3); s.connect("/var/run/docker.sock"); s.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
    assert b"200 OK" in s.recv(200)
EOF
}

stop_docker() {
    if [ -s .docker-pid ]; then
        pid=$(cat .docker-pid)
        kill "$pid" 2>/dev/null || true
        tries=0
        while kill -0 "$pid" 2>/dev/null && [ $tries -lt 60 ]; do tries=$((tries + 1)); sleep 0.5; done
        rm -f .docker-pid
    fi
}
