"""Stage `fetch`: the target and every data file on this disk, and target.json with the target's facts.

A GGUF target is dequantised once into a safetensors checkpoint that any engine loads. After this stage no
later one needs the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.config import Family, Params, Target
from specflow.errors import UserError, explained
from specflow.files import atomic_path, digest_of, sha256_json, write_json
from specflow.paths import Paths
from specflow.sources import resolve
from specflow.targets.checkpoint import check_whole
from specflow.targets.date import ASKS_DATE, FIXED_DATE
from specflow.targets.model import TargetFacts, load_tokenizer, resolve_aux_layer_ids
from specflow.targets.parts import check_parts
from specflow.targets.supported import check_supported, quantisation, read_config, shape_facts
from specflow.targets.template import end_of_turn
from specflow.targets.weights import INDEX, SINGLE, read_json_object, stored_tensors, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger("specflow")
_GGUF_CONVERSION = 1
"""Raise when the conversion changes: part of the key of converted checkpoints."""
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"}
_TOKENIZER_FILES |= {"vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"}
_CONFIG_FILES = {"config.json", "generation_config.json"}


def run(
    name: str, family: Family, params: Params, paths: Paths, log: Callable[[dict[str, float], int], None]
) -> dict[str, float]:
    """Fetch target, data sources and prompt sets into the cache; write target.json."""
    folder = fetch_target(family.target, paths.cache)
    facts = read_checkpoint(family.target, folder, paths.cache)
    check_family(family, facts, online=name in params.online)
    if family.train.init_from is None:
        check_parts(family.train, facts, stored_tensors(folder))
    others = [resolve(source, paths.cache) for source in (*family.data.sources, *params.prompt_sets.values())]
    write_json(paths.target, facts.model_dump())
    return {
        "target_parameters": facts.num_parameters,
        "target_bytes": sum((folder / file).stat().st_size for file in facts.files),
        "source_bytes": sum(_size(path) for path in others),
    }


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def check_family(family: Family, facts: TargetFacts, *, online: bool) -> None:
    """Raise UserError for settings of later stages that this target rules out, before hours are spent on them."""
    resolve_aux_layer_ids(facts, family.extract)
    if (size := family.vocab.draft_vocab_size) > facts.vocab_size:
        raise UserError(f"vocab.draft_vocab_size is {size}, more than the target's {facts.vocab_size} tokens: lower it")
    if facts.quantisation is None:
        return
    here = [
        f"{name}.engine transformers"
        for name, settings in (("sample", family.sample), ("extract", family.extract))
        if settings.engine == "transformers"
    ]
    here += ["train_online"] if online else []
    if here:
        raise UserError(
            f"target is quantised ({facts.quantisation}), which runs through vLLM only, not in this process as by "
            f"{' and '.join(here)}: set the engines to vllm and list the family in offline, or name the unquantised "
            "checkpoint"
        )
    logger.warning(
        "target is quantised (%s): stage bench, which runs it in its own process, will refuse it; `specflow "
        "bench-served` measures it",
        facts.quantisation,
    )


def fetch_target(target: Target, cache: Path) -> Path:
    """Folder of the target as a safetensors checkpoint."""
    path = resolve(target, cache)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{target.parts[0]} has no config.json: name the folder of a transformers checkpoint")
        return path
    if not path.is_file():
        raise UserError(f"{target.parts[0]} is neither a file nor a folder: name a checkpoint")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(
                f"{target.parts[0]} is neither a checkpoint folder nor a GGUF file: name one of these as target"
            )
    key = sha256_json({"gguf": digest_of(path, cache), "conversion": _GGUF_CONVERSION})[:16]
    folder = cache / "targets" / key
    if not folder.exists():
        with atomic_path(folder) as temporary:
            _dequantise(path, temporary)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explained(f"transformers cannot read {gguf.name}", "use a whole GGUF of an architecture that it supports"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now; what says otherwise would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_checkpoint(target: Target, folder: Path, cache: Path) -> TargetFacts:
    """Facts of the checkpoint in `folder`, checked whole: weights by their headers, tokenizer and template by use.

    Raises UserError for whatever would stop a later stage or make it wrong.
    """
    num_tensors = len(stored_tensors(folder))
    trust = target.trust_remote_code
    config = read_config(folder, trust_remote_code=trust, num_tensors=num_tensors)
    text = config.get_text_config()
    check_supported(config, remote_code=trust)
    quantised = quantisation(config)
    model = check_whole(folder, config, trust_remote_code=trust, quantised=quantised is not None)
    files = _digests(folder, cache)
    facts = TargetFacts(
        source=" + ".join(target.parts),
        revision=_revision(target, folder, cache),
        digest=sha256_json({file: files[file] for file in files if file not in _TOKENIZER_FILES}),
        folder=str(folder.relative_to(cache) if folder.is_relative_to(cache) else folder),
        files=files,
        tokenizer_digest=sha256_json({file: files[file] for file in files if file in _TOKENIZER_FILES}),
        template_digest="",
        architecture=(config.architectures or [type(text).__name__])[0],
        **vars(model),
        **shape_facts(text),
        eos_token_ids=[],
        dtype=target.dtype,
        quantisation=quantised,
        chat_template=target.chat_template,
        template_options=target.template_options,
        trust_remote_code=trust,
    )
    _check_tokenizer_files(folder)
    tokenizer = load_tokenizer(facts, cache)
    _check_tokenizer(tokenizer, facts)
    return facts.model_copy(
        update={
            "template_digest": sha256_json(tokenizer.chat_template),
            "template_date": FIXED_DATE if ASKS_DATE in tokenizer.chat_template else None,
            "eos_token_ids": _stop_ids(folder, text, tokenizer),
        }
    )


def _check_tokenizer_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): put the model's own there")
    for name in sorted(_TOKENIZER_FILES):
        if name.endswith(".json") and (folder / name).is_file():
            read_json_object(folder / name)


def _check_tokenizer(tokenizer: Any, facts: TargetFacts) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer of {facts.source} has no tokenizer.json (fast form), which loss masks need: add one"
        )
    added = set(tokenizer.added_tokens_decoder)  # some have an id for images, which text never has, behind the table
    largest = max(set(tokenizer.get_vocab().values()) - added, default=None)
    if largest is None or largest >= facts.vocab_size:
        got = "no tokens" if largest is None else f"tokens up to id {largest}"
        raise UserError(
            f"tokenizer of {facts.source} has {got}, the model's embedding {facts.vocab_size} rows: "
            "put the model's own tokenizer in its folder"
        )


def _revision(target: Target, folder: Path, cache: Path) -> str:
    """Commit of a hub snapshot, digest of a file, or `local` for a folder that its file digests identify."""
    if target.parts[0].startswith("hf:"):
        return folder.name
    path = resolve(target, cache)
    return "local" if path.is_dir() else digest_of(path, cache)


def _digests(folder: Path, cache: Path) -> dict[str, str]:
    """sha256 by file name of the weights that are loaded, configs and tokenizer files."""
    weights = {file.name for file in weight_files(folder)}
    index = set() if weights == {SINGLE} else {INDEX}
    names = weights | index | _TOKENIZER_FILES | _CONFIG_FILES
    return {name: digest_of(folder / name, cache) for name in sorted(names) if (folder / name).is_file()}


def _stop_ids(folder: Path, config: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that end an answer: of the generation config, else the config; tokenizer; chat template."""
    from transformers import GenerationConfig

    stop = config.eos_token_id
    if (path := folder / "generation_config.json").is_file():
        read_json_object(path)
        with explained(f"transformers cannot read {path}", "correct it, or fetch it again"):
            generation = GenerationConfig.from_pretrained(folder)
        stop = generation.eos_token_id if generation.eos_token_id is not None else stop
    ids = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id, end_of_turn(tokenizer)}
    ids -= {None}
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < config.vocab_size]:
        raise UserError(
            f"{folder} names {wrong[0]!r} as an end token (eos_token_id), the model has {config.vocab_size} tokens: "
            "correct config.json, generation_config.json or the tokenizer"
        )
    return sorted(ids)
