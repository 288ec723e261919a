"""Every supported architecture: cached, ragged and speculative forwards and capture equal plain transformers.

The reference is an untouched copy of the model with eager attention, one unpadded sequence at a time; sequences are
several times longer than the sliding window.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specflow.errors import UserError
from specflow.extract.stage import StateCapture
from specflow.sample.generation import optimised_and_checked
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import CachedTarget
from specflow.targets.supported import TESTED, check_supported

VOCAB, WINDOW = 97, 8
LENGTHS = [37, 5, 23]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL_AND_GLOBAL = ["sliding_attention", "sliding_attention", "full_attention"] * 2
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "llama rope llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": None},
    "mistral sliding": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {},
    "qwen2 sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "gemma3_text": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": LOCAL_AND_GLOBAL,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": LOCAL_AND_GLOBAL},
    "phi3": {"sliding_window": WINDOW},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "gemma3": {
        "text_config": {
            **SMALL,
            "num_key_value_heads": 1,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_AND_GLOBAL,
            "head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}
AUX = [0, 2, 5, 6]


def make_model(name: str) -> PreTrainedModel:
    """A random fp32 model whose every weight differs from its neutral value, with eager attention."""
    settings = {"model_type": name, **SMALL, **ARCHITECTURES[name]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
            else:
                weight.normal_(0.0, 1.0 if "embed" in key else 1.2 / weight.shape[-1] ** 0.5)
    return model.requires_grad_(False)


class Reference:
    """Logits [n, vocab], states after the final norm [n, H] and residual streams of each sequence."""

    def __init__(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
        self.logits: list[Tensor] = []
        self.final: list[Tensor] = []
        self.aux: list[Tensor] = []
        for row in self.rows:
            output = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
            into: dict[int, Tensor] = {}
            # hidden_states[n] is behind the final norm, so the stream after the last layer is seen by a hook
            hook = (
                model.get_decoder()
                .layers[-1]
                .register_forward_hook(
                    lambda module, args, out, into=into: into.update({6: out[0] if isinstance(out, tuple) else out})
                )
            )
            model(input_ids=torch.tensor([row]), use_cache=False)
            hook.remove()
            streams = [output.hidden_states[k][0] if k < 6 else into[6][0] for k in AUX]
            self.logits.append(output.logits[0])
            self.final.append(output.hidden_states[-1][0])
            self.aux.append(torch.cat(streams, dim=-1))


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Reference]:
    """A model as every stage runs it (sdpa, optimised in place), and what the untouched one says."""
    model = make_model(request.param)
    reference = Reference(model)
    optimised = copy.deepcopy(model)
    optimised.set_attn_implementation("sdpa")
    return optimise_for_inference(optimised), reference


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_batched_ragged_decoding(pair: tuple[PreTrainedModel, Reference]) -> None:
    """Prompts of 3, 1 and 9 tokens in one padded forward, then one token each until the shorter ones are full."""
    model, reference = pair
    target = CachedTarget(model, num_rows=3, max_length=48, aux_layer_ids=AUX)
    starts = [3, 1, 9]
    padded = torch.zeros(3, max(starts), dtype=torch.int64)
    for i, (row, start) in enumerate(zip(reference.rows, starts, strict=True)):
        padded[i, :start] = torch.tensor(row[:start])
    states = target.forward(padded, rows=[0, 1, 2], counts=starts)
    for i, start in enumerate(starts):
        close(target.logits(states)[i, :start], reference.logits[i][:start])
    rows = [0, 2]
    for step in range(14):
        ids = torch.tensor([[reference.rows[i][starts[i] + step]] for i in rows])
        logits = target.logits(target.forward(ids, rows=rows))[:, 0]
        for n, i in enumerate(rows):
            close(logits[n], reference.logits[i][starts[i] + step])
            close(target.aux()[n, 0], reference.aux[i][starts[i] + step])
    target.close()


@pytest.mark.parametrize("num_tokens", [1, 4, 7])
def test_verification_of_several_tokens_after_a_rejection(
    pair: tuple[PreTrainedModel, Reference], num_tokens: int
) -> None:
    """A prompt, then K + 1 tokens a step of which the last is taken back each time and its place written again."""
    model, reference = pair
    row = reference.rows[0]
    target = CachedTarget(model, num_rows=1, max_length=64, aux_layer_ids=AUX)
    close(target.logits(target.forward(torch.tensor([row[:11]])))[0], reference.logits[0][:11])
    at = 11
    while at + num_tokens <= len(row):
        states = target.forward(torch.tensor([[*row[at : at + num_tokens], 3]]))
        close(target.logits(states)[0, :-1], reference.logits[0][at : at + num_tokens])
        close(target.aux()[0, :-1], reference.aux[0][at : at + num_tokens])
        at += num_tokens
        target.lengths[0] = at
    target.close()


def test_a_tree_and_the_path_kept_of_it(pair: tuple[PreTrainedModel, Reference]) -> None:
    """Steps of a tree that holds the sequence's own next tokens among others: states of that path in the tree, then of
    what follows on the kept keys, equal the plain forward's. Beyond every sliding window.
    """
    model, reference = pair
    row = reference.rows[0]
    target = CachedTarget(model, num_rows=1, max_length=64, aux_layer_ids=AUX)
    at = 9
    target.forward(torch.tensor([row[:at]]))
    # nodes 2, 4 and 5 are the sequence's; 0 and 1 are no ancestors of them, 3 and 6 hang on them
    parents, right = [-1, 0, -1, 2, 2, 4, 5], [2, 4, 5]
    for accepted in (3, 1, 0, 2, 3, 3):
        tokens = [4, 5, row[at + 1], 6, row[at + 2], row[at + 3], 7]
        states = target.forward(torch.tensor([[row[at], *tokens]]), parents=parents)
        rows = [0, *(node + 1 for node in right)]
        close(target.logits(states)[0, rows], reference.logits[0][at : at + 4])
        close(target.aux()[0, rows], reference.aux[0][at : at + 4])
        target.keep(right[:accepted])
        close(target.aux()[0], reference.aux[0][at : at + 1 + accepted])
        at += 1 + accepted
        assert target.lengths == [at]
    target.close()


def test_capture(pair: tuple[PreTrainedModel, Reference]) -> None:
    """Right-padded capture of rows of different lengths gives the residual streams and final states of each alone."""
    model, reference = pair
    with StateCapture(model, AUX, torch.float32) as states_of:
        token_ids, aux, final, finite = states_of(reference.rows)
    assert token_ids.tolist() == [token for row in reference.rows for token in row] and bool(finite.all())
    close(aux, torch.cat(reference.aux))
    close(final, torch.cat(reference.final))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_compared_here_passes_fetch_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"model_type": name, **({} if name == "gemma3" else SMALL), **ARCHITECTURES[name]}
    check_supported(AutoConfig.for_model(**settings))
    assert not caplog.records
    assert AutoConfig.for_model(**settings).get_text_config().model_type in TESTED


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "gemma2"}, "target of model type gemma2 caps its logits (final_logit_softcapping)"),
        ({"model_type": "cohere"}, "scales its logits (logit_scale 0.0625)"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "scales its logits (logits_scaling 8.0)"),
        ({"model_type": "qwen3_next"}, "layers of type ['linear_attention']"),
        ({"model_type": "llama4_text"}, "layers of type ['chunked_attention']"),
        ({"model_type": "gpt_oss", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "fused attention"),
        ({"model_type": "t5"}, "model type t5 has no rope_parameters"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE type 'dynamic'",
        ),
        ({"model_type": "bert"}, "no rope_parameters"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_one_line_at_fetch(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_supported(AutoConfig.for_model(**settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_architecture_that_does_more_than_we_know_stops_at_the_first_prompt() -> None:
    """Cohere scales its logits after the head: without fetch's check, sample's comparison sees it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("cohere", **SMALL)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with pytest.raises(UserError, match="CohereForCausalLM differs from transformers' own forward"):
        optimised_and_checked(model, list(range(3, 30)))
    model = make_model("gemma3_text")
    model.set_attn_implementation("sdpa")
    assert optimised_and_checked(model, list(range(3, 30))) is model
    assert optimised_and_checked(model, [5]) is model
