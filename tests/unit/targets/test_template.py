"""Golden multi-turn masks for the chat templates of several families, and what stands between turns."""

import datetime

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specflow.errors import UserError
from specflow.targets import date, template
from tests.toys import CHATML as TOY_CHATML
from tests.toys import make_tiny_tokenizer

# The rules of the real templates, shortened to what decides the mask.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe SmolLM.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen3: thinking blocks of history are stripped, the last answer always has one.
QWEN3 = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% else %}{% set parts = m['content'].split('</think>') %}{% set answer = parts[-1].lstrip('\\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{% if loop.last %}<|im_start|>assistant\n<think>\n{{ thought }}\n</think>\n\n{{ answer }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n{{ answer }}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As QWEN3, with a generation prompt that opens the block itself (R1 and its distillations).
OPENS_THINKING = QWEN3.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
).replace("{% if loop.last %}", "{% if false %}")
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIALS = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    QWEN3: ["<|im_start|>", "<|im_end|>"],
    OPENS_THINKING: ["<|im_start|>", "<|im_end|>"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
TURNS = [
    {"role": "user", "content": "t or a?"},
    {"role": "assistant", "content": "a"},  # stands in every header too
    {"role": "user", "content": "Say a again,\n\nünïcode 🙂"},
    {"role": "assistant", "content": "a ünïcode 🙂\n\nanswer."},
]


def make_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer, one token a byte and one a special token."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS[chat_template])
    tokenizer.add_tokens(["<think>", "</think>"])  # added and not special, as in Qwen3
    eos = SPECIALS[chat_template][-1]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=chat_template)


def supervised(chat_template: str, messages: list[dict[str, str]]) -> list[str]:
    tokenizer = make_tokenizer(chat_template)
    token_ids, spans = template.encode_conversation(tokenizer, messages)
    assert tokenizer.decode(token_ids) == template.render(tokenizer, messages, False)
    return [tokenizer.decode(token_ids[start:end]) for start, end in spans]


@pytest.mark.parametrize(
    ("chat_template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (OPENS_THINKING, "<|im_end|>")],
)
def test_golden_masks(chat_template: str, end: str) -> None:
    assert supervised(chat_template, TURNS) == [f"a{end}", f"a ünïcode 🙂\n\nanswer.{end}"]
    assert supervised(chat_template, TURNS[:3]) == [f"a{end}"]  # a user turn at the end is no answer


def test_exact_token_positions_with_an_injected_system_prompt() -> None:
    tokenizer = make_tokenizer(CHATML)
    token_ids, spans = template.encode_conversation(tokenizer, TURNS[:2])
    prompt = "<|im_start|>system\nBe SmolLM.<|im_end|>\n<|im_start|>user\nt or a?<|im_end|>\n<|im_start|>assistant\n"
    start = len(template.encode(tokenizer, prompt))
    assert spans == [[start, start + 2]]  # `a` and the end of turn
    assert len(token_ids) == start + 3  # the newline after it is not supervised
    assert token_ids[:start] == template.encode(tokenizer, template.render(tokenizer, TURNS[:1], True))


def test_a_system_message_takes_the_place_of_the_injected_one() -> None:
    system = {"role": "system", "content": "a a a"}
    assert supervised(CHATML, [system, *TURNS]) == supervised(CHATML, TURNS)


def test_white_space_and_special_text_in_messages() -> None:
    messages = [
        {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nb"},
        {"role": "assistant", "content": "  b<|im_end|> c \n"},
    ]
    assert supervised(CHATML, messages) == ["  b<|im_end|> c \n<|im_end|>"]
    assert supervised(LLAMA3, [TURNS[0], {"role": "assistant", "content": " b \n"}]) == ["b<|eot_id|>"]


def test_thinking_is_supervised_where_the_template_keeps_it() -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
    assert supervised(QWEN3, [TURNS[0], thought]) == ["<think>\nhm\n</think>\n\na<|im_end|>"]
    assert supervised(QWEN3, TURNS[:2]) == ["<think>\n\n</think>\n\na<|im_end|>"]
    assert supervised(QWEN3, [TURNS[0], thought, *TURNS[2:]]) == [
        "a<|im_end|>",
        "<think>\n\n</think>\n\na ünïcode 🙂\n\nanswer.<|im_end|>",
    ]


def test_a_template_that_rewrites_other_turns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CHATML.replace("{% for", "{{ messages | map(attribute='content') | join | length }}{% for", 1)
    monkeypatch.setitem(SPECIALS, counted, SPECIALS[CHATML])
    with pytest.raises(UserError, match=r"cannot locate the answer 'a'.*target.chat_template"):
        supervised(counted, TURNS)


def test_template_errors_are_user_errors() -> None:
    tokenizer = make_tokenizer(GEMMA)
    with pytest.raises(UserError, match=r"refuses a conversation of roles \[system, user\] \(System role not"):
        template.render(tokenizer, [{"role": "system", "content": "x"}, TURNS[0]], True)
    with pytest.raises(UserError, match="Roles must alternate"):
        template.render(tokenizer, [TURNS[1]], False)


@pytest.mark.parametrize("chat_template", [CHATML, LLAMA3, GEMMA])
def test_next_turn_suffix_continues_the_generated_tokens(chat_template: str) -> None:
    tokenizer = make_tokenizer(chat_template)
    suffix = template.next_turn_suffix(tokenizer, TURNS[:1], "a", TURNS[2]["content"])
    assert suffix is not None
    prompt = template.encode(tokenizer, template.render(tokenizer, TURNS[:1], True))
    generated = [*template.encode(tokenizer, "a"), template.end_of_turn(tokenizer)]
    whole = template.encode(tokenizer, template.render(tokenizer, TURNS[:3], True))
    assert prompt + generated + template.encode(tokenizer, suffix) == whole


def test_next_turn_suffix_is_none_where_history_changes() -> None:
    qwen = make_tokenizer(QWEN3)
    assert template.next_turn_suffix(qwen, TURNS[:1], "<think>\nhm\n</think>\n\na", "b") is None
    assert template.next_turn_suffix(qwen, TURNS[:1], "a", "b") == (
        "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    llama = make_tokenizer(LLAMA3)
    assert template.next_turn_suffix(llama, TURNS[:1], "a \n", "b") is None  # the template trims


def test_end_of_turn_is_the_templates_special_token() -> None:
    for chat_template, specials in SPECIALS.items():
        tokenizer = make_tokenizer(chat_template)
        assert tokenizer.decode([template.end_of_turn(tokenizer)]) == specials[-1]
    plain = make_tokenizer(CHATML)
    plain.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    assert template.end_of_turn(plain) is None


DATED = (
    "{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday is {{ date_string }}, {{ strftime_now(format='%A %Y-%m-%-d') }}.<|im_end|>\n"
    + TOY_CHATML
)


def test_a_template_that_prints_todays_date_prints_one_day_on_all_days() -> None:
    tokenizer = make_tiny_tokenizer(chat_template=date.with_fixed_date(DATED))
    text = template.render(tokenizer, [{"role": "user", "content": "q"}], True)
    assert text.startswith("<|im_start|>system\nToday is 26 Jul 2024, Friday 2024-07-26.<|im_end|>\n<|im_start|>user\n")
    given = make_tiny_tokenizer(chat_template="{%- set date_string = 'May Day' -%}" + tokenizer.chat_template)
    assert "Today is May Day, Friday" in template.render(given, [{"role": "user", "content": "q"}], True)
    assert date.with_fixed_date(CHATML) == CHATML


def test_directives_are_those_of_strftime() -> None:
    day = datetime.datetime.fromisoformat(date.FIXED_DATE)
    assert {each: day.strftime(f"%{each}") for each in date._DIRECTIVES} == date._DIRECTIVES
