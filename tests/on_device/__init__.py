"""Checks of all that depends on the device, as functions of it: `tests/gpu` runs them on a GPU, `tests/unit` the same
ones on a CPU under a GPU's choices, so that no line of them is run for the first time where time is dear.
"""
