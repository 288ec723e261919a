"""Results made up through the schema, so that a field that is renamed breaks the tests that name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from specflow.bench.statistics.records import Record
from specflow.bench.statistics.summary import summary_of
from specflow.results.schema import Conditions, Identity, Settings, Summary, TargetIdentity, Versions

M = TypeVar("M", bound=BaseModel)

IDENTITY = Identity(
    cpu="Some CPU",
    cpu_cores=2,
    torch_threads=2,
    load_average_at_start=0.1,
    device="cpu",
    platform="Linux",
    versions=Versions(specflow="0.1.0", engine="0123456789ab", python="3.11.9", torch="2.13.0", transformers="5.23.0"),
    target=TargetIdentity(
        source="pypi:a-target==0.1.2/weights.gguf",
        revision="0.1.2",
        digest="target-digest",
        tokenizer_digest="tokenizer-digest",
        template_digest="template-digest",
        dtype="float32",
    ),
    draft_digest="2d35f3d1" * 8,
    git_commit="2d35f3d" * 5,
    draft_dtype="float32",
)


def changed(model: M, **changes: Any) -> M:
    """`model` with other values, checked as those of a file; a mapping changes a part within it."""
    known = {name: getattr(model, name) for name in type(model).model_fields}
    for name, value in changes.items():
        inner = known.get(name)
        known[name] = changed(inner, **value) if isinstance(inner, BaseModel) and isinstance(value, dict) else value
    return type(model).model_validate(known)


def summary_from(
    records: Sequence[Record],
    *,
    num_speculative_tokens: int,
    identity: Identity = IDENTITY,
    settings: dict[str, Any] | None = None,
    **fields: Any,
) -> Summary:
    """The summary of records, with nothing measured besides; `fields` are of Summary, `settings` of Settings."""
    questions: dict[str, set[str]] = {}
    for record in records:
        questions.setdefault(record.set, set()).add(record.question_id)
    asked = {name: sorted(ids) for name, ids in questions.items()}
    chosen = Settings.model_validate(
        {
            "prompt_sets": list(asked),
            "num_speculative_tokens": num_speculative_tokens,
            "mode": "both",
            "questions": asked,
            "sweep_questions": [],
            **(settings or {}),
        }
    )
    conditions = fields.get("conditions", Conditions())
    tree = fields.get("tree")
    found = summary_of(
        records,
        num_speculative_tokens=num_speculative_tokens,
        greedy=chosen.greedy,
        tree=tree is not None,
        conditions=conditions,
    )
    made = Summary(
        **dict(found),
        family="tiny",
        settings=chosen,
        identity=identity,
        conditions=conditions,
        num_speculative_tokens=num_speculative_tokens,
        tree=None,
        sweep=[],
        cost_model=None,
        batch=[],
        accuracy=None,
        notes=[],
        num_skipped_turns=0,
        stock_generate_tok_s=None,
        baseline_over_stock=None,
        baseline_equals_stock=None,
    )
    return changed(made, **fields)
