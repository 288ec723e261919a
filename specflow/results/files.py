"""What every result file is made of, and the one way to read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from specflow import files
from specflow.errors import UserError


class Part(BaseModel):
    """A part of a result: frozen, unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def changed(self, **changes: Any) -> Self:
        """The same with other values, checked as those of a file are."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


R = TypeVar("R", bound=Part)


def read_result(kind: type[R], file: Path, *, version: int, what: str, made_by: str) -> R:
    """Raises UserError in one line for a file that is missing, damaged or of another version; `made_by` makes it."""
    raw = files.read_json(file, what=what, made_by=made_by)
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != version:
        of = "no schema version" if found is None else f"schema version {found!r}"
        raise UserError(f"{what} {file} has {of}, this specflow reads {version}: run `{made_by}` again")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{what} {file} is damaged ({where}: {first['msg']}): delete it and run `{made_by}` again"
        ) from None
