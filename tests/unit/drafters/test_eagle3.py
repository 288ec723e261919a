"""The draft model against a reference written from the definition: explicit loops, fp64, no code shared with it."""

import math

import pytest
import torch

from specflow.drafters.eagle3 import DraftCache, Eagle3Config, Eagle3Draft, load_draft, save_draft
from specflow.errors import UserError
from specflow.training.packing import Document, pack

CONFIG = Eagle3Config(
    hidden_size=24,
    target_hidden_size=20,
    intermediate_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    vocab_size=50,
    draft_vocab_size=30,
    aux_layer_ids=[1, 2, 4],
)


def make_draft(seed: int = 0, dtype: torch.dtype = torch.float64) -> Eagle3Draft:
    torch.manual_seed(seed)
    draft = Eagle3Draft(CONFIG)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chosen = torch.randperm(CONFIG.vocab_size)[: CONFIG.draft_vocab_size].sort().values
    draft.d2t.copy_(chosen - torch.arange(len(chosen)))
    draft.t2d[chosen] = True
    return draft.to(dtype)


def make_document(length: int, spans: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float64) -> Document:
    g = torch.Generator().manual_seed(seed)
    width = CONFIG.target_hidden_size
    return Document(
        str(seed),
        torch.randint(CONFIG.vocab_size, (length,), generator=g),
        torch.randn(length, 3 * width, generator=g, dtype=dtype),
        torch.randn(length, width, generator=g, dtype=dtype),
        spans,
    )


def rms(x, weight):
    return [
        v * w / math.sqrt(sum(u * u for u in x) / len(x) + CONFIG.rms_norm_eps) for v, w in zip(x, weight, strict=True)
    ]


def mat(weight, x):
    return [sum(a * b for a, b in zip(row, x, strict=True)) for row in weight]


def rotate(head, position):
    half = len(head) // 2
    out = list(head)
    for i in range(half):
        angle = position * CONFIG.rope_parameters["rope_theta"] ** (-2 * i / len(head))
        a, b = head[i], head[i + half]
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def reference(draft: Eagle3Draft, document: Document, embedding, steps: int):
    """Recycled states by [step][row] for every row of one document, and their logits: loops over scalars."""
    w = {name: tensor.tolist() for name, tensor in draft.state_dict().items()}
    tokens, aux, table = document.token_ids.tolist(), document.aux.tolist(), embedding.tolist()
    hd, heads, kv = CONFIG.head_dim, CONFIG.num_attention_heads, CONFIG.num_key_value_heads

    def split(x):
        return [x[i : i + hd] for i in range(0, len(x), hd)]

    hidden = [mat(w["fc.weight"], row) for row in aux]
    keys = [[] for _ in tokens]  # keys[t][k]: (per kv head) of row t at step k
    values = [[] for _ in tokens]
    states, logits = [], []
    for k in range(steps):
        queries, new = [], []
        for t in range(len(tokens)):
            token = tokens[min(t + 1 + k, len(tokens) - 1)]
            x = rms(table[token], w["input_layernorm.weight"]) + rms(hidden[t], w["hidden_norm.weight"])
            queries.append([rotate(head, t + k) for head in split(mat(w["q_proj.weight"], x))])
            keys[t].append([rotate(head, t + k) for head in split(mat(w["k_proj.weight"], x))])
            values[t].append(split(mat(w["v_proj.weight"], x)))
        for t in range(len(tokens)):
            seen = [(keys[s][0], values[s][0]) for s in range(t + 1)]
            seen += [(keys[t][i], values[t][i]) for i in range(1, k + 1)]
            attended = []
            for h in range(heads):
                group = h // (heads // kv)
                scores = [
                    sum(a * b for a, b in zip(queries[t][h], key[group], strict=True)) / math.sqrt(hd)
                    for key, _ in seen
                ]
                weights = [math.exp(s - max(scores)) for s in scores]
                attended += [
                    sum(wt * value[group][d] for wt, (_, value) in zip(weights, seen, strict=True)) / sum(weights)
                    for d in range(hd)
                ]
            middle = [a + b for a, b in zip(hidden[t], mat(w["o_proj.weight"], attended), strict=True)]
            x = rms(middle, w["post_attention_layernorm.weight"])
            gate, up = mat(w["gate_proj.weight"], x), mat(w["up_proj.weight"], x)
            mlp = mat(w["down_proj.weight"], [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
            new.append([a + b for a, b in zip(middle, mlp, strict=True)])
        hidden = new
        states.append(hidden)
        logits.append([mat(w["lm_head.weight"], rms(row, w["norm.weight"])) for row in hidden])
    return torch.tensor(states, dtype=torch.float64), torch.tensor(logits, dtype=torch.float64)


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(
        CONFIG.vocab_size, CONFIG.hidden_size, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )


def test_unroll_equals_the_definition_in_fp64(embedding):
    draft, document = make_draft(), make_document(11, [(3, 7), (9, 11)], seed=1)
    states, logits = reference(draft, document, embedding, steps=3)
    batch = pack([document], ttt_steps=3)
    for k, hidden in enumerate(draft.unroll(batch.rows, embedding)):
        supervised = batch.rows.queries[batch.supervised[k]]
        assert torch.allclose(hidden[batch.supervised[k]], states[k, supervised], atol=1e-12)
        assert torch.allclose(draft.logits(hidden[batch.supervised[k]]), logits[k, supervised], atol=1e-11)


def test_chain_drafting_equals_training_time_test_step_for_step(embedding):
    """Step k of training is step k of serving on the same tokens: same positions, keys and recycled states."""
    draft, document = make_draft(), make_document(12, [(1, 12)], seed=2)
    batch = pack([document], ttt_steps=4)
    steps = draft.unroll(batch.rows, embedding)
    ids = document.token_ids
    for start in (2, 5, 7):  # the chain's first row: all rows up to it come from the target
        cache = DraftCache(CONFIG, 32, torch.float64)
        hidden = draft.decode(embedding[ids[1 : start + 2]], draft.project(document.aux[: start + 1]), cache)[-1:]
        for k in range(4):
            query = int((batch.rows.queries == start).nonzero())
            assert torch.allclose(hidden[0], steps[k][query], atol=1e-12), (start, k)
            if k < 3:
                hidden = draft.decode(embedding[ids[start + 2 + k]][None], hidden, cache)


def test_packed_documents_equal_each_on_its_own(embedding):
    draft = make_draft()
    documents = [make_document(n, [(2, n - 1)], seed=n) for n in (9, 14, 6)]
    packed = pack(documents, 3)
    together = draft.unroll(packed.rows, embedding)
    offset = 0
    for document in documents:
        single = pack([document], 3)
        alone = draft.unroll(single.rows, embedding)
        count = len(single.rows.queries)
        for k in range(3):
            assert torch.allclose(together[k][offset : offset + count], alone[k], atol=1e-12)
        offset += count
    assert offset == len(packed.rows.queries)


def test_save_and_load_give_equal_tensors_and_a_damaged_file_is_one_line(tmp_path):
    draft = make_draft(dtype=torch.float32)
    save_draft(draft, tmp_path / "draft")
    back = load_draft(tmp_path / "draft")
    assert back.config == CONFIG
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in draft.state_dict().items())
    (tmp_path / "draft" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="train it again"):
        load_draft(tmp_path / "draft")


def test_rope_whose_angles_depend_on_length_is_refused():
    with pytest.raises(UserError, match="dynamic"):
        Eagle3Draft(
            CONFIG.model_copy(update={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
        )


def test_a_full_draft_cache_is_one_line(embedding):
    draft = make_draft()
    cache = DraftCache(CONFIG, 3, torch.float64)
    with pytest.raises(UserError, match="4 draft rows do not fit"):
        draft.decode(embedding[:4], torch.zeros(4, CONFIG.hidden_size, dtype=torch.float64), cache)
