"""A project of a tiny target with an untrained draft, exported: all that a benchmark needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from specflow.config import Params, parse_params
from specflow.drafters.eagle3 import Eagle3Config, Eagle3Draft
from specflow.export.eagle3 import save_export
from specflow.files import write_json, write_jsonl
from specflow.paths import Paths
from specflow.targets.fetch import read_checkpoint
from tests.toys import make_project_inputs, tiny_params

TIMES = {"started_at", "prefill_s", "draft_s", "verify_s", "decode_s", "model_s"}
"""Fields of a record that no two runs share."""


def make_bench_project(folder: Path) -> tuple[Params, Paths]:
    """params.yaml, inputs and artifacts up to the export of the family `tiny`."""
    make_project_inputs(folder)
    raw = tiny_params(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    params = parse_params(raw)
    paths = Paths(root=folder, family="tiny", cache=folder / "cache")
    facts = read_checkpoint(params.families["tiny"].target, folder / "target", paths.cache)
    write_json(paths.target, facts.model_dump())
    shape = {name: value for name, value in facts.model_dump().items() if name in Eagle3Config.model_fields}
    ids = facts.default_aux_layer_ids()
    config = Eagle3Config(**shape, target_hidden_size=facts.hidden_size, draft_vocab_size=128, aux_layer_ids=ids)
    torch.manual_seed(0)
    draft = Eagle3Draft(config)
    draft.t2d[:128] = True
    save_export(draft, facts, paths.export / "eagle3")
    rows = [
        {
            "id": f"h{i}",
            "source": "s",
            "category": "chat",
            "messages": [{"role": "user", "content": f"the cat sees {i} dogs"}],
        }
        for i in range(6)
    ]
    write_jsonl(paths.prompts / "eval.jsonl", rows)
    return params, paths


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
