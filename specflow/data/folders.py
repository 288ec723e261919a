"""Files of a data set folder (a hub snapshot): its configurations and splits, as the hub's own library finds them.

`datasets` says which files make a split; it does not read them, because it casts every file to the schema of the
first one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from specflow.errors import UserError

_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv")


def data_files(folder: Path, config: str | None, split: str) -> tuple[list[Path], list[str]]:
    """Files of one split of one configuration, and names of data files that belong to no split of it.

    Raises UserError that names what there is, where `config` or `split` is needed or is another's.
    """
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        try:
            builder = datasets.load_dataset_builder(str(folder), name=config, cache_dir=scratch)
        except Exception as error:  # of many kinds: README's YAML, missing files, loading scripts
            raise _explained(folder, config, error) from None
    splits = {str(name): [Path(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}: set the source's `split` to one of {sorted(splits)}")
    known = {file for files in splits.values() for file in files}
    others = (
        file
        for file in sorted(folder.rglob("*"))
        if file.name.removesuffix(".gz").endswith(_SUFFIXES) and not file.name.startswith(".")
    )
    return splits[split], [str(file.relative_to(folder)) for file in others if file not in known]


def _explained(folder: Path, config: str | None, error: Exception) -> UserError:
    import datasets

    try:
        names = datasets.get_dataset_config_names(str(folder))
    except Exception:  # the folder is none that `datasets` knows: the first error says why
        names = []
    if config is not None and config not in names:
        return UserError(f"{folder} has no configuration {config!r}: set the source's `config` to one of {names}")
    if config is None and len(names) > 1:
        return UserError(f"{folder} has the configurations {names}: set the source's `config` to one of them")
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder} cannot be read as a data set ({reason}): check the folder, or name one file of it")
