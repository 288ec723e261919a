"""Every wrong setting of settings.py ends in one line that names its path; right ones of the same kind pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from specflow.config import load_params
from tests.attacks.bad_input import BadInput, fault
from tests.attacks.settings import CASES
from tests.toys import tiny_params


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """params.yaml is enough: nothing else is looked at before it is right."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(tmp_path)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name[:60])
def test_a_wrong_setting_is_one_line(folder: Path, bad: BadInput) -> None:
    assert not fault(bad, folder)


def test_there_are_many_and_no_two_alike() -> None:
    assert len(CASES) >= 107 and len({bad.name for bad in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "change",
    [
        ("lr: 0.001", "lr: 1e-3"),  # YAML 1.1 reads that as a word
        ("ttt_steps: 3", "ttt_steps: 7"),
        ("online: []", "online: []  # für alle"),
        ("online: []", "online: &none []"),
    ],
)
def test_what_is_right_passes(folder: Path, change: tuple[str, str]) -> None:
    file = folder / "params.yaml"
    before = file.read_text(encoding="utf-8")
    assert change[0] in before
    file.write_text(before.replace(*change), encoding="utf-8-sig")
    assert load_params(file).family("tiny").train.lr == 1e-3
