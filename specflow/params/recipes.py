"""Recipes: families ready to be added to params.yaml. What the user is told and asked; the edit is `file.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specflow.config import load_params, parse_params
from specflow.errors import UserError
from specflow.params.file import add_family, missing_prompt_sets, read_recipe


def add_recipe(params_path: Path, recipe: Path, *, name: str | None = None, accept_terms: bool = False) -> list[str]:
    """Add the family of `recipe` to params.yaml; returns lines that say what was done and what to type next.

    Raises UserError, with params.yaml untouched, where the recipe states licence terms that were not accepted or lacks
    a parameter that dvc.yaml names.
    """
    _, fragment = read_recipe(recipe)
    own_name = next(iter(fragment["families"]))
    _check_complete(recipe, fragment["families"][own_name], params_path.with_name("dvc.yaml"))
    terms = fragment.get("terms")
    if terms and not accept_terms:
        raise UserError(f"{own_name} comes under the {_terms(terms)}: read them and repeat this with --accept-terms")
    new_sets = missing_prompt_sets(load_params(params_path).prompt_sets, fragment)
    add_family(params_path, recipe, name=name)
    name = name or own_name
    lines = [f"Added family {name} to {params_path}, listed in {_listing(fragment)}; the rest is as it was."]
    if terms:
        lines.append(f"You accepted the {_terms(terms)}.")
    if new_sets:
        lines.append(
            f"Added prompt sets {', '.join(new_sets)}: training prompts of every family are held against them, so "
            "fetch, prepare and bench of the others run again."
        )
    steps = {
        f"specflow plan {name}": "disk, memory and time, before anything runs",
        f"dvc repro fetch@{name}": "the target alone, to see that it loads",
        "dvc repro": "everything; families that are up to date are not run again",
    }
    width = max(map(len, steps))
    return [*lines, "Next:", *(f"  {command.ljust(width)}  # {why}" for command, why in steps.items())]


def list_recipes(folder: Path) -> list[str]:
    """One line per recipe of a folder: file, how it trains, target, terms."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"no recipes in {folder}: name a file of your own, in the form that docs/families.md explains")
    rows = []
    for file in files:
        _, fragment = read_recipe(file)
        params = parse_params({key: value for key, value in fragment.items() if key != "terms"}, where=str(file))
        target = next(iter(params.families.values())).target.parts[0]
        terms = fragment.get("terms")
        rows.append((str(file), _listing(fragment), f"{target} ({terms['name']})" if terms else target))
    width = max(len(row[0]) for row in rows)
    return [f"{file.ljust(width)}  {listing.ljust(7)}  {target}" for file, listing, target in rows]


def _listing(fragment: dict[str, Any]) -> str:
    return "offline" if fragment.get("offline") else "online"


def _terms(terms: dict[str, str]) -> str:
    return f"{terms['name']} ({terms['url']})"


def _check_complete(recipe: Path, family: Any, dvc_yaml: Path) -> None:
    """DVC stops at a parameter that dvc.yaml names and params.yaml lacks; say so before anything is written."""
    import yaml

    if not dvc_yaml.exists():
        return
    prefix = "families.${item.family}."
    for stage, content in yaml.safe_load(dvc_yaml.read_text(encoding="utf-8"))["stages"].items():
        for path in content.get("params", []):
            if not path.startswith(prefix):
                continue
            place = family
            for part in path.removeprefix(prefix).split("."):
                if not isinstance(place, dict) or part not in place:
                    raise UserError(
                        f"{recipe} lacks {path.removeprefix(prefix)}, which stage {stage} of dvc.yaml depends on: add "
                        "it, with its default if you have no other value"
                    )
                place = place[part]
