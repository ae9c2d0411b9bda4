"""Bytes by name: files that appear whole or not at all, leases, errors that pass.

Knows no run. Open atomic.py first.
"""
