import pytest

from swarmmail.lab import image
from swarmmail.lab.containers import memory_in_use


def test_recipe_is_whole() -> None:
    files = image.recipe()
    copied = [
        name
        for line in files["Dockerfile"].decode().splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    ]
    assert copied
    assert set(copied) == files.keys() - {"Dockerfile"}


def test_another_recipe_is_another_image() -> None:
    one = image.tag({"a": b"1", "b": b"2"}, "host")
    assert one == image.tag({"b": b"2", "a": b"1"}, "host")
    others = [{"a": b"1"}, {"a": b"12"}, {"a": b"1", "c": b"2"}, {"a": b"", "1b": b"2"}]
    assert one not in [image.tag(other, "host") for other in others]
    assert one != image.tag({"a": b"1", "b": b"2"}, "bare")
    assert not one.endswith(":latest")


def test_a_base_that_was_pruned_is_made_again_though_the_hosts_image_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of the stack are made of it."""
    made: list[str] = []
    monkeypatch.setattr(image, "_has", lambda client, name: name != image.BASE)
    monkeypatch.setattr(image, "_get_base", lambda client: made.append(image.BASE))
    monkeypatch.setattr(image, "_build", lambda *words: made.append("host"))
    image.ensure(None, "host")
    assert made == [image.BASE]


def test_memory_is_counted_without_cache() -> None:
    assert memory_in_use("100\nanon 60\ninactive_file 30\n") == 70
    assert memory_in_use("100\ncache 50\ninactive_file 1\ntotal_inactive_file 40\n") == 60
