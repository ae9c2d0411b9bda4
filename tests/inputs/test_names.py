"""Names of files: braces, and the parts of a dataset."""

import pytest

from stream_engine.errors import ConfigError
from stream_engine.inputs.names import expanded, missing_parts


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{2..1}{x,}", ["2x", "2", "1x", "1"]),
        ("{a}{}.tar", ["{a}{}.tar"]),
    ],
)
def test_braces_mean_what_they_mean_to_a_shell(pattern: str, names: list[str]):
    assert expanded(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..9999}{0..9999}"])
def test_no_end_of_names_is_refused(pattern: str):
    with pytest.raises(ConfigError, match="more than 100000 names"):
        expanded(pattern)


def test_the_parts_of_each_dataset_are_counted_by_themselves():
    names = ["a/x-00001-of-00002.parquet", "b/x-00000-of-00001.parquet", "b/y.parquet"]
    assert list(missing_parts(names)) == ["a/x-00000-of-00002.parquet"]
