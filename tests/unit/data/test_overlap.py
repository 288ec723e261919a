# ruff: noqa: RUF001 - full-width letters and punctuation are what is tested
"""Overlap: 13 words where a script has blanks, as many letters as 13 words have on average where it has none."""

from __future__ import annotations

import json

import pytest

from specflow.data import overlap
from tests import ROOT

BENCHMARK = "please count every letter of the quiet old garden near the river before the cat sees it"
ZH = "请用一句话解释什么是光合作用并举例说明它在现代农业生产中的意义以及它对全球气候变化的影响"
JA = "光合成とは何かを一文で説明し現代の農業における意義と地球の気候変動への影響を例を挙げて述べてください"
TH = "ช่วยอธิบายการสังเคราะห์ด้วยแสงในหนึ่งประโยคและยกตัวอย่างความสำคัญต่อการเกษตรและสภาพอากาศ"
SETS = {
    "mine": ["Short one?", BENCHMARK],
    "zh": [ZH, "继续"],
    "ja": [JA],
    "th": [TH],
    "mix": [f"用 {BENCHMARK[:40]} 解释"],
}


def found(*turns: str) -> str | None:
    held = overlap.Turns((name, turn) for name, texts in SETS.items() for turn in texts)
    return held.repeated_by([{"role": "user", "content": turn} for turn in turns])


@pytest.mark.parametrize(
    ("turns", "name"),
    [
        (("short ONE",), "mine"),  # equal but for case and punctuation
        (("short one more",), None),
        (("fine", "Short one?"), "mine"),
        (("well: " + " ".join(BENCHMARK.split()[3:16]).upper(),), "mine"),  # 13 words of it
        (("well: " + " ".join(BENCHMARK.split()[3:15]),), None),  # 12
        ((f"你好。{ZH}。谢谢",), "zh"),
        (("，".join(ZH) + "！",), "zh"),  # blanks and punctuation do not count
        ((f"你好{ZH[5:27]}吗",), "zh"),  # 22 characters
        ((f"你好{ZH[5:26]}吗",), None),  # 21
        (("继续",), "zh"),
        (("请继续",), None),
        ((f"こんにちは。{JA}。",), "ja"),
        ((f"こんにちは、{JA[:12]}。",), None),
        ((f"สวัสดีครับ {TH} ขอบคุณ",), "th"),
        ((f"สวัสดีครับ {TH[:25]} ขอบคุณ",), None),
        (("请用一句话解释什么是光合作用",), None),  # how many questions begin
    ],
)
def test_overlap(turns: tuple[str, ...], name: str | None) -> None:
    assert found(*turns) == name


def test_a_mixed_run_adds_up() -> None:
    """7 words and 10 Han characters are as long as 13 words, 7 and 9 are not."""
    words = "train a small draft model with vllm"
    held = overlap.Turns([("mixed", f"{words}投机解码的草稿模型吗")])
    assert held.repeated_by([{"role": "user", "content": f"x {words} 投机解码的草稿模型吗 y"}]) == "mixed"
    assert held.repeated_by([{"role": "user", "content": f"x {words} 投机解码的草稿模型, y"}]) is None


def test_letters_with_marks_are_one_word() -> None:
    """Hindi has blanks, and its vowel signs are no letters: 13 words are 13 words."""
    assert len(overlap.units("हिन्दी में लिखिए")[0]) == 3
    assert overlap.normalise_text("ﾌﾞﾛｯｸ　ＡＢＣ") == overlap.normalise_text("ブロック abc")


def test_what_many_share_is_nobodys() -> None:
    held = overlap.Turns([("a", "go on"), ("b", "go on"), ("c", "Go on!"), ("a", "mine")], most_names=2)
    assert held.repeated_by([{"role": "user", "content": "go on"}]) is None
    assert held.repeated_by([{"role": "user", "content": "mine"}]) == "a"


def test_the_field_checks_chinese_questions_are_found() -> None:
    folder = ROOT.parent / "shared" / "data" / "field"
    if not folder.exists():
        pytest.skip("../shared/data is not here")
    questions = [json.loads(line) for line in (folder / "overlap-zh.questions.jsonl").read_text().splitlines()]
    held = overlap.Turns(("zh", turn) for question in questions for turn in question["turns"])
    records = [json.loads(line) for line in (folder / "overlap-zh.conversations.jsonl").read_text().splitlines()]
    texts = [record["conversations"][0]["value"] for record in records]
    hits = [held.repeated_by([{"role": "user", "content": text}]) is not None for text in texts]
    assert hits == ["光合作用" in text for text in texts] and sum(hits) == 20
