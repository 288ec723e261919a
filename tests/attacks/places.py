"""Places that params.yaml names, or where the project lies, that do not exist, cannot be used, or lead in a circle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.attacks.bad_input import BadInput

Edit = Callable[[dict[str, Any], Path], object]


def _params(edit: Edit) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "params.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        edit(raw, folder)
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")

    return damage


def _cache(place: str) -> Edit:
    return lambda raw, folder: raw.update(cache_dir=place.format(folder=folder))


def _target(source: str, **options: Any) -> Edit:
    return lambda raw, folder: raw["families"]["tiny"].update(target={"source": source, **options})


def _data(source: str, make: Callable[[Path], object] = lambda folder: None) -> Edit:
    def edit(raw: dict[str, Any], folder: Path) -> None:
        make(folder)
        raw["families"]["tiny"]["data"]["sources"] = [{"source": source}]

    return edit


def _loop(folder: Path) -> None:
    (folder / "loop.json").symlink_to("loop.json")


def _circle(folder: Path) -> None:
    (folder / "circle" / "deep").mkdir(parents=True)
    (folder / "circle" / "deep" / "up").symlink_to(folder / "circle")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def _section(section: str, **values: Any) -> Edit:
    return lambda raw, folder: raw["families"]["tiny"][section].update(values)


PLACES: list[tuple[str, Edit, tuple[str, ...]]] = [
    ("a cache that is a file", _cache("{folder}/params.yaml"), ("cache folder", "cache_dir")),
    ("a cache below a file", _cache("{folder}/params.yaml/x"), ("cache folder", "cache_dir")),
    ("a cache that cannot be made", _cache("/proc/none/x"), ("cache folder", "cache_dir")),
    ("a cache in nobody's home", _cache("~nosuchuser/x"), ("~nosuchuser/x", "no home folder")),
    ("a cache whose name is too long", _cache("{folder}/" + "x" * 300), ("cache_dir", "over 255 bytes")),
    ("a target in nobody's home", _target("file:~nosuchuser/x"), ("~nosuchuser/x", "no home folder")),
    ("a target that is not there", _target("file:nowhere"), ("file:nowhere does not exist",)),
    ("a target whose name is too long", _target("file:" + "x" * 300), ("target.source", "over 255 bytes")),
    ("a hub name that leads up", _target("hf:../.."), ("hf:../..", "org/name@revision")),
    ("a hub name that leads up, with a revision", _target("hf:../..@main"), ("org/name@revision",)),
    ("a hub revision that leads up", _target("hf:org/name@../../x"), ("org/name@revision",)),
    ("a template that is not there", _target("file:target", chat_template="nowhere"), ("nowhere does not exist",)),
    ("data that is a link to itself", _data("file:loop.json", _loop), ("file:loop.json",)),
    ("data in a folder that leads in a circle", _data("file:circle", _circle), ("circle/deep/up", "link")),
    ("data that is a pipe", _data("file:pipe", _pipe), ("pipe is no regular file",)),
    ("data below a file", _data("file:params.yaml/x"), ("does not exist",)),
    ("a null byte in a name", _data("file:a\0b"), ("file:a",)),
    ("an earlier draft that is not there", _section("train", init_from="nowhere"), ("nowhere does not exist",)),
    ("an assistant that is not there", _section("bench", assistant="nowhere"), ("nowhere does not exist",)),
]

CASES = [BadInput("place", name, _params(edit), ("fetch", "tiny"), words) for name, edit, words in PLACES]
