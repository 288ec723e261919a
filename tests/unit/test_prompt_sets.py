"""Benchmark questions: both layouts, and what a wrong file is told."""

import gzip
import json
from pathlib import Path

import pytest

from specflow.data.prompt_sets import Question, read_prompt_set
from specflow.errors import UserError


def test_mt_bench_layout(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["", "r"]}\n'
        '\n{"question_id": 82, "category": "", "turns": ["c"]}\n'
    )
    assert read_prompt_set("mt", path) == [
        Question("81", "writing", ["a", "b"], ["", "r"]),
        Question("82", "mt", ["c"]),
    ]


def test_human_eval_layout_is_wrapped(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n    '''doc'''\n", "canonical_solution": "    return 1\n"}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    (question,) = read_prompt_set("he", path)
    assert question.category == "coding"
    assert question.turns == ["Complete the following Python function.\n\n```python\ndef f():\n    '''doc'''\n```"]
    assert question.reference == ["    return 1\n"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1}', "line 2 lacks 'turns'"),
        ('{"turns": ["a"]}', "line 2 lacks 'question_id'"),
        ('{"question_id": 1, "turns": []}', "line 2: 'turns' is empty"),
        ('{"question_id": 1, "turns": [" "]}', "line 2: 'turns' holds an empty"),
        ('{"question_id": 1, "turns": "a"}', "line 2: 'turns' is 'a', expected a list"),
        ('{"task_id": 1, "prompt": null}', "line 2: 'prompt' holds an empty or non-text"),
        ('{"question_id": 0, "turns": ["b"]}', "line 2 has the id '0' of an earlier line"),
        ("[1]", "line 2 is a list, expected an object"),
        ("nonsense", "line 2 is not JSON"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 0, "turns": ["a"]}\n' + line + "\n")
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_prompt_set("set", path)


def test_empty_and_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no question"):
        read_prompt_set("set", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompt_set("set", path)
