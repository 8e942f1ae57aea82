"""The fence, run for real: by each POSIX shell that is here, on directories that stand for volumes."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

FENCE = Path(__file__).parents[2] / "swarmmail" / "mail" / "fence.sh"
REFUSED = 78
NOBODY = 65534
MARKER = {"cluster": "lab", "service": "mda", "generation": "3", "node": "node1", "state": "live"}
SHELLS = [
    command for command in (["/bin/sh"], ["dash"], ["bash", "--posix"], ["busybox", "sh"]) if shutil.which(command[0])
]


@pytest.fixture(params=SHELLS, ids=" ".join)
def shell(request: pytest.FixtureRequest) -> list[str]:
    command: list[str] = request.param
    return command


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter (pytest's own is for its owner only), with the fence in it."""
    with TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        shutil.copy(FENCE, path / "fence")
        (path / "fence").chmod(0o644)
        yield path


def volume(path: Path, **changes: str | None) -> Path:
    path.mkdir()
    lines = [f"{key}={value}" for key, value in (MARKER | changes).items() if value is not None]
    (path / ".swarmmail-volume").write_text("\n".join(lines) + "\n")
    return path


def variables(volumes: str) -> dict[str, str]:
    """What deploy gives to a fence, for a volume as ``volume`` makes it."""
    return {
        "PATH": os.environ["PATH"],
        "SWARMMAIL_CLUSTER": "lab",
        "SWARMMAIL_SERVICE": "mda",
        "SWARMMAIL_GENERATION": "3",
        "SWARMMAIL_NODE": "node1",
        "SWARMMAIL_VOLUMES": volumes,
    }


def run(
    shell: list[str], place: Path, volumes: str, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*shell, str(place / "fence"), *(command or ("echo", "started"))],
        env=variables(volumes) | environment,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], because: str) -> None:
    assert result.returncode == REFUSED
    assert result.stdout == ""
    assert because in result.stderr
    assert result.stderr.startswith("swarmmail: ")
    assert result.stderr.count("\n") == 1


def test_its_own_volume_starts_the_command(shell: list[str], place: Path) -> None:
    result = run(shell, place, str(volume(place / "mail")))
    assert (result.returncode, result.stdout, result.stderr) == (0, "started\n", "")


def test_arguments_and_environment_reach_the_command_untouched(shell: list[str], place: Path) -> None:
    arguments = ("a b", "", "*", "$HOME", "--", "it's\n")
    result = run(
        shell,
        place,
        str(volume(place / "mail")),
        "python3",
        "-c",
        "import os, sys; print(sys.argv[1:], os.environ['volume'], os.environ['state'])",
        *arguments,
        volume="mine",
        state="x",
    )
    assert result.stdout == f"{list(arguments)} mine x\n"


def test_the_command_becomes_the_process_itself(shell: list[str], place: Path) -> None:
    """Process 1 of a container gets the signals, so no shell may stay in between."""
    process = subprocess.Popen([*shell, str(place / "fence"), "sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=10)[0] == f"{process.pid}\n"


def test_the_command_s_exit_status_is_the_fence_s(shell: list[str], place: Path) -> None:
    assert run(shell, place, "", "sh", "-c", "exit 7").returncode == 7


def test_no_volumes_no_check(shell: list[str], place: Path) -> None:
    nothing = {f"SWARMMAIL_{name}": "" for name in ("CLUSTER", "SERVICE", "GENERATION", "NODE")}
    assert run(shell, place, "", **nothing).stdout == "started\n"


@pytest.mark.parametrize("name", ["with space", "with  two", "*", "-n", "ümlaut", "a=b", "$HOME"])
def test_unusual_paths(shell: list[str], place: Path, name: str) -> None:
    assert run(shell, place, str(volume(place / name))).stdout == "started\n"
    assert_refused(run(shell, place, str(volume(place / f"{name} old", state="stale"))), f"{name} old")


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"cluster": "other"}, "belongs to cluster 'other', not to 'lab'"),
        ({"cluster": None}, "belongs to cluster ''"),
        ({"cluster": "lab "}, "belongs to cluster 'lab '"),
        ({"service": "mta"}, "belongs to service 'mta'"),
        ({"service": None}, "belongs to service ''"),
        ({"generation": "2"}, "is an old copy (generation 2, wanted 3)"),
        ({"generation": "0"}, "is an old copy"),
        ({"generation": None}, "names no generation"),
        ({"generation": "three"}, "names no generation (found 'three')"),
        ({"generation": "-4"}, "names no generation"),
        ({"generation": "9" * 19}, "names no generation"),
        ({"node": "node2"}, "was made for node 'node2', this is 'node1'"),
        ({"node": None}, "was made for node ''"),
        ({"state": "stale"}, "is marked 'stale', not 'live'"),
        ({"state": None}, "is marked '', not 'live'"),
        ({"state": "*"}, "is marked '*'"),
    ],
    ids=str,
)
def test_a_marker_that_does_not_fit_is_refused(
    shell: list[str], place: Path, changes: dict[str, str | None], because: str
) -> None:
    assert_refused(run(shell, place, str(volume(place / "mail", **changes))), because)


def test_a_later_generation_starts(shell: list[str], place: Path) -> None:
    assert run(shell, place, str(volume(place / "mail", generation="12"))).stdout == "started\n"


def test_generations_are_numbers_not_texts(shell: list[str], place: Path) -> None:
    mail = str(volume(place / "mail", generation="9"))
    assert_refused(run(shell, place, mail, SWARMMAIL_GENERATION="10"), "generation 9, wanted 10")
    assert run(shell, place, mail, SWARMMAIL_GENERATION="08").stdout == "started\n"


def test_an_unknown_line_and_a_missing_last_newline_do_no_harm(shell: list[str], place: Path) -> None:
    marker = volume(place / "mail") / ".swarmmail-volume"
    marker.write_text("made=2026-01-01 by=x\n\n" + marker.read_text().rstrip("\n"))
    assert run(shell, place, str(place / "mail")).stdout == "started\n"


def test_a_value_is_only_text(shell: list[str], place: Path) -> None:
    mail = volume(place / "mail", state="$(echo live)")
    assert_refused(run(shell, place, str(mail)), "is marked '$(echo live)'")


def test_nothing_mounted(shell: list[str], place: Path) -> None:
    assert_refused(run(shell, place, str(place / "mail")), f"nothing is mounted at {place}/mail")


def test_an_empty_volume(shell: list[str], place: Path) -> None:
    (place / "mail").mkdir()
    assert_refused(run(shell, place, str(place / "mail")), "is empty")


@pytest.mark.parametrize("name", ["lab.test", ".hidden", "..odd", "dangling"])
def test_data_without_a_marker(shell: list[str], place: Path, name: str) -> None:
    (place / "mail").mkdir()
    (place / "mail" / name).symlink_to("nowhere")
    assert_refused(run(shell, place, str(place / "mail")), "has files but no marker")


def test_a_marker_that_is_no_file(shell: list[str], place: Path) -> None:
    (place / "mail" / ".swarmmail-volume").mkdir(parents=True)
    assert_refused(run(shell, place, str(place / "mail")), "can't be read")


@pytest.mark.parametrize("target", ["../marker", "nowhere"])
def test_a_marker_that_is_a_link(shell: list[str], place: Path, target: str) -> None:
    marker = volume(place / "mail") / ".swarmmail-volume"
    marker.rename(place / "marker")
    marker.symlink_to(target)
    assert_refused(run(shell, place, str(place / "mail")), "is a link")


def test_an_empty_marker(shell: list[str], place: Path) -> None:
    (volume(place / "mail") / ".swarmmail-volume").write_text("")
    assert_refused(run(shell, place, str(place / "mail")), "belongs to cluster ''")


@pytest.mark.parametrize("order", ["good:bad", "bad:good", "good:good:bad"])
def test_one_bad_volume_is_enough(shell: list[str], place: Path, order: str) -> None:
    volume(place / "good")
    volume(place / "bad", state="stale")
    volumes = ":".join(str(place / name) for name in order.split(":"))
    assert_refused(run(shell, place, volumes), f"{place}/bad is marked 'stale'")


def test_several_good_volumes_start(shell: list[str], place: Path) -> None:
    volumes = f"{volume(place / 'mail')}:{volume(place / 'index')}:"
    assert run(shell, place, volumes).stdout == "started\n"


@pytest.mark.parametrize("name", ["CLUSTER", "SERVICE", "GENERATION", "NODE"])
@pytest.mark.parametrize("value", ["", None])
def test_an_incomplete_environment(shell: list[str], place: Path, name: str, value: str | None) -> None:
    mail = str(volume(place / "mail"))
    if value is None:
        unset = ["env", "-u", f"SWARMMAIL_{name}", *shell]
        assert_refused(run(unset, place, mail), "the fence needs SWARMMAIL_CLUSTER")
    else:
        assert_refused(run(shell, place, mail, **{f"SWARMMAIL_{name}": value}), "the fence needs")


def test_a_generation_that_is_no_number(shell: list[str], place: Path) -> None:
    mail = str(volume(place / "mail"))
    assert_refused(run(shell, place, mail, SWARMMAIL_GENERATION="3;id"), "the fence needs")


def test_no_command(shell: list[str], place: Path) -> None:
    mail = volume(place / "mail")
    result = subprocess.run(
        [*shell, str(place / "fence")],
        env={"PATH": os.environ["PATH"], "SWARMMAIL_VOLUMES": str(mail)},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert_refused(result, "no command to run")


def test_without_root(shell: list[str], place: Path) -> None:
    """As the MDA runs: another user than the marker's owner, who may read it, or may not."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    mail = volume(place / "mail")
    mail.chmod(0o700)
    os.chown(mail, NOBODY, NOBODY)
    (mail / ".swarmmail-volume").chmod(0o644)
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *shell]
    assert run(nobody, place, str(mail)).stdout == "started\n"
    (mail / ".swarmmail-volume").chmod(0o600)
    assert_refused(run(nobody, place, str(mail)), f"can't be read; make it a file that user {NOBODY} may read")


# ---- during a move ----


def start(shell: list[str], place: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*shell, str(place / "fence"), *(command or ("echo", "started"))],
        env=variables(str(place / "mail")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def become(path: Path, **changes: str) -> None:
    """As a move does: the new marker takes the old one's place."""
    new = path / ".swarmmail-volume.new"
    new.write_text("".join(f"{key}={value}\n" for key, value in (MARKER | changes).items()))
    new.rename(path / ".swarmmail-volume")


def waits(process: subprocess.Popen[str]) -> str:
    """What it says when it begins to wait; it must then go on waiting."""
    assert process.stderr is not None
    said = process.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    return said


@pytest.mark.parametrize("state", ["standby", "held"])
def test_it_waits_until_its_volume_is_the_live_one(shell: list[str], place: Path, state: str) -> None:
    path = volume(place / "mail", state=state)
    process = start(shell, place)
    assert f"mda waits: its volume is marked '{state}'" in waits(process)
    become(path, state="live", generation="4")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "started\n", ""), "it says it once"


def test_it_refuses_when_the_move_ended_elsewhere(shell: list[str], place: Path) -> None:
    path = volume(place / "mail", state="held")
    process = start(shell, place)
    assert waits(process)
    become(path, state="stale")
    out, err = process.communicate(timeout=10)
    assert process.returncode == REFUSED and out == "" and "marked 'stale'" in err


def test_all_volumes_must_be_live(shell: list[str], place: Path) -> None:
    volume(place / "a")
    path = volume(place / "mail", state="standby")
    process = start(shell, place)
    assert waits(process)
    become(path, state="live")
    assert process.communicate(timeout=10)[0] == "started\n"


@pytest.mark.parametrize("changes", [{"node": "other"}, {"cluster": "other"}, {"service": "mta"}, {"generation": "2"}])
def test_it_does_not_wait_for_what_is_not_its_own(shell: list[str], place: Path, changes: dict[str, str]) -> None:
    assert run(shell, place, str(volume(place / "mail", state="standby", **changes))).returncode == REFUSED


def test_it_ends_at_once_when_it_is_told_to(shell: list[str], place: Path) -> None:
    """Process 1 of a container: no signal does anything unless it is asked for."""
    volume(place / "mail", state="standby")
    process = start(shell, place)
    assert waits(process)
    process.terminate()
    assert process.wait(5) == 143


def test_what_waits_is_well_and_what_runs_is_judged_by_its_own_check(shell: list[str], place: Path) -> None:
    path = volume(place / "mail", state="standby")
    assert run(shell, place, str(path), "--health", "false").returncode == 0
    become(path, state="live")
    assert run(shell, place, str(path), "--health", "sh", "-c", "exit 7").returncode == 7
    become(path, state="stale")
    assert run(shell, place, str(path), "--health", "true").returncode == REFUSED
