"""Reading, comparing and executing runbooks, without hosts; and the form of the pages that there are."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tests" / "lab"))
import runbook  # noqa: E402
from runbook import Changed, Command, RunbookError, Written  # noqa: E402

FOLDER = REPO / "docs" / "runbooks"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


def parse(text: str) -> runbook.Page:
    return runbook.parse(dedent(text))


# ---- the pages ----


def test_the_pages_are_found() -> None:
    assert {"first-install.md", "add-a-host.md", "mail-stuck-in-the-queue.md"} <= {path.name for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_has_its_five_sections_and_commands(path: Path) -> None:
    page = runbook.read(path)
    assert page.sections == runbook.SECTIONS
    assert any(isinstance(step, Command) for step in page.steps)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_is_in_the_list(path: Path) -> None:
    assert f"({path.name})" in (FOLDER / "README.md").read_text()


# ---- reading ----


def test_commands_with_what_they_show() -> None:
    page = parse("""\
        # Title
        ## Check
        ```console
        $ fab plan; echo $?
        plan: nothing to do
        0
        host1, host2$ uptime
        $ true
        ```
        """)
    assert page.sections == ("Check",)
    assert page.steps == (
        Command(4, (runbook.OPERATOR,), "fab plan; echo $?", ("plan: nothing to do", "0")),
        Command(7, ("host1", "host2"), "uptime", ()),
        Command(8, (runbook.OPERATOR,), "true", ()),
    )


def test_file_and_change() -> None:
    page = parse("""\
        ```yaml
        # inventories/x.yml
        a: 1
        ```
        ```diff
        --- inventories/x.yml
        +++ inventories/x.yml
         a: 1
        -b: 2
        +b: 3
        ```
        """)
    assert page.steps == (
        Written(2, "inventories/x.yml", "# inventories/x.yml\na: 1\n"),
        Changed(6, "inventories/x.yml", "a: 1\nb: 2\n", "a: 1\nb: 3\n"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```sh\nls\n```\n", "page:1: a block of kind 'sh'"),
        ("```\nls\n```\n", "page:1: a block of kind ''"),
        ("```console\nls\n```\n", "page:2: a console block begins with a prompt"),
        ("```console\n```\n", "page:2: a console block begins with a prompt"),
        ("text\n```console\n$ ls\n", "page:2: this block does not end"),
        ("  ```console\n$ ls\n  ```\n", "page:1: a fence begins its line"),
        ("```yaml\na: 1\n```\n", "page:2: a yaml block begins with the path"),
        ("```diff\n--- a/x\n+++ b/x\n+b\n```\n", "page:2: a diff block begins with the path"),
        ("```diff\n--- a/x\n+++ a/x\nb\n```\n", "page:2: lines of a diff"),
    ],
)
def test_what_is_not_executed_is_no_page(text: str, words: str) -> None:
    with pytest.raises(RunbookError, match=words.replace("'", ".")):
        runbook.parse(text)


# ---- comparing ----


@pytest.mark.parametrize(
    ("shown", "output", "good"),
    [
        ("", "", True),
        ("", "something\n", False),
        ("done", "done\n\n", True),
        ("done", "not done\n", False),
        ("a  b", "a      b\n", True),
        ("took ... s", "took 12.5 s\n", True),
        ("took ... s", "took 12.5\n", False),
        ("a ... b", "a 1\n2 b\n", False),
        ("a ... b", "a    b\n", True),
        ("a ... b", "ab\n", False),
        ("a ...", "a\n", True),
        ("a ...", "a 1 2\n", True),
        ("a ...", "ab\n", False),
        ("a... b", "a1 2 b\n", True),
        ("a:...", "a:1\n", True),
        ("... b ... c", "a b c\n", True),
        ("...", "", True),
        ("...", "1\n2\n", True),
        ("...\nlast", "last\n", True),
        ("...\nlast", "1\n2\nlast\n", True),
        ("...\nlast", "1\nlast\n2\n", False),
        ("...\nlast", "1\nthe last\n", False),
        ("first\n...\nlast", "first\nlast\n", True),
        ("a.c", "abc\n", False),
    ],
)
def test_fixed_parts_are_compared(shown: str, output: str, good: bool) -> None:
    assert runbook.matches(shown.splitlines(), output) is good


# ---- executing ----

BOOK = """\
```yaml
# hosts/x.yml
address: 192.0.2.11
```
```console
$ ping 192.0.2.11
192.0.2.11 answers after ... ms
host1, host2$ uptime
up ...
```
```diff
--- hosts/x.yml
+++ hosts/x.yml
 address: 192.0.2.11
+port: 2222
```
"""
REAL = {"192.0.2.11": "198.18.0.11"}


def answer(host: str, words: str) -> tuple[int, str]:
    return 0, {"ping 198.18.0.11": "198.18.0.11 answers after 3 ms\n", "uptime": f"up {host}\n"}[words]


def test_steps_are_done_in_order_with_real_addresses(tmp_path: Path) -> None:
    (tmp_path / "hosts").mkdir()
    done = []

    def shell(host: str, words: str) -> tuple[int, str]:
        done.append((host, words))
        return answer(host, words)

    runbook.execute(runbook.parse(BOOK), shell, tmp_path, REAL)
    assert done == [(runbook.OPERATOR, "ping 198.18.0.11"), ("host1", "uptime"), ("host2", "uptime")]
    assert (tmp_path / "hosts/x.yml").read_text() == "# hosts/x.yml\naddress: 198.18.0.11\nport: 2222\n"


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        (lambda host, words: (0, "other\n"), r"(?s)page:6: .*answers after.*exit status 0\nother"),
        (lambda host, words: (1, answer(host, words)[1]), "(?s)page:6: .*exit status 1"),
        (lambda host, words: (0, "down\n") if host == "host2" else answer(host, words), r"page:8: host2\$ uptime"),
    ],
)
def test_what_differs_is_said_with_its_line(shell: runbook.Shell, words: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").mkdir()
    with pytest.raises(RunbookError, match=words):
        runbook.execute(runbook.parse(BOOK), shell, tmp_path, REAL)


@pytest.mark.parametrize(
    "before", ["other: 1\n", "address: 192.0.2.11\naddress: 192.0.2.11\n", "x address: 192.0.2.11\n"]
)
def test_a_change_fits_once_or_not_at_all(before: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/y.yml").write_text(before)
    page = parse("""\
        ```diff
        --- x/y.yml
        +++ x/y.yml
        -address: 192.0.2.11
        +address: 192.0.2.12
        ```
        """)
    with pytest.raises(RunbookError, match="not once"):
        runbook.execute(page, answer, tmp_path, {})
    assert (tmp_path / "x/y.yml").read_text() == before
