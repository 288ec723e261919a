"""Definitions of the benchmark through servers against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from specflow.bench.served import gap, metrics
from specflow.bench.served.client import Reply, Request, _read_openai, _read_sglang
from specflow.bench.served.measuring import SIDES, _record, check_pair, passes, plain_flags, refuse_synthetic
from specflow.bench.served.metrics import Block, ServedRecord
from specflow.bench.served.results import counters_agree, verdict
from specflow.config import Serve
from specflow.errors import UserError
from specflow.results.schema import Divergence
from specflow.results.served import Check, Gap, Level, Server
from specflow.serving.engines import Install, Launch, launch


def served(
    accepted: list[int] | None = None,
    *,
    engine: str = "draft",
    question: str = "q0",
    repeat: int = 0,
    tokens: list[int] | None = None,
    chunks: list[float] | None = None,
    error: str | None = None,
    concurrency: int = 1,
) -> ServedRecord:
    ids = tokens or list(range(1 + sum(a + 1 for a in accepted or [])))
    return ServedRecord(
        set="s",
        question_id=question,
        category="c",
        turn=0,
        repeat=repeat,
        engine=engine,
        concurrency=concurrency,
        num_prompt_tokens=5,
        server_prompt_tokens=5,
        num_tokens=len(ids),
        token_ids=ids,
        text=None,
        steps=None if accepted is None else [[3, a] for a in accepted],
        started_s=0.0,
        chunk_s=chunks or [0.1, 1.1],
        finish_reason="length",
        error=error,
    )


def plain(tokens: list[int], **kwargs: Any) -> ServedRecord:
    record = served(engine="baseline", tokens=tokens, **kwargs)
    return dataclasses.replace(record, steps=[[0, 0]] * (len(tokens) - 1))


def test_percentiles_interpolate_between_order_statistics() -> None:
    """Type 7: rank h = (n - 1) q + 1; of 1..5 the 90th lies 0.6 of the way from the 4th to the 5th."""
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert metrics.percentile(values, 50) == 3.0
    assert metrics.percentile(values, 90) == pytest.approx(4.6)
    assert metrics.percentile(values, 99) == pytest.approx(4.96)
    assert metrics.percentile([], 50) is None


def test_latencies_of_one_block() -> None:
    """5 tokens in 3 messages at 0.1, 0.5 and 0.9 s; one request of one token; one that failed."""
    block = Block(
        "draft",
        2,
        0,
        wall_s=2.0,
        records=[
            served([1, 1], chunks=[0.1, 0.5, 0.9]),
            served([], question="q1", chunks=[0.3]),
            served([1, 1], question="q2", error="status 500", chunks=[0.1]),
        ],
        counters=None,
    )
    side = metrics.side([block], num_gpus=2)
    assert (side.num_requests, side.num_errors, side.num_tokens) == (3, 1, 6)
    assert side.tok_s == 3.0 and side.tok_s_per_gpu == 1.5
    assert side.ttft_ms.p50 == pytest.approx(200.0)
    assert side.e2e_ms.p50 == pytest.approx(600.0)
    assert side.tpot_ms.to_json() == pytest.approx({"p50": 200.0, "p90": 200.0, "p99": 200.0})  # 0.8 s / 4 tokens
    assert side.itl_ms.p50 == pytest.approx(400.0)  # two gaps of 0.4 s
    assert side.user_tok_s == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("speedups", "stops"),
    [
        ({1: 1.4, 2: 1.2, 4: 0.8}, 2**1.5),  # halfway between 2 and 4 in doublings
        ({1: 1.5, 8: 0.5}, 2**1.5),
        ({1: 1.3, 2: 1.0, 4: 1.2}, 2.0),
        ({1: 1.3, 16: 1.01}, None),
        ({2: 0.9, 4: 1.2}, 2.0),
    ],
)
def test_break_even_concurrency(speedups: dict[int, float], stops: float | None) -> None:
    found = metrics.break_even(speedups)
    assert found == (None if stops is None else pytest.approx(stops))


METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 6.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7632e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 12.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 9.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 3.0
# TYPE vllm:spec_decode_num_accepted_tokens_created gauge
vllm:spec_decode_num_accepted_tokens_created{engine="0",model_name="m"} 1.7632e+09
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 1.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 512.0
"""


def test_counters_are_summed_over_engines_and_differenced() -> None:
    after = metrics.parse_counters(METRICS)
    assert after == {"num_steps": 16, "num_drafted": 32, "num_accepted": 12, "accepted_at_0": 8, "accepted_at_1": 4}
    before = {"num_steps": 8.0, "num_drafted": 16.0, "num_accepted": 8.0, "accepted_at_0": 6.0, "accepted_at_1": 2.0}
    grown = metrics.differenced(before, after)
    assert grown is not None
    found = metrics.of_counters(grown, 2)
    assert found.length == 1.5 == 1 + sum(found.survival)
    assert found.survival == [0.25, 0.25] and found.conditional == [0.25, 1.0]
    with pytest.raises(UserError, match="fell during a block"):
        metrics.differenced(after, before)
    with pytest.raises(UserError, match="another number of tokens"):
        metrics.of_counters(grown, 1)
    assert metrics.parse_counters("# TYPE up gauge\nup 1\n") is None


def test_acceptance_from_requests_equals_the_counters() -> None:
    records = [served([1, 0, 2]), served([3], question="q1")]
    counters = {"num_steps": 4.0, "num_drafted": 12.0, "num_accepted": 6.0}
    block = Block("draft", 1, 0, 1.0, records, counters)
    found = metrics.acceptance([block], 3)
    assert found is not None and found.to_json()["from"] == found.source == "requests"
    assert found.length == 2.5 and found.survival == [0.75, 0.5, 0.25]
    assert counters_agree([block], 3) is True
    assert counters_agree([dataclasses.replace(block, counters={**counters, "num_accepted": 7.0})], 3) is False
    by_position = {**counters, "accepted_at_0": 3.0, "accepted_at_1": 2.0, "accepted_at_2": 1.0}
    untold = dataclasses.replace(block, records=[served(tokens=[1, 2])], counters=by_position)
    other = metrics.acceptance([untold], 3)
    assert other is not None and (other.source, other.length) == ("counters", 2.5)
    assert metrics.acceptance([dataclasses.replace(untold, counters=None)], 3) is None


def test_vllm_per_request_metrics() -> None:
    """Shape of vLLM 0.32's SpeculativeDecodingMetrics (entrypoints/generate/base/protocol.py)."""
    told = {
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 1 / 3,
        "acceptance_histogram": [1, 0, 1, 0],
        "num_spec_steps": 2,
        "num_accepted_draft_tokens": 2,
        "num_draft_tokens": 6,
        "num_spec_tokens": 3,
    }
    detailed = {**told, "per_step_accepted": [2, 0], "per_step_drafted": [3, 3]}
    assert metrics.vllm_steps(detailed, 5) == [[3, 2], [3, 0]]
    assert metrics.vllm_steps(told, 5) == [[3, 0], [3, 2]]  # `summary`: in any order
    assert metrics.vllm_steps({**told, "num_draft_tokens": 5}, 5) is None
    assert metrics.vllm_steps(None, 5) is None and metrics.vllm_steps(None, 1) == []


SGLANG = {
    "spec_accept_rate": 0.2930232558139535,
    "spec_accept_length": 2.4651162790697674,
    "spec_num_correct_drafts": 63,
    "spec_num_proposed_drafts": 215,
    "spec_verify_ct": 43,
    "spec_correct_drafts_histogram": [11, 14, 11, 4, 0, 3],
}
"""One request of 106 tokens as a real server told it, K = 5: https://github.com/sgl-project/sglang/pull/33518.
Not run on a real server here: SGLang needs a GPU. `specflow bench-served <family> --engine sglang` would.
"""


def test_sglang_counts() -> None:
    steps = metrics.sglang_steps(SGLANG, 106, 5)
    assert steps is not None and len(steps) == 43
    record = dataclasses.replace(served(tokens=list(range(106))), steps=steps)
    found = metrics.acceptance([Block("draft", 1, 0, 1.0, [record], None)], 5)
    assert found is not None
    assert found.length == pytest.approx(1 + 63 / 43)
    assert found.survival[0] == pytest.approx(32 / 43) and found.survival[4] == pytest.approx(3 / 43)
    assert record.as_record().num_cut == 1 + 63 + 43 - 106


def test_sglang_counts_with_the_root_and_by_older_names() -> None:
    """Older servers: spec_accept_token_num, spec_draft_token_num, spec_accept_histogram (tokenizer_manager.py,
    _calculate_spec_decoding_metrics); a count of speculative_num_draft_tokens a step includes the root.
    """
    older = {
        "spec_verify_ct": 43,
        "spec_accept_token_num": 63,
        "spec_draft_token_num": 43 * 6,
        "spec_accept_histogram": SGLANG["spec_correct_drafts_histogram"],
    }
    assert metrics.sglang_steps(older, 106, 5) == metrics.sglang_steps(SGLANG, 106, 5)


@pytest.mark.parametrize(
    "change",
    [{"spec_verify_ct": 42}, {"spec_num_correct_drafts": 64}, {"spec_num_proposed_drafts": 43 * 4}],
)
def test_sglang_counts_that_contradict_each_other(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="do not belong together at K = 5"):
        metrics.sglang_steps({**SGLANG, **change}, 106, 5)


def test_sglang_stream_is_cumulative_or_incremental() -> None:
    """Messages of /generate with `stream`: text and counts so far; `output_ids` so far or only the new ones."""

    def message(ids: list[int], total: int, end: bool) -> dict[str, Any]:
        meta: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": total, "finish_reason": None}
        if end:
            meta |= {"finish_reason": {"type": "length", "length": total}, "spec_verify_ct": 1}
        return {"text": "x" * total, "output_ids": ids, "meta_info": meta}

    for parts in ([([4], 1), ([4, 5, 6], 3)], [([4], 1), ([5, 6], 3)]):
        reply = Reply(0.0)
        for number, (ids, total) in enumerate(parts):
            _read_sglang(reply, message(ids, total, number == 1), 0.5 * (number + 1))
        assert reply.token_ids == [4, 5, 6] and reply.chunk_s == [0.5, 1.0] and reply.num_tokens == 3
        assert reply.finish_reason == "length" and reply.speculation == {"spec_verify_ct": 1}


def test_openai_stream_without_token_ids() -> None:
    """Outputs are then told apart by their text, and tokens counted as the server's usage says."""
    request = Request("s", "q0", "c", 0, [1, 2], "hi")
    reply = Reply(0.0)
    for text, finish in (("al", None), ("pha", "stop")):
        _read_openai(reply, {"choices": [{"text": text, "finish_reason": finish}]}, 0.1)
    _read_openai(reply, {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}, 0.2)
    record = _record(reply, request, "baseline", 1, 0, None)  # type: ignore[arg-type] - the target alone needs no K
    assert (record.num_tokens, record.token_ids, record.text, record.error) == (3, None, "alpha", None)
    other = dataclasses.replace(record, engine="draft", text="alpaca", steps=None)
    blocks = [Block("baseline", 1, 0, 1.0, [record], None), Block("draft", 1, 0, 1.0, [other], None)]
    level = metrics.level(blocks, 3, greedy=True, num_gpus=None)
    assert level.lossless_rate == 0.0 and level.first_divergence is not None and level.first_divergence.position == 3
    assert level.acceptance is None


def test_a_level_pairs_requests_and_repeats() -> None:
    blocks = [
        Block("baseline", 1, 0, 2.0, [plain([1, 2, 3, 4])], None),
        Block("baseline", 1, 1, 2.0, [plain([1, 2, 3, 4], repeat=1)], None),
        Block("draft", 1, 0, 1.0, [served([2], tokens=[1, 2, 3, 4])], None),
        Block("draft", 1, 1, 1.6, [served([2], tokens=[1, 2, 9, 4], repeat=1)], None),
    ]
    level = metrics.level(blocks, 3, greedy=True, num_gpus=None)
    assert level.speedup == pytest.approx((8 / 2.6) / (8 / 4.0))
    assert level.speedup_range == pytest.approx([2.0 / 1.6, 2.0])
    assert level.lossless_rate == 0.5
    assert level.first_divergence == Divergence(
        set="s", question_id="q0", turn=0, sample=0, repeat=1, position=2, expected=3, got=9
    )


def test_steps_that_leave_out_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="the server's counts leave out steps"):
        dataclasses.replace(served([1]), token_ids=list(range(9))).as_record()


def test_a_user_answers_at_least_four_requests_in_a_block() -> None:
    assert [passes(6, c) for c in (1, 2, 4, 16)] == [1, 2, 3, 11]


def said(levels: list[Level], stops: float | None) -> str:
    return verdict(levels, stops, engine="vllm", version="0.32.0", k=3)


def one_level(concurrency: int, speedup: float, *, num_errors: int = 0, **changes: Any) -> Level:
    """6 requests to each side, of those with the draft `num_errors` failed."""
    blocks = [
        Block(engine, concurrency, 0, 1.0, [served([1], question=f"q{q}", engine=engine) for q in range(6)], None)
        for engine in SIDES
    ]
    level = metrics.level(blocks, 3, greedy=True, num_gpus=None)
    assert level.acceptance is not None and level.acceptance.length == 2.0
    draft = level.draft.changed(num_errors=num_errors)
    speeds = {"speedup": speedup, "speedup_range": (speedup - 0.1, speedup + 0.1)}
    return level.changed(draft=draft, **speeds, **changes)


def test_verdicts() -> None:
    pays, stops = one_level(1, 1.2), one_level(4, 0.8)
    assert said([pays, stops], 2.0).startswith(
        "Pays through vllm 0.32.0 at K = 3 up to about 2.0 requests at once: output tokens/s (lowest to highest "
        "repeat) 1.20x (1.10 to 1.30) at 1, 0.80x (0.70 to 0.90) at 4 requests at once."
    )
    assert "repeats lie on both sides of 1 at 1 at once" in said([one_level(1, 1.05)], None)
    assert said([pays], None).startswith("Pays through vllm 0.32.0 at K = 3 up to 1 requests at once, the most")
    assert said([stops], 4.0).startswith("Does not pay")
    assert "2 of 12 requests failed" in said([one_level(1, 1.2, num_errors=2)], None)
    where = Divergence(set="s", question_id="q", turn=0, sample=0, repeat=0, position=7, expected=1, got=2)
    assert "differs in 50.0% of the requests" in said(
        [one_level(1, 1.2, lossless_rate=0.5, first_divergence=where)], None
    )
    accepted = pays.acceptance
    assert accepted is not None
    assert "acceptance length is 1.01" in said([one_level(1, 0.7, acceptance=accepted.changed(length=1.01))], 1.0)


def test_synthetic_acceptance_and_flags_of_speculation_are_refused() -> None:
    config = '{"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.5}'
    with pytest.raises(UserError, match="synthetic acceptance is on"):
        refuse_synthetic(["--speculative-config", config], {})
    with pytest.raises(UserError, match="synthetic acceptance is on"):
        refuse_synthetic([], {"SGLANG_SIMULATE_ACC_LEN": "3.2"})
    with pytest.raises(UserError, match="would go to the target alone too"):
        refuse_synthetic(["--speculative-config", "{}"], {})
    refuse_synthetic(["--max-num-seqs", "8"], {"SGLANG_SIMULATE_ACC_LEN": "-1"})


def command(port: int, draft: Path | None, dtype: str = "float32") -> Launch:
    install = Install("vllm", Path("venv/bin/python"), "0.32.0", on_cpu=True)
    return launch(
        install, Serve(), target=Path("t"), target_dtype=dtype, served_name="m", port=port, draft=draft,
        num_speculative_tokens=3,
    )  # fmt: skip


def test_per_request_metrics_are_asked_for_with_a_draft_alone() -> None:
    """vLLM ends at its start where the flag comes without --speculative-config."""
    flag = "--per-request-spec-decode-metrics"
    assert flag in command(81, Path("d")).argv and flag not in command(81, None).argv


def test_unequal_builds_and_flags_are_refused() -> None:
    plain_one, with_draft = (plain_flags(command(port, draft)) for port, draft in ((81, None), (82, Path("d"))))
    assert plain_one == with_draft and ("--dtype", "float32") in plain_one
    one = Server(url=None, num_gpus=None, dtype=None, k=None, version="0.32.0", flags=plain_one)
    check_pair(one, one.changed(k=3))
    with pytest.raises(UserError, match=r"different builds, 0\.32\.0 and 0\.31\.0"):
        check_pair(one, one.changed(version="0.31.0"))
    other = plain_flags(command(81, None, dtype="bfloat16"))
    with pytest.raises(UserError, match=r"different flags \(--dtype\)"):
        check_pair(one, one.changed(flags=other))


def gap_of(
    expected: float | None, in_process: float, served: float, interval: tuple[float, float], checks: list[Check]
) -> Gap:
    return gap.gap(
        "heldout", 6, expected=expected, in_process=in_process, served=served, interval=interval, checks=checks
    )


OK = Check("chat template", True, "renders the same tokens")
BAD = Check("chat template", False, "the server renders a question otherwise (from token 3 on)")
UNTOLD = Check("dtype", None, "target.json has float32")


def test_gap_within_five_percent_needs_no_advice() -> None:
    found = gap_of(1.60, 1.56, 1.55, (1.4, 1.7), [OK])
    assert found.gap == pytest.approx(1.55 / 1.60 - 1) and not found.apart and found.advice == []


def test_gap_at_the_server_names_the_failed_check() -> None:
    found = gap_of(1.60, 1.56, 1.20, (1.1, 1.3), [BAD, UNTOLD])
    assert found.apart and found.gap == pytest.approx(-0.25)
    text = " ".join(found.advice)
    assert "Look at the chat template: the server renders a question otherwise" in text
    assert "does not tell its dtype" in text and "norm flags" not in text
    clean = " ".join(gap_of(1.60, 1.56, 1.20, (1.1, 1.3), [OK]).advice)
    assert "RoPE, layer ids and norm flags" in clean


def test_gap_before_the_server_looks_at_the_prompts() -> None:
    found = gap_of(1.80, 1.56, 1.56, (1.3, 1.9), [OK])
    assert found.apart and len(found.advice) == 1
    assert "Server and in-process chain agree" in found.advice[0] and "1.30 to 1.90 holds" in found.advice[0]
    assert gap_of(None, 1.5, 1.5, (1.4, 1.6), []).gap == 0.0


def test_prompt_counts() -> None:
    assert gap.check_prompts([(5, 5), (7, 7)]).ok is True
    assert gap.check_prompts([(5, 6)]).ok is False and gap.check_prompts([(5, None)]).ok is None
