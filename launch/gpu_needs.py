"""python launch/gpu_needs.py [--missing]

Names, a line each, the distributions that the GPU check needs beside torch, triton, transformers
and what these bring along; with --missing those alone that this python has not.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution

NEEDS = [
    "braceexpand",  # of webdataset
    "iniconfig",  # of pytest, and so is pluggy
    "msgspec",
    "pillow",
    "pluggy",
    "protobuf",
    "pyarrow",
    "pytest",
    "pytest-timeout",
    "sentencepiece",
    "simplejpeg",
    "webdataset",
]


def is_missing(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return True
    return False


if __name__ == "__main__":
    print("\n".join(name for name in NEEDS if "--missing" not in sys.argv or is_missing(name)))
