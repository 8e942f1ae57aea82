"""What the lab leaves in the project folder: ``.lab/`` (keys, certificates) and ``inventories/lab.yml``.

Everything in ``.lab/`` is made for this lab and worthless without it. Folder 0700, files 0600.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from swarmmail.lab.driver import Access, Machine

MAIL_DOMAIN = "lab.test"  # RFC 6761: .test is nobody's
MAIL_HOSTNAMES = (f"mx.{MAIL_DOMAIN}", f"imap.{MAIL_DOMAIN}")


def folder(root: Path) -> Path:
    return root / ".lab"


def inventory_path(root: Path) -> Path:
    return root / "inventories" / "lab.yml"


def write(path: Path, content: str | bytes, mode: int = 0o600) -> bool:
    """Write a file whole or not at all. False: it was so already, and was not touched."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return False
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(data)
    fresh.replace(path)
    return True


def leaving(root: Path) -> Path:
    """The mark that a `down` has begun. Where it is found, that `down` was killed and must be finished first:
    Docker may still be removing what is listed as running."""
    return folder(root) / "leaving"


def access(root: Path) -> Access:
    """The lab's SSH key and sudo password, made when missing.

    The key is written last: as long as it is missing nobody has been let in with the password beside it.
    """
    home = folder(root)
    home.mkdir(mode=0o700, exist_ok=True)
    private, public, password = home / "id_ed25519", home / "id_ed25519.pub", home / "sudo_password"
    if not (private.exists() and public.exists() and password.exists()):
        secret, line = key_pair()
        write(password, secrets.token_urlsafe(12) + "\n")
        write(public, f"{line} swarmmail-lab\n")
        write(private, secret)
    return Access(public.read_text().strip(), password.read_text().strip())


def key_pair() -> tuple[bytes, str]:
    """A new SSH key: the private half as OpenSSH writes it, the public one as "type base64"."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, line.decode()


def certificates(root: Path, addresses: Sequence[str]) -> None:
    """A CA of the lab's own, and one certificate for its mail names and every address a host can have.

    Those that are there are kept if they are for just these. The certificate is written last: it stands for all.
    """
    home = folder(root)
    paths = home / "ca.crt", home / "tls.key", home / "tls.crt"
    if all(path.exists() for path in paths) and _names(paths[2]) == {*MAIL_HOSTNAMES, *addresses}:
        return
    import trustme

    ca = trustme.CA(organization_name="swarmmail lab")
    leaf = ca.issue_cert(*MAIL_HOSTNAMES, *addresses, common_name=MAIL_HOSTNAMES[0])
    write(paths[0], ca.cert_pem.bytes())
    write(paths[1], leaf.private_key_pem.bytes())
    write(paths[2], b"".join(blob.bytes() for blob in leaf.cert_chain_pems))


def _names(certificate: Path) -> set[str]:
    """The names and addresses that a certificate is good for; none if it cannot be read."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return set()
    return {str(name.value) for name in names}


def known_hosts(machines: Sequence[Machine], keys: dict[str, str]) -> str:
    """The text of a known_hosts file (sshd(8)) with exactly the lab's hosts."""
    return "".join(f"{machine.address} {keys[machine.name]}\n" for machine in machines)


def inventory(machines: Sequence[Machine], connect_timeout: int | None = None) -> str:
    """The text of ``inventories/lab.yml``. ``connect_timeout``: seconds, for hosts that are slow to answer.

    Of three or more hosts the first three are managers: a quorum that bears the loss of one. Of fewer, the
    first alone: two managers bear the loss of none.
    """
    managers = 3 if len(machines) >= 3 else 1
    lines = [
        "# Written by `fab lab.up`, removed by `fab lab.down`: changes are lost. Copy the file to keep some.",
        "cluster: lab",
        "ssh:",
        "  user: root",
        "  key: ../.lab/id_ed25519",
        "  known_hosts: ../.lab/known_hosts",
        *([f"  connect_timeout: {connect_timeout}"] if connect_timeout else []),
        "hosts:",
    ]
    for number, machine in enumerate(machines):
        lines += [
            f"  {machine.name}:",
            f"    address: {machine.address}",
            f"    role: {'manager' if number < managers else 'worker'}",
            *(["    nat: true"] if machine.nat else []),
        ]
    last = machines[min(2, len(machines) - 1)]
    lines += [
        "network:",
        "  name: local-mail-delivery",
        "  encryption: auto",
        "stack:",
        "  path: ../stacks/mail",
        "  name: mail",
        "  settings:",
        f"    MAIL_DOMAIN: {MAIL_DOMAIN}",
        f"    MAIL_HOSTNAME: {MAIL_HOSTNAMES[0]}",
        "  tls:",
        "    certificate: ../.lab/tls.crt",
        "    key: ../.lab/tls.key",
        "    ca: ../.lab/ca.crt",
        "  placement:",  # the edge, without data, is on the first manager unless it is named here
        f"    mta: {machines[0].name}",
        f"    mda: {last.name}",
    ]
    return "\n".join(lines) + "\n"


def remove(root: Path) -> list[str]:
    """Remove both, and ``inventories/`` if nothing else is in it. What was removed."""
    removed = []
    path = inventory_path(root)
    if path.exists():
        path.unlink()
        removed.append("file inventories/lab.yml")
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    if folder(root).exists():  # last: the mark of an unfinished `down` is in it
        shutil.rmtree(folder(root))
        removed.append("folder .lab")
    return removed
