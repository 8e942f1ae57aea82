"""``hosts``: the SSH connection, the fleet and the Docker API, against a real SSH server on the loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from builders import make_inventory
from sshserver import MAX_SESSIONS, Server, new_user_key, running

from swarmmail.hosts.connection import Host
from swarmmail.hosts.fleet import Fleet
from swarmmail.model import inventory
from swarmmail.model.errors import Deadline, HostError, SwarmmailError, Unreachable

PASSWORD = "correct horse 'battery' $taple"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "host1") as one:
        yield one


def spec(server: Server, name: str = "host1", **changes: Any) -> inventory.Host:
    values: dict[str, Any] = {
        "name": name,
        "address": "127.0.0.1",
        "port": server.port,
        "key": server.key_file,
        "known_hosts": server.known_hosts,
        "connect_timeout": 5,
        "role": "manager",
        "advertise": "198.18.0.11",
    }
    return inventory.Host(**values | changes)


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def one(password: str | None = None, **changes: Any) -> Host:
        hosts.append(Host(spec(server, **changes), sudo_password=password))
        return hosts[-1]

    yield one
    for host in hosts:
        host.close()


Connect = Callable[..., Host]


# ---- who is let in, and who is believed ----


def test_a_known_host_is_reached(server: Server, connect: Connect) -> None:
    result = connect().run("echo out; echo err >&2; exit 3", check=False)
    assert (result.status, result.stdout, result.stderr, result.ok) == (3, "out\n", "err\n", False)


def test_an_unknown_host_key_is_refused(server: Server, connect: Connect) -> None:
    server.known_hosts.write_text("")
    with pytest.raises(Unreachable, match="host1, ssh: host key is not known") as refused:
        connect().run("true")
    fingerprint = server.host_key.fingerprint
    assert fingerprint in str(refused.value)
    assert server.commands == []
    assert server.known_hosts.read_text() == "", "nothing is learnt on the way"


def test_a_changed_host_key_is_refused(server: Server, connect: Connect) -> None:
    server.know(paramiko.ECDSAKey.generate())
    with pytest.raises(Unreachable, match="host key has CHANGED"):
        connect().run("true")
    assert server.commands == []


def test_a_missing_known_hosts_file_is_said(server: Server, connect: Connect) -> None:
    server.known_hosts.unlink()
    with pytest.raises(Unreachable, match=r"no file .*known_hosts -> make it: ssh-keyscan"):
        connect().run("true")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_wrong_key_is_refused(server: Server, connect: Connect, kind: str) -> None:
    if kind == "ecdsa":
        paramiko.ECDSAKey.generate().write_private_key_file(str(server.key_file))
    elif kind == "rsa":
        paramiko.RSAKey.generate(1024).write_private_key_file(str(server.key_file))
    else:
        new_user_key(server.key_file)
    with pytest.raises(Unreachable, match=r"user root was not let in with key .* -> try: ssh -i"):
        connect().run("true")


def test_a_closed_port_is_said_at_once(server: Server, connect: Connect) -> None:
    server.close()
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="refused"):
        connect().run("true")
    assert time.monotonic() - begun < 8


def test_connections_dropped_before_the_banner_are_tried_again(server: Server, connect: Connect) -> None:
    server.to_drop = 2
    assert connect().run("echo here").stdout == "here\n"
    assert server.connections == 3


def test_an_sshd_that_always_drops_ends_in_time(server: Server, connect: Connect) -> None:
    server.to_drop = 1000
    begun = time.monotonic()
    with pytest.raises(Unreachable):
        connect(connect_timeout=1).run("true")
    assert time.monotonic() - begun < 20


# ---- commands ----


@pytest.mark.timeout(30)
def test_ten_mebibytes_on_both_streams(connect: Connect) -> None:
    size = 10 * 1024 * 1024
    result = connect().run(f"head -c {size} /dev/zero & head -c {size} /dev/zero >&2; wait")
    assert (len(result.stdout), len(result.stderr)) == (size, size)


@pytest.mark.timeout(30)
def test_large_input_goes_in_while_output_comes_out(connect: Connect) -> None:
    data = bytes(range(64, 128)) * 32768
    assert connect().run("cat", stdin=data).stdout.encode() == data


@pytest.mark.timeout(30)
def test_input_that_nobody_reads_blocks_nothing(connect: Connect) -> None:
    assert connect().run("exec <&-; echo done", stdin=b"x" * 4_000_000).stdout == "done\n"


def test_output_that_is_no_utf8_is_no_error(connect: Connect) -> None:
    assert connect().run(r"printf 'a\377b'").stdout == "a\ufffdb"


def test_a_failed_command_says_its_last_words(connect: Connect) -> None:
    with pytest.raises(HostError, match=r"^host1, copy: exit status 2: disk full$"):
        connect().run("echo much; echo before >&2; echo disk full >&2; exit 2", step="copy")


def test_a_hanging_command_is_ended_at_the_host(server: Server, connect: Connect, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(Deadline, match=r"took longer than 0.5 s"):
        connect().run(f"sleep 10; touch {tmp_path}/late", timeout=0.5)
    assert time.monotonic() - begun < 8
    assert not (tmp_path / "late").exists()


def test_a_host_that_does_not_answer_any_more_ends_at_our_deadline(connect: Connect) -> None:
    host = connect()
    host.open()
    begun = time.monotonic()
    with pytest.raises(Deadline, match=r"no answer within 0\.5 s"):
        host._exec("hang", b"", "ask", 0.5)
    assert time.monotonic() - begun < 8
    assert host.run("echo still here").stdout == "still here\n"


def test_a_connection_lost_while_a_command_runs(server: Server, connect: Connect) -> None:
    host = connect()
    host.open()
    threading.Timer(0.3, server.cut).start()
    begun = time.monotonic()
    with pytest.raises(HostError, match=r"^host1, wait: connection lost"):
        host.run("sleep 20", step="wait")
    assert time.monotonic() - begun < 15
    assert host.run("echo again").stdout == "again\n", "the next command connects anew"


def test_a_command_that_is_killed_is_no_lost_connection(server: Server, connect: Connect) -> None:
    host = connect()
    with pytest.raises(HostError, match=r"^host1, wait: the command was killed there$"):
        host._exec("kill -9 $$", b"", "wait", 5)
    assert host.run("echo again").stdout == "again\n"
    assert server.connections == 1


def test_a_host_that_runs_no_commands_is_named(server: Server, connect: Connect) -> None:
    host = connect()
    host.open()
    server.refuse_commands = True
    with pytest.raises(HostError, match="host1, ask"):
        host.run("true", step="ask")


def test_a_file_is_written_whole(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "-a  folder" / "it's"
    connect().write(str(path), b"\0\1binary\n", mode="0640")
    assert path.read_bytes() == b"\0\1binary\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["it's"]


# ---- many at once ----


def test_many_threads_share_one_connection_and_its_sessions(server: Server, connect: Connect) -> None:
    host = connect()
    with ThreadPoolExecutor(max_workers=45) as pool:
        commands = [pool.submit(host.run, f"sleep 0.05; echo {i}") for i in range(30)]
        requests = [pool.submit(lambda: host.docker.version()["Version"]) for _ in range(15)]
        assert [int(future.result().stdout) for future in commands] == list(range(30))
        assert {future.result() for future in requests} == {"26.1.5"}
    assert server.connections == 1
    assert 4 < server.peak <= MAX_SESSIONS


def test_docker_answers_by_the_same_connection(server: Server, connect: Connect) -> None:
    host = connect()
    host.run("true")
    assert host.docker.version()["ApiVersion"] == "1.45"
    assert "docker system dial-stdio" in server.commands
    assert server.connections == 1


def test_docker_that_is_opened_beside_other_work_is_the_one_that_is_used(server: Server, connect: Connect) -> None:
    host = connect()
    host.open_docker()
    host.run("true")
    assert host.docker.version()["ApiVersion"] == "1.45"
    assert host.docker is host.docker
    assert server.commands.count("docker system dial-stdio") == 1


def test_a_docker_that_does_not_answer_says_so_when_it_is_used(server: Server, connect: Connect) -> None:
    host = connect()
    host.open()
    server.refuse_commands = True
    host.open_docker()
    with pytest.raises(HostError, match="host1, look") as failed, host.doing("look"):
        host.docker.version()
    assert str(failed.value).endswith("-> run: fab bootstrap") or "connection lost" in str(failed.value)


def test_a_host_that_is_away_is_not_taken_for_a_docker_that_does_not_answer(server: Server, connect: Connect) -> None:
    host = connect()
    server.close()
    with pytest.raises(Unreachable, match="host1, ssh: "), host.doing("look"):
        host.docker.version()


# ---- root ----


def sudo(server: Server, *, free: bool = False) -> None:
    (server.folder / "password").write_text(PASSWORD + "\n")
    if free:
        (server.folder / "free").touch()


def test_root_needs_no_sudo(server: Server, connect: Connect) -> None:
    connect().run("true")
    assert "sudo" not in "".join(server.commands)


def test_sudo_without_a_password(server: Server, connect: Connect) -> None:
    sudo(server, free=True)
    assert connect(user="admin").run("cat", stdin="hello").stdout == "hello"
    assert server.commands[0] == "sudo -n true"
    assert server.commands[1].startswith("sudo -n -- timeout ")


def test_sudo_with_a_password_which_only_standard_input_carries(server: Server, connect: Connect) -> None:
    sudo(server)
    host = connect(PASSWORD, user="admin")
    assert host.run("cat", stdin="hello").stdout == "hello"
    assert host.docker.version()["Version"] == "26.1.5"
    assert server.commands[-1].startswith("GET /v")
    assert any(command.startswith("sudo -k -S -p '' -- docker") for command in server.commands)
    assert all("battery" not in command and "horse" not in command for command in server.commands)


def test_a_wrong_password_is_not_repeated_in_the_error(server: Server, connect: Connect) -> None:
    sudo(server)
    with pytest.raises(HostError, match="sudo did not let user admin become root") as refused:
        connect("wrong one", user="admin").run("true")
    assert "wrong one" not in str(refused.value)
    assert "wrong one" not in "".join(server.commands)


def test_a_wrong_password_is_tried_once_only(server: Server, connect: Connect) -> None:
    """Accounts are locked after a few (pam_faillock)."""
    sudo(server)
    host = connect("wrong one", user="admin")
    host.open_docker()
    for _ in range(2):
        with pytest.raises(HostError, match="sudo did not let user admin become root"):
            host.run("true")
    with pytest.raises(HostError), host.doing("look"):
        host.docker.version()
    assert [command for command in server.commands if " -S " in command] == ["sudo -k -S -p '' -- true"]


def test_sudo_that_needs_a_password_which_nobody_gave(server: Server, connect: Connect) -> None:
    sudo(server)
    with pytest.raises(HostError, match=r"needs a password for sudo -> run again as: .*--prompt-for-sudo-password"):
        connect(user="admin").run("true")
    assert connect(user="admin").run("echo me", root=False).stdout == "me\n"


# ---- ways through a host ----


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "host2") as one:
        yield one


def test_a_host_behind_another_one(server: Server, far: Server) -> None:
    gateway = Host(spec(server))
    host = Host(spec(far, "host2"), gateway)
    assert host.run("echo far").stdout == "far\n"
    assert server.commands == [f"tunnel to port {far.port}"]
    host.close()
    gateway.close()


def test_the_key_of_a_host_behind_another_one_is_checked_too(server: Server, far: Server) -> None:
    far.know(paramiko.ECDSAKey.generate())
    gateway = Host(spec(server))
    with pytest.raises(Unreachable, match="host2, ssh: host key has CHANGED"):
        Host(spec(far, "host2"), gateway).run("true")
    assert far.commands == []
    gateway.close()


def test_a_port_that_only_the_host_reaches(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:

        def answer() -> None:
            sock, _ = target.accept()
            with sock:
                sock.sendall(b"220 " + sock.recv(100))

        threading.Thread(target=answer, daemon=True).start()
        with (
            connect().forward("127.0.0.1", target.getsockname()[1]) as port,
            socket.create_connection(("127.0.0.1", port), timeout=5) as client,
        ):
            client.sendall(b"hello")
            assert client.recv(100) == b"220 hello"


def test_a_forwarded_port_passes_ends_on_and_asks_no_channel_for_a_descriptor(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipe behind a channel's descriptor may be closed under paramiko's own thread, which dies of it."""
    monkeypatch.setattr(paramiko.Channel, "fileno", lambda _: pytest.fail("a channel's descriptor was asked for"))
    host = connect()
    sent = bytes(range(256)) * 4096
    with socket.create_server(("127.0.0.1", 0)) as target:

        def answer() -> None:
            for _ in range(8):
                sock, _peer = target.accept()
                with sock, sock.makefile("rb") as stream:
                    sock.sendall(stream.read())  # to the end of what the client sends

        threading.Thread(target=answer, daemon=True).start()
        with host.forward("127.0.0.1", target.getsockname()[1]) as port:
            for _ in range(8):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                    threading.Thread(target=lambda c=client: (c.sendall(sent), c.shutdown(socket.SHUT_WR))).start()
                    with client.makefile("rb") as stream:
                        assert stream.read() == sent
    assert host.run("echo alive").stdout == "alive\n"


# ---- the fleet ----


def fleet(*servers: Server, way: str | None = None) -> Fleet:
    written = make_inventory("m" * len(servers))
    hosts = {
        f"host{i}": spec(
            one,
            f"host{i}",
            advertise=f"198.18.0.1{i}",
            **({"jump": inventory.Jump(member=way)} if way and i > 1 else {}),
        )
        for i, one in enumerate(servers, 1)
    }
    return Fleet(written.model_copy(update={"hosts": hosts}))


def test_all_hosts_at_once(server: Server, far: Server) -> None:
    with fleet(server, far) as hosts:
        assert [host.name for host in hosts] == ["host1", "host2"]
        begun = time.monotonic()
        results = hosts.each(lambda host: host.run(f"sleep 2; echo {host.name}").stdout)
        assert results == {"host1": "host1\n", "host2": "host2\n"}
        assert time.monotonic() - begun < 4
        assert hosts.each(lambda host: host.name, ["host2"]) == {"host2": "host2"}
        assert hosts.each(lambda host: host.name, []) == {}


def test_every_host_that_failed_is_named(server: Server, far: Server) -> None:
    with fleet(server, far) as hosts:
        with pytest.raises(HostError, match="host2"):
            hosts.each(lambda host: host.run(f"[ {host.name} = host1 ]"))
        with pytest.raises(SwarmmailError) as both:
            hosts.each(lambda host: host.run("exit 5"))
        assert str(both.value).splitlines() == [
            "host1, command: exit status 5: no message",
            "host2, command: exit status 5: no message",
        ]


def test_a_fleet_leaves_no_connection_open(server: Server, far: Server) -> None:
    with fleet(server, far, way="host1") as hosts:
        hosts.each(lambda host: host.run("true"))
        assert server.connections == 1
        assert far.connections == 1
    deadline = time.monotonic() + 3
    while any(t.is_active() for t in server.transports + far.transports) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(t.is_active() for t in server.transports + far.transports)
