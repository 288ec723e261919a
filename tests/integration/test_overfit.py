"""An overfit draft through every stage from sample to bench: acceptance near K + 1, or something between is misaligned.

One prompt set for everything, on purpose: training, evaluation and benchmark see the same questions, and the target is
greedy, so a draft that has learned its rows by heart must be accepted almost always. An off-by-one in capture, packing,
training-time test, export or drafting shows here as an acceptance length near 1.
"""

import json
from types import SimpleNamespace

import pytest

from specflow.bench import stage as bench
from specflow.config import parse_params
from specflow.data import vocab
from specflow.export import stage as export
from specflow.extract import stage as extract
from specflow.sample import stage as sampling
from specflow.training import stage as training
from tests.captures import tiny_project, write_split
from tests.toys import make_tiny_target

K = 3
QUESTIONS = ["the cat sees one bird", "every river moves slowly", "some old window", "a red letter and a number", "dog"]
SECTIONS = {
    "data": {"train_conversations": 5, "eval_conversations": 5, "max_prompt_tokens": 100},
    "sample": {"max_new_tokens": 24, "batch_size": 4},
    "vocab": {"draft_vocab_size": 200},
    "extract": {"dtype": "float32", "max_length_tokens": 200, "batch_tokens": 400},
    "train": {"ttt_steps": K, "epochs": 600, "batch_tokens": 400, "lr": 5e-3, "warmup_ratio": 0.1, "evals": 2},
    "bench": {
        "prompt_sets": ["heldout"],
        "num_prompts": 5,
        "max_new_tokens": 24,
        "num_speculative_tokens": K,
        "stock_generate": False,
        "prompt_lookup": False,
    },
}


def test_an_overfit_draft_is_accepted_almost_always(tmp_path):
    target = make_tiny_target(tmp_path / "target")
    project = tiny_project(tmp_path / "project", target)
    project.settings["families"]["tiny"] |= {
        section: project.settings["families"]["tiny"].get(section, {}) | values for section, values in SECTIONS.items()
    }
    project.params = parse_params(project.settings)
    rows = [
        {"id": f"q{i}", "source": "s", "category": "c", "messages": [{"role": "user", "content": question}]}
        for i, question in enumerate(QUESTIONS)
    ]
    prefixed = [row | {"id": f"e{row['id']}"} for row in rows]
    write_split(project.paths.prompts, rows, prefixed)
    for stage in (sampling, vocab, extract, SimpleNamespace(run=training.run_offline), export):
        project.run(stage)
    trained = json.loads(project.paths.plot("eval.json").read_text())[-1]
    assert trained["expected_acceptance_length"] > 1 + 0.95 * K
    project.run(bench)
    summary = json.loads((project.paths.bench / "summary.json").read_text())
    result = summary["sets"]["heldout"]
    assert result["lossless"] is True
    assert result["acceptance_length"] == pytest.approx(1 + sum(result["survival"]))
    assert result["acceptance_length"] > 1 + 0.9 * K
