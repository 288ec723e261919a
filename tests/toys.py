"""Tiny things made on the spot, without a network: a Llama checkpoint with its tokenizer, conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "a",
    "one",
    "some",
    "every",
    "cat",
    "dog",
    "bird",
    "river",
    "mountain",
    "garden",
    "window",
    "letter",
    "number",
    "sees",
    "finds",
    "likes",
    "moves",
    "paints",
    "counts",
    "red",
    "small",
    "quiet",
    "bright",
    "old",
    "near",
    "under",
    "over",
    "before",
    "after",
    "and",
    "but",
    "because",
    "slowly",
    "often",
    "never",
]


def make_tiny_target(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = 300,
    hidden_size: int = 32,
    num_hidden_layers: int = 6,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 64,
    tie_word_embeddings: bool = False,
    max_position_embeddings: int = 512,
    chat_template: str | None = CHATML,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random fp32 Llama-architecture checkpoint with its tokenizer into `folder`; return `folder`.

    Weights are wide enough for the greedy choice to depend on the context and to stay clear of ties.
    """
    tokenizer = make_tiny_tokenizer(vocab_size, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                std = 1.0 if "embed_tokens" in name else 1.5 / tensor.shape[1] ** 0.5
                tensor.normal_(0.0, std, generator=generator)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_gemma(folder: Path, *, seed: int = 0, num_hidden_layers: int = 6) -> Path:
    """Write a random fp32 Gemma 3 text checkpoint without a chat template: two sliding layers of 16 tokens for each
    full one, rope bases of their own, q and k norms, scaled and tied embeddings, one key/value head.
    """
    tokenizer = make_tiny_tokenizer(chat_template=None)
    pattern = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=(pattern * num_hidden_layers)[:num_hidden_layers],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Gemma3ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.3 if tensor.ndim == 1 else 0.3 if "embed_tokens" in name else 1.5 / tensor.shape[1] ** 0.5
            tensor.normal_(0.0, scale, generator=generator)
        # tied weights make a token predict itself for ever, unless the final norm turns directions round
        model.model.norm.weight.normal_(-1.0, 1.0, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_tokenizer(vocab_size: int = 300, *, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE over WORDS with ChatML's special tokens; the end-of-turn token is eos, `<|endoftext|>` pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(["user assistant system", *WORDS])] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


def make_conversations(count: int, *, seed: int = 0, turns: int = 2) -> list[dict[str, object]]:
    """ShareGPT records with distinct questions: `{"id", "conversations": [{"from", "value"}, ...]}`."""
    rng = random.Random(seed)
    records: list[dict[str, object]] = []
    for number in range(count):
        messages = []
        for turn in range(rng.randint(1, turns)):
            question = " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))
            messages.append({"from": "human", "value": f"{question} {number}.{turn}"})
            messages.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))})
        records.append({"id": f"conversation-{number}", "conversations": messages})
    return records


def make_conversations_file(path: Path, count: int, *, seed: int = 0, turns: int = 2) -> Path:
    """Write `make_conversations` as one JSON array, ShareGPT's own layout; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(make_conversations(count, seed=seed, turns=turns)), encoding="utf-8")
    return path


def make_prompt_set_file(path: Path, count: int, *, seed: int = 1) -> Path:
    """Write benchmark questions in MT-Bench's layout: jsonl of `question_id, category, turns`; return `path`."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_id": number,
            "category": "even" if number % 2 == 0 else "odd",
            "turns": [" ".join(rng.choices(WORDS, k=9)) for _ in range(2)],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_params(folder: Path) -> dict[str, Any]:
    """params.yaml of a family over the files of `make_project_inputs`; no section is missing."""
    return {
        "cache_dir": str(folder / "cache"),
        "prompt_sets": {"questions": {"source": f"file:{folder / 'questions.jsonl'}"}},
        "offline": ["tiny"],
        "online": [],
        "families": {
            "tiny": {
                "allow_cpu": True,
                "target": {"source": f"file:{folder / 'target'}"},
                "data": {
                    "sources": [{"source": f"file:{folder / 'conversations.json'}", "format": "sharegpt"}],
                    "train_conversations": 24,
                    "eval_conversations": 6,
                    "max_turns": 2,
                    "max_prompt_tokens": 128,
                },
                "sample": {"engine": "transformers", "max_new_tokens": 16, "batch_size": 8},
                "vocab": {"draft_vocab_size": 128},
                "extract": {"dtype": "float32", "max_length_tokens": 256, "batch_tokens": 512, "shard_bytes": 65536},
                "train": {"ttt_steps": 3, "epochs": 2, "batch_tokens": 256, "lr": 1e-3, "evals": 2, "checkpoints": 2},
                "export": {"num_speculative_tokens": 2},
                "bench": {
                    "prompt_sets": ["questions", "heldout"],
                    "num_prompts": 2,
                    "max_new_tokens": 12,
                    "sweep": [1, 2],
                    "sweep_prompts": 1,
                },
            }
        },
    }


def make_project_inputs(folder: Path) -> None:
    """Write target, conversations and questions that `tiny_params` names."""
    make_tiny_target(folder / "target")
    make_conversations_file(folder / "conversations.json", 60)
    make_prompt_set_file(folder / "questions.jsonl", 4)
