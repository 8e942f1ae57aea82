"""``mail.deploy.check``: what is said of a stack before any host is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from swarmmail.mail import deploy
from swarmmail.model import inventory
from swarmmail.model.errors import InputError
from swarmmail.model.inventory import Inventory

STACK = Path(__file__).parents[2] / "stacks" / "mail"


def given(folder: Path, tls: str = "tls: {certificate: tls.crt, key: tls.key}") -> Inventory:
    path = folder / "lab.yml"
    path.write_text(
        "cluster: lab\nhosts:\n  host1: {address: 198.18.0.11, role: manager}\n"
        f"stack:\n  path: {STACK}\n  name: mail\n"
        "  settings: {MAIL_DOMAIN: lab.test, MAIL_HOSTNAME: mx.lab.test}\n"
        f"  placement: {{mta: host1, mda: host1}}\n  {tls}\n"
    )
    return inventory.load(path)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    authority = trustme.CA()
    made = authority.issue_cert("mx.lab.test")
    made.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    made.private_key_pem.write_to_path(tmp_path / "tls.key")
    authority.issue_cert("mx.lab.test").private_key_pem.write_to_path(tmp_path / "other.key")
    return tmp_path


def test_a_good_stack(pair: Path) -> None:
    assert set(deploy.check(given(pair)).services) == {"mta", "mda", "edge"}


def test_a_key_of_another_certificate(pair: Path) -> None:
    (pair / "other.key").rename(pair / "tls.key")
    with pytest.raises(InputError, match=r"lab.yml: stack.tls: tls.crt and tls.key are no pair: KEY_VALUES_MISMATCH"):
        deploy.check(given(pair))


def test_no_certificate_though_the_stack_uses_one(pair: Path) -> None:
    with pytest.raises(InputError, match=r"stack.tls: missing; .* uses the secret tls-certificate"):
        deploy.check(given(pair, tls=""))
