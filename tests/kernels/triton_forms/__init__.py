"""Tests of the Triton kernels themselves: on a GPU where there is one, else in the interpreter.

Without a GPU, tests/kernels/test_interpreter.py runs this folder with TRITON_INTERPRET=1.
"""
