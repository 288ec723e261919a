"""The target model as files: facts recorded by `fetch`, and the parts of it that stages load.

The one place that knows layer numbering: an aux layer id k is the residual stream after k decoder layers, 0 being the
embeddings (vLLM's convention; transformers' `hidden_states[k]` for k < n). SpecForge's and SGLang's id is k - 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from specflow.errors import UserError, explained
from specflow.files import digest_of, read_json, sha256_json
from specflow.paths import outside
from specflow.targets.date import with_fixed_date
from specflow.targets.weights import read_tensor, stored_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specflow.config import Extract


class TargetFacts(BaseModel):
    """target.json: identity and shape of a fetched target. Written by `fetch`, read by every later stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    revision: str
    digest: str
    """sha256 over the digests of the weight and config files: the target's identity."""
    folder: str
    """Folder of a transformers checkpoint, relative to the cache folder (absolute for `file:` sources)."""
    files: dict[str, str]
    """sha256 of each file."""
    tokenizer_digest: str
    template_digest: str
    architecture: str
    model_type: str
    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    lm_head_key: str
    embedding_key: str
    eos_token_ids: list[int]
    dtype: str
    quantisation: str | None = None
    """How the weights are packed (fp8, compressed-tensors); such a target runs in vLLM only."""
    chat_template: str | None = None
    """Path of a template file that replaces the tokenizer's."""
    template_options: dict[str, bool | int | str] = {}
    template_date: str | None = None
    """What a template that prints today's date prints instead (date.py); None where it prints none."""
    trust_remote_code: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What results of this target depend on: weights, tokenizer, template, dtype and end tokens."""
        return self.model_dump(
            include={"digest", "tokenizer_digest", "template_digest", "template_options", "dtype", "eos_token_ids"}
        )

    def path(self, cache: Path) -> Path:
        folder = cache / self.folder
        if not (folder / "config.json").exists():
            raise UserError(
                f"target folder {folder} is gone from the cache: run `dvc repro -f fetch@<family>` to fetch it"
            )
        check_unchanged(self, cache)
        return folder

    def default_aux_layer_ids(self) -> list[int]:
        """(2, n//2, n-3), the EAGLE-3 default in vLLM's numbering; SpecForge's [1, n//2-1, n-4] are the same
        tensors.
        """
        n = self.num_hidden_layers
        ids = sorted({min(2, n), n // 2, max(n - 3, 0)})
        return ids if len(ids) == 3 else list(range(max(n - 2, 0), n + 1))[-3:]


def check_unchanged(facts: TargetFacts, cache: Path) -> None:
    """Raise UserError naming the first file of the target that is not, or no longer, the one that `fetch` recorded.

    Cheap where nothing changed: digests are remembered by size and times.
    """
    for name, digest in facts.files.items():
        file = cache / facts.folder / name
        if not file.is_file():
            raise UserError(f"target file {file} is gone since it was fetched: run `dvc repro`, or put it back")
        if digest_of(file, cache) != digest:
            raise UserError(
                f"target file {file} changed since it was fetched: run `dvc repro`, which takes what is there now"
            )


def read_facts(path: Path) -> TargetFacts:
    return TargetFacts.model_validate(read_json(path, what="target facts", made_by="specflow fetch <family>"))


def resolve_aux_layer_ids(facts: TargetFacts, settings: Extract) -> list[int]:
    """Ascending layer ids to capture. Raises UserError for ids given twice, out of range, or none at all."""
    given = facts.default_aux_layer_ids() if settings.aux_layer_ids is None else settings.aux_layer_ids
    ids = sorted(set(given))
    n = facts.num_hidden_layers
    if not ids or len(ids) != len(given) or ids[-1] > n:
        raise UserError(
            f"extract.aux_layer_ids is {given}: give distinct ids within 0..{n} "
            "(residual after k layers, 0 = embeddings)"
        )
    return ids


def load_model(facts: TargetFacts, cache: Path, *, device: str = "cpu") -> PreTrainedModel:
    """Load the target in its dtype, in eval mode, gradients off. Device "auto": its layers over all visible GPUs.

    Raises UserError for a quantised target.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if facts.quantisation is not None:
        raise UserError(
            f"target {facts.source} is quantised ({facts.quantisation}), which runs through vLLM only: set the engines "
            "of sample and extract to vllm, measure with `specflow bench-served`, or name the unquantised checkpoint"
        )
    spread: dict[str, Any] = {"device_map": "balanced"} if device == "auto" else {}
    model = AutoModelForCausalLM.from_pretrained(
        facts.path(cache),
        dtype=getattr(torch, facts.dtype),
        trust_remote_code=facts.trust_remote_code,
        attn_implementation="sdpa",
        **spread,
    )
    return (model if spread else model.to(device)).eval().requires_grad_(False)


def load_tokenizer(facts: TargetFacts, cache: Path) -> PreTrainedTokenizerBase:
    """The target's tokenizer, with the family's chat template where it names one. Raises UserError without any."""
    from transformers import AutoTokenizer

    folder = facts.path(cache)
    cure = "put the model's tokenizer files there, whole and in UTF-8"
    with explained(f"transformers cannot load the tokenizer in {folder}", cure):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=facts.trust_remote_code)
    tokenizer.chat_template = _template_of(tokenizer, facts)
    if facts.template_options:  # set in the template itself: all who render it, and its digest, see the same
        options = "".join(f"{{%- set {k} = {json.dumps(v)} -%}}" for k, v in facts.template_options.items())
        tokenizer.chat_template = options + tokenizer.chat_template
    tokenizer.chat_template = with_fixed_date(tokenizer.chat_template)
    if facts.template_digest not in ("", sha256_json(tokenizer.chat_template)):  # fetch itself does not know it yet
        raise UserError(f"the chat template of {facts.source} changed since it was fetched: run `dvc repro`")
    return tokenizer


def _template_of(tokenizer: PreTrainedTokenizerBase, facts: TargetFacts) -> str:
    """The family's own template or the tokenizer's, of several named ones that called default, as servers take it."""
    if facts.chat_template is not None:
        path = outside(facts.chat_template)
        if not path.is_file():
            raise UserError(f"target.chat_template {path} does not exist: name a Jinja file of this project")
        try:
            return path.read_text(encoding="utf-8-sig")  # a mark at the start would begin every prompt
        except UnicodeDecodeError as error:
            raise UserError(
                f"target.chat_template {path} is not UTF-8 text ({error.reason} at byte {error.start}): "
                "save it as UTF-8"
            ) from None
    template: Any = tokenizer.chat_template
    if isinstance(template, dict) and template and "default" not in template:
        raise UserError(
            f"tokenizer of {facts.source} has chat templates {sorted(template)} and none called default: name a Jinja "
            "file in this family's target.chat_template"
        )
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise UserError(
            f"tokenizer of {facts.source} has no chat template: name a Jinja file in this family's target.chat_template"
        )
    if not isinstance(template, str):
        raise UserError(
            f"tokenizer of {facts.source} has {type(template).__name__} for a chat template, expected text: name a "
            "Jinja file in this family's target.chat_template"
        )
    return template.removeprefix("\ufeff")


def server_template(facts: TargetFacts, cache: Path) -> str:
    """The chat template for a server that renders it itself: without template_options, which a request may set."""
    return str(
        load_tokenizer(facts.model_copy(update={"template_options": {}, "template_digest": ""}), cache).chat_template
    )


def load_tensor(facts: TargetFacts, cache: Path, key: str) -> torch.Tensor:
    """One tensor of the checkpoint, single-file or sharded, without loading the rest. Dtype as stored."""
    return read_tensor(facts.path(cache), key)


def tensor_names(facts: TargetFacts, cache: Path) -> list[str]:
    """Names of all tensors of the checkpoint, from the headers alone."""
    return list(stored_tensors(facts.path(cache)))


def load_lm_head(facts: TargetFacts, cache: Path) -> torch.Tensor:
    """Output head [vocab_size, hidden_size], tied or not, in the target's dtype."""
    import torch

    return load_tensor(facts, cache, facts.lm_head_key).to(getattr(torch, facts.dtype))


def load_embedding(facts: TargetFacts, cache: Path) -> torch.Tensor:
    """Input embedding [vocab_size, hidden_size] in the target's dtype."""
    import torch

    return load_tensor(facts, cache, facts.embedding_key).to(getattr(torch, facts.dtype))


def attention_of(config: Any) -> tuple[int | None, set[str]]:
    """Sliding window in tokens (None: every layer sees everything) and the types of the layers of a text config.

    No types: all layers are alike, as in Mistral, whose every layer slides where a window is set. Raises UserError for
    layers that are not attention, or whose attention is neither full nor sliding.
    """
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise UserError(f"target has layers of type {sorted(unknown)}: specflow knows full and sliding attention")
    window = getattr(config, "sliding_window", None)
    return (None if types == {"full_attention"} else window), types


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The text decoder (embeddings, layers, final norm) without the output head."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise UserError(
            f"{type(model).__name__} has no list of decoder layers: this architecture cannot be captured yet"
        )
    return decoder
