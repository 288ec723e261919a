"""Benchmark questions: both layouts, and what a wrong file is told."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from specflow.data.prompt_sets import Program, Question, read_prompt_set
from specflow.errors import UserError
from tests import ROOT


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
        ('{"question_id": 0, "turns": ["b"]}', "line 2 has the id '0' of line 1"),
        ("[1]", "line 2 is a list, expected an object"),
        ('{"prompt": "a", "text": "b"}', "line 2 has the keys prompt, text: expected question_id, category, turns"),
        ('{"question": " ", "answer": "1"}', "line 2: 'question' holds an empty"),
        ('{"question_id": 1, "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM"]}', "line 2 is a placeholder"),
        ("nonsense", "line 2 cannot be read (Expecting value)"),
        ('{"question_id": 1, "turns": ["\\ud83d"]}', "line 2 holds half a character"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 0, "turns": ["a"]}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompt_set("set", path)


def test_empty_and_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no question"):
        read_prompt_set("set", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="in UTF-16, expected UTF-8"):
        read_prompt_set("set", path)


GSM8K = [
    {"question": "How many are 3 and 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "And 5?", "answer": "#### 12"},
]
ALPACA = [
    {"instruction": "Name a fruit.", "input": "", "output": "Apple"},
    {"instruction": "Translate.", "input": "Haus", "output": "house"},
]
SPEED = [{"question_id": "q-1", "category": "coding", "turns": ["first", "second"], "source": "x"}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            GSM8K,
            [
                Question("0", "math", ["How many are 3 and 4?"], ["3 + 4 = <<3+4=7>>7\n#### 7"]),
                Question("1", "math", ["And 5?"], ["#### 12"]),
            ],
        ),
        (
            ALPACA,
            [
                Question("0", "name", ["Name a fruit."], ["Apple"]),
                Question("1", "name", ["Translate.\n\nHaus"], ["house"]),
            ],
        ),
        (SPEED, [Question("q-1", "coding", ["first", "second"])]),
    ],
)
def test_layouts_of_the_known_sets(tmp_path: Path, kind: str, rows: list[dict[str, Any]], expected: Any) -> None:
    path = tmp_path / f"file.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if kind == "jsonl.gz" else lines.encode())
    assert read_prompt_set("name", path) == expected


def test_a_context_belongs_to_its_question(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Who?", "context": "Bo came.", "answer": "Bo"}))
    assert read_prompt_set("squad", path)[0].turns == ["Who?\n\nBo came."]


def test_human_eval_keeps_what_judges_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(c): ...", "entry_point": "f"}
    path.write_text(json.dumps(record))
    assert read_prompt_set("he", path)[0].program == Program("def f():\n", "def check(c): ...", "f")


def test_a_folder_must_have_one_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    one = tmp_path / "data" / "test.jsonl"
    one.write_text(json.dumps(GSM8K[0]))
    assert len(read_prompt_set("g", tmp_path)) == 1
    (tmp_path / "data" / "train.jsonl").write_text(one.read_text())
    with pytest.raises(UserError, match=r"has 2 files of questions \(data/test.jsonl, data/train.jsonl\): name one"):
        read_prompt_set("g", tmp_path)


def test_damaged_json_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('[{"question_id": 1,\n "turns": ["a"]},\n nonsense]')
    with pytest.raises(UserError, match=r"q\.json byte 39 cannot be read"):
        read_prompt_set("set", tmp_path / "q.json")
    (tmp_path / "q.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"q.parquet row 1 cannot be read \(.*\): expected jsonl, json"):
        read_prompt_set("set", tmp_path / "q.parquet")


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "humaneval", "mt_bench"])
def test_files_that_peers_benchmark_with(name: str) -> None:
    path = ROOT.parent / "shared" / "data" / "bench" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    questions = read_prompt_set(name, path)
    assert len(questions) == 80 and {len(question.turns) for question in questions} == {2 if name == "mt_bench" else 1}
    if name == "gsm8k":
        assert all("####" in question.reference[0] for question in questions if question.reference)
