"""The draft as it decodes on a CPU: the same function as the plain one, in each variant that other trainers write."""

import pytest
import torch

from specflow import kernels
from specflow.drafters.eagle3 import DraftCache, Eagle3Draft, RaggedDraftCache
from specflow.drafters.inference import PreparedDraft, decoding_dtype, place, prepare
from specflow.kernels import PrepackedLinear, fast_bf16
from tests.decoding import make_draft

V = 40
VARIANTS = [
    {},
    {"norm_before_residual": True},
    {"norm_output": True},
    {"fc_norm": True, "norm_before_fc": True},
    {"norm_output": True, "norm_before_residual": True},
]


def random_norms(draft: Eagle3Draft) -> Eagle3Draft:
    generator = torch.Generator().manual_seed(9)
    for name, weight in draft.named_parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 2.0, generator=generator)
            assert "norm" in name
    return draft


def outputs(draft: Eagle3Draft) -> list[torch.Tensor]:
    """Logits after a prefill of 5 rows, a step of one, a level of a tree, and ragged rows; 70 positions grow the
    tables."""
    generator = torch.Generator().manual_seed(3)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 32, generator=generator)

    cache = DraftCache(draft.config, 80, torch.float32)
    hidden = draft.decode(rows(5), draft.project(torch.randn(5, 96, generator=generator)), cache)
    found = [draft.logits(hidden)]
    hidden = draft.decode(rows(1), hidden[-1:], cache)
    found.append(draft.logits(hidden))
    mask = torch.zeros(3, 9).masked_fill_(~torch.cat((torch.ones(3, 6), torch.eye(3)), 1).bool(), float("-inf"))
    found.append(draft.logits(draft.decode(rows(3), hidden.repeat(3, 1), cache, 6, mask)))
    found.append(draft.logits(draft.decode(rows(61), rows(61), cache)))
    ragged = RaggedDraftCache(draft.config, 2, 20, torch.float32)
    draft.decode_rows(rows(2, 4), rows(2, 4), ragged)
    ragged.lengths[1] = 1
    found.append(draft.logits(draft.decode_rows(rows(2, 3), rows(2, 3), ragged).flatten(0, 1)))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_prepared_equals_plain(variant: dict[str, bool]) -> None:
    draft = random_norms(make_draft(V, **variant))
    plain, exact = outputs(draft), prepare(draft)
    assert isinstance(exact, PreparedDraft) and prepare(exact) is exact
    for expected, got in zip(plain, outputs(exact), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    if not kernels._PACKS_BF16:
        return
    for expected, got in zip(plain, outputs(prepare(draft, torch.bfloat16)), strict=True):
        error = float((got - expected).norm() / expected.norm())
        assert got.dtype == torch.float32 and 1e-4 < error < 0.08  # rounded, and close


def test_what_cannot_be_packed_stays_plain() -> None:
    draft = make_draft(V).to(torch.float64)
    assert prepare(draft) is draft


def test_without_packed_bfloat16_a_draft_decodes_in_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN packs it with AVX-512 alone: on other processors torch's own products run, as on a GPU."""
    monkeypatch.setattr(kernels, "_PACKS_BF16", False)
    placed = place(make_draft(V), torch.bfloat16, torch.device("cpu"))
    assert not isinstance(placed, PreparedDraft) and placed.norm.weight.dtype == torch.bfloat16
    assert isinstance(place(make_draft(V), torch.float32, torch.device("cpu")), PreparedDraft)


def test_on_a_gpu_the_whole_draft_has_the_dtype(as_gpu: None) -> None:
    placed = place(make_draft(V), torch.bfloat16, torch.device("cpu"))
    assert not isinstance(placed, PreparedDraft)
    assert {weight.dtype for weight in placed.parameters()} == {torch.bfloat16}


def test_the_plain_draft_is_not_changed() -> None:
    draft = random_norms(make_draft(V))
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    prepare(draft)
    after = draft.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_product_in_another_dtype_keeps_the_dtype_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((24, 48), (24,), (3, 48)))
    expected = x @ weight.t() + bias
    for dtype, tolerance in ((None, 1e-5), *([(torch.bfloat16, 0.02)] if kernels._PACKS_BF16 else [])):
        got = PrepackedLinear(weight, bias, dtype)(x)
        assert got.dtype == torch.float32
        assert float((got - expected).norm() / expected.norm()) < tolerance


def test_the_dtype_is_the_one_asked_for() -> None:
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda"), torch.float16
    assert decoding_dtype("float32", half, cpu) == decoding_dtype("float32", half, gpu) == torch.float32
    assert decoding_dtype("bfloat16", half, cpu) == torch.bfloat16
    assert decoding_dtype("auto", half, gpu) == half
    assert decoding_dtype("auto", half, cpu) == (torch.bfloat16 if fast_bf16() else torch.float32)
