"""Drafting with an independent small model of the same vocabulary: a benchmark's reference row, a chain of K tokens.

The small model decodes as the target does, over a key/value cache of its own that is cut back to the accepted tokens
before each proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specflow.decoding.sampling import Dense, Few, Sampling
from specflow.decoding.verify import Proposal
from specflow.errors import UserError
from specflow.files import sha256_json
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class IndependentDrafter:
    """Takes `model` over: it is optimised for inference in place.

    Under sampling each token is drawn from the small model's own distribution at the same settings, which verification
    is told, so that the target's distribution comes out.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, vocab_size: int | None = None) -> None:
        """`vocab_size`: the target's, where it differs from the model's by padding."""
        self.target = CachedTarget(optimise_for_inference(model), num_rows=1, max_length=max_length)
        own = model.config.get_text_config().vocab_size
        self._num_ids = min(own, vocab_size or own)
        self._target_ids = torch.arange(self._num_ids, device=self.target.device)

    @torch.inference_mode()
    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        """Begin a sequence: everything before the last token goes into the cache."""
        self.target.lengths[0] = 0
        if len(history) > 1:
            self.target.forward(torch.tensor([history[:-1]]))

    @torch.inference_mode()
    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        # Accepted drafts are cached already, rejected ones lie behind: all that agrees is before the last token.
        kept = min(self.target.lengths[0], len(history) - 1)
        self.target.lengths[0] = kept
        following = torch.tensor([history[kept:]])
        tokens: list[Tensor] = []
        draws: list[Dense | Few] = []
        for _ in range(num_tokens):
            hidden = self.target.forward(following)
            logits = self.target.logits(hidden[0, -1:])[:, : self._num_ids]
            if sampling.greedy:
                tokens.append(logits.argmax(-1))
            else:
                token, drawn_from = sampling.draft(logits[0], self._target_ids, generator)
                tokens.append(token)
                draws.append(drawn_from)
            following = tokens[-1][None]
        return Proposal(torch.cat(tokens).tolist(), draws=draws)

    def max_nodes(self, num_tokens: int) -> int:
        return num_tokens


def check_assistant(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError unless the model in `folder` is one whose token ids mean what the target's mean.

    Tables that differ only in unused rows behind the last token are the same vocabulary.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").exists():
        raise UserError(f"assistant {folder} has no config.json: name the folder of a transformers checkpoint")
    try:
        own_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
        own, expected = vocabulary_digest(AutoTokenizer.from_pretrained(folder)), vocabulary_digest(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"assistant {folder} does not load ({reason}): name a causal language model") from None
    if own != expected or min(own_size, vocab_size) < len(tokenizer):
        raise UserError(
            f"assistant {folder} has another vocabulary (digest {own[:12]}, {own_size} ids) than the target (digest "
            f"{expected[:12]}, {vocab_size} ids): use a draft model with the target's tokenizer"
        )


def load_assistant(
    folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, dtype: torch.dtype, device: str = "cpu"
) -> PreTrainedModel:
    """The small model in `folder`, a transformers checkpoint, for a target of this tokenizer and `vocab_size`.

    Raises UserError as `check_assistant` does.
    """
    from transformers import AutoModelForCausalLM

    check_assistant(folder, tokenizer, vocab_size)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"assistant {folder} does not load ({reason}): name a causal language model") from None
    return model.to(device).eval().requires_grad_(False)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what each token id stands for: all that drafting needs two tokenizers to share."""
    return sha256_json(sorted(tokenizer.get_vocab().items()))
