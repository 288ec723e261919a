"""What every part of the schema of params.yaml is made of: a frozen section and numbers with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Unknown keys are rejected, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
