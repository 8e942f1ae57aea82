"""Kinds of value in an inventory: what is allowed, and why something is not.

The description of each type is what an error message and the manual call "allowed". A validator's
ValueError holds the reason only (it may be empty); ``yamlfile.problems`` puts it behind what was found and
what is allowed.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo

from swarmmail.model.yamlfile import did_you_mean

# RFC 1918, and what the Internet does not route either: RFC 6598 (shared space), RFC 2544 (benchmarks)
_PRIVATE = [
    IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15")
]
REACHABLE = "an IP address that the other hosts can reach"
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("put it in quotes" if isinstance(value, int | float) else "")
    try:
        return str(ip_address(value))
    except ValueError:
        pass
    labels = value.removesuffix(".").split(".")
    if re.fullmatch(r"[\d.:]+", value) or labels[-1].isdigit():  # RFC 3696, 2: no top-level label is all digits
        raise ValueError("not a valid IP address")
    if len(value) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("not a host name")
    return value


def is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def advertise(value: object) -> str:
    text = address(value)
    if not is_ip(text):
        raise ValueError("the Swarm stores addresses, not names")
    ip = ip_address(text)
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast or (ip.is_link_local and ip.version == 6):
        raise ValueError("other hosts cannot reach it by that")
    return text


def _subnet(value: object) -> IPv4Network | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, str) or "/" not in value:
        raise ValueError(did_you_mean(value, ["auto"]) if isinstance(value, str) else "")
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError("not a network") from None
    if not isinstance(network, IPv4Network):
        raise ValueError("an overlay needs IPv4 inside; the hosts themselves may use IPv6")
    if str(network.network_address) != value.partition("/")[0]:
        raise ValueError(f"did you mean {str(network)!r}?")
    if network.prefixlen > 28:
        raise ValueError("too small, at least /28")
    if not any(network.subnet_of(private) for private in _PRIVATE):
        raise ValueError("these are addresses of the Internet: the hosts could no longer reach them")
    return network


def _mtu(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1280 <= value <= 9000:
        raise ValueError(did_you_mean(value, ["auto"]) if isinstance(value, str) else "")
    return value


def _path(value: object, info: ValidationInfo) -> Path:
    """Absolute; relative ones start at the folder of the inventory file."""
    if not isinstance(value, str | Path):
        raise ValueError("")
    if not str(value).strip() or not str(value).isprintable():
        raise ValueError("not a path")
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError("no such user") from None
    folder = info.context["folder"] if info.context else Path()
    return Path(os.path.normpath(folder / path))


def _not_a_switch(value: object) -> object:
    if isinstance(value, bool) or (
        isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "true", "false", "y", "n")
    ):
        raise ValueError(
            "it is a choice of method, not a switch: write auto for encryption by what all hosts can do, "
            "or none for clear text if that is really meant"
        )
    return value


def _true_or_false(value: object) -> object:
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
        raise ValueError("write true or false, without quotes")
    return value


def _host_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", value):
        raise ValueError("not a name for a host, allowed: a-z, 0-9 and -, at most 63")
    if value == "local":
        raise ValueError("as stack.build the name local means the operator's machine: choose another")
    return value


def _setting_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError("not a name for a setting, allowed: letters, digits and _, as in an environment variable")
    if value.upper().startswith("SWARMMAIL_"):
        raise ValueError("names that start with SWARMMAIL_ belong to the tool")
    return value


def _setting(value: object) -> str:
    if not isinstance(value, str):
        quotable = isinstance(value, bool | int | float)
        raise ValueError("allowed: text" + ("; put it in quotes" if quotable else ""))
    return value


Cluster = Annotated[
    str, Field(pattern="^[a-z][a-z0-9-]{0,31}$", description="a-z, 0-9 and -, a letter first, at most 32")
]
Address = Annotated[str, PlainValidator(address), Field(description="a host name or an IP address")]
Advertise = Annotated[str, PlainValidator(advertise), Field(description=REACHABLE)]
Port = Annotated[int, Field(ge=1, le=65535, description="a port, 1 to 65535")]
Seconds = Annotated[int, Field(ge=1, le=600, description="whole seconds, 1 to 600")]
Login = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}$", description="a login name, at most 32")]
FilePath = Annotated[Path, PlainValidator(_path), Field(description="a path")]
Subnet = Annotated[
    IPv4Network | Literal["auto"],
    PlainValidator(_subnet),
    Field(description="auto, or a private IPv4 network of at least /28 such as 10.91.0.0/24"),
]
Mtu = Annotated[int | Literal["auto"], PlainValidator(_mtu), Field(description="auto, or bytes, 1280 to 9000")]
# swarmkit's own rule for names (manager/controlapi/common.go, isValidDNSName)
NetworkName = Annotated[
    str,
    Field(pattern="^[A-Za-z0-9]([-_]*[A-Za-z0-9])*$", max_length=63, description="letters, digits, - and _"),
]
StackName = Annotated[
    str, Field(pattern="^[a-z0-9]([-_]*[a-z0-9])*$", max_length=32, description="a-z, 0-9, - and _, at most 32")
]
Encryption = Annotated[
    Literal["auto", "ipsec", "wireguard", "none"],
    BeforeValidator(_not_a_switch),
    Field(description="auto, ipsec, wireguard, none"),
]
Role = Annotated[Literal["manager", "worker"], Field(description="manager, worker")]
Switch = Annotated[bool, BeforeValidator(_true_or_false), Field(description="true, false")]
HostName = Annotated[str, AfterValidator(_host_name)]
SettingName = Annotated[str, AfterValidator(_setting_name)]
Setting = Annotated[str, PlainValidator(_setting)]
