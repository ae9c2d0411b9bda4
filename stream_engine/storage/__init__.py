"""Everything that knows bytes and paths: inputs, shards, results, leases, exports."""
