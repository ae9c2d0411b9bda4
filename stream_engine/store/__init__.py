"""Bytes by name, on a disk or in object storage: created where absent, replaced where unchanged.

Beside them leases, names of sources, and errors that pass. Knows no run. Open base.py first (what
is promised), then files.py (what other rooms call).
"""
