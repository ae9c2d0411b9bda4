"""What a run has on disk and what it means: paths, manifest, shards, results, failures, state.

Knows no model and no pipeline: fingerprints and stage names are handed to it. Open paths.py first
(the layout), then state.py.
"""
