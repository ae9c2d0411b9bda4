"""All that needs a GPU, in one command: `bash launch/gpu_check.sh OUT`; a file here a step.

`--rehearse` runs the same code on any machine: tiny shapes, CPU, Triton's interpreter.
"""
