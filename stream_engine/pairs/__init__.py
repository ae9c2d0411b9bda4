"""Results of all shards -> candidate pairs -> filters -> balance -> pairs and their statistics.

Knows no model and imports no torch. Open merger.py first.
"""
