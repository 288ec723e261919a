"""Attacks: what a user, a machine or a stranger can do wrong, by kind, and how each ends.

Each file `KIND.py` lists the cases of one kind; `test_KIND.py` runs a small form of them with the suite, and
`python -m tests.attacks` all of them, printing the table of docs/reliability.md.
"""
