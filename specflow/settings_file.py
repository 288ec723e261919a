"""Text and YAML of a settings file: in UTF-8, each key once, of a size and depth that a person writes.

Owns what must hold before anybody asks what a setting means. YAML itself lets the last of two equal keys win, and a
few aliases of aliases stand for billions of values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError

if TYPE_CHECKING:
    from yaml.nodes import Node

MOST_VALUES = 100_000
"""Values of a file, those that aliases repeat counted each time."""
MOST_LEVELS = 50
MOST_BYTES = 10 * 2**20
LONGEST_TEXT = 4096
"""Of a string: the longest path that Linux takes."""
LONGEST_NAME = 255
"""Of one part of a path, in bytes."""


def read_text(path: Path) -> str:
    """Text of a settings file. Raises UserError, naming line and byte, where it is not UTF-8."""
    raw = path.read_bytes()
    if len(raw) > MOST_BYTES:
        raise UserError(f"{path} has {len(raw):,} bytes, settings have at most {MOST_BYTES:,}: is it another file?")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, expected UTF-8: save it in that encoding")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} has byte 0x{raw[error.start]:02x}, which is not UTF-8 (Windows-1252 or Latin-1?): "
            "save the file as UTF-8"
        ) from None


def load_yaml(text: str, path: Path) -> Any:
    """The values of YAML text. Raises UserError for what is not YAML, said twice or beyond all measure."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _measure(node, path, {}, ())
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is nested deeper than {MOST_LEVELS} levels: no setting lies so deep") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        raise UserError(f"{path} has a value that cannot be read ({' '.join(str(error).split())[:200]})") from None


def _measure(node: Node, path: Path, known: dict[int, int], above: tuple[str, ...]) -> int:
    """Values below and at `node`, aliases counted as often as they stand there."""
    from yaml.nodes import MappingNode, SequenceNode

    if id(node) in known:
        return known[id(node)]
    line = node.start_mark.line + 1
    if len(above) > MOST_LEVELS:
        raise UserError(f"{path} line {line} is nested deeper than {MOST_LEVELS} levels: no setting lies so deep")
    known[id(node)] = MOST_VALUES + 1  # whoever meets it again below itself has an endless value
    size = 1
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in lines and name != "<<":
                where = ".".join([*above, name])
                raise UserError(f"{path} sets {where} twice, in lines {lines[name]} and {key.start_mark.line + 1}")
            lines[name] = key.start_mark.line + 1
            size += _measure(value, path, known, (*above, name))
    elif isinstance(node, SequenceNode):
        size += sum(_measure(value, path, known, (*above, str(number))) for number, value in enumerate(node.value))
    if size > MOST_VALUES:
        where = ".".join(above) or "the file"
        raise UserError(f"{path} line {line}: {where} has over {MOST_VALUES:,} values: aliases of aliases?")
    known[id(node)] = size
    return size


def check_texts(raw: Any, where: str, above: tuple[str, ...] = ()) -> None:
    """Raises UserError for a string, key or value, that no file, name or server can be called by."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            check_texts(key if isinstance(key, str) else None, where, above)
            check_texts(value, where, (*above, str(key)[:LONGEST_NAME]))
    elif isinstance(raw, list):
        for number, value in enumerate(raw):
            check_texts(value, where, (*above, str(number)))
    elif isinstance(raw, str) and (reason := _unusable(raw)):
        raise UserError(f"{where}: {'.'.join(above) or 'the file'} {reason}, got {raw[:40]!r}")


def _unusable(text: str) -> str | None:
    if len(text) > LONGEST_TEXT:
        return f"has a text of {len(text):,} characters, at most {LONGEST_TEXT:,} are possible"
    if any(not char.isprintable() and char not in "\n\t" for char in text):
        return "has a control character or half of a surrogate pair"
    if any(len(part.encode()) > LONGEST_NAME for part in text.split("/")) and " " not in text:
        return f"has a name of over {LONGEST_NAME} bytes, which no file system takes"
    return None
