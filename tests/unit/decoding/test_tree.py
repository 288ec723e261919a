"""Tree drafting against slow references written from the definitions, one path at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specflow.config_bench import DynamicTree, StaticTree
from specflow.decoding.chain import ChainDrafter
from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.generate import generate
from specflow.decoding.sampling import GREEDY, Sampling
from specflow.decoding.tree import TreeDrafter
from specflow.decoding.verify import Proposal
from specflow.errors import UserError
from tests.decoding import PROMPT, H, Scratch, V, make_draft, make_session, make_target, sequence

D = 16
BRANCHES = [[0, 0], [0], [2], [1], [0, 1, 3], [0, 1], [2, 0], [0, 1, 0], [0, 1, 3, 0], [5]]  # in no order


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(4))


def make_session_of(table: torch.Tensor) -> Eagle3Session:
    return Eagle3Session(make_draft(draft_vocab_size=D), table, 64)


def paths_of(proposal: Proposal) -> list[tuple[int, ...]]:
    """Tokens from the root to each node."""
    assert proposal.parents is not None
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def eagle2(scratch: Scratch, tree: DynamicTree, temperature: float = 1.0) -> set[tuple[int, ...]]:
    """EAGLE-2, section 4, in loops. A node's value is the product of the draft's probabilities on its path. Expansion:
    the top_k nodes of a level by value each get their top_k tokens as children. Reranking: of all nodes ever made the
    total_token - 1 of highest value stay, the shallower first among equals.
    """
    values: dict[tuple[int, ...], float] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(tree.depth):
        children: dict[tuple[int, ...], float] = {}
        for path in level:
            probs = torch.softmax(scratch.logits(path).double() / temperature, -1).tolist()
            for draft_id in sorted(range(len(probs)), key=lambda i: -probs[i])[: tree.top_k]:
                children[(*path, scratch.token(draft_id))] = values.get(path, 1.0) * probs[draft_id]
        values |= children
        level = sorted(children, key=lambda path: -children[path])[: tree.top_k]
    return set(sorted(values, key=lambda path: (-values[path], len(path)))[: tree.total_token - 1])


def static(scratch: Scratch, branches: list[list[int]]) -> set[tuple[int, ...]]:
    """Each node by itself: walk down its ranks."""
    found = set()
    for branch in branches:
        tokens: list[int] = []
        for rank in branch:
            logits = scratch.logits(tokens).tolist()
            tokens.append(scratch.token(sorted(range(len(logits)), key=lambda i: -logits[i])[rank]))
        found.add(tuple(tokens))
    return found


@pytest.mark.parametrize(
    "tree",
    [
        DynamicTree(total_token=8, depth=3, top_k=3),
        DynamicTree(total_token=24, depth=4, top_k=5),
        DynamicTree(total_token=61, depth=5, top_k=4),
        DynamicTree(total_token=500, depth=3, top_k=4),  # more than there is
        DynamicTree(total_token=5, depth=1, top_k=16),
        DynamicTree(total_token=12, depth=4, top_k=2),
    ],
    ids=str,
)
def test_dynamic_tree_is_eagle2s(table: torch.Tensor, tree: DynamicTree) -> None:
    """At several lengths of one sequence, with rows of earlier proposals to forget in between."""
    history, aux = sequence(24)
    drafter = TreeDrafter(make_session_of(table), tree)
    known = 7
    drafter.start(history[: known + 1], aux[:known])
    new = aux[known - 1 : known]
    for grow in [1, 4, 2]:
        proposal = drafter.propose(history[: known + 1], new, tree.depth, GREEDY, None)
        scratch = Scratch(make_draft(draft_vocab_size=D), table, history[: known + 1], aux[:known])
        paths = paths_of(proposal)
        assert set(paths) == eagle2(scratch, tree)
        assert len(set(paths)) == len(paths) <= drafter.max_nodes(tree.depth)
        new, known = aux[known : known + grow], known + grow


def test_dynamic_tree_at_a_temperature_ranks_by_the_probabilities_there(table: torch.Tensor) -> None:
    history, aux = sequence(12)
    tree = DynamicTree(total_token=14, depth=3, top_k=4)
    drafter = TreeDrafter(make_session_of(table), tree)
    scratch = Scratch(make_draft(draft_vocab_size=D), table, history, aux)
    found = {}
    for temperature in (0.2, 1.5):
        drafter.start(history, aux)
        proposal = drafter.propose(history, aux[-1:], 3, Sampling(temperature, 0.9, 2), torch.Generator())
        found[temperature] = set(paths_of(proposal))
        assert found[temperature] == eagle2(scratch, tree, temperature)
        assert not proposal.draws
    assert found[0.2] != found[1.5]


def test_static_tree_takes_the_ranks_it_names(table: torch.Tensor) -> None:
    history, aux = sequence(24)
    tree = StaticTree(branches=BRANCHES)
    drafter = TreeDrafter(make_session_of(table), tree)
    known = 9
    drafter.start(history[: known + 1], aux[:known])
    new = aux[known - 1 : known]
    for grow in [3, 1, 2]:
        proposal = drafter.propose(history[: known + 1], new, 4, GREEDY, None)
        scratch = Scratch(make_draft(draft_vocab_size=D), table, history[: known + 1], aux[:known])
        assert set(paths_of(proposal)) == static(scratch, BRANCHES)
        assert len(proposal.token_ids) == len(BRANCHES) == drafter.max_nodes(4)
        new, known = aux[known : known + grow], known + grow


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_tree_of_one_branch_is_the_chain(table: torch.Tensor, depth: int) -> None:
    history, aux = sequence(12)
    session = make_session_of(table)
    one_branch = [
        ChainDrafter(session),
        TreeDrafter(session, DynamicTree(total_token=depth + 1, depth=depth, top_k=1)),
        TreeDrafter(session, StaticTree(branches=[[0] * (i + 1) for i in range(depth)])),
    ]
    tokens = []
    for drafter in one_branch:
        drafter.start(history, aux)
        proposal = drafter.propose(history, aux[-1:], depth, GREEDY, None)
        tokens.append(proposal.token_ids)
        assert proposal.parents in (None, list(range(-1, depth - 1)))
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == depth


@pytest.mark.parametrize("certain", [False, True])
def test_ancestors_stay_where_paths_are_equally_likely(table: torch.Tensor, certain: bool) -> None:
    """A draft that finds every token equally likely, and one whose first token has probability 1 at every depth, so
    that child and parent tie.
    """
    draft = make_draft(draft_vocab_size=D)
    draft.lm_head.weight.zero_()
    session = Eagle3Session(draft, table, 64)
    if certain:
        head = torch.zeros(1, D)
        head[0, 3] = 200.0
        session.draft.logits = lambda hidden: head.expand(len(hidden), -1)  # type: ignore[method-assign]
    history, aux = sequence(12)
    for total_token in (4, 9, 20):
        tree = DynamicTree(total_token=total_token, depth=3, top_k=3)
        drafter = TreeDrafter(session, tree)
        drafter.start(history, aux)
        proposal = drafter.propose(history, aux[-1:], 3, GREEDY, None)
        assert proposal.parents is not None and len(proposal.token_ids) == total_token - 1
        assert all(-1 <= parent < node for node, parent in enumerate(proposal.parents))
        paths = paths_of(proposal)
        assert len(set(paths)) == len(paths) and max(map(len, paths)) <= 3
        token = 3 + int(draft.d2t[3])
        if certain:
            assert {(token,), (token, token), (token, token, token)} <= set(paths)


class Readings(TorchDispatchMode):
    """Counts operations whose result the host has to wait for on a GPU. A list made of a tensor is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = [a for a in args if isinstance(a, list | tuple) for a in a if getattr(a, "dtype", None) == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "multinomial") or (name == "index" and masks):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_readings_sees_what_waits() -> None:
    with Readings() as readings:
        x = torch.ones(3)
        float(x[0]), x[x > 0], x.nonzero(), torch.multinomial(x, 1)
    assert readings.names == ["_local_scalar_dense", "index", "nonzero", "multinomial"]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.8, 0.9, 5)], ids=str)
def test_the_host_waits_for_no_step_of_a_proposal(table: torch.Tensor, sampling: Sampling, as_gpu: None) -> None:
    """On a GPU, whose path is taken here, it reads the drafted tokens at the end, and nothing before."""
    history, aux = sequence(12)
    session = make_session_of(table)
    drafters = [
        (ChainDrafter(session), 4),
        (TreeDrafter(session, DynamicTree(total_token=14, depth=4, top_k=4)), 4),
        (TreeDrafter(session, StaticTree(branches=BRANCHES)), 4),
    ]
    for drafter, depth in drafters:
        drafter.start(history, aux)
        with Readings() as readings:
            proposal = drafter.propose(history, aux[-1:], depth, sampling, torch.Generator())
        assert readings.names == [] and len(proposal.token_ids) >= 4


def test_drafters_share_a_session_one_after_the_other() -> None:
    target = make_target()

    def steps(drafter: object, depth: int) -> list[tuple[int, int]]:
        return generate(
            target, PROMPT, max_new_tokens=30, eos_ids=(), drafter=drafter, num_speculative_tokens=depth
        ).steps

    tree = DynamicTree(total_token=20, depth=3, top_k=8)
    alone = [steps(ChainDrafter(make_session(target)), 4), steps(TreeDrafter(make_session(target), tree), 3)]
    session = make_session(target)
    chain, branching = ChainDrafter(session), TreeDrafter(session, tree)
    for _ in range(2):
        assert [steps(chain, 4), steps(branching, 3)] == alone


def test_a_tree_larger_than_the_cache_is_one_line() -> None:
    target = make_target(max_length=60)
    tree = DynamicTree(total_token=61, depth=4, top_k=10)
    with pytest.raises(
        UserError, match="prompt of 7 tokens, 20 new and 60 drafted need 87, the context holds 60"
    ) as caught:
        generate(
            target,
            PROMPT,
            max_new_tokens=20,
            eos_ids=(),
            drafter=TreeDrafter(make_session(target), tree),
            num_speculative_tokens=4,
        )
    assert "\n" not in str(caught.value)


def test_a_tree_up_to_the_last_place_of_the_cache() -> None:
    """The draft needs more rows for it than the target has places."""
    target = make_target(max_length=7 + 30 + 20)
    tree = DynamicTree(total_token=21, depth=6, top_k=10)
    drafter = TreeDrafter(make_session(target), tree)
    plain = generate(target, PROMPT, max_new_tokens=30, eos_ids=())
    drafted = generate(target, PROMPT, max_new_tokens=30, eos_ids=(), drafter=drafter, num_speculative_tokens=6)
    assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("tree", "width"),
    [(DynamicTree(total_token=30, depth=2, top_k=17), 17), (StaticTree(branches=[[0], [0, 16]]), 17)],
)
def test_a_tree_wider_than_the_draft_vocabulary_is_refused(
    table: torch.Tensor, tree: DynamicTree | StaticTree, width: int
) -> None:
    with pytest.raises(UserError, match=f"the {width} likeliest tokens of a draft that knows {D}: make it narrower"):
        TreeDrafter(make_session_of(table), tree)
