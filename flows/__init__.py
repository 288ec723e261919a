"""Prefect flows over DVC's stage graph. The only importer of prefect."""
