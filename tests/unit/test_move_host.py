"""What a move does on a host, run for real by ``sh`` in a folder that stands for /run and for a volume."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarmmail.model.move import marker

SCRIPT = (Path(__file__).parents[2] / "swarmmail" / "move" / "host.sh").read_text()
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey swarmmail-move-id1"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOther somebody@home"


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    """``run(verb, *words)``: the script with its folders in ``tmp_path``."""
    text = SCRIPT.replace("/run/swarmmail-move-", f"{tmp_path}/run/swarmmail-move-")
    assert text.endswith('\n"$@"\n')
    text = text.removesuffix('"$@"\n') + f'keys_file() {{ echo {tmp_path}/ssh/keys; }}\n"$@"\n'
    (tmp_path / "run").mkdir()

    def verb(*words: object, full: bool = False) -> subprocess.CompletedProcess[str]:
        limit = "trap '' XFSZ; ulimit -f 0\n" if full else ""  # as a full disk: files are made, and stay empty
        return subprocess.run(
            ["sh", "-s", "--", *map(str, words)],
            input=limit + text,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return verb


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volumes" / "mail_mail" / "_data"
    path.mkdir(parents=True)
    return path


def text(state: str, generation: int = 2, service: str = "mda") -> str:
    return marker("lab", service, generation, "node1", state).rstrip("\n")


# ---- markers ----


def test_a_marker_is_written_only_over_what_is_expected(run, volume: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("mark", "-", volume, text("standby"), ",none,").returncode == 0
    there = (volume / ".swarmmail-volume").read_text()
    assert there == marker("lab", "mda", 2, "node1", "standby")
    refused = run("mark", "-", volume, text("stale"), ",live,")
    assert refused.returncode == 3 and "marked 'standby', expected live" in refused.stderr
    assert (volume / ".swarmmail-volume").read_text() == there
    assert run("mark", "-", volume, text("live"), ",standby,live,").returncode == 0
    assert run("mark", "-", volume, text("live"), ",nothing,").returncode == 0, "what is there already is no change"
    assert [path.name for path in volume.iterdir()] == [".swarmmail-volume"]


def test_a_full_disk_leaves_the_marker_that_was_there(run, volume: Path) -> None:  # type: ignore[no-untyped-def]
    before = marker("lab", "mda", 2, "node1", "standby")
    (volume / ".swarmmail-volume").write_text(before)
    assert run("mark", "-", volume, text("stale"), ",standby,", full=True).returncode == 1
    assert [(path.name, path.read_text()) for path in volume.iterdir()] == [(".swarmmail-volume", before)]


@pytest.mark.parametrize(("generation", "allowed"), [(1, True), (2, True), (3, False), (4, False)])
def test_a_live_copy_is_overwritten_only_when_its_data_has_left_long_ago(  # type: ignore[no-untyped-def]
    run, volume: Path, generation: int, allowed: bool
) -> None:
    """The copy to be made is generation 4, so generation 3 is the one that serves."""
    (volume / ".swarmmail-volume").write_text(marker("lab", "mda", generation, "node1", "live"))
    assert (run("mark", "-", volume, text("standby", 4), ",none,older,").returncode == 0) == allowed


def test_a_command_of_a_move_that_was_ended_does_nothing(run, volume: Path) -> None:  # type: ignore[no-untyped-def]
    (volume / ".swarmmail-volume").write_text(marker("lab", "mda", 2, "node1", "live"))
    for words in (
        ("mark", "gone", volume, text("held"), ",live,"),
        ("stop", "gone", "-", 1, "mail_mail", os.getpid()),
        ("pass", "gone", 0, "x@y", 0, f"{volume}={volume}"),
        ("manifest", "gone", "no", 0, 1, 1, "x", volume),
    ):
        done = run(*words)
        assert done.returncode == 3 and "ended by somebody else" in done.stderr, words
    assert "state=live" in (volume / ".swarmmail-volume").read_text()


@pytest.mark.parametrize(
    ("files", "answer"),
    [
        ({}, "empty"),
        ({".swarmmail-volume": marker("lab", "mda", 3, "n", "stale"), "x": ""}, "3 stale"),
        ({"x": ""}, "may be somebody's data"),
        ({".swarmmail-volume": marker("lab", "mta", 3, "n", "stale")}, "belongs to service 'mta'"),
        ({".swarmmail-volume": marker("other", "mda", 3, "n", "stale")}, "of cluster 'other'"),
    ],
)
def test_what_is_in_a_volume(run, volume: Path, files: dict[str, str], answer: str) -> None:  # type: ignore[no-untyped-def]
    for name, content in files.items():
        (volume / name).write_text(content)
    done = run("what", volume, "lab", "mda")
    assert answer in done.stdout + done.stderr
    assert done.returncode == (0 if done.stdout else 3)


# ---- the key ----


@pytest.fixture
def serve(run, tmp_path: Path, volume: Path) -> Path:  # type: ignore[no-untyped-def]
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "keys").write_text(OTHER)
    done = run("open_target", "id1", "root", 24, "192.0.2.1,192.0.2.2", KEY, volume)
    assert "ssh-" in done.stdout or done.returncode in (0, 1, 2)  # host keys, where there are some
    return tmp_path / "run" / "swarmmail-move-id1" / "serve"


def test_the_key_is_let_in_for_one_command_from_one_host_for_a_day(serve: Path, tmp_path: Path) -> None:
    other, line = (tmp_path / "ssh" / "keys").read_text().splitlines()
    assert other == OTHER
    options = line.removesuffix(f" {KEY}")
    assert options.startswith('restrict,from="192.0.2.1,192.0.2.2",expiry-time="')
    assert options.endswith(f'command="/bin/sh {serve}"')
    until = time.mktime(time.strptime(options.split('expiry-time="')[1][:12], "%Y%m%d%H%M"))
    assert 23 * 3600 < until - time.time() <= 24 * 3600


def ask(serve: Path, command: str) -> subprocess.CompletedProcess[str]:
    """What the key's command does with what the client asks for; a program `rsync` of ours shows it."""
    fake = serve.parent / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "rsync").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (fake / "rsync").chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(serve)],
        env={"PATH": f"{fake}:{os.environ['PATH']}", "SSH_ORIGINAL_COMMAND": command},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )


@pytest.mark.parametrize(
    "what",
    [
        "-logDtpAXrSe.iLsfxCIvu --delete",
        "-lHogDtpAXrSe.iLsfxCIvu --delete-during",
        "-ldHogDtpAXRSe.LsfxCIvu --no-r --delete",
    ],
)
def test_the_key_receives_a_copy_into_its_volume(serve: Path, volume: Path, what: str) -> None:
    """A whole pass, without and with hard links, and one over what has changed. The tests of passes use it, too."""
    options = f"{what} -@-1 --stats --numeric-ids --partial-dir .swarmmail-partial"
    done = ask(serve, f"rsync --server {options} . {volume}/")
    assert done.returncode == 0 and done.stdout.split() == ["--server", *options.split(), ".", f"{volume}/"]
    assert (serve.parent / "pids").read_text().strip().isdigit(), "so that it can be ended"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "sh",
        "rsync",
        "rsync --server -r . /etc/",
        "rsync --server -r . VOLUME/../other/",
        "rsync --server --sender -r . VOLUME/",
        "rsync --server -r --remove-source-files . VOLUME/",
        "rsync --server -r --log-file=/etc/cron.d/x . VOLUME/",
        "rsync --server -r --partial-dir /etc . VOLUME/",
        "rsync --server -r --rsync-path=sh . VOLUME/",
        "rsync --server -r --backup-dir=/etc . VOLUME/",
        "rsync --server -r --copy-dest=/root . VOLUME/",
        "rsync --server -r /etc . VOLUME/",
        "rsync --server -r . /etc VOLUME/",
        "rsync --server -r; id . VOLUME/",
        "rsync --daemon . VOLUME/",
        "sh -c id rsync --server . VOLUME/",
    ],
)
def test_the_key_may_do_nothing_else(serve: Path, volume: Path, command: str) -> None:
    done = ask(serve, command.replace("VOLUME", str(volume)))
    assert done.returncode == 3 and done.stdout == "" and "may not do that" in done.stderr


def test_closing_takes_away_keys_and_copies_of_moves_and_nothing_else(run, serve: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    copying = subprocess.Popen(["sh", "-c", "exec -a 'rsync --server' sleep 60"], executable="bash")
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.2)
        (serve.parent / "pids").write_text(f"{copying.pid}\n{stranger.pid}\n999999999\n")
        # our child stays a zombie until it is waited for; a host's process does not
        threading.Thread(target=copying.wait, daemon=True).start()
        assert run("close", "root").returncode == 0
        assert (tmp_path / "ssh" / "keys").read_text() == OTHER + "\n"
        assert not serve.parent.exists()
        assert copying.poll() is not None and stranger.poll() is None
        assert run("close", "root").returncode == 0, "nothing to do"
    finally:
        copying.kill()
        stranger.kill()
        stranger.wait()


def test_a_full_disk_takes_no_key_away(run, serve: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    keys = tmp_path / "ssh" / "keys"
    before = keys.read_text()
    done = run("close", "root", full=True)
    assert done.returncode == 3 and "can't be taken out of" in done.stderr
    assert keys.read_text() == before and list(keys.parent.iterdir()) == [keys]
    assert not serve.parent.exists(), "the rest is cleaned up all the same"


# ---- comparing ----


def manifest(run, path: Path, id_: str, since: float = 0.0) -> str:  # type: ignore[no-untyped-def]
    folder = Path(str(path).split("/volumes/")[0]) / "run" / f"swarmmail-move-{id_}"
    folder.mkdir(parents=True, exist_ok=True)
    done = run("manifest", id_, "no", int(since), 1, 1, "dovecot-uidlist", path)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_a_true_copy_compares_equal_whatever_the_names(run, tmp_path: Path, volume: Path) -> None:  # type: ignore[no-untyped-def]
    there = tmp_path / "volumes" / "copy" / "_data"
    for name in ("a", "with space", "new\nline", "üml", "-n", "*", "'\"$x"):
        (volume / name).write_text(name)
    (volume / os.fsdecode(b"latin-\xe9")).write_text("x")
    (volume / "folder").mkdir()
    (volume / "link").symlink_to("a")
    os.link(volume / "a", volume / "folder" / "hard")
    (volume / ".swarmmail-volume").write_text("marker of the source")

    def copy() -> None:
        shutil.rmtree(there, ignore_errors=True)
        there.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", str(volume), str(there)], check=True, timeout=30)
        (there / ".swarmmail-volume").write_text("another")

    copy()
    before = manifest(run, volume, "one")
    assert before == manifest(run, there, "two") and before.split()[0] == "11"

    def changed(change: object) -> bool:
        subprocess.run(["sh", "-c", str(change)], cwd=there, check=True, timeout=10)
        differs = manifest(run, there, "two") != before
        copy()
        assert manifest(run, there, "two") == before
        return differs

    for change in (
        "rm a",
        "touch new",
        "touch -d 2001-01-01 a",
        "chmod 600 a",
        "mv 'with space' without; touch -r a .",
        "rmdir folder 2>/dev/null || rm -r folder",
        "cp -p a b; mv b a",  # the hard link is gone, all else is the same
        "ln -sfn b link",
        "printf b >a; touch -r link a",
    ):
        assert changed(change), change


def test_a_content_that_differs_under_the_same_size_and_time(run, tmp_path: Path, volume: Path) -> None:  # type: ignore[no-untyped-def]
    there = tmp_path / "volumes" / "copy" / "_data"
    (volume / "mail").write_text("one")
    shutil.copytree(volume, there)
    assert manifest(run, volume, "one") == manifest(run, there, "two")
    (there / "mail").write_text("two")
    os.utime(there / "mail", ns=((volume / "mail").stat().st_atime_ns, (volume / "mail").stat().st_mtime_ns))
    os.utime(there, ns=(volume.stat().st_atime_ns, volume.stat().st_mtime_ns))
    assert manifest(run, volume, "one") != manifest(run, there, "two")


@pytest.mark.parametrize(
    ("name", "changed", "seen"), [("mail", 2000, True), ("dovecot-uidlist", 1000, True), ("mail", 1000, False)]
)
def test_contents_are_compared_of_what_changed_and_of_certain_names(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, volume: Path, name: str, changed: int, seen: bool
) -> None:
    """Beside the sample, which here holds nothing."""
    said = []
    for path, text in ((volume, "one"), (tmp_path / "volumes" / "copy" / "_data", "two")):
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
        os.utime(path / name, (changed, changed))
        os.utime(path, (1000, 1000))
        (tmp_path / "run" / "swarmmail-move-x").mkdir(parents=True, exist_ok=True)
        done = run("manifest", "x", "no", 1500, 999, 1000, "dovecot-uidlist", path)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert (said[0] != said[1]) is seen, said


# ---- copying ----


@pytest.fixture
def copy(run, tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """``copy(since, mode, linked)``: a pass into another folder, through the key's command; what it printed. Also that
    folder."""
    there = tmp_path / "volumes" / "copy" / "_data"
    there.mkdir(parents=True)
    (tmp_path / "ssh").mkdir()
    run("open_target", "id1", "root", 24, "192.0.2.1", KEY, there)
    programs = tmp_path / "bin"
    programs.mkdir()
    # ssh OPTION... HOST COMMAND...: a process of its own, as of sshd
    (programs / "ssh").write_text(
        '#!/bin/sh\nwhile [ "$1" != rsync ]; do shift; done\n'
        f'SSH_ORIGINAL_COMMAND="$*" exec setsid sh {tmp_path}/run/swarmmail-move-id1/serve\n'
    )
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def one(since: int, mode: str = "last", linked: int = 0) -> str:
        done = run("pass", "id1", mode, since, linked, "x@y", 0, f"{volume}={there}")
        assert done.returncode in ({"live": (0, 24), "links": (0, 2, 24), "last": (0,)}[mode]), done.stderr
        return str(done.stdout)

    yield one, there
    run("end", "id1")  # one that hangs


GONE = "rsync: [sender] get_acl: sys_acl_get_file(a/cur/1.M1, ACL_TYPE_ACCESS): No such file or directory (2)"
UNREAD = 'rsync: [sender] opendir "/v/_data/a/cur" failed: No such file or directory (2)'
SKIPS = "IO error encountered -- skipping file deletion"
NO_RIGHT = 'rsync: [sender] send_files failed to open "/v/_data/b": Permission denied (13)'
NO_SPACE = 'rsync: [receiver] write failed on "/v/_data/b": No space left on device (28)'
NOT_THERE = 'rsync: [receiver] mkstemp "/v/_data/a/.1.x" failed: No such file or directory (2)'


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ((GONE,), 24),
        (("", GONE, "", 'file has vanished: "/v/_data/a/x"'), 24),
        ((UNREAD, SKIPS, 'file has vanished: "/v/_data/a/x"'), 24),
        ((GONE, NO_RIGHT), 23),
        ((GONE, NOT_THERE), 23),
        ((NO_SPACE,), 23),
        ((), 23),
    ],
)
def test_what_went_away_while_it_was_looked_at_has_only_vanished(  # type: ignore[no-untyped-def]
    run, copy, tmp_path: Path, volume: Path, says: tuple[str, ...], status: int
) -> None:
    """rsync calls it an error (23) when a file goes between its stat(2) and the look at its ACL."""
    _, there = copy
    last = "rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(1338)"
    (tmp_path / "said").write_text("".join(f"{line}\n" for line in (*says, last)))
    rsync = tmp_path / "bin" / "rsync"
    rsync.write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit 23\n")
    rsync.chmod(0o755)
    done = run("pass", "id1", "last", 0, 0, "x@y", 0, f"{volume}={there}")
    assert done.returncode == status
    assert next(line for line in (*says, last) if line) in done.stderr and "\n\n" not in done.stderr


@pytest.mark.parametrize(("status", "passes"), [(24, 2), (23, 1), (12, 1)])
def test_what_vanished_in_one_volume_does_not_leave_out_the_next(  # type: ignore[no-untyped-def]
    run, copy, tmp_path: Path, volume: Path, status: int, passes: int
) -> None:
    _, there = copy
    rsync = tmp_path / "bin" / "rsync"
    rsync.write_text(f"#!/bin/sh\necho once >>{tmp_path}/log\nexit {status}\n")
    rsync.chmod(0o755)
    pair = f"{volume}={there}"
    assert run("pass", "id1", "last", 0, 0, "x@y", 0, pair, pair).returncode == status
    assert (tmp_path / "log").read_text() == "once\n" * passes


def test_a_pass_over_what_has_changed_finds_all_that_a_service_does(run, copy, volume: Path) -> None:  # type: ignore[no-untyped-def]
    """As a mail server does it: new names, renamed ones, deletions, a file that grows, one replaced, a hard link."""
    one, there = copy
    (volume / ".swarmmail-volume").write_text("marker of the source")
    (there / ".swarmmail-volume").write_text("another")
    for folder in ("a/cur", "a/new", "quiet/cur", "gone/cur"):
        (volume / folder).mkdir(parents=True)
        for number in range(20):
            (volume / folder / f"mail{number}").write_text("x" * number)
    began = int(one(0).split()[1])
    assert manifest(run, volume, "one") == manifest(run, there, "two")
    (there / "quiet" / "cur" / "mail7").write_text("nobody looks here again")
    time.sleep(2.1)  # what is about to change has another second
    (volume / "a" / "new" / "mail3").rename(volume / "a" / "cur" / "mail3:2,S")
    (volume / "a" / "new" / "new\nline üml").write_text("fresh")
    (volume / "a" / "cur" / "mail5").unlink()
    with (volume / "a" / "cur" / "mail6").open("a") as grows:
        grows.write("more")
    os.link(volume / "a" / "cur" / "mail8", volume / "a" / "new" / "linked")
    (volume / "top.tmp").write_text("replaced")
    (volume / "top.tmp").rename(volume / "top")
    shutil.rmtree(volume / "gone")
    (volume / "made" / "cur").mkdir(parents=True)
    (volume / "made" / "cur" / "mail").write_text("x")
    (volume / "a" / "cur" / "mail9").chmod(0o600)
    one(began + 1)
    assert (there / "quiet" / "cur" / "mail7").read_text() == "nobody looks here again"
    (there / "quiet" / "cur" / "mail7").write_text("x" * 7)
    times = (volume / "quiet" / "cur" / "mail7").stat()
    os.utime(there / "quiet" / "cur" / "mail7", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert manifest(run, volume, "one") == manifest(run, there, "two")
    assert (there / ".swarmmail-volume").read_text() == "another"


@contextlib.contextmanager
def churn(mailbox: Path) -> Iterator[None]:
    """As IMAP clients do that copy mails (Dovecot links them), mark them as read, and delete them."""
    for folder in ("cur", ".Kept/cur", ".Kept/tmp"):
        (mailbox / folder).mkdir(parents=True)

    def work() -> None:
        for number in itertools.count():
            mail = mailbox / "cur" / f"{number}:2,"
            mail.write_text(f"mail {number}")
            os.link(mail, mailbox / ".Kept" / "tmp" / f"{number}")
            time.sleep(0.001)
            (mailbox / ".Kept" / "tmp" / f"{number}").rename(mailbox / ".Kept" / "cur" / f"{number}:2,")
            mail.rename(mail.with_name(f"{number}:2,S"))
            if number >= 50:
                (mailbox / ".Kept" / "cur" / f"{number - 50}:2,").unlink()
            if number >= 300:
                (mailbox / "cur" / f"{number - 300}:2,S").unlink()
            if stop.is_set():
                return

    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        time.sleep(1.1)  # what was there before has another second
        try:
            yield
        finally:
            stop.set()
    working.result()


def test_mails_of_two_names_that_vanish_while_they_are_copied(run, copy, volume: Path) -> None:  # type: ignore[no-untyped-def]
    """With -H, rsync waits for ever for them when there are many files: such passes hung."""
    one, there = copy
    for user in ("ann", "bob", "cid"):
        (volume / user / "cur").mkdir(parents=True)
        for number in range(500):
            (volume / user / "cur" / f"{number}").write_text(f"{user} {number}")
    old, new = (there / "bob" / "cur" / name for name in ("of ann", "of cid"))
    os.link(volume / "ann" / "cur" / "1", volume / "bob" / "cur" / old.name)
    with churn(volume / "eve"):
        for _ in range(3):
            began = int(one(0, mode="live").split()[1])
            assert old.stat().st_nlink == 1
            shutil.rmtree(there / "eve")  # what is there already is not asked for again
        one(0, mode="live")
        for _ in range(3):
            one(began, mode="links")
        os.link(volume / "cid" / "cur" / "1", volume / "bob" / "cur" / new.name)
        last = int(one(0, mode="live").split()[1])
    assert (old.stat().st_nlink, new.stat().st_nlink) == (2, 1)
    one(last - 1, linked=began)
    assert (old.stat().st_nlink, new.stat().st_nlink) == (2, 2)
    assert manifest(run, volume, "one") == manifest(run, there, "two")


def test_names_of_one_file_are_looked_at_in_the_last_pass_only_if_it_has_changed(run, copy, volume: Path) -> None:  # type: ignore[no-untyped-def]
    one, there = copy
    for name in ("a", "b"):
        (volume / name).write_text(name)
        os.link(volume / name, volume / f"{name}{name}")
    one(0, mode="live")
    (there / "aa").unlink()  # nobody but the last pass could tell
    time.sleep(1.1)
    now = int(time.time())
    made = int((volume / "a").stat().st_ctime)
    assert "transferred" not in one(made - 1, mode="links"), "too young"
    one(now, linked=now)
    assert not (there / "aa").exists() and (there / "b").stat().st_nlink == 1
    one(now, linked=0)
    assert (there / "aa").stat().st_nlink == (there / "b").stat().st_nlink == 2
    assert manifest(run, volume, "one") == manifest(run, there, "two")


def test_a_copy_that_stands_still_is_seen_and_ended(run, copy, tmp_path: Path, volume: Path) -> None:  # type: ignore[no-untyped-def]
    """Both processes of the receiver are stopped; none may write any more when it was ended."""
    _, there = copy
    (volume / "large").write_bytes(os.urandom(30_000_000))  # for nearly a minute, at that rate
    pids = tmp_path / "run" / "swarmmail-move-id1" / "pids"
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(run, "pass", "id1", "live", 0, 0, "x@y", 600, f"{volume}={there}")

        def signs() -> str:
            time.sleep(0.5)
            return str(run("progress", "id1").stdout.splitlines()[0])

        deadline = time.monotonic() + 10
        while not list(there.glob(".large.*")):
            assert time.monotonic() < deadline
        assert signs() != signs(), "it works"
        [receiver] = [
            int(pid)
            for pid in pids.read_text().split()
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"rsync\0--server\0")
        ]
        [writer] = map(int, Path(f"/proc/{receiver}/task/{receiver}/children").read_text().split())
        for pid in (receiver, writer):
            os.kill(pid, signal.SIGSTOP)
        while signs() != signs():
            assert time.monotonic() < deadline + 10
        assert run("end", "id1").returncode == 0
        for pid in (receiver, writer):
            with contextlib.suppress(FileNotFoundError):  # or nobody has waited for it yet
                assert Path(f"/proc/{pid}/cmdline").read_bytes() == b""
        assert going.result(10).returncode not in (0, 24)
    assert run("end", "id1").returncode == 0, "nothing is left to end"
    assert run("end", "gone").returncode == 3


def test_what_an_ended_copy_had_begun_does_not_stay(run, copy, volume: Path) -> None:  # type: ignore[no-untyped-def]
    """rsync keeps it for the next time; here the mail was marked meanwhile, and has another name."""
    one, there = copy
    for folder in (there, there / "new"):
        (folder / ".swarmmail-partial").mkdir(parents=True)
        (folder / ".swarmmail-partial" / "mail").write_text("begun")
    (volume / "new").mkdir()
    (volume / "new" / "mail:2,S").write_text("x")
    one(0, mode="live")
    assert manifest(run, volume, "one") != manifest(run, there, "two")
    one(0)
    assert manifest(run, volume, "one") == manifest(run, there, "two")
    (there / "new" / ".swarmmail-partial").mkdir()
    assert run("settle", there).returncode == 0
    one(0, mode="live")
    assert manifest(run, volume, "one") == manifest(run, there, "two")


def test_what_such_a_pass_misses_is_found_by_the_comparison(run, copy, volume: Path) -> None:  # type: ignore[no-untyped-def]
    """What is below a folder that got another name has not changed itself."""
    one, there = copy
    (volume / "a" / "b" / "c").mkdir(parents=True)
    (volume / "a" / "b" / "c" / "mail").write_text("x")
    began = int(one(0).split()[1])
    time.sleep(2.1)
    (volume / "a").rename(volume / "renamed")
    one(began + 1)
    assert manifest(run, volume, "one") != manifest(run, there, "two")
    one(0)
    assert manifest(run, volume, "one") == manifest(run, there, "two")


def test_measuring(run, volume: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (volume / "x").write_bytes(b"x" * 100_000)
    size, files, free, inodes = map(int, run("measure", volume).stdout.split())
    assert size >= 100_000 and files == 2 and free > 0 and inodes >= 0
    assert run("measure", tmp_path / "not" / "there").stdout.split()[:2] == ["0", "0"]
