"""Stage `export`: the trained draft in the forms that servers load, each held against its load contract."""

from __future__ import annotations

from specflow.config import Family, Params
from specflow.drafters.eagle3 import load_draft
from specflow.export.eagle3 import load_export, save_export
from specflow.files import sha256_file
from specflow.paths import Log, Paths
from specflow.targets.model import read_facts


def run(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Write export/eagle3 and prove the round trip: what loads from it equals what was trained, tensor by tensor."""
    facts, draft = read_facts(paths.target), load_draft(paths.draft)
    folder = paths.export / "eagle3"
    save_export(draft, facts, folder)
    back = load_export(folder).state_dict()
    assert all(tensor.equal(back[key]) for key, tensor in draft.state_dict().items()), "export round trip differs"
    weights = folder / "model.safetensors"
    return {
        "export_bytes": weights.stat().st_size,
        "export_digest_prefix": int(sha256_file(weights)[:12], 16),
        "draft_vocab_size": draft.config.draft_vocab_size,
        "recommended_num_speculative_tokens": family.export.num_speculative_tokens,
    }
