import ssl
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from swarmmail.lab import files
from swarmmail.lab.driver import Machine
from swarmmail.model.inventory import load


def machines(count: int) -> list[Machine]:
    return [Machine(f"host{i}", f"198.18.0.{10 + i}", "host", "running") for i in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "roles", "mda"),
    [
        (1, ["manager"], "host1"),
        (2, ["manager", "worker"], "host2"),
        (3, ["manager"] * 3, "host3"),
        (5, ["manager"] * 3 + ["worker"] * 2, "host3"),
    ],
)
def test_inventory_has_a_quorum_and_a_placement(count: int, roles: list[str], mda: str) -> None:
    text = files.inventory(machines(count))
    data = YAML(typ="safe").load(text)
    assert text.startswith("# ")
    assert [host["role"] for host in data["hosts"].values()] == roles
    assert data["hosts"]["host1"]["address"] == "198.18.0.11"
    assert data["stack"]["placement"] == {"mta": "host1", "mda": mda}


def test_inventory_tells_which_host_is_behind_the_router(tmp_path: Path) -> None:
    one, two, three = machines(3)
    path = files.inventory_path(tmp_path)
    path.parent.mkdir()
    path.write_text(files.inventory([one, two, replace(three, nat=True)]))
    assert {name: host.nat for name, host in load(path).hosts.items()} == {
        "host1": False,
        "host2": False,
        "host3": True,
    }


def test_inventory_is_one_that_the_schema_takes(tmp_path: Path) -> None:
    path = files.inventory_path(tmp_path)
    path.parent.mkdir()
    path.write_text(files.inventory(machines(3)))
    assert list(load(path).hosts) == ["host1", "host2", "host3"]


def test_access_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    first = files.access(tmp_path)
    assert files.access(tmp_path) == first
    assert first.sudo_password not in repr(first)
    assert stat.S_IMODE(files.folder(tmp_path).stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files.folder(tmp_path).iterdir()}
    assert modes == {"id_ed25519": 0o600, "id_ed25519.pub": 0o600, "sudo_password": 0o600}


def test_half_an_access_is_made_anew(tmp_path: Path) -> None:
    """Killed after the public key: nobody was let in with it, and it has no private one."""
    first = files.access(tmp_path)
    (files.folder(tmp_path) / "id_ed25519").unlink()
    assert files.access(tmp_path).public_key != first.public_key


def test_certificate_is_good_for_names_and_addresses(tmp_path: Path) -> None:
    files.access(tmp_path)
    files.certificates(tmp_path, ["198.18.0.11"])
    home = files.folder(tmp_path)
    context = ssl.create_default_context(cafile=str(home / "ca.crt"))
    context.load_cert_chain(home / "tls.crt", home / "tls.key")  # raises if they do not belong together
    before = (home / "tls.crt").read_bytes()
    files.certificates(tmp_path, ["198.18.0.11"])
    assert (home / "tls.crt").read_bytes() == before
    files.certificates(tmp_path, ["198.18.0.11", "198.18.0.12"])
    assert (home / "tls.crt").read_bytes() != before


def test_a_damaged_certificate_is_made_anew(tmp_path: Path) -> None:
    files.access(tmp_path)
    files.certificates(tmp_path, ["198.18.0.11"])
    (files.folder(tmp_path) / "tls.crt").write_text("half a certif")
    files.certificates(tmp_path, ["198.18.0.11"])
    assert "END CERTIFICATE" in (files.folder(tmp_path) / "tls.crt").read_text()


def test_known_hosts_names_each_address_once() -> None:
    text = files.known_hosts(machines(2), {"host1": "ssh-ed25519 AAAA1", "host2": "ssh-ed25519 AAAA2"})
    assert text == "198.18.0.11 ssh-ed25519 AAAA1\n198.18.0.12 ssh-ed25519 AAAA2\n"


def test_write_leaves_an_equal_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert files.write(path, "one")
    before = path.stat().st_ino
    assert not files.write(path, "one")
    assert path.stat().st_ino == before
    assert files.write(path, "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_remove_leaves_other_inventories(tmp_path: Path) -> None:
    files.access(tmp_path)
    mine, other = files.inventory_path(tmp_path), files.inventory_path(tmp_path).with_name("mine.yml")
    mine.parent.mkdir()
    mine.write_text("cluster: lab\n")
    other.write_text("cluster: mine\n")
    assert files.remove(tmp_path) == ["file inventories/lab.yml", "folder .lab"]
    assert list(tmp_path.rglob("*")) == [other.parent, other]
    assert files.remove(tmp_path) == []
