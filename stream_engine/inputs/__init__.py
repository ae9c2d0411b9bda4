"""Foreign files and rows -> a Sample or a named reject -> shards.

Knows no model and no result, and imports no torch. Open readers.py first, then ingest.py.
"""
