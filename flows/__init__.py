"""Prefect flows over DVC's stage graph. The only importer of prefect."""

from specflow.http import spare_loopback

spare_loopback()  # Prefect's own client asks the environment's proxies, for a server on this machine too
