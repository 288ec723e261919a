"""Edits of params.yaml that leave every other byte as it is: values by dotted key, a family out of a recipe.

Owns the text of the file: comments, order, quoting and layout are the user's. What may stand in it is `config`'s, which
checks the result before it is written. A round trip through a YAML writer would move comments and wrap lines, so an
edit replaces or inserts exactly the characters of its value, found by the positions that the parser reports.
"""

from __future__ import annotations

import copy
import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from specflow.config import parse_params
from specflow.errors import UserError
from specflow.files import atomic_path
from specflow.settings_file import load_yaml, read_text


def set_params(path: Path, overrides: Mapping[str, Any]) -> None:
    """Set values of params.yaml by dotted key, `{"families.x.train.lr": 1e-4}`; lists and mappings are replaced whole.

    The file is written once, and only if the outcome is valid. Raises UserError for unknown keys and bad values.
    """
    text, newline = _read(path)
    wanted = _load(text, path)
    values = {key: yaml.safe_load(yaml.safe_dump(value)) for key, value in overrides.items()}
    for key, value in values.items():
        _assign(wanted, key, value, path)
    parse_params(wanted, where=str(path))
    for key, value in values.items():
        text = _set(text, key.split("."), value)
    _write(path, text, newline, wanted)


def add_family(path: Path, recipe: Path, *, name: str | None = None) -> None:
    """Put the family of a recipe (a fragment of params.yaml, see recipes/) into params.yaml, under `name` if given.

    Its comments come along; its name is appended to `offline` or `online` as in the recipe, and prompt sets that
    params.yaml lacks are added. Raises UserError for a name that is taken, or a recipe that is malformed or invalid.
    """
    text, newline = _read(path)
    source, fragment = read_recipe(recipe)
    old_name = next(iter(fragment["families"]))
    name = name or old_name
    wanted = _load(text, path)
    parse_params(wanted, where=str(path))
    if name in wanted["families"]:
        raise UserError(f"{path} has a family {name!r} already: give another name (--name), or remove that one first")
    listing = "offline" if fragment.get("offline") else "online"
    new_sets = missing_prompt_sets(wanted.get("prompt_sets") or {}, fragment)
    wanted["families"][name] = fragment["families"][old_name]
    wanted[listing] = [*(wanted.get(listing) or []), name]
    if new_sets:
        wanted["prompt_sets"] = {
            **(wanted.get("prompt_sets") or {}),
            **{s: fragment["prompt_sets"][s] for s in new_sets},
        }
    parse_params(wanted, where=f"{recipe} in {path}")
    for prompt_set in new_sets:
        text = _copy_entry(text, source, "prompt_sets", prompt_set, prompt_set)
    text = _append(text, listing, name)
    text = _copy_entry(text, source, "families", old_name, name)
    _write(path, text, newline, wanted)


def read_recipe(recipe: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a recipe. Raises UserError unless it holds one family and says how it trains."""
    try:
        source = read_text(recipe)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no recipe {recipe}: `specflow add-family --list` shows those of recipes/") from None
    fragment = _load(source, recipe)
    known = {"families", "offline", "online", "prompt_sets", "terms"}
    if unknown := sorted(set(map(str, fragment)) - known):
        raise UserError(f"{recipe} has {unknown}: a recipe holds families, offline or online, prompt_sets and terms")
    families = fragment.get("families")
    if not isinstance(families, dict) or len(families) != 1:
        raise UserError(f"{recipe} must hold exactly one family under `families:`: see recipes/ for the form")
    listed = [fragment.get("offline") or [], fragment.get("online") or []]
    if sorted(listed) != [[], list(families)]:
        raise UserError(f"{recipe} must list its family {next(iter(families))!r} in either offline or online, once")
    terms = fragment.get("terms")
    if terms is not None and (not isinstance(terms, dict) or set(terms) != {"name", "url"}):
        raise UserError(f"{recipe}: terms must be a mapping of name and url, got {terms!r}")
    return source, fragment


def missing_prompt_sets(known: Collection[str], fragment: Mapping[str, Any]) -> list[str]:
    """Names of the prompt sets that a recipe brings and that are not `known`."""
    return [name for name in fragment.get("prompt_sets") or {} if name not in known]


def _read(path: Path) -> tuple[str, str]:
    """Text with plain newlines, and the newline to write it with."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"no {path}: run specflow in the folder of your project") from None
    newline = "\r\n" if "\r\n" in text else "\n"
    return text.replace("\r\n", "\n"), newline


def _load(text: str, path: Path) -> dict[str, Any]:
    raw = load_yaml(text, path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping of parameters, got {type(raw).__name__}")
    return raw


def _write(path: Path, text: str, newline: str, wanted: dict[str, Any]) -> None:
    """Write the edited text, once it is sure that it says `wanted` and nothing else."""
    try:
        got = yaml.safe_load(text)
    except yaml.YAMLError:
        got = None
    if got != wanted:
        raise UserError(f"{path} is laid out in a way that cannot be edited safely (an alias, a tag?): edit it by hand")
    with atomic_path(path.resolve()) as temporary:
        temporary.write_bytes(text.replace("\n", newline).encode())
        temporary.chmod(path.stat().st_mode)


def _assign(raw: dict[str, Any], key: str, value: Any, path: Path) -> None:
    """Set a dotted key in a parsed file; sections in between are made where they are absent or null."""
    parts = key.split(".")
    if parts[0] == "families" and len(parts) > 1 and parts[1] not in raw.get("families", {}):
        raise UserError(f"unknown family {parts[1]!r} in {key!r}: {path} has {sorted(raw.get('families', {}))}")
    place: Any = raw
    for part, following in itertools.pairwise(parts):
        if isinstance(place, list):
            place = place[_index(place, part, key)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise UserError(f"{key!r}: {part} holds the value {place!r}, there is no {following!r} below it")
    if isinstance(place, list):
        place[_index(place, parts[-1], key)] = copy.deepcopy(value)
    else:
        place[parts[-1]] = copy.deepcopy(value)


def _index(items: Sequence[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"{key!r}: {part!r} is no position in a list of {len(items)}, which count from 0")
    return int(part)


def _set(text: str, parts: list[str], value: Any) -> str:
    """`text` with the value at `parts` replaced, or inserted at the end of the deepest mapping that is there."""
    key: Node | None = None
    node = _compose(text)
    for depth, part in enumerate(parts):
        if isinstance(node, SequenceNode):
            key, node = None, node.value[int(part)]
            continue
        found = _entry(node, part) if isinstance(node, MappingNode) else None
        if found is None:
            rest = value
            for missing in reversed(parts[depth + 1 :]):
                rest = {missing: rest}
            if isinstance(node, MappingNode):
                return _insert(text, node, f"{_flow(part)}: {_flow(rest)}")
            return _replace(text, key, node, {part: rest})  # `section:` with nothing below it
        key, node = found
    return _replace(text, key, node, value)


def _compose(text: str) -> Node:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, MappingNode), "checked by _load"
    return node


def _entry(mapping: MappingNode, name: str) -> tuple[Node, Node] | None:
    """Key and value nodes; the last of several, as the parser has it."""
    return next(((key, value) for key, value in reversed(mapping.value) if key.value == name), None)


def _replace(text: str, key: Node | None, node: Node, value: Any) -> str:
    start, end = node.start_mark.index, _end(text, node)
    if isinstance(node, ScalarNode):
        quotes = node.style if node.style in ("'", '"') and isinstance(value, str) else None
        new = _flow(value, quotes)
        space = " " if start > 0 and text[start - 1] == ":" else ""  # an empty value has no place of its own
        return text[:start] + space + new + text[end:]
    own_lines = not node.flow_style and key is not None and node.start_mark.line > key.end_mark.line
    if not own_lines:
        return text[:start] + _flow(value) + text[end:]
    assert key is not None
    colon = text.index(":", key.end_mark.index) + 1
    first, behind = text.rindex("\n", 0, start) + 1, _line_end(text, end) + 1
    return text[:colon] + " " + _flow(value) + text[colon:first] + text[behind:]


def _insert(text: str, mapping: MappingNode, entry: str) -> str:
    """`text` with one more entry at the end of a mapping; the lines of `entry` are indented as its siblings are."""
    if mapping.flow_style:
        at = mapping.end_mark.index - 1
        return text[:at] + (", " if mapping.value else "") + entry + text[at:]
    at = _line_end(text, _end(text, mapping))
    return text[:at] + "\n" + textwrap.indent(entry, " " * mapping.start_mark.column) + text[at:]


def _append(text: str, name: str, item: str) -> str:
    """`text` with `item` at the end of the list under the top-level key `name`."""
    root = _compose(text)
    assert isinstance(root, MappingNode)
    found = _entry(root, name)
    if found is None:
        return _insert(text, root, f"{name}: {_flow([item])}")
    key, node = found
    if not isinstance(node, SequenceNode):
        return _replace(text, key, node, [item])
    if node.flow_style:
        at = node.end_mark.index - 1
        return text[:at] + (", " if node.value else "") + _flow(item) + text[at:]
    at = _line_end(text, _end(text, node))
    return text[:at] + "\n" + " " * int(node.start_mark.column) + f"- {_flow(item)}" + text[at:]


def _copy_entry(text: str, source: str, section: str, name: str, new_name: str) -> str:
    """`text` with entry `name` of `source`'s section, comments above it included, put into its own section."""
    root, from_root = _compose(text), _compose(source)
    assert isinstance(root, MappingNode) and isinstance(from_root, MappingNode)
    from_section = _entry(from_root, section)
    assert from_section is not None and isinstance(from_section[1], MappingNode), "checked by read_recipe"
    found = _entry(from_section[1], name)
    assert found is not None
    key, value = found
    into = _entry(root, section)
    plain = into is not None and isinstance(into[1], MappingNode) and not into[1].flow_style
    if not plain or from_section[1].flow_style:
        return _set(text, [section, new_name], yaml.safe_load(source)[section][name])
    assert into is not None and isinstance(into[1], MappingNode)
    first = source.rindex("\n", 0, key.start_mark.index) + 1
    lines = source[:first].splitlines()
    while lines and lines[-1].strip().startswith("#"):
        first -= len(lines.pop()) + 1
    block = source[first : key.start_mark.index] + _flow(new_name)
    block = textwrap.dedent(block + source[key.end_mark.index : _line_end(source, _end(source, value))])
    return _insert(text, into[1], "\n" + block if section == "families" else block)


def _end(text: str, node: Node) -> int:
    """Index behind the last character of a node; the parser's own mark of a block lies at the next token."""
    if isinstance(node, MappingNode | SequenceNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return max(last[0].end_mark.index, _end(text, last[1])) if isinstance(last, tuple) else _end(text, last)
    end = node.end_mark.index
    literal = isinstance(node, ScalarNode) and node.style in ("|", ">")
    return len(text[:end].rstrip("\n")) if literal else end


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found


def _flow(value: Any, quotes: str | None = None) -> str:
    """A value on one line."""
    dumped: str = yaml.safe_dump(
        value, default_flow_style=True, default_style=quotes, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return dumped.removesuffix("...\n").strip()
