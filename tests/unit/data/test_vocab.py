"""Draft vocabulary: closed forms, and the stage on hand-written samples."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specflow.data import vocab
from specflow.data.vocab import build_draft_vocab, count_supervised, coverage
from specflow.errors import UserError
from tests.captures import tiny_project, write_split
from tests.toys import make_tiny_target


def chosen_ids(d2t):
    return (torch.arange(len(d2t)) + d2t).tolist()


def test_takes_specials_then_the_most_frequent_with_ties_to_the_lower_id():
    counts = np.array([0, 5, 2, 2, 9, 2, 0, 1])
    d2t, t2d = build_draft_vocab(counts, always=[6], size=4)
    assert chosen_ids(d2t) == [1, 2, 4, 6]  # 6 is special, then 4 (9), 1 (5), and 2 of the three with 2
    assert d2t.dtype == torch.int64 and d2t.tolist() == [1, 1, 2, 3]
    assert t2d.dtype == torch.bool and t2d.nonzero()[:, 0].tolist() == [1, 2, 4, 6]


def test_fills_up_with_the_lowest_unused_ids():
    d2t, _ = build_draft_vocab(np.array([0, 0, 0, 0, 3, 0]), always=[5], size=4)
    assert chosen_ids(d2t) == [0, 1, 4, 5]


def test_whole_vocabulary_is_the_identity():
    d2t, t2d = build_draft_vocab(np.arange(7), always=[0, 3], size=7)
    assert d2t.tolist() == [0] * 7 and t2d.all()


def test_special_ids_beyond_the_models_rows_are_left_out():
    d2t, _ = build_draft_vocab(np.array([1, 0, 0]), always=[2, 50], size=2)
    assert chosen_ids(d2t) == [0, 2]


def test_sizes_that_cannot_be_are_the_users_to_mend():
    with pytest.raises(UserError, match="draft_vocab_size is 9, more than the target's 8"):
        build_draft_vocab(np.zeros(8, dtype=np.int64), [], 9)
    with pytest.raises(UserError, match="less than the 3 special tokens"):
        build_draft_vocab(np.zeros(8, dtype=np.int64), [1, 2, 3], 2)


def test_counts_supervised_tokens_only_by_category():
    rows = [
        {"category": "a", "token_ids": [1, 1, 2, 3, 4], "spans": [[2, 4]]},
        {"category": "b", "token_ids": [1, 2, 2, 2], "spans": [[0, 1], [3, 4]]},
    ]
    counts = count_supervised(rows, 6)
    assert counts["a"].tolist() == [0, 0, 1, 1, 0, 0]
    assert counts["b"].tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match="token 4"):
        count_supervised([{"category": "a", "token_ids": [4], "spans": [[0, 1]]}], 4)


def test_coverage_is_the_share_of_counted_tokens():
    t2d = np.array([True, False, True])
    assert coverage(np.array([3, 1, 4]), t2d) == 7 / 8
    assert coverage(np.zeros(3, dtype=np.int64), t2d) == 0.0


def test_stage_counts_the_training_split_alone(tmp_path):
    project = tiny_project(tmp_path, make_tiny_target(tmp_path / "target"), vocab={"draft_vocab_size": 6})
    train = {"category": "x", "token_ids": [7, 8, 8, 9], "spans": [[1, 4]]}
    evaluation = {"category": "y", "token_ids": [8, 250, 250, 250], "spans": [[0, 4]]}
    paths = project.paths
    write_split(paths.samples, [train], [evaluation])
    metrics = project.run(vocab)
    ids = chosen_ids(load_file(paths.vocab / "vocab.safetensors")["d2t"])
    assert {8, 9, *project.facts.eos_token_ids} <= set(ids) and 250 not in ids and ids == sorted(ids)
    report = json.loads((paths.vocab / "coverage.json").read_text())
    assert report["train"] == 1.0 and report["eval"] == 0.25
    assert report["by_category"] == {"x": 1.0, "y": 0.25}
    assert metrics["coverage_eval"] == 0.25
    assert {"category": "eval", "coverage": 0.25} in json.loads(paths.plot("coverage.json").read_text())


def test_a_large_vocabulary_takes_well_under_a_second():
    counts = np.random.default_rng(0).poisson(0.7, 152_000)
    started = time.perf_counter()
    build_draft_vocab(counts, [0, 151_999], 32_000)
    assert time.perf_counter() - started < 0.5
