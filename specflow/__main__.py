"""`python -m specflow` is the `specflow` command."""

from specflow.cli import main

main()
