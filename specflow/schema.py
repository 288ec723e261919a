"""What every part of the schema of params.yaml is made of: a frozen section and numbers with their bounds.

A number is a finite number, never `true`. Every count has an upper bound: what lies beyond it is a slip of the finger,
and would hang or fill the memory hours later instead of being refused now. Fields narrow it with `Field(le=...)`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"Input should be a number, got {str(value).lower()}")
    return value


_NUMBER = BeforeValidator(_no_bool)
_Float = Annotated[float, Field(allow_inf_nan=False), _NUMBER]

Whole = Annotated[int, Field(ge=0, le=10**9), _NUMBER]
Count = Annotated[int, Field(ge=1, le=10**9), _NUMBER]
Bytes = Annotated[int, Field(ge=2**10, le=2**40), _NUMBER]
Fraction = Annotated[_Float, Field(ge=0.0, le=1.0)]
Positive = Annotated[_Float, Field(gt=0.0, le=1e9)]
NonNegative = Annotated[_Float, Field(ge=0.0, le=1e9)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), _NUMBER]
"""What torch takes; numpy takes it too."""
Switch = Annotated[bool, Field(strict=True)]
"""true or false, not a number or a word that means one."""


class Section(BaseModel):
    """Unknown keys are rejected, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
