"""The stack file: what is refused and how it is said, what rendering adds, and how differences are shown."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from swarmmail.model import content, inventory, stack
from swarmmail.model.errors import InputError
from swarmmail.model.stack import Filling, StackFile

REPO = Path(__file__).parents[2]

GOOD = """\
services:
  mta:
    image: example/mta
    build: ./mta
    environment:
      MAIL_DOMAIN: ${MAIL_DOMAIN:?the domain}
      POSTMASTER: ${POSTMASTER:-}
    networks: [overlay]
    ports:
      - {target: 25, published: 25, mode: host}
    volumes:
      - queue:/var/spool/postfix
    secrets: [tls-key]
    stop_grace_period: 10s
    deploy:
      endpoint_mode: dnsrr
      labels: {swarmmail.role: mta}
  mda:
    image: example/mda:1.2
    user: "5000:5000"
    entrypoint: tini -- "mda server"
    networks: [overlay]
    ports:
      - {target: 143, published: 143, mode: host}
    volumes:
      - {type: volume, source: mail, target: /srv/mail}
      - {type: tmpfs, target: /tmp}
    deploy:
      endpoint_mode: dnsrr
      labels: [swarmmail.role=mda, other=1]
networks:
  overlay: {external: true, name: local-mail-delivery}
volumes:
  queue:
  mail: {name: the-mail}
secrets:
  tls-key: {external: true}
x-note: nobody reads this
"""
PLACEMENT = "{mta: host1, mda: host2}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project folder, where the operator is."""
    (tmp_path / "inventories").mkdir()
    (tmp_path / "mail" / "mta").mkdir(parents=True)
    (tmp_path / "mail" / "mta" / "Dockerfile").write_text("FROM scratch\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(
    text: str = GOOD, placement: str = PLACEMENT, given: str = "{MAIL_DOMAIN: lab.test}"
) -> tuple[StackFile, inventory.Inventory]:
    """In the folder of the fixture: the relative paths are what people see in messages."""
    Path("mail/stack.yml").write_text(text)
    path = Path("inventories/lab.yml")
    path.write_text(
        "cluster: lab\n"
        "hosts: {host1: {address: 10.1.0.1, role: manager}, host2: {address: 10.1.0.2, role: worker}}\n"
        f"stack: {{path: ../mail, settings: {given}, placement: {placement}}}\n"
    )
    loaded = inventory.load(path)
    return stack.read(loaded), loaded


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def line(text: str, words: str) -> int:
    return next(number for number, one in enumerate(text.splitlines(), 1) if words in one)


# ---- reading ----


def test_what_is_read(folder: Path) -> None:
    file, _ = read()
    assert file.name == "mail" and list(file.services) == ["mta", "mda"]
    mta, mda = file.services.values()
    assert mta.image == f"example/mta:{content.of_folder(folder / 'mail' / 'mta')}"
    assert (mta.build, mda.build) == ((folder / "mail" / "mta").resolve(), None)
    assert (mda.image, mda.user, mda.entrypoint) == ("example/mda:1.2", "5000:5000", ("tini", "--", "mda server"))
    assert (mta.role, mda.role) == ("mta", "mda") and file.by_role("mda") is mda and file.by_role("") is None
    assert (mta.ports, mda.ports) == ((25,), (143,))
    assert (mta.volumes, mda.volumes) == ({"queue": "/var/spool/postfix"}, {"mail": "/srv/mail"})
    assert (file.volume_name("queue"), file.volume_name("mail")) == ("mail_queue", "the-mail")
    assert mda.labels == {"swarmmail.role": "mda", "other": "1"} and mda.place_label == "swarmmail.mda"


def test_the_tag_follows_the_folder(folder: Path) -> None:
    before = read()[0].services["mta"].image
    assert read()[0].services["mta"].image == before
    (folder / "mail" / "mta" / "main.cf").write_text("a = b\n")
    assert read()[0].services["mta"].image != before


@pytest.mark.parametrize(
    ("path", "placement"),
    [("stacks/mail", "{mta: h, mda: h}"), ("tests/lab/stacks/pica", "{pica-mail-mta: h, pica-mail-mda: h}")],
)
def test_the_stacks_of_this_project_are_good(folder: Path, path: str, placement: str) -> None:
    """What is shipped, and the one that another collective could bring."""
    Path("inventories/lab.yml").write_text(
        "cluster: c\n"
        "hosts: {h: {address: 10.0.0.1, role: manager}}\n"
        f"stack: {{path: {REPO / path}, placement: {placement}, settings: {{MAIL_DOMAIN: a.b, MAIL_HOSTNAME: c.d}}}}\n"
    )
    file = stack.read(inventory.load(Path("inventories/lab.yml")))
    assert file.by_role("mta") and file.by_role("mda")


REFUSED = [
    ("image: example/mta\n", "image: [a]\n", "    image: [a]", r"services\.mta\.image: missing"),
    ("image: example/mda:1.2", "image: example/mda", "image: example/mda", "tag other than latest"),
    ("image: example/mda:1.2", "image: example/mda:latest", "mda:latest", "tag other than latest"),
    ("image: example/mda:1.2", "image: host:5000/mda", "host:5000", "tag other than latest"),
    ("    user:", "    depends_on: [mta]\n    user:", "depends_on", r"services\.mda\.depends_on: .*leave it out"),
    ("role=mda", "role=mdb", "role=mdb", r"'mdb', allowed: mta, mda"),
    ("role=mda", "role=mta", "services:", "services mta, mda all have the role mta"),
    (
        "    networks: [overlay]\n    ports:\n      - {target: 143",
        "    ports:\n      - {target: 143",
        "  mda:",
        r"services\.mda\.networks: not on the overlay local-mail-delivery",
    ),
    ("{target: 143, published: 143, mode: host}", '"143:143"', '"143:143"', r"services\.mda\.ports\.\S*0.*open relay"),
    ("{target: 143, published: 143, mode: host}", "{target: 143, mode: ingress}", "ingress", "mode: host"),
    ("{target: 143, published: 143", "{target: 24, published: 24", "target: 24", "LMTP takes mail without a password"),
    ("- queue:/var", "- ./queue:/var", "./queue", "write NAME:PATH"),
    ("- queue:/var", "- quue:/var", "quue", "write NAME:PATH with NAME below the top-level 'volumes:'"),
    ("source: mail,", "source: male,", "male", "write NAME:PATH"),
    ("labels: {swarmmail.role: mta}", "replicas: 2", "    deploy:", "a service with data runs once"),
    ("labels: {swarmmail.role: mta}", "mode: global", "    deploy:", "a service with data runs once"),
    (
        "labels: {swarmmail.role: mta}",
        "update_config: {order: start-first}",
        "start-first",
        r"services\.mta\.deploy\.update_config\.order: .*two writers",
    ),
    (
        "labels: {swarmmail.role: mta}",
        "rollback_config: {order: start-first}",
        "start-first",
        r"services\.mta\.deploy\.rollback_config\.order: .*two writers",
    ),
    ("stop_grace_period: 10s", "stop_grace_period: 1m30s", "1m30s", "at most 55s"),
    ("stop_grace_period: 10s", "stop_grace_period: soon", "soon", "at most 55s"),
    ("build: ./mta", "build: ./nowhere", "nowhere", r"services\.mta\.build: no file .*nowhere/Dockerfile"),
    ("build: ./mta", "build: {context: nowhere}", "nowhere", "no file"),
    ("POSTMASTER: ${POSTMASTER:-}", "POSTMASTER: $POSTMASTER", "$POST", r"\$\{POSTMASTER\} is not in stack\.settings"),
    (
        "${MAIL_DOMAIN:?the domain}",
        "${MAIL_DOMAN:?x}",
        "DOMAN",
        r"\$\{MAIL_DOMAN\} is not .*did you mean 'MAIL_DOMAIN'",
    ),
    ("  mda:\n", "  m.da:\n", "m.da", "allowed in a service's name"),
    ("x-note: nobody reads this", "x-note: ${NOWHERE}", "NOWHERE", "NOWHERE"),
]


@pytest.mark.parametrize(("old", "new", "where", "words"), REFUSED, ids=[new.strip()[:40] for _, new, _, _ in REFUSED])
def test_what_is_refused_with_its_line(folder: Path, old: str, new: str, where: str, words: str) -> None:
    text = changed(old, new)
    with pytest.raises(InputError) as caught:
        read(text)
    found = [problem for problem in caught.value.problems if problem.startswith(f"{folder}/mail/stack.yml:")]
    assert found, caught.value.problems
    match = [problem for problem in found if re.search(words, problem)]
    assert len(match) == 1 and "\n" not in match[0], found
    number = int(match[0].split(":")[1])
    start = line(text, where)
    assert number == start, match


def test_everything_wrong_is_said_at_once(folder: Path) -> None:
    text = GOOD.replace("mode: host", "mode: ingress").replace("image: example/mda:1.2", "image: example/mda")
    with pytest.raises(InputError) as caught:
        read(text, placement="{mta: host1, mdb: host1}", given="{}")
    assert len(caught.value.problems) == 5  # two ports, an image, one placement; MAIL_DOMAIN
    assert sum("stack.placement" in problem for problem in caught.value.problems) == 1


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("{mta: host1}", "service 'mda' has data and no host to begin on; write mda: host1"),
        ("{mta: host1, mda: host1, mdaa: host1}", "mail/stack.yml; did you mean 'mda'?"),
    ],
)
def test_placement_and_services_agree(folder: Path, placement: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(placement=placement)
    assert [problem for problem in caught.value.problems if words in problem] == caught.value.problems
    assert caught.value.problems[0].startswith("inventories/lab.yml")


@pytest.mark.parametrize("text", ["[]\n", "services:\n", "services: {}\n", "services: [mta]\n", "x-other: 1\n"])
def test_a_file_without_services(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"^\S+/mail/stack\.yml:1: no services"):
        read(text)


@pytest.mark.parametrize(
    ("written", "variables"),
    [
        ("$A", ["A"]),
        ("${A}", ["A"]),
        ("${A:?text}x${B}", ["A", "B"]),
        ("${A:-default}", []),
        ("${A-default}", []),
        ("${A:+other}", []),
        ("$$A", []),
        ("$${A}", []),
        ("$$$A", ["A"]),
        ("5$", []),
        ("no variable", []),
    ],
)
def test_variables_are_found_as_compose_finds_them(written: str, variables: list[str]) -> None:
    found = list(stack._variables({"a": ["x", {"b": written}]}, ()))
    assert found == [(("a", 1, "b"), name) for name in variables]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("10s", 10), ("1m30s", 90), ("1h", 3600), ("500ms", 0.5), ("1.5s", 1.5), ("10", None), ("", None), ("1s x", None)],
)
def test_durations(written: str, seconds: float | None) -> None:
    assert stack._seconds(written) == seconds


yamlish = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab:/${}.-", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab-", min_size=1, max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = (
    "image",
    "build",
    "networks",
    "ports",
    "volumes",
    "secrets",
    "deploy",
    "user",
    "entrypoint",
    "stop_grace_period",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(("mta", "mda")), st.sampled_from(KEYS), yamlish)
def test_any_value_anywhere_is_read_or_refused_in_words(folder: Path, service: str, key: str, value: Any) -> None:
    document = YAML(typ="safe").load(GOOD)
    document["services"][service][key] = value
    try:
        read(json.dumps(document))
    except InputError as refused:
        assert all(re.match(r"\S*(mail/stack|inventories/lab)\.yml:", problem) for problem in refused.problems)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(("networks", "volumes", "secrets", "services")), yamlish)
def test_any_value_at_the_top_is_read_or_refused_in_words(folder: Path, key: str, value: Any) -> None:
    document = YAML(typ="safe").load(GOOD)
    document[key] = value
    try:
        read(json.dumps(document))
    except InputError as refused:
        assert all(re.match(r"\S*(mail/stack|inventories/lab)\.yml:", problem) for problem in refused.problems)


# ---- rendering ----


FILLING = Filling(
    commands={"mta": ("mta", "$HOME", "a b"), "mda": ("tini", "--", "mda server")},
    generations={"mta": 1, "mda": 7},
    secrets={"tls-key": "mail_tls-key_abc"},
    configs={stack.FENCE: "mail_fence_def"},
)


def test_what_rendering_adds(folder: Path) -> None:
    file, loaded = read()
    before = copy.deepcopy(file.document.value)
    rendered = stack.render(file, loaded, FILLING)
    assert file.document.value == before, "the file itself stays as it is"
    mta, mda = rendered["services"]["mta"], rendered["services"]["mda"]
    assert mta["image"] == file.services["mta"].image and "build" not in mta
    assert mta["entrypoint"] == mda["entrypoint"] == ["/bin/sh", "/swarmmail-fence"]
    assert mta["command"] == ["mta", "$$HOME", "a b"], "what the image runs is no variable of the file"
    assert mda["configs"] == [{"source": "swarmmail-fence", "target": "/swarmmail-fence", "mode": 0o555}]
    assert mda["environment"] == {
        "SWARMMAIL_CLUSTER": "lab",
        "SWARMMAIL_SERVICE": "mda",
        "SWARMMAIL_GENERATION": "7",
        "SWARMMAIL_NODE": "{{.Node.ID}}",
        "SWARMMAIL_VOLUMES": "/srv/mail",
    }
    assert mta["environment"]["MAIL_DOMAIN"] == "${MAIL_DOMAIN:?the domain}", "variables are Docker's to fill in"
    assert mda["deploy"]["placement"]["constraints"] == ["node.labels.swarmmail.mda == true"]
    assert mda["deploy"]["update_config"]["order"] == "stop-first"
    assert rendered["networks"] == {"overlay": {"external": True, "name": "local-mail-delivery"}}
    assert rendered["secrets"]["tls-key"] == {"external": True, "name": "mail_tls-key_abc"}
    assert rendered["configs"]["swarmmail-fence"] == {"external": True, "name": "mail_fence_def"}
    assert "x-note" not in rendered and set(rendered["volumes"]) == {"queue", "mail"}
    json.dumps(rendered)


def test_constraints_and_configs_of_the_file_stay(folder: Path) -> None:
    text = changed(
        "      labels: {swarmmail.role: mta}\n",
        "      labels: {swarmmail.role: mta}\n      placement: {constraints: [node.role == worker]}\n"
        "      update_config: {parallelism: 1}\n    configs: [own]\n",
    )
    text += "configs: {own: {file: ./own}}\n"
    file, loaded = read(text)
    rendered = stack.render(file, loaded, FILLING)
    mta = rendered["services"]["mta"]
    assert mta["deploy"]["placement"]["constraints"] == ["node.role == worker", "node.labels.swarmmail.mta == true"]
    assert mta["configs"][0] == "own" and rendered["configs"]["own"] == {"file": "./own"}
    assert mta["deploy"]["update_config"] == {"parallelism": 1, "order": "stop-first"}


FENCED = ("CMD", "/bin/sh", "/swarmmail-fence", "--health")


@pytest.mark.parametrize(
    ("written", "test"),
    [
        ("{test: [CMD, ask, a b]}", [*FENCED, "ask", "a b"]),
        (
            "{test: [CMD-SHELL, ask | me]}",
            [*FENCED, "/bin/sh", "-c", "ask | me"],
        ),
        ("{test: ask | me}", [*FENCED, "/bin/sh", "-c", "ask | me"]),
        ("{test: [NONE]}", ["NONE"]),
        ("{disable: true}", None),
        ("{interval: 5s}", None),
    ],
)
def test_a_fence_that_waits_is_well(folder: Path, written: str, test: list[str] | None) -> None:
    file, loaded = read(changed('    user: "5000:5000"\n', f'    user: "5000:5000"\n    healthcheck: {written}\n'))
    rendered = stack.render(file, loaded, FILLING)["services"]["mda"]
    assert rendered["healthcheck"].get("test") == test


def test_a_service_with_data_has_a_task_on_each_node_with_its_label(folder: Path) -> None:
    """One, and during a move a second, whose fence waits."""
    file, loaded = read(
        changed("      labels: {swarmmail.role: mta}\n", "      labels: {swarmmail.role: mta}\n      replicas: 1\n")
    )
    deploy = stack.render(file, loaded, FILLING)["services"]["mta"]["deploy"]
    assert deploy["mode"] == "global" and "replicas" not in deploy


EDGE = """\
  edge:
    image: example/edge:1
    networks: [overlay]
    deploy: {endpoint_mode: dnsrr, labels: {swarmmail.role: edge}}
  web:
    image: example/web:1
networks:
"""


@pytest.mark.parametrize(
    ("more", "edge", "web"), [("", "host1", ""), (", edge: host2", "host2", ""), (", web: host2", "host1", "host2")]
)
def test_a_service_without_data_may_be_bound_to_a_host_and_the_edge_is(
    folder: Path, more: str, edge: str, web: str
) -> None:
    file, loaded = read(changed("networks:\n  overlay", f"{EDGE}  overlay"), placement=f"{PLACEMENT[:-1]}{more}}}")
    filling = Filling(
        {**FILLING.commands, "edge": (), "web": ()}, FILLING.generations, FILLING.secrets, FILLING.configs
    )
    rendered = stack.render(file, loaded, filling)["services"]
    for name, host in (("edge", edge), ("web", web)):
        assert stack.first_host(file.services[name], loaded) == host
        deploy = rendered[name].get("deploy") or {}
        constraints = [f"node.labels.swarmmail.{name} == true"] if host else []
        assert (deploy.get("placement") or {}).get("constraints", []) == constraints
        assert deploy.get("mode") == ("global" if host else None)


@pytest.mark.parametrize("how", ["replicas: 2", "mode: global"])
def test_a_service_that_is_bound_to_a_host_runs_once(folder: Path, how: str) -> None:
    text = changed("networks:\n  overlay", f"{EDGE}  overlay").replace(
        "example/web:1\n", f"x:1\n    deploy: {{{how}}}\n"
    )
    read(text)
    with pytest.raises(
        InputError, match=r":\d+: services\.web\.deploy: a service that is bound to a host .* runs once"
    ):
        read(text, placement="{mta: host1, mda: host2, web: host1}")


def test_what_two_services_share_by_an_anchor_is_apart_when_rendered(folder: Path) -> None:
    text = changed(
        "      labels: {swarmmail.role: mta}\n",
        "      labels: {swarmmail.role: mta}\n      placement: &p {constraints: []}\n",
    ).replace("mda, other=1]\n", "mda, other=1]\n      placement: *p\n")
    file, loaded = read(text)
    services = stack.render(file, loaded, FILLING)["services"]
    for name in ("mta", "mda"):
        assert services[name]["deploy"]["placement"]["constraints"] == [f"node.labels.swarmmail.{name} == true"]


def test_the_hash_of_the_definition(folder: Path) -> None:
    file, loaded = read()
    rendered = stack.render(file, loaded, FILLING)
    canonical = copy.deepcopy(rendered)
    one = stack.label_specs(rendered, canonical)
    assert stack.SPEC_LABEL not in json.dumps(rendered), "what was given is not changed"
    canonical["services"]["mta"]["healthcheck"] = {"interval": "9s"}
    two = stack.label_specs(rendered, canonical)

    def label(document: dict[str, Any], name: str) -> str:
        return stack.pairs(document["services"][name]["deploy"]["labels"])[stack.SPEC_LABEL]

    assert label(one, "mta") != label(two, "mta") and label(one, "mda") == label(two, "mda")
    assert stack.pairs(two["services"]["mda"]["deploy"]["labels"])["other"] == "1"


# ---- comparing ----


def view(file: StackFile, loaded: inventory.Inventory, name: str = "mda") -> stack.View:
    rendered = stack.render(file, loaded, FILLING)
    # what `docker stack config` makes of it, as far as the two differ here
    canonical = copy.deepcopy(rendered)
    for raw in canonical["services"].values():
        raw["networks"] = dict.fromkeys(raw["networks"])
        raw["secrets"] = [{"source": name} for name in raw.get("secrets", [])]
    return stack.wanted_view(file, stack.label_specs(rendered, canonical), canonical, name)


def test_the_same_service_as_file_and_as_the_api_shows_it(folder: Path) -> None:
    file, loaded = read()
    wanted = view(file, loaded)
    seen = stack.seen_view(
        {
            "Spec": {
                "Labels": {"swarmmail.role": "mda", stack.SPEC_LABEL: wanted["definition"][0]},
                "TaskTemplate": {
                    "ContainerSpec": {
                        "Image": "example/mda:1.2",
                        "Command": ["/bin/sh", "/swarmmail-fence"],
                        "Args": ["tini", "--", "mda server"],
                        "Env": [
                            "SWARMMAIL_VOLUMES=/srv/mail",
                            "SWARMMAIL_CLUSTER=lab",
                            "SWARMMAIL_NODE={{.Node.ID}}",
                            "SWARMMAIL_GENERATION=7",
                            "SWARMMAIL_SERVICE=mda",
                        ],
                        "User": "5000:5000",
                        "Mounts": [
                            {"Type": "tmpfs", "Target": "/tmp"},
                            {"Type": "volume", "Source": "the-mail", "Target": "/srv/mail"},
                        ],
                        "Configs": [{"ConfigName": "mail_fence_def"}],
                    },
                    "Placement": {"Constraints": ["node.labels.swarmmail.mda == true"]},
                    "Networks": [{"Target": "id1"}],
                },
                "Mode": {"Global": {}},
                "EndpointSpec": {"Ports": [{"Protocol": "tcp", "TargetPort": 143, "PublishedPort": 143}]},
            }
        },
        {"id1": "local-mail-delivery"},
    )
    assert seen == wanted and stack.differences(seen, wanted) == []


values = st.lists(st.text("abc=/", min_size=1, max_size=4), max_size=4).map(lambda found: tuple(sorted(set(found))))
ASPECTS = (
    "image",
    "command",
    "environment",
    "volumes",
    "networks",
    "ports",
    "secrets",
    "configs",
    "placement",
    "rights",
)
views = st.fixed_dictionaries(
    {**dict.fromkeys(ASPECTS, values), "replicas": st.sampled_from([("0",), ("1",)]), "definition": values}
)


@given(views)
def test_nothing_differs_from_itself(one: dict[str, tuple[str, ...]]) -> None:
    assert stack.differences(one, dict(one)) == []


@given(views, st.sampled_from((*ASPECTS, "replicas", "definition")), values, values)
def test_any_single_change_shows_whole(
    one: dict[str, tuple[str, ...]], aspect: str, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """Every value that comes or goes stands in a line of its aspect."""
    shown = stack.differences({**one, aspect: before}, {**one, aspect: after})
    assert bool(shown) == (before != after)
    assert all(text.startswith(f"{aspect}: ") for text in shown)
    if aspect != "definition":
        for value in {*before} ^ {*after}:
            assert any(value in text for text in shown)


def test_the_definition_is_named_only_where_nothing_else_shows() -> None:
    one = {"image": ("a",), "definition": ("1",)}
    assert stack.differences(one, {"image": ("b",), "definition": ("2",)}) == ["image: a -> b"]
    assert stack.differences(one, {"image": ("a",), "definition": ("2",)})[0].startswith("definition: other settings")


@pytest.mark.parametrize(
    ("by_hand", "words"),
    [
        ({"cap_add": ["SYS_ADMIN"]}, "rights: + CAP_SYS_ADMIN"),
        ({"cap_drop": ["CAP_CHOWN"]}, "rights: + without CAP_CHOWN"),
        ({"user": "0"}, "rights: user 5000:5000 -> user 0"),
        ({"read_only": True}, "rights: + read only"),
    ],
)
def test_rights_are_compared(folder: Path, by_hand: dict[str, Any], words: str) -> None:
    file, loaded = read()
    wanted = view(file, loaded)
    document = YAML(typ="safe").load(GOOD)
    document["services"]["mda"].update(by_hand)
    other, _ = read(json.dumps(document))
    assert words in stack.differences(wanted, view(other, loaded))
