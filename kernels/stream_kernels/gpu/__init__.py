"""Triton forms for CUDA devices, imported when the first CUDA tensor arrives.

Their wrappers assume nothing about the device, so that Triton's interpreter runs them on CPU.
"""
