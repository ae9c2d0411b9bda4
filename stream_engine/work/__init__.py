"""One process of a run: lease, read, process, write, release; and the models that this takes.

Knows no file format and no ranking rule. Open worker.py first (the loop), then runner.py (a run
from its settings to its dataset).
"""
