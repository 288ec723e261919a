"""Damaged data: each kind of file by its reader, and some of them by the command that a user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from specflow.config import DataSource
from specflow.data.conversations import SourceReport, read_conversations
from specflow.data.prompt_sets import read_prompt_set
from specflow.errors import UserError
from tests.attacks import data
from tests.attacks.bad_input import copy_project, fault, run_specflow, template_project
from tests.toys import make_tiny_tokenizer

THROUGH_THE_COMMAND = {
    "a gzip damaged in the middle",
    "a line nested 100,000 deep",
    "special tokens in messages",
    "a folder of several configurations",
    "a few lone surrogates",
    "a lone surrogate in a question",
}


ONLY_WITH_A_TARGET = {"special tokens in messages"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = template_project(tmp_path_factory.mktemp("data") / "template")
    assert run_specflow(folder, "fetch", "tiny").code == 0
    return folder


@pytest.mark.parametrize(
    "bad", [case for case in data.CASES if case.name in THROUGH_THE_COMMAND], ids=lambda bad: bad.name
)
def test_the_command_ends_in_one_line(bad: data.BadInput, template: Path, tmp_path: Path) -> None:
    assert fault(bad, copy_project(template, tmp_path / "project")) == ""


READERS = [case for case in data.DATA if case[0] not in ONLY_WITH_A_TARGET]


@pytest.mark.parametrize(("name", "file", "content", "options", "words"), READERS, ids=[case[0] for case in READERS])
def test_a_reader_names_what_is_wrong(
    tmp_path: Path, name: str, file: str, content: data.Content, options: dict[str, str], words: tuple[str, ...]
) -> None:
    path = data.put(tmp_path / file, content)
    report = SourceReport(name)
    source = DataSource.model_validate({"source": f"file:{path}", **options})
    reading = read_conversations(source, path, report, make_tiny_tokenizer())
    if not words:
        assert len(list(reading)) == len(data.RECORDS)
        return
    with pytest.raises(UserError) as error:
        list(reading)
    _check(str(error.value), words)


@pytest.mark.parametrize(
    ("name", "file", "content", "words"), data.PROMPT_SETS, ids=[case[0] for case in data.PROMPT_SETS]
)
def test_a_prompt_set_names_what_is_wrong(
    tmp_path: Path, name: str, file: str, content: data.Content, words: tuple[str, ...]
) -> None:
    path = data.put(tmp_path / file, content)
    if not words:
        assert len(read_prompt_set("questions", path)) == len(data.QUESTIONS)
        return
    with pytest.raises(UserError) as error:
        read_prompt_set("questions", path)
    _check(str(error.value), words)


def _check(message: str, words: tuple[str, ...]) -> None:
    assert "\n" not in message
    assert [word for word in words if word.lower() not in message.lower()] == [], message
