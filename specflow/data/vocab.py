"""Stage `vocab`: which target tokens the draft can propose, and how much of the text they cover."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from specflow.errors import UserError
from specflow.files import atomic_path, read_jsonl, write_json
from specflow.targets.model import load_tokenizer, read_facts

if TYPE_CHECKING:
    from specflow.config import Family, Params
    from specflow.paths import Log, Paths

    Counts = NDArray[np.int64]


def run(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Write vocab/vocab.safetensors (d2t int64 [D] offsets, t2d bool [V]) and vocab/coverage.json."""
    facts = read_facts(paths.target)
    tokenizer = load_tokenizer(facts, paths.cache)
    made_by = f"dvc repro sample@{name}"
    train, evaluation = (
        _count_file(paths.samples / f"{split}.jsonl", facts.vocab_size, made_by) for split in ("train", "eval")
    )
    counts = _total(train, facts.vocab_size)
    started = time.perf_counter()
    always = [*tokenizer.all_special_ids, *facts.eos_token_ids]
    d2t, t2d = build_draft_vocab(counts, always, family.vocab.draft_vocab_size)
    build_s = time.perf_counter() - started
    report = _coverage_report(train, evaluation, t2d.numpy())
    with atomic_path(paths.vocab) as folder:
        folder.mkdir()
        save_file({"d2t": d2t, "t2d": t2d}, folder / "vocab.safetensors")
        write_json(folder / "coverage.json", report)
    overall = [{"category": split, "coverage": report[split]} for split in ("train", "eval")]
    by_category = [{"category": key, "coverage": value} for key, value in report["by_category"].items()]
    write_json(paths.plot("coverage.json"), overall + by_category)
    return {
        "draft_vocab_size": len(d2t),
        "coverage_train": report["train"],
        "coverage_eval": report["eval"],
        "distinct_train_tokens": int((counts > 0).sum()),
        "build_s": build_s,
    }


def build_draft_vocab(counts: Counts, always: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Choose `size` of the target's tokens: `always`, then by falling count, ties to the lower id.

    Returns d2t int64 [size], with target id = i + d2t[i] ascending, and t2d bool [vocab]. Tokens never seen fill up
    what is left, lowest id first. Raises UserError if `size` exceeds the target's vocabulary or cannot hold `always`.
    """
    vocab_size = len(counts)
    forced = np.unique(np.asarray(always, dtype=np.int64))
    forced = forced[forced < vocab_size]  # a tokenizer may know more special tokens than the model has rows
    if size > vocab_size:
        raise UserError(f"vocab.draft_vocab_size is {size}, more than the target's {vocab_size} tokens: lower it")
    if size < len(forced):
        raise UserError(f"vocab.draft_vocab_size is {size}, less than the {len(forced)} special tokens: raise it")
    priority = np.asarray(counts, dtype=np.int64).copy()
    priority[forced] = np.iinfo(np.int64).max
    chosen = np.sort(np.argsort(-priority, kind="stable")[:size])
    t2d = np.zeros(vocab_size, dtype=bool)
    t2d[chosen] = True
    return torch.from_numpy(chosen - np.arange(size)), torch.from_numpy(t2d)


def read_vocab(folder: Path) -> tuple[Tensor, Tensor]:
    """d2t int64 [D] and t2d bool [V] as the stage wrote them."""
    try:
        tensors = load_file(folder / "vocab.safetensors")
    except FileNotFoundError:
        raise UserError(f"draft vocabulary {folder} is missing: run `specflow vocab <family>` first") from None
    return tensors["d2t"], tensors["t2d"]


def coverage(counts: Counts, t2d: NDArray[np.bool_]) -> float:
    """Share of the counted tokens that the draft vocabulary holds; 0 where nothing was counted."""
    total = int(counts.sum())
    return int(counts[t2d].sum()) / total if total else 0.0


def count_supervised(rows: Sequence[dict[str, Any]], vocab_size: int) -> dict[str, Counts]:
    """Occurrences of each token id [vocab_size] within the supervised spans, by category."""
    parts: dict[str, list[NDArray[np.int64]]] = {}
    for row in tqdm(rows, desc="vocab", unit="row"):
        token_ids = np.asarray(row["token_ids"], dtype=np.int64)
        parts.setdefault(row["category"], []).extend(token_ids[start:end] for start, end in row["spans"])
    counts = {}
    for category, spans in parts.items():
        token_ids = np.concatenate([*spans, np.empty(0, dtype=np.int64)])
        if len(token_ids) and (highest := int(token_ids.max())) >= vocab_size:
            raise UserError(
                f"samples hold token {highest}, the target has {vocab_size}: they are another target's, "
                "run `dvc repro -f sample@<family>`"
            )
        counts[category] = np.bincount(token_ids, minlength=vocab_size)
    return counts


def _count_file(path: Any, vocab_size: int, made_by: str) -> dict[str, Counts]:
    return count_supervised(read_jsonl(path, what="samples", made_by=made_by), vocab_size)


def _total(counts: dict[str, Counts], vocab_size: int) -> Counts:
    return sum(counts.values(), np.zeros(vocab_size, dtype=np.int64))


def _coverage_report(train: dict[str, Counts], evaluation: dict[str, Counts], t2d: NDArray[np.bool_]) -> dict[str, Any]:
    categories = sorted({*train, *evaluation})
    merged = {
        key: _total({i: c[key] for i, c in enumerate((train, evaluation)) if key in c}, len(t2d)) for key in categories
    }
    totals = {"train": _total(train, len(t2d)), "eval": _total(evaluation, len(t2d))}
    return {
        "train": coverage(totals["train"], t2d),
        "eval": coverage(totals["eval"], t2d),
        "by_category": {key: coverage(counts, t2d) for key, counts in merged.items()},
        "train_tokens": int(totals["train"].sum()),
        "eval_tokens": int(totals["eval"].sum()),
        "draft_vocab_size": int(t2d.sum()),
        "vocab_size": len(t2d),
    }
