"""Pairs as trainers read them: formats, dataset card, and the check of what was written.

Knows no run in progress and imports no torch. Open formats/__init__.py first.
"""
