"""Drafts in the model registry, on a real sqlite store: versions, the alias, and what promote does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specflow import files
from specflow.compare.promote import promote
from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.tracking import record, registry
from specflow.tracking.store import open_store
from tests.evidence import write_bench

EQUAL = dict.fromkeys(("a", "b", "c"), 1.25)
BETTER = dict.fromkeys(EQUAL, 1.5)


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(record, "_pipeline_key", lambda: None)
    return open_store(Path())


def bench(params: Params, paths: Paths, speedups: dict[str, float], **how: Any) -> None:
    """A bench stage: files and the run around them."""
    with record.stage_run("bench", "tiny", params, paths) as run:
        run.finish(write_bench(paths, speedups, **how))


def versions(client: Any) -> dict[str, Any]:
    found = client.search_model_versions("name = 'specflow-tiny'")
    return {version.version: client.get_model_version(version.name, version.version) for version in found}


def champion(client: Any) -> str | None:
    found = registry.champion(client, "tiny")
    return None if found is None else str(found.version)


def test_a_benchmarked_draft_is_a_version_with_its_weights(client: Any, params: Params, paths: Paths) -> None:
    bench(params, paths, EQUAL, draft="one")
    (version,) = versions(client).values()
    expected = {
        "family": "tiny",
        "mode": "offline",
        "draft_digest": files.sha256_bytes(b"one"),
        "target_digest": "target-digest",
        "acceptance_length": "2.0000",
        "speedup": "1.2500",
        "speedup_low": "1.2500",
        "speedup_high": "1.2500",
        "lossless": "yes",
        "weights": "copied",
    }
    assert expected.items() <= version.tags.items()
    assert version.description.startswith("Pays: 1.25x")
    run = client.get_run(version.run_id)
    assert run.data.tags["metrics_md5"] == version.tags["metrics_md5"]
    folder = client.download_artifacts(version.run_id, "draft")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"one"
    assert champion(client) is None  # only promote gives the alias


def test_the_same_draft_measured_again_stays_one_version(client: Any, params: Params, paths: Paths) -> None:
    bench(params, paths, EQUAL, draft="one")
    bench(params, paths, BETTER, draft="one")
    (version,) = versions(client).values()
    assert version.tags["speedup"] == "1.5000"
    assert version.tags["bench_run_id"] != version.run_id
    assert (Path(client.download_artifacts(version.run_id, "draft")) / "model.safetensors").exists()
    bench(params, paths, BETTER, draft="two")
    assert len(versions(client)) == 2


def test_weights_stay_in_dvc_where_the_project_says_so(client: Any, params: Params, paths: Paths) -> None:
    bench(params.model_copy(update={"register_weights": False}), paths, EQUAL)
    (version,) = versions(client).values()
    assert version.tags["weights"] == "in DVC only"
    assert {file.path for file in client.list_artifacts(version.run_id, "draft")} == {"draft/config.json"}


def test_the_alias_moves_to_a_better_draft_only(client: Any, params: Params, paths: Paths) -> None:
    bench(params, paths, EQUAL, draft="one")
    assert promote("tiny", params, paths, dry_run=True).promote
    assert champion(client) is None
    assert promote("tiny", params, paths).promote
    assert champion(client) == "1"
    again = promote("tiny", params, paths)
    assert not again.promote and "is the champion already: version 1" in again.sentences[0]

    bench(params, paths, {"a": 1.25, "b": 1.2, "c": 1.3}, draft="two")
    assert not promote("tiny", params, paths).promote
    assert champion(client) == "1"
    assert "includes 1" in versions(client)[2].tags["last_decision"]

    bench(params, paths, BETTER, draft="three")
    decision = promote("tiny", params, paths)
    assert decision.promote and decision.sentences[-1] == "models:/specflow-tiny@champion is now version 3."
    assert champion(client) == "3"
    assert "1.200 times as fast" in versions(client)[3].tags["promoted_because"]

    bench(params, paths, dict.fromkeys(EQUAL, 1.1), draft="four")
    assert not promote("tiny", params, paths).promote
    assert champion(client) == "3"


def test_a_champion_measured_again_under_the_new_conditions_can_be_compared(
    client: Any, params: Params, paths: Paths
) -> None:
    bench(params, paths, EQUAL, draft="one")
    promote("tiny", params, paths)
    bench(params, paths, BETTER, draft="two", device="H100")
    decision = promote("tiny", params, paths)
    assert not decision.promote and "Some CPU, 2 threads, cpu then, Some CPU, 2 threads, H100 now" in str(decision)
    bench(params, paths, EQUAL, draft="one", device="H100")
    bench(params, paths, BETTER, draft="two", device="H100")
    assert promote("tiny", params, paths).promote
    assert champion(client) == "2"


def test_the_benchmark_must_be_there_and_of_the_exported_draft(store: Path, params: Params, paths: Paths) -> None:
    with pytest.raises(UserError, match="'tiny' has no benchmark: run `dvc repro bench@tiny`"):
        promote("tiny", params, paths)
    write_bench(paths, EQUAL, draft="one")
    (paths.export / "eagle3" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="is of another draft than"):
        promote("tiny", params, paths)


def test_a_benchmark_nobody_recorded_is_registered_only_if_the_lock_vouches_for_it(
    client: Any, params: Params, paths: Paths
) -> None:
    write_bench(paths, EQUAL)
    with pytest.raises(UserError, match="no run of the benchmark of 'tiny' is recorded"):
        promote("tiny", params, paths)
