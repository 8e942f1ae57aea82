import pytest

from swarmmail.lab import rights


def status(mask: str) -> str:
    return f"Name:\tcat\nCapInh:\t0000000000000000\nCapBnd:\t{mask}\nCapAmb:\t0000000000000000\n"


def test_a_missing_bit_is_a_missing_capability() -> None:
    assert rights.bounding_set(status("000001ffffffffff")) - rights.bounding_set(status("000001fffeffffff")) == {
        "SYS_RESOURCE"  # bit 24 (linux/capability.h)
    }


def test_dockers_default_set_is_decoded() -> None:
    """00000000a80425fb is what `docker run` gives by default."""
    names = (
        "chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod "
        "audit_write setfcap"  # as capsh --decode prints them
    )
    assert rights.bounding_set(status("00000000a80425fb")) == set(names.upper().split())


def test_no_capability_beyond_those_of_the_kernel() -> None:
    assert rights.bounding_set(status("ffffffffffffffff")) >= rights.CAPABILITIES.keys()


def test_no_bounding_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="CapBnd"):
        rights.bounding_set("Name:\tcat\n")


def test_what_could_break_the_machine_is_not_given() -> None:
    assert not rights.CAPABILITIES.keys() & {"SYS_MODULE", "SYS_TIME", "SYS_RAWIO"}
    assert not [rule for rule in rights.DEVICES if rule.startswith(("a", "b")) or "*" in rule]
