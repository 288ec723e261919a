"""Stages `train_offline` and `train_online`: one loop, two sources of hidden states."""

from __future__ import annotations

import hashlib
import logging

from specflow.config import Family, Params
from specflow.device import default_device
from specflow.drafters.eagle3 import Eagle3Draft, save_draft
from specflow.files import read_jsonl, sha256_file, sha256_json, write_json
from specflow.hidden_states import Expected, HiddenStateStore
from specflow.paths import Log, Paths
from specflow.resume import State, code_digest, in_use, versions
from specflow.targets.model import (
    TargetFacts,
    load_embedding,
    load_lm_head,
    load_model,
    read_facts,
    resolve_aux_layer_ids,
)
from specflow.training.checkpoint import Checkpoints, Progress
from specflow.training.features import Features, LiveFeatures, StoredFeatures
from specflow.training.initial import initial_draft
from specflow.training.loop import Trainer

logger = logging.getLogger("specflow")


def run_offline(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Train from the hidden-state store; returns headline metrics."""
    facts = read_facts(paths.target)
    ids = resolve_aux_layer_ids(facts, family.extract)
    expected = Expected(facts.digest, facts.template_digest, family.extract.dtype, ids)
    store = HiddenStateStore.open(paths.manifest, expected)
    with in_use(store.folder):
        store.verify()
        inputs = sha256_file(paths.manifest)
        return _train(f"train_offline@{name}", family, paths, log, facts, StoredFeatures(store), inputs)


def run_online(name: str, family: Family, params: Params, paths: Paths, log: Log) -> dict[str, float]:
    """Train with the target's forward on the fly; nothing but the draft is written."""
    facts = read_facts(paths.target)
    model = load_model(facts, paths.cache, device=str(default_device()))
    files = {split: paths.samples / f"{split}.jsonl" for split in ("train", "eval")}
    samples = {
        split: read_jsonl(file, what="samples", made_by=f"dvc repro sample@{name}") for split, file in files.items()
    }
    features = LiveFeatures(model, samples, family.extract, resolve_aux_layer_ids(facts, family.extract))
    digest = sha256_json([facts.digest, family.extract.model_dump(), *(sha256_file(file) for file in files.values())])
    return _train(f"train_online@{name}", family, paths, log, facts, features, digest)


def _train(
    what: str,
    family: Family,
    paths: Paths,
    log: Log,
    facts: TargetFacts,
    features: Features,
    data_digest: str,
) -> dict[str, float]:
    draft = initial_draft(facts, family, paths.cache, paths.vocab, resolve_aux_layer_ids(facts, family.extract))
    stage = what.partition("@")[0]
    parts = {
        "code": code_digest(paths.root, stage),
        "versions": versions(),
        "target": facts.identity,
        "inputs": [data_digest, weights_digest(draft)],
        "settings": family.train.model_dump(mode="json"),
    }
    with State(paths.state / "checkpoints", what, parts) as state:
        trainer = Trainer(
            stage=stage,
            draft=draft,
            embedding=load_embedding(facts, paths.cache),
            full_head=load_lm_head(facts, paths.cache),
            features=features,
            config=family.train,
            checkpoints=Checkpoints(state.folder),
            log=log,
            device=default_device(),
        )
        _say_plan(trainer)
        progress = trainer.run()
        save_draft(trainer.draft, paths.draft)
        write_json(paths.plot("training.json"), progress.curves["training"], indent=None)
        write_json(paths.plot("eval.json"), progress.curves["eval"], indent=None)
        state.finish()
    return _headline(trainer, progress)


def weights_digest(draft: Eagle3Draft) -> str:
    """sha256 of a draft's tensors with their names: what a run starts from, wherever it was read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(draft.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _say_plan(trainer: Trainer) -> None:
    parameters = sum(p.numel() for p in trainer.draft.parameters())
    tokens = sum(row.length for row in trainer.train_rows)
    logger.info(
        "%s: %.1fM parameters, %d documents, %d tokens x %d epochs, %d optimizer steps on %s",
        trainer.stage, parameters / 1e6, len(trainer.train_rows), tokens, trainer.config.epochs, len(trainer.plan),
        trainer.device,
    )  # fmt: skip


def _headline(trainer: Trainer, progress: Progress) -> dict[str, float]:
    best = next(point for point in progress.curves["eval"] if point["step"] == progress.best_step)
    tokens = sum(row.length for row in trainer.train_rows)
    return {
        "expected_acceptance_length": best["expected_acceptance_length"],
        **{name: value for name, value in best.items() if name.startswith("survival_")},
        "best_step": progress.best_step,
        "steps": progress.step,
        # without epochs there is no loss and no speed
        **({"final_loss": progress.curves["training"][-1]["loss"]} if trainer.plan else {}),
        "train_tokens": tokens * (trainer.config.epochs > 0),
        **({"train_tok_s": tokens * trainer.config.epochs / progress.seconds} if trainer.plan else {}),
        "train_s": progress.seconds,
        "parameters": sum(p.numel() for p in trainer.draft.parameters()),
    }
