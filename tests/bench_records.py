"""Records made up by hand, for what is computed from records."""

from __future__ import annotations

from specflow.bench.statistics.records import Record


def record(
    accepted: list[int],
    *,
    engine: str = "draft",
    question: str = "q0",
    repeat: int = 0,
    k: int = 3,
    seconds: float = 1.0,
    tokens: list[int] | None = None,
    turn: int = 0,
    sample: int = 0,
    cut: int = 0,
    category: str = "c",
    set: str = "s",
    started_at: float = 0.0,
) -> Record:
    """A request whose steps drafted `k` each and accepted this many; a quarter of its time is prefill."""
    num_tokens = 1 + sum(a + 1 for a in accepted) - cut
    return Record(
        set=set,
        question_id=question,
        category=category,
        turn=turn,
        repeat=repeat,
        engine=engine,
        order=0,
        num_prompt_tokens=5,
        token_ids=tokens or list(range(num_tokens)),
        steps=[[k, a] for a in accepted],
        num_cut=cut,
        prefill_s=0.25 * seconds,
        draft_s=0.15 * seconds,
        verify_s=0.6 * seconds,
        decode_s=0.75 * seconds,
        model_s=0.72 * seconds,
        finish_reason="length",
        sample=sample,
        started_at=started_at,
    )


def plain(num_tokens: int, **kwargs: object) -> Record:
    """The target alone: every step drafts nothing."""
    return record([0] * (num_tokens - 1), engine="baseline", k=0, **kwargs)  # type: ignore[arg-type]


def benchmark(
    draft_seconds: float,
    *,
    questions: int = 6,
    repeats: int = 3,
    accepted: tuple[int, ...] = (1, 1, 1, 1, 1),
    hour: float = 3600.0,
    slower: float = 0.0,
    **kwargs: object,
) -> list[Record]:
    """Both engines over some questions of unequal length of time, the repeats an hour apart.

    The machine's speed falls by the share `slower` from one repeat to the next, for both engines alike.
    """
    num_tokens = 1 + sum(a + 1 for a in accepted)
    records = []
    for repeat in range(repeats):
        pace = (1 - slower) ** -repeat
        for q in range(questions):
            at = 1e9 + repeat * hour + 10 * q
            where = {"question": f"q{q}", "repeat": repeat}
            records.append(plain(num_tokens, seconds=pace * (1 + 0.01 * q), started_at=at, **where))
            seconds = pace * draft_seconds * (1 + 0.02 * q)
            records.append(record(list(accepted), seconds=seconds, started_at=at + 5, **where, **kwargs))  # type: ignore[arg-type]
    return records
