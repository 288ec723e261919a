"""The closed-form start: recovers a linear target exactly, and its folding leaves the draft's function alone."""

import pytest
import torch
from torch.nn import functional as F

from specflow.drafters.eagle3 import Eagle3Draft
from specflow.errors import UserError
from specflow.training.packing import Document, pack
from specflow.training.warmstart import feature_scale, fit_linear
from tests.unit.drafters.test_eagle3 import CONFIG, make_draft
from tests.unit.training.test_loop import make_trainer

WIDTH = CONFIG.hidden_size
# one width, and value heads wide enough to carry any map of the embedding
SQUARE = CONFIG.model_copy(update={"target_hidden_size": WIDTH, "num_key_value_heads": 6})
TABLE = torch.randn(SQUARE.vocab_size, WIDTH, generator=torch.Generator().manual_seed(1))


def linear_target(num_documents=30, length=20):
    """Documents whose post-norm state at t + 1 is norm.weight * (A aux_t + B RMS(e_{t+1})) for hidden A and B."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(WIDTH, 3 * WIDTH, generator=g) / 8, torch.randn(WIDTH, WIDTH, generator=g) / 5
    weight = torch.rand(WIDTH, generator=g) + 0.5
    documents = []
    for number in range(num_documents):
        tokens = torch.randint(SQUARE.vocab_size, (length,), generator=g)
        aux = torch.randn(length, 3 * WIDTH, generator=g)
        final = torch.zeros(length, WIDTH)
        final[1:] = weight * (aux[:-1] @ a.t() + F.rms_norm(TABLE[tokens[1:]], (WIDTH,)) @ b.t())
        documents.append(Document(str(number), tokens, aux, final, [(2, length)]))
    return documents, weight, a


def test_a_linear_target_is_recovered():
    documents, weight, a = linear_target()
    torch.manual_seed(0)
    draft = Eagle3Draft(SQUARE)
    with torch.no_grad():
        draft.norm.weight.copy_(weight)
    assert fit_linear(draft, [pack(documents, 1)], TABLE) > 0.99
    assert torch.allclose(draft.fc.weight, a, atol=0.02)
    # through the layer: rows attend their own token well enough to point where the target points
    batch = pack(documents[:4], 1)
    hidden = draft.norm(draft.unroll(batch.rows, TABLE)[0][batch.supervised[0]])
    assert F.cosine_similarity(hidden, batch.teacher_states[batch.teacher_rows[0]]).mean() > 0.8


def test_scale_is_the_rms_of_each_channel_without_the_sink_rows():
    documents, _, _ = linear_target(num_documents=2)
    documents[0].aux[:4] = 1e4
    batch = pack(documents, 1)
    rows = torch.cat([document.aux[4:] for document in documents])
    assert torch.allclose(feature_scale([batch]), rows.pow(2).mean(0).sqrt())


def test_folding_the_scale_leaves_the_function_alone(tmp_path):
    """Training on scaled features with a scaled fc is the same function; with a zero learning rate nothing moves."""
    trainer = make_trainer(tmp_path, lr=1e-30)
    before = make_draft(dtype=torch.float32)
    assert not torch.allclose(trainer.feature_scale, torch.ones(()), atol=0.05)
    trainer.run()
    assert torch.allclose(trainer.draft.fc.weight, before.fc.weight, atol=1e-6)


def test_other_widths_are_one_line():
    documents, _, _ = linear_target(num_documents=1)
    with pytest.raises(UserError, match="one width, got 24 and 20"):
        fit_linear(make_draft(dtype=torch.float32), [pack(documents, 1)], TABLE)
