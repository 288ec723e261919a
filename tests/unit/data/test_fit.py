"""What a family can use of tools, thoughts and marks: with a template that shows them, and one that does not."""

from collections import Counter
from typing import Any

import pytest

from specflow.config import parse_params
from specflow.data.fit import Fit
from specflow.data.layouts import Refused
from specflow.sample.stage import _from_dataset
from specflow.targets.template import encode_conversation, render, shown_parts
from tests.toys import CHATML, make_tiny_tokenizer

# Tools in front, calls and results in their turns, thoughts after the last question only (as in Qwen3).
FULL = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "lookup", "arguments": {"q": 1}}}],
}
RESULT = {"role": "tool", "content": "twelve"}
CALLED = [{**USER, "tools": TOOLS}, CALL, RESULT, ANSWER, USER, ANSWER]


def fitted(
    messages: list[dict[str, Any]], template: str = CHATML, *, engine: str = "dataset", **data: Any
) -> tuple[list[dict[str, Any]], int, Counter[str]]:
    limits = {"train_conversations": 1, "eval_conversations": 1, "max_prompt_tokens": 400, **data}
    family = {
        "target": {"source": "file:x"},
        "data": {"sources": [{"source": "file:y"}], **limits},
        "sample": {"engine": engine},
    }
    fit = Fit(parse_params({"families": {"f": family}}).family("f"), make_tiny_tokenizer(chat_template=template))
    kept, tokens = fit.fit(messages)
    return kept, tokens, fit.unused


def test_what_a_template_shows() -> None:
    assert shown_parts(make_tiny_tokenizer(chat_template=CHATML)) == {"tool_results"}
    everything = {"tools", "tool_calls", "tool_results", "reasoning_content"}
    assert shown_parts(make_tiny_tokenizer(chat_template=FULL)) == everything


def test_tool_turns_go_through_a_template_that_shows_them() -> None:
    kept, tokens, unused = fitted(CALLED, FULL)
    assert (kept, unused) == (CALLED, {})
    tokenizer = make_tiny_tokenizer(chat_template=FULL)
    text = render(tokenizer, kept, add_generation_prompt=False)
    assert '"name": "lookup"' in text and '<call>lookup {"q": 1}</call>' in text and "tool\ntwelve<" in text
    token_ids, spans = encode_conversation(tokenizer, kept)
    answers = ['<call>lookup {"q": 1}</call><|im_end|>', "a dog<|im_end|>", "a dog<|im_end|>"]
    assert [tokenizer.decode(token_ids[start:end]) for start, end in spans] == answers
    first = len(tokenizer(render(tokenizer, kept[:1], True), add_special_tokens=False)["input_ids"])
    assert tokens > first + len(tokenizer("twelve", add_special_tokens=False)["input_ids"])


def test_tool_turns_are_refused_where_the_template_does_not_show_them() -> None:
    with pytest.raises(Refused, match="tool calls, which the chat template does not show"):
        fitted(CALLED)


@pytest.mark.parametrize("template", [CHATML, FULL])
def test_a_target_that_answers_itself_is_asked_up_to_the_first_call(template: str) -> None:
    kept, _, unused = fitted(CALLED, template, engine="transformers")
    assert kept == ([CALLED[0]] if template == FULL else [USER])
    assert unused["turns from the first tool call on, since the target answers itself"] == 1
    assert unused["tools, which the chat template does not show"] == int(template == CHATML)


def test_thoughts_are_rendered_or_the_conversation_is_refused() -> None:
    thought = [USER, {**ANSWER, "reasoning_content": "one bird"}]
    assert fitted(thought, FULL)[0] == thought
    with pytest.raises(Refused, match="reasoning_content, which the chat template does not show"):
        fitted(thought)
    kept, _, unused = fitted(thought, engine="transformers")
    assert (kept, unused) == ([USER, ANSWER], {"reasoning_content, since the target answers itself": 1})


def test_text_with_special_tokens_is_refused() -> None:
    bad = {**USER, "content": "a <|im_end|> b"}
    with pytest.raises(Refused, match=r"its text holds the special token '<\|im_end\|>'"):
        fitted([bad, ANSWER], engine="transformers")
    own = [USER, {**ANSWER, "content": "<|im_start|>x"}]
    assert fitted(own, engine="transformers")[0] == own  # its answer is not used
    with pytest.raises(Refused, match="special token"):
        fitted(own)


def test_answers_are_needed_where_the_data_set_answers() -> None:
    empty = {**ANSWER, "content": ""}
    for messages in ([USER], [USER, empty, USER, ANSWER]):
        with pytest.raises(Refused, match="no answers of its own"):
            fitted(messages)
    with pytest.raises(Refused, match="marks every answer as not to be trained"):
        fitted([USER, {**ANSWER, "train": False}])
    with pytest.raises(Refused, match="longer than max_prompt_tokens"):
        fitted([USER, ANSWER], max_prompt_tokens=3)


def rows(messages: list[dict[str, Any]], template: str) -> list[tuple[str, list[str], list[str]]]:
    """(id, trained texts, turns) of the data set's own answers."""
    tokenizer = make_tiny_tokenizer(chat_template=template)
    done = _from_dataset(tokenizer, {"id": "x", "category": "c", "messages": messages}, 0)
    return [
        (
            row["id"],
            [tokenizer.decode(row["token_ids"][a:b]) for a, b in row["spans"]],
            [t["text"] for t in row["turns"]],
        )
        for row in done["rows"]
    ]


def test_marked_answers_are_context_and_not_trained() -> None:
    last = {**ANSWER, "content": "one bird"}
    assert rows([USER, {**ANSWER, "train": False}, USER, last], CHATML) == [("x", ["one bird<|im_end|>"], ["one bird"])]
    assert rows([USER, ANSWER, USER, last], CHATML) == [
        ("x", ["a dog<|im_end|>", "one bird<|im_end|>"], ["a dog", "one bird"])
    ]


def test_a_template_that_drops_old_thoughts_gives_each_answer_its_own_row() -> None:
    first, last = {**ANSWER, "reasoning_content": "old"}, {**ANSWER, "content": "one bird", "reasoning_content": "red"}
    assert rows([USER, first, USER, last], FULL) == [
        ("x", ["<think>old</think>\na dog<|im_end|>"], ["a dog"]),
        ("x#1", ["<think>red</think>\none bird<|im_end|>"], ["one bird"]),
    ]
