"""The MLflow record of a pipeline run, written beside it: importing mlflow takes 2 s, so a thread starts with that."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows.graph import StageNode


class Link:
    """Links the families' MLflow parents to a flow run. Nothing here can fail the flow: MLflow is a log."""

    def __init__(self, root: Path) -> None:
        self._file = root / "params.yaml"
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._import, name="import-mlflow", daemon=True)
        if self._file.exists():
            self._thread.start()

    def _import(self) -> None:
        try:
            from specflow.tracking import record

            self._link = record.link_pipeline
        except Exception as error:
            self._error = error

    def finish(self, key: str, nodes: Iterable[StageNode], tags: dict[str, str], logger: Any) -> dict[str, str]:
        """Parent run id by family; empty where there is no specflow project or no store to write to."""
        names = sorted({node.family for node in nodes if node.family is not None})
        if not self._file.exists() or not names:
            return {}
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            from specflow.config import load_params

            return dict(self._link(key, names, load_params(self._file), tags))
        except Exception as error:
            logger.warning("MLflow has no record of this pipeline run: %s", " ".join(str(error).split()))
            return {}
