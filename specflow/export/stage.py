"""Stage `export`: the trained draft in the forms that servers load, each held against its load contract."""

from __future__ import annotations

from specflow.config import Family, Params
from specflow.drafters.eagle3 import Eagle3Draft, load_draft
from specflow.export.eagle3 import load_export, save_export
from specflow.export.imports import read_draft
from specflow.export.speculators import save_speculators
from specflow.files import sha256_file
from specflow.paths import Log, Paths
from specflow.targets.model import TargetFacts, read_facts


def run(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Write export/eagle3 and prove the round trip: what loads from it equals what was trained, tensor by tensor."""
    facts, draft = read_facts(paths.target), load_draft(paths.draft)
    folder = paths.export / "eagle3"
    save_export(draft, facts, folder)
    back = load_export(folder).state_dict()
    assert all(tensor.equal(back[key]) for key, tensor in draft.state_dict().items()), "export round trip differs"
    if family.export.speculators:
        _write_speculators(draft, facts, family, paths)
    weights = folder / "model.safetensors"
    return {
        "export_bytes": weights.stat().st_size,
        "export_digest_prefix": int(sha256_file(weights)[:12], 16),
        "draft_vocab_size": draft.config.draft_vocab_size,
        "recommended_num_speculative_tokens": family.export.num_speculative_tokens,
    }


def _write_speculators(draft: Eagle3Draft, facts: TargetFacts, family: Family, paths: Paths) -> None:
    """Write export/speculators and read it back."""
    source = family.target.parts[0]
    hub_name = source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else None
    verifier = family.export.verifier or hub_name or str(facts.path(paths.cache).resolve())
    folder, k = paths.export / "speculators", family.export.num_speculative_tokens
    save_speculators(draft, facts, folder, verifier=verifier, num_speculative_tokens=k)
    back = read_draft(folder, facts, paths.cache)[0].state_dict()
    assert all(tensor.equal(back[key]) for key, tensor in draft.state_dict().items()), "export round trip differs"
