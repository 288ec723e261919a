"""A row of records.jsonl: one request as one engine answered it once. All numbers of the benchmark come from these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specflow import files
from specflow.errors import UserError

BASELINE, DRAFT = "baseline", "draft"


def record_key(set_name: str, question_id: str, turn: int, sample: int, repeat: int, engine: str) -> str:
    """The stable id of a row, by which a resumed run and the shares of a split one know what is done."""
    return f"{set_name}/{question_id}/{turn}/{sample}/{repeat}/{engine}"


@dataclass(frozen=True)
class Record:
    """One request of one engine in one repeat."""

    set: str
    question_id: str
    category: str
    turn: int
    repeat: int
    engine: str
    """baseline, draft or one of config_bench.REFERENCES."""
    order: int
    """Place among the engines that ran this request in this repeat."""
    num_prompt_tokens: int
    token_ids: list[int]
    """Generated ids."""
    steps: list[list[int]]
    """[drafted, accepted] of each verification step; for a tree drafted nodes and the length of the accepted path."""
    num_cut: int
    """Verified tokens of the last step beyond max_new_tokens or the end of the turn."""
    prefill_s: float
    draft_s: float
    verify_s: float
    decode_s: float
    finish_reason: str
    sample: int = 0
    """Which of a question's answers, each with its own seed and history."""
    started_at: float = 0.0
    """Unix time at which the request began; 0 where it is not known, as of a server's."""
    model_s: float | None = None
    """Part of decode_s inside model calls; None where it is not known, as of a server's."""

    def __post_init__(self) -> None:
        emitted = 1 + sum(accepted + 1 for _, accepted in self.steps) - self.num_cut
        assert len(self.token_ids) == emitted, f"{self.key}: {len(self.token_ids)} tokens, steps say {emitted}"
        assert all(0 <= accepted <= drafted for drafted, accepted in self.steps), f"{self.key}: accepted over drafted"

    @property
    def question(self) -> tuple[str, str]:
        """What intervals draw: a question's turns, samples and repeats belong together."""
        return self.set, self.question_id

    @property
    def request(self) -> tuple[str, str, int, int]:
        return self.set, self.question_id, self.turn, self.sample

    @property
    def key(self) -> str:
        return record_key(self.set, self.question_id, self.turn, self.sample, self.repeat, self.engine)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    def to_json(self) -> dict[str, Any]:
        return {"id": self.key, **asdict(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        return cls(**{name: value for name, value in row.items() if name != "id"})


def read_records(file: Path, *, made_by: str) -> list[Record]:
    """Raises UserError in one line for a file that is missing or damaged; `made_by` makes it."""
    found = []
    for number, row in enumerate(files.read_jsonl(file, what="benchmark records", made_by=made_by), 1):
        try:
            found.append(Record.from_json(row))
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"benchmark records {file}: row {number} is damaged ({error}): run `{made_by}` again"
            ) from None
    return found


Pair = tuple[Record, Record]


def by_engine(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    """Records of each engine; none of an engine that did not run."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record.engine].append(record)
    return found


def paired(baseline: Sequence[Record], engine: Sequence[Record]) -> list[Pair]:
    """(baseline, engine) of the same request and repeat. Repeats that one of them did not run are left out."""
    by_run = {(*record.request, record.repeat): record for record in baseline}
    return [(by_run[run], r) for r in engine if (run := (*r.request, r.repeat)) in by_run]
