"""The compiled form for processors with AVX-512. Whoever imports it has tensors on CPU."""
