"""A tiny target and a tiny draft that speak the same vocabulary, for tests of drafting and verification."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.sampling import Sampling
from specflow.decoding.verify import Proposal
from specflow.drafters.eagle3 import DraftCache, Eagle3Config, Eagle3Draft
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget

V, H, AUX = 64, 32, [0, 1, 2]
PROMPT = [5, 9, 2, 40, 7, 7, 31]
_SHAPE = {"hidden_size": H, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def make_llama(
    vocab_size: int = V,
    *,
    seed: int = 0,
    num_layers: int = 4,
    num_heads: int = 4,
    hidden_size: int = H,
    spread: float = 1.5,
    noise: float = 0.0,
) -> LlamaForCausalLM:
    """Weights so wide that the greedy choice depends on the context; a smaller `spread` of the head flattens it.

    With `noise`, relative to the weights, a model that often agrees with the one without.
    """
    config = LlamaConfig(
        **(_SHAPE | {"num_attention_heads": num_heads, "hidden_size": hidden_size}),
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            scale = spread if "lm_head" in name else 1.5
            weight.normal_(0.0, 1.0 if "embed" in name else scale / weight.shape[1] ** 0.5, generator=generator)
    for weight in model.parameters():
        if weight.ndim == 2 and noise > 0:
            weight += torch.randn(weight.shape, generator=generator) * weight.std() * noise
    return model


def make_target(model: LlamaForCausalLM | None = None, *, num_rows: int = 1, max_length: int = 200) -> CachedTarget:
    model = optimise_for_inference(model or make_llama())
    return CachedTarget(model, num_rows=num_rows, max_length=max_length, aux_layer_ids=AUX)


def make_draft(
    vocab_size: int = V, *, draft_vocab_size: int | None = None, seed: int = 1, **changes: object
) -> Eagle3Draft:
    """A random draft of the tiny target, which knows some tokens of the vocabulary (None: all)."""
    known = draft_vocab_size or vocab_size
    config = Eagle3Config(
        **_SHAPE,
        target_hidden_size=H,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        rope_parameters=_ROPE,
        vocab_size=vocab_size,
        draft_vocab_size=known,
        aux_layer_ids=AUX,
    ).model_copy(update=changes)
    draft = Eagle3Draft(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5, generator=generator)
    chosen = torch.randperm(vocab_size, generator=generator)[:known].sort().values
    draft.d2t.copy_(chosen - torch.arange(known))
    draft.t2d[chosen] = True
    return draft


def make_session(target: CachedTarget, seed: int = 1, draft_vocab_size: int | None = None) -> Eagle3Session:
    table = target.model.get_input_embeddings().weight
    return Eagle3Session(make_draft(len(table), draft_vocab_size=draft_vocab_size, seed=seed), table, target.max_length)


class Scratch:
    """Logits of a draft after any path of drafted tokens, computed from scratch each time: the slow reference."""

    def __init__(self, draft: Eagle3Draft, table: Tensor, history: list[int], aux: Tensor) -> None:
        """`aux` are the rows of all positions before the last token of `history`."""
        self.draft, self.table, self.history, self.aux = draft, table, history, aux

    def logits(self, path: Sequence[int]) -> Tensor:
        """[D] after the drafted tokens `path`, one row at a time: row t reads aux_t and the token at t + 1."""
        cache = DraftCache(self.draft.config, 200, torch.float32)
        hidden = self.draft.decode(self.table[torch.tensor(self.history[1:])], self.draft.project(self.aux), cache)[-1:]
        for token in path:
            hidden = self.draft.decode(self.table[torch.tensor([token])], hidden, cache)
        return self.draft.logits(hidden)[0]

    def token(self, draft_id: int) -> int:
        return draft_id + int(self.draft.d2t[draft_id])

    def chain(self, num_tokens: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(num_tokens):
            tokens.append(self.token(int(self.logits(tokens).argmax())))
        return tokens


class KnownTree:
    """Drafts the known continuation along one path of a tree, right down to depth `num_right` (None: as far as the path
    goes); all other nodes are wrong. Tree and path are random at each step, unless parents and path are given.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        answer: list[int],
        num_right: int | None,
        num_nodes: int = 12,
        shape: tuple[list[int], list[int]] | None = None,
        vocab_size: int = V,
    ) -> None:
        self.start_at, self.answer, self.num_right, self.shape = len(prompt), answer, num_right, shape
        self.num_nodes, self.vocab_size = num_nodes if shape is None else len(shape[0]), vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.expected: list[list[int]] = []  # the path that has to be accepted, step by step

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        assert aux is None or len(aux) == len(history) - 1

    def max_nodes(self, num_tokens: int) -> int:
        return self.num_nodes

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        def number(below: int) -> int:
            return int(torch.randint(below, (), generator=self.generator))

        at, size = len(history) - self.start_at, self.vocab_size
        right = (self.answer + [0] * (self.num_nodes + 1))[at:]
        if self.shape is None:
            parents = [number(node + 1) - 1 for node in range(self.num_nodes)]
            path = [number(self.num_nodes)]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
        else:
            parents, path = self.shape
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        num_right = len(path) if self.num_right is None else min(self.num_right, len(path))
        self.expected.append(path[:num_right])
        tokens = [
            right[depths[node]] if node in path[:num_right] else (right[depths[node]] + 1 + number(size - 2)) % size
            for node in range(self.num_nodes)
        ]
        return Proposal(tokens, parents)


def fits(observed: np.ndarray, chances: np.ndarray) -> float:
    """p-value of counts under probabilities; rare outcomes are counted together."""
    expected = chances.ravel() * observed.sum() / chances.sum()
    rare = expected < 5
    cells = [(*map(np.sum, (observed.ravel()[rare], expected[rare])),)] if expected[rare].sum() > 0 else []
    cells += list(itertools.compress(zip(observed.ravel(), expected, strict=True), ~rare))
    got, wanted = np.array(cells).T
    return float(chisquare(got, wanted * got.sum() / wanted.sum()).pvalue)


def sequence(length: int) -> tuple[list[int], torch.Tensor]:
    """Tokens and the aux rows of all but the last."""
    generator = torch.Generator().manual_seed(5)
    history = torch.randint(0, V, (length,), generator=generator).tolist()
    return history, torch.randn(length - 1, 3 * H, generator=generator)
