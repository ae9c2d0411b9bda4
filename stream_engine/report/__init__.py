"""A run for people: a static page of its counts and pairs, and pairs in the terminal.

Reads what a run has on disk and writes nothing but the report's own folder. What is shown was
written by strangers: it reaches a page only through an escaping template or as a text node.

Open site.py first, which writes the folder; survey.py counts and draws, entries.py says what is
shown of a pair, static/pairs.js shows it. Knows no model and runs none.
"""

DEFAULT_ROWS = 500
"""Pairs that a report draws at random, unless it is told otherwise."""
