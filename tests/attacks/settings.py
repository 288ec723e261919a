"""Settings that are wrong: each ends in one line that says where, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.attacks.bad_input import BadInput

KIND = "settings"
FAMILY = "families.tiny"
COMMAND = ("plan",)
NAN, INF = float("nan"), float("inf")


def setting(path: str, value: Any, *words: str) -> BadInput:
    """The setting at a dotted path of params.yaml (below the family unless it starts with a dot) is `value`."""
    full = path[1:] if path.startswith(".") else f"{FAMILY}.{path}"

    def damage(folder: Path) -> None:
        file = folder / "params.yaml"
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        place = raw
        *above, last = full.split(".")
        for part in above:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")

    return BadInput(KIND, f"{full} {str(value)[:40]}", damage, COMMAND, (full, *words))


def text(name: str, change: Callable[[bytes], bytes], *words: str) -> BadInput:
    """The bytes of params.yaml are changed."""

    def damage(folder: Path) -> None:
        file = folder / "params.yaml"
        file.write_bytes(change(file.read_bytes()))

    return BadInput(KIND, name, damage, COMMAND, ("params.yaml", *words))


def _bomb(levels: int) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


NOT_A_COUNT = (0, -1, 1.5, True, INF, NAN, "many", None, [1], 10**30)
COUNTS = [setting("train.ttt_steps", value) for value in NOT_A_COUNT]
NOT_A_RATE = (0, -1.0, True, False, INF, -INF, NAN, "fast", None, {"a": 1})
RATES = [setting("train.lr", value) for value in NOT_A_RATE]
SEEDS = [setting("train.seed", value) for value in (-1, 2**63, 2**64, 10**4000, 1.5, True, NAN)]
TOO_MUCH = [
    setting("train.ttt_steps", 1000, "32"),
    setting("train.epochs", 10**6),
    setting("train.accumulate", 10**8),
    setting("train.evals", 10**8),
    setting("train.checkpoints", 10**8),
    setting("train.batch_tokens", 10**12),
    setting("train.intermediate_size", 10**9),
    setting("train.fit_tokens", 10**12),
    setting("vocab.draft_vocab_size", 10**9),
    setting("sample.batch_size", 10**6),
    setting("sample.concurrency", 10**6),
    setting("sample.max_new_tokens", 10**9),
    setting("sample.eval_temperature", 1e6),
    setting("data.max_turns", 10**6),
    setting("data.train_conversations", 10**12),
    setting("data.max_prompt_tokens", 10**9, "16777216"),
    setting("extract.aux_layer_ids", [0, 10**6], "aux_layer_ids.1"),
    setting("extract.aux_layer_ids", []),
    setting("extract.batch_tokens", 10**12),
    setting("extract.shard_bytes", 1),
    setting("export.num_speculative_tokens", 1000),
    setting("bench.num_speculative_tokens", 1000),
    setting("bench.sweep", [1, 1000], "sweep.1"),
    setting("bench.repeats", 10**6),
    setting("bench.num_samples", 10**6, "1000"),
    setting("bench.max_new_tokens", 10**9),
    setting("bench.batch_sizes", [10**6]),
    setting("bench.cost_tokens", [10**6]),
    setting("bench.tree", {"total_token": 10**6, "depth": 3, "top_k": 2}, "total_token"),
    setting("bench.tree", {"total_token": 60, "depth": 3, "top_k": 10**6}, "top_k"),
    setting("serve.replicas", 10**6),
    setting("serve.tensor_parallel_size", 10**6),
    setting("serve.max_model_len", 10**9),
    setting("resources.bench", {"gpus": 10**6}),
    setting("resources.bench", {"shards": 10**6}),
]
OUT_OF_RANGE = [
    setting("bench.temperature", -0.1),
    setting("bench.temperature", NAN),
    setting("bench.top_p", 0.0),
    setting("bench.top_p", 1.5),
    setting("bench.repeats", 2),
    setting("sample.temperatures", []),
    setting("sample.temperatures", [0.0, INF], "temperatures.1"),
    setting("train.betas", [0.9, 1.5], "betas.1"),
    setting("train.betas", [0.9]),
    setting("train.warmup_ratio", 2),
    setting("train.clip_grad_norm", 0),
    setting("train.ttt_decay", INF),
    setting("serve.gpu_memory_utilization", 1.2),
    setting("resources.bench", {"timeout_s": INF}),
]
WRONG_KIND = [
    setting("allow_cpu", "yes please"),
    setting("allow_cpu", 1),
    setting("bench.execute_code", "on"),
    setting("bench.execute_code", None),
    setting("sample.engine", "vllmm"),
    setting("target.dtype", "int8"),
    setting("target.source", 7),
    setting("target.template_options", {"not a name": True}),
    setting("data.sources", []),
    setting("data.sources", "file:x"),
    setting("bench.tree", "wide"),
    setting("bench.tree", {"branches": [[0, 0]]}),
    setting("train", None),
    setting("train", []),
    setting("train.tt_steps", 3, "did you mean 'ttt_steps'"),
    setting("bench.num_prompt", 3, "did you mean"),
    setting(".cache_dir", 3),
    setting(".stroe", None, "did you mean 'store'"),
    setting(".online", ["tiny"], "twice"),
    setting(".offline", ["tnyi"], "tnyi"),
]
NAMES = [
    text("a family of 300 letters", lambda raw: raw.replace(b"tiny", b"x" * 300), "families", "255 bytes"),
    text("a family of 65 letters", lambda raw: raw.replace(b"tiny", b"x" * 65), "family name", "64"),
    setting(".families.a/b", {}, "a/b"),
    setting(".families.ä", {}, "ä"),
    setting(".prompt_sets.gsm8k@main", {"source": "file:questions.jsonl"}, "letters"),
    setting(f".prompt_sets.{'x' * 65}", {"source": "file:questions.jsonl"}, "64"),
    setting("target.source", f"file:{'x' * 300}", "255 bytes"),
    setting("target.source", f"file:{'x/' * 3000}", "4,096"),
    setting("target.source", "file:a\0b", "control character"),
    setting("train.init_from", "draft\x1b[31m", "control character"),
    setting("serve.model_name", "m\udc80".encode("utf-8", "surrogatepass").decode("latin-1") + "\x85", "control"),
]
STAGES = [
    text(
        "a stage that is none",
        lambda raw: raw.replace(b"    allow_cpu", b"    resources: {benhc: {gpus: 1}}\n    allow_cpu"),
        "resources.benhc",
        "did you mean 'bench'",
    )
]
TEXTS = [
    text("one byte of Windows-1252 in a comment", lambda raw: raw + b"# f\xfcr alle\n", "0xfc", "utf-8"),
    text("UTF-16", lambda raw: raw.decode().encode("utf-16"), "utf-16"),
    text("a NUL", lambda raw: raw + b"# \0\n", "not valid YAML"),
    text("a key twice", lambda raw: raw + b"offline: [tiny]\n", "offline", "twice"),
    text("a family twice", lambda raw: raw.replace(b"  tiny:", b"  tiny: {}\n  tiny:"), "families.tiny", "twice"),
    text("nested 100 deep", lambda raw: raw + b"a: " + b"[" * 100 + b"]" * 100, "deep"),
    text("nested 10,000 deep", lambda raw: raw + b"a: " + b"[" * 10_000, "deep"),
    text("a billion values by aliases", lambda raw: _bomb(9), "alias"),
    text("an alias of itself", lambda raw: raw + b"a: &a [*a]\n", "alias"),
    text("merges of merges", lambda raw: _bomb(8).replace(b"[x", b"[{k: 1}") + b"\nz: {<<: *a7}\n", "alias"),
    text("an unknown alias", lambda raw: raw + b"a: *nobody\n", "not valid YAML"),
    text("a tag of Python", lambda raw: raw + b"a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    text("a tab", lambda raw: b"\t" + raw, "not valid YAML"),
    text("a date that is none", lambda raw: raw + b"a: 2026-13-45\n", "cannot be read"),
    text("a number of 5,000 digits", lambda raw: raw + b"a: " + b"9" * 5000 + b"\n", "cannot be read"),
    text("a list", lambda raw: b"- a\n- b\n", "dictionary"),
    text("a word", lambda raw: b"hello\n", "dictionary"),
    text("nothing", lambda raw: b"", "dictionary"),
    text("cut off", lambda raw: raw + b"a: {b: [", "not valid YAML"),
    text("two documents", lambda raw: raw + b"---\na: 1\n", "not valid YAML"),
    text("another file", lambda raw: b"\x89PNG\r\n\x1a\n" + raw, "0x89"),
    text("20 MB", lambda raw: raw + b"# " + b"x" * 20 * 2**20, "bytes"),
]
CASES: list[BadInput] = [*COUNTS, *RATES, *SEEDS, *TOO_MUCH, *OUT_OF_RANGE, *WRONG_KIND, *NAMES, *STAGES, *TEXTS]
