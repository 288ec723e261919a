"""Exported drafts as versions of a registered model, one model per family; the alias `champion` names the one to serve.

A version's weights lie among the artifacts of the bench run that registered it, and that run, like every later bench of
the same draft, keeps the per-request records: so a draft can be compared with the champion long after its run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from specflow.paths import Paths, project_home
from specflow.results.schema import Summary, family_summary
from specflow.tracking import results
from specflow.tracking.store import ensure_experiment, open_store, search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
DRAFT = "draft"
"""Artifact folder of the weights in the run that registered them."""


def model_name(family: str) -> str:
    return f"specflow-{family}"


def register_draft(client: MlflowClient, run_id: str, paths: Paths, tags: dict[str, str], *, weights: bool) -> str:
    """Register the exported draft that the bench run `run_id` measured; return its version.

    A draft that is registered already keeps its version, whose tags then tell of the newest benchmark. `weights` False
    registers the draft by its digests alone.
    """
    summary = family_summary(paths)
    digest = summary.identity.draft_digest
    assert digest is not None, "the stage measures a draft"
    known = {**tags, **_version_tags(summary, paths), "bench_run_id": run_id}
    _ensure_model(client, paths.family)
    version = find_version(client, paths.family, digest)
    if version is None:
        folder = paths.export / "eagle3"
        if weights:
            client.log_artifacts(run_id, str(folder), DRAFT)
        else:
            client.log_artifact(run_id, str(folder / "config.json"), DRAFT)
        version = client.create_model_version(
            model_name(paths.family),
            f"runs:/{run_id}/{DRAFT}",
            run_id,
            tags={**known, "weights": "copied" if weights else "in DVC only"},
            description=summary.verdict,
        )
    else:
        tag_version(client, version, known)
        client.update_model_version(version.name, version.version, summary.verdict)
    return str(version.version)


def _version_tags(summary: Summary, paths: Paths) -> dict[str, str]:
    overall = summary.overall
    ends = dict(zip(("speedup_low", "speedup_high"), overall.speedup_ci or (), strict=False))
    export = results.locked_export(paths)
    return {
        **results.conditions(summary),
        "draft_digest": str(summary.identity.draft_digest),
        "num_speculative_tokens": str(summary.num_speculative_tokens),
        "acceptance_length": f"{overall.acceptance_length:.4f}",
        "speedup": f"{overall.speedup:.4f}",
        **{end: f"{value:.4f}" for end, value in ends.items()},
        "lossless": {True: "yes", False: "no", None: "sampled"}[overall.lossless],
        **({"dvc_export_md5": export} if export else {}),
    }


def _ensure_model(client: MlflowClient, family: str) -> None:
    from mlflow.exceptions import MlflowException

    name = model_name(family)
    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, {"family": family}, f"EAGLE-3 drafts for {family}, exported by specflow")
    except MlflowException:  # another machine was quicker
        client.get_registered_model(name)


def find_version(client: MlflowClient, family: str, draft_digest: str) -> ModelVersion | None:
    """The family's version with these weights, the oldest where a race has made two."""
    found = [v for v in _versions(client, family) if v.tags.get("draft_digest") == draft_digest]
    return min(found, key=lambda version: int(version.version), default=None)


def _versions(client: MlflowClient, family: str) -> list[ModelVersion]:
    versions, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{model_name(family)}'", page_token=token)
        versions += list(page)
        if not (token := page.token):
            return versions


def champion(client: MlflowClient, family: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model_name(family), CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model yet, or no such alias
            return None
        raise


def crown(client: MlflowClient, version: ModelVersion, why: str) -> None:
    """Move the alias to this version and write the reason to it."""
    tag_version(client, version, {"promoted_because": why})
    client.set_registered_model_alias(version.name, CHAMPION, version.version)


def tag_version(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)


@contextmanager
def benchmarks(client: MlflowClient, family: str, draft_digest: str, home: Path) -> Iterator[Iterator[Path]]:
    """Folders with summary.json and records.jsonl of the recorded benchmarks of a draft, newest first.

    They are fetched one by one, and gone at the end of the block.
    """
    experiment_id = ensure_experiment(client, family, home)
    query = f"tags.stage = 'bench' and tags.draft_digest = '{draft_digest}'"
    runs = search(client, experiment_id, query, limit=20)

    def fetched(root: Path) -> Iterator[Path]:
        for run in runs:
            have = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
            if not {"summary.json", "records.jsonl"} <= have:
                continue
            folder = root / run.info.run_id
            folder.mkdir()
            for name in ("summary.json", "records.jsonl"):
                client.download_artifacts(run.info.run_id, name, str(folder))
            yield folder

    with tempfile.TemporaryDirectory() as temporary:
        yield fetched(Path(temporary))


def open_registry(paths: Paths) -> MlflowClient:
    return open_store(project_home(paths.root))
