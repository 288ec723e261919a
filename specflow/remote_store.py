"""Shard files in a place that machines share: any fsspec URL (`s3://bucket/prefix`, `gs://`, `file:///mnt/store`).

Owns copying there and back, whole or not at all; what a shard is and where its record lies is `hidden_states.py`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specflow.errors import RetryableError, UserError
from specflow.files import atomic_path, sha256_file

WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Protocols under which an object appears only once it is whole; elsewhere a file takes its name by a rename."""


def upload(path: Path, url: str) -> None:
    """Copy a file into the folder `url` under its own name."""
    with _reached(url) as (files, folder):
        target = f"{folder}/{path.name}"
        files.makedirs(folder, exist_ok=True)
        protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
        if protocols & WHOLE_PUTS:
            files.put_file(str(path), target)
            return
        temporary = f"{folder}/.{path.name}.{platform.node()}-{os.getpid()}.tmp"
        files.put_file(str(path), temporary)
        files.mv(temporary, target)


def size(url: str, name: str) -> int | None:
    """Bytes of a file in the folder `url`, None where it is not there."""
    with _reached(url) as (files, folder):
        try:
            return int(files.info(f"{folder}/{name}")["size"])
        except FileNotFoundError:
            return None


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copy the file of that name from the folder `url` to `path`. Raises UserError unless its digest is `sha256`."""
    with _reached(url) as (files, folder), atomic_path(path) as temporary:
        try:
            files.get_file(f"{folder}/{path.name}", str(temporary))
        except FileNotFoundError:
            raise UserError(f"{url}/{path.name} is missing from the store: run the extract stage again") from None
        if (digest := sha256_file(temporary)) != sha256:
            raise UserError(
                f"{url}/{path.name} has sha256 {digest[:12]}, the manifest says {sha256[:12]}: delete it there and run "
                "the extract stage again"
            )


@contextmanager
def _reached(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of `url` and the path in it. Errors of a store are one line; lost connections may pass."""
    import fsspec

    try:
        files, folder = fsspec.core.url_to_fs(url)
        yield files, folder.rstrip("/")
    except ImportError as error:
        raise UserError(f"store {url}: {error}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"store {url}: {error}: give a URL that fsspec knows, such as s3://bucket/prefix") from None
    except OSError as error:
        raise RetryableError(
            f"store {url} cannot be reached or written ({error}): check access, then run it again"
        ) from None
