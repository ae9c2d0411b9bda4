"""What a run costs when it is large: one file a subcommand of `python -m tests.benchmarks scale`.

    python -m tests.benchmarks scale merge  --questions 10000 100000 --out FILE
    python -m tests.benchmarks scale ingest --rows 10000 100000 --out FILE

Each size is measured in a process of its own (measuring.py), on input that synthesis.py makes fast,
with the writers of a run. What is printed, and kept by --out, is one JSON object: machine, command,
versions and load beside the figures. A subcommand is a module with `add_arguments` and `measure`,
and a line in SUBCOMMANDS of command.py.
"""
