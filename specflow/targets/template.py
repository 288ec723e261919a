"""The chat template as text and tokens: prompts, supervised spans, what stands between two turns.

Everything is found in what the template renders, never assumed from a model family: start of an answer is
where the generation prompt ends, its end is the end of its text plus the special token that the template puts
right behind it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import jinja2

from specflow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant's may have `tool_calls` (OpenAI's
form, arguments as an object), `reasoning_content`, and `train: False` where its answer is not to be trained; the first
message of a conversation may have `tools`, the schemas of functions.
"""

_OURS = ("tools", "train")
"""Keys of a message that are no business of the template's."""
_MARK = "\ue000answer\ue000"  # private-use characters: in no answer and nothing that a template trims

MOST_SECONDS = 10.0
"""For rendering two short messages, which takes milliseconds."""


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """Text of a conversation under the chat template. Raises UserError where the template refuses it."""
    tools = messages[0].get("tools") if messages else None
    shown = [{key: value for key, value in message.items() if key not in _OURS} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            shown, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except UserError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is no valid Jinja (line {error.lineno}: {error.message}): correct it, or name another "
            "in target.chat_template"
        ) from None
    except Exception as error:  # a template is a program: it may divide by zero, recurse for ever, add text to numbers
        roles = ", ".join(message["role"] for message in messages)
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise UserError(
            f"the chat template refuses a conversation of roles [{roles}] ({kind}{' '.join(str(error).split())[:300]}"
            "): drop such conversations, or name another template in target.chat_template"
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of template text: nothing is added, the template has written its special tokens itself."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a whole conversation and the half-open ranges of them that the assistant generates.

    A range holds the answer (thinking block included, where the template keeps it) and its end-of-turn token,
    not the newline after it. Answers marked `train: False` have none. Raises UserError where an answer cannot be
    located in the template's output.
    """
    text = render(tokenizer, messages, add_generation_prompt=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    specials, spans = special_tokens(tokenizer), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        start, end = _answer_range(tokenizer, messages, index, text)
        end += len(_special_at(text, end, specials))
        inside = [
            i
            for i, (first, last) in enumerate(encoding["offset_mapping"])
            if start <= first < end and start < last <= end
        ]
        if inside:
            spans.append([inside[0], inside[-1] + 1])
    return encoding["input_ids"], spans


def _answer_range(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, text: str
) -> tuple[int, int]:
    """Characters of the full rendering `text` that answer `index` generates, without its end-of-turn token.

    A rendering with a mark in place of the answer shows what the template puts before and behind it, whatever
    it does to the answer itself (trims it, opens or strips a thinking block).
    """
    marked = [*messages[:index], {"role": "assistant", "content": _MARK}, *messages[index + 1 :]]
    before, mark, behind = render(tokenizer, marked, add_generation_prompt=False).partition(_MARK)
    prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
    if not mark:
        raise UserError("the chat template leaves answers out of a conversation: name another in target.chat_template")
    end = len(text) - len(behind)
    # Where the generation prompt opens a block that history lacks, the answer starts behind its bare header.
    start = len(prompt) if text.startswith(prompt) else len(before) if text.startswith(before) else end + 1
    if not text.endswith(behind) or start > end:
        raise UserError(
            f"cannot locate the answer {messages[index]['content'][:40]!r} in the chat template's output, "
            "which changes other turns with it: use a template that does not (target.chat_template)"
        )
    return start, end


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the special tokens, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def _special_at(text: str, position: int, specials: list[str]) -> str:
    return next((token for token in specials if text.startswith(token, position)), "")


def shown_parts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Which of `tools`, `tool_calls`, `tool_results` and `reasoning_content` the template shows of a conversation."""
    marks = {name: f"{_MARK}{name}" for name in ("tools", "tool_calls", "tool_results", "reasoning_content")}
    tool = {"type": "function", "function": {"name": marks["tools"], "description": "", "parameters": {}}}
    call = {"type": "function", "id": "call00000", "function": {"name": marks["tool_calls"], "arguments": {}}}
    question = {"role": "user", "content": "question"}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": marks["tool_results"], "tool_call_id": "call00000", "name": "name"}
    thought = {"role": "assistant", "content": "answer", "reasoning_content": marks["reasoning_content"]}
    text = ""
    for messages in ([{**question, "tools": [tool]}, called, result], [question, thought]):
        try:
            text += render(tokenizer, messages, add_generation_prompt=False)
        except UserError:  # a template that refuses them shows none
            continue
    return {name for name, mark in marks.items() if mark in text}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the template puts behind an answer, None where it puts none.

    Raises UserError for a template that shows no question or no answer, or does not end within a few seconds.
    """
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    with _time_limit(MOST_SECONDS):
        token_ids, spans = encode_conversation(tokenizer, messages)
        prompt = render(tokenizer, messages[:1], add_generation_prompt=True)
    if not spans or messages[0]["content"] not in prompt:
        raise UserError(
            f"the chat template does not show the {'question' if spans else 'answer'} of a conversation: name another "
            "in target.chat_template"
        )
    last = token_ids[spans[0][1] - 1]
    return last if tokenizer.decode([last]) in special_tokens(tokenizer) else None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise UserError where a template runs longer. Only the main thread can be interrupted; elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise UserError(
            f"the chat template is not done with a conversation of two messages after {seconds:g} s: name another in "
            "target.chat_template"
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def next_turn_suffix(
    tokenizer: PreTrainedTokenizerBase, messages_so_far: list[Message], assistant_text: str, user_text: str
) -> str | None:
    """What to append behind a generated answer and its end-of-turn token to pose the next user turn.

    `messages_so_far` ends with the user turn that `assistant_text` (end-of-turn token excluded) answers. None
    where the template rewrites history, so that the tokens generated so far are no prefix of the next prompt:
    render it anew.
    """
    prompt = render(tokenizer, messages_so_far, add_generation_prompt=True)
    messages = [
        *messages_so_far,
        {"role": "assistant", "content": assistant_text},
        {"role": "user", "content": user_text},
    ]
    following = render(tokenizer, messages, add_generation_prompt=True)
    generated = prompt + assistant_text
    if not following.startswith(generated):
        return None
    token = _special_at(following, len(generated), special_tokens(tokenizer))
    return following[len(generated) + len(token) :] if token else None


def suffix_behind_any_answer(
    tokenizer: PreTrainedTokenizerBase, messages_so_far: list[Message], user_text: str
) -> str | None:
    """As `next_turn_suffix`, but whatever the template does to the answer itself when it is history.

    A template that drops an answer's thinking writes the same behind it: appended to the generated tokens, the thinking
    stays. None where the template puts no special token behind an answer.
    """
    messages = [*messages_so_far, {"role": "assistant", "content": _MARK}, {"role": "user", "content": user_text}]
    behind = render(tokenizer, messages, add_generation_prompt=True).partition(_MARK)[2]
    token = _special_at(behind, 0, special_tokens(tokenizer))
    return behind[len(token) :] if token else None
