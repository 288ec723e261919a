"""Trees in the target's cache: the mask, states equal to those of separate chains, keys after compaction."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specflow.errors import UserError
from specflow.targets.attention import GROUPED, optimise_for_inference
from specflow.targets.cached import CachedTarget, tree_layout
from tests.decoding import AUX, make_llama
from tests.toys import make_tiny_gemma

PREFIX = [5, 9, 2, 40, 7, 7, 31, 12, 50, 3, 17, 22, 8, 8, 41, 60, 11, 29, 35, 2]


def random_parents(num_nodes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, node, (), generator=generator)) if node else -1 for node in range(num_nodes)]


def path_to(node: int, parents: list[int]) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


@pytest.fixture(scope="module", params=["grouped", "grouped and fused", "one head each", "sliding window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Attention as transformers has it, folded over two and four query heads, and with windows of 16 tokens."""
    if request.param == "sliding window":
        folder = make_tiny_gemma(tmp_path_factory.mktemp("gemma"))
        made = optimise_for_inference(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval())
        assert made.config._attn_implementation == GROUPED and made.config.sliding_window < len(PREFIX)
        return made
    made = make_llama(num_heads=2 if request.param == "one head each" else 4)
    return optimise_for_inference(made) if request.param != "grouped" else made


def make_target(model: PreTrainedModel) -> CachedTarget:
    return CachedTarget(model, num_rows=1, max_length=120, aux_layer_ids=AUX)


def keys_and_values(target: CachedTarget) -> torch.Tensor:
    """[layers, 2, heads, length, head_dim] of the one row."""
    length = target.lengths[0]
    both = [torch.stack((layer.keys[0], layer.values[0])) for layer in target._cache.layers]
    return torch.stack(both)[:, :, :, :length].clone()


def test_layout_is_what_walking_up_gives() -> None:
    for num_nodes in (0, 1, 2, 7, 40):
        parents = random_parents(num_nodes, num_nodes)
        depths, sees = tree_layout(tuple(parents))
        paths = [[], *(path_to(node, parents) for node in range(num_nodes))]
        assert depths.tolist() == [len(path) for path in paths]
        for i, path in enumerate(paths):
            assert sees[i].nonzero()[:, 0].tolist() == sorted([0, *(node + 1 for node in path)])


def test_a_node_before_its_parent_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="after its parent"):
        tree_layout((1, -1))


DEEP = [*[-1] * 10, *range(9, 34)]  # a path longer than a sliding window, behind ten leaves


@pytest.mark.parametrize(
    "parents", [random_parents(n, n) for n in (1, 6, 14, 45)] + [DEEP], ids=lambda parents: f"{len(parents)} nodes"
)
def test_a_tree_is_all_its_paths_at_once(model: PreTrainedModel, parents: list[int]) -> None:
    """States and aux streams of every node, against one forward per leaf over prefix and path as plain tokens."""
    num_nodes = len(parents)
    tokens = torch.randint(3, 60, (num_nodes,), generator=torch.Generator().manual_seed(1)).tolist()
    tree, chain = make_target(model), make_target(model)
    tree.forward(torch.tensor([PREFIX[:-1]]))
    states = tree.forward(torch.tensor([[PREFIX[-1], *tokens]]), parents=parents)[0]
    aux = tree.aux()[0]  # now: hooks on the model that both targets share hear the other's forwards too
    seen = set()
    for leaf in set(range(num_nodes)) - set(parents):
        path = path_to(leaf, parents)
        chain.lengths[0] = 0
        expected = chain.forward(torch.tensor([PREFIX + [tokens[node] for node in path]]))[0, len(PREFIX) - 1 :]
        rows = [0, *(node + 1 for node in path)]
        torch.testing.assert_close(states[rows], expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(aux[rows], chain.aux()[0, len(PREFIX) - 1 :], rtol=1e-4, atol=1e-4)
        seen.update(rows)
    assert seen == set(range(num_nodes + 1))


@pytest.mark.parametrize("path", [[], [0], [0, 2], [1], [1, 4, 5], [0, 2, 6], [3]], ids=str)
def test_what_is_kept_equals_a_fresh_prefill(model: PreTrainedModel, path: list[int]) -> None:
    """Keys and values: bitwise those the tree wrote, moved; as close to a prefill as another shape of product allows.
    Then the next tokens see the same.
    """
    parents, tokens = [-1, -1, 0, -1, 1, 4, 2], [33, 14, 52, 27, 9, 44, 38]
    assert all(parents[node] == before for before, node in zip([-1, *path], path, strict=False))
    tree, fresh = make_target(model), make_target(model)
    tree.forward(torch.tensor([PREFIX[:-1]]))
    tree.forward(torch.tensor([[PREFIX[-1], *tokens]]), parents=parents)
    written, aux = keys_and_values(tree), tree.aux()[0]
    tree.keep(path)
    rows = [0, *(node + 1 for node in path)]
    slots = [*range(len(PREFIX) - 1), *(len(PREFIX) - 1 + row for row in rows)]
    assert torch.equal(keys_and_values(tree), written[:, :, :, slots])
    assert torch.equal(tree.aux()[0], aux[rows])

    kept = PREFIX + [tokens[node] for node in path]
    fresh.forward(torch.tensor([kept]))
    assert tree.lengths == fresh.lengths == [len(kept)]
    torch.testing.assert_close(keys_and_values(tree), keys_and_values(fresh), rtol=1e-4, atol=2e-5)
    for step in ([4], [30, 21, 19]):
        got, expected = (target.forward(torch.tensor([step])) for target in (tree, fresh))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_a_chain_given_as_a_tree_is_the_chain(model: PreTrainedModel) -> None:
    as_tree, as_chain = make_target(model), make_target(model)
    for target in (as_tree, as_chain):
        target.forward(torch.tensor([PREFIX[:-1]]))
    step = torch.tensor([[PREFIX[-1], 33, 14, 52]])
    got, expected = as_tree.forward(step, parents=[-1, 0, 1]), as_chain.forward(step)
    assert torch.equal(got, expected)
    for target in (as_tree, as_chain):
        target.keep([0, 1])
    assert torch.equal(keys_and_values(as_tree), keys_and_values(as_chain))


def test_more_room_holds_what_was_there(model: PreTrainedModel) -> None:
    small, large = (CachedTarget(model, num_rows=1, max_length=length) for length in (24, 60))
    for target in (small, large):
        target.forward(torch.tensor([PREFIX]))
    with pytest.raises(UserError, match="25 tokens do not fit the cache of 24"):
        small.forward(torch.tensor([[1, 2, 3, 4, 5]]))
    small.reserve(60)
    for target in (small, large):
        target.forward(torch.tensor([[1, 2, 3, 4, 5]]), parents=[-1, -1, 1, 2])
        target.keep([1, 2])
    assert torch.equal(keys_and_values(small), keys_and_values(large))


def test_targets_of_one_model_keep_their_own_states(model: PreTrainedModel) -> None:
    """The model's hooks fire for whoever runs it."""
    alone, one, other = make_target(model), make_target(model), make_target(model)
    for target in (alone, one):
        target.forward(torch.tensor([PREFIX]))
    expected = alone.aux()
    alone.close()
    other.forward(torch.tensor([PREFIX[::-1]]))
    assert torch.equal(one.aux(), expected) and not torch.equal(other.aux(), expected)
    one.keep([0, 1])
    assert torch.equal(one.aux(), expected[:, :3])
