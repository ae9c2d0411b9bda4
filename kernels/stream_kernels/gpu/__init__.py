"""Triton forms for CUDA devices, imported when the first CUDA tensor arrives.

Their wrappers assume nothing about the device, so that Triton's interpreter runs them on CPU.
Whatever grows with the batch lies on a grid's first axis: the others end at 65535 programs, which
answers to score times key heads exceed.
"""
