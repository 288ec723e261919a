"""A chat template that prints today's date prints one day on all days."""

from __future__ import annotations

FIXED_DATE = "2024-07-26"
"""What a template sees that asks for today's date (Llama 3's own where it is told none): prompts, their digests and the
draft that they train must not change with the calendar.
"""
ASKS_DATE = "strftime_now"
_DIRECTIVES = {
    **{"-d": "26", "-m": "7", "-H": "0", "-I": "12", "-M": "0", "-S": "0", "-j": "208", "-y": "24"},
    **{"a": "Fri", "A": "Friday", "w": "5", "u": "5", "d": "26", "e": "26", "b": "Jul", "h": "Jul", "B": "July"},
    **{"m": "07", "y": "24", "Y": "2024", "G": "2024", "H": "00", "I": "12", "p": "AM", "M": "00", "S": "00"},
    **{"f": "000000", "z": "", "Z": "", "j": "208", "U": "29", "W": "30", "V": "30", "F": "2024-07-26"},
    **{"D": "07/26/24", "x": "07/26/24", "T": "00:00:00", "X": "00:00:00", "R": "00:00"},
    "c": "Fri Jul 26 00:00:00 2024",
}
"""strftime of FIXED_DATE, in English whatever the machine's locale."""


def with_fixed_date(template: str) -> str:
    """`template` with a `strftime_now` of its own, that of FIXED_DATE, where it calls the renderer's."""
    if ASKS_DATE not in template:
        return template
    replaced = "".join(f".replace('%{directive}', '{text}')" for directive, text in _DIRECTIVES.items())
    return f"{{%- macro {ASKS_DATE}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}{template}"
