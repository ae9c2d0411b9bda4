"""A sample's key is of its content: what has changed in any part is another sample."""

from __future__ import annotations

from stream_engine.records import EncodedImage, sample_key

CAT, DOG = EncodedImage(b"cat", "cat.png"), EncodedImage(b"dog", "dog.png")


def test_a_key_names_the_id_the_question_and_every_image() -> None:
    """Without the id, two users' rows with the same question about the same picture were one."""
    keys = [
        sample_key("7", "Why?", (CAT, DOG)),
        sample_key("8", "Why?", (CAT, DOG)),
        sample_key("", "Why?", (CAT, DOG)),
        sample_key("7", "How?", (CAT, DOG)),
        sample_key("7", "Why?", (DOG, CAT)),
        sample_key("7", "Why?", (CAT,)),
        sample_key("7", "Why?", ()),
    ]
    assert len(set(keys)) == len(keys)


def test_no_part_of_a_key_runs_into_the_next() -> None:
    assert sample_key("1", "2", ()) != sample_key("12", "", ())
    assert sample_key("1", "2", (EncodedImage(b"3"),)) != sample_key(
        "1", "23", (EncodedImage(b""),)
    )


def test_keys_are_those_of_runs_made_before() -> None:
    """A run directory is added to by its keys: another digest would take all its rows for new."""
    assert sample_key("7", "Why?", (CAT, DOG)) == "c83948eedb34ffdab14fa346b4fb0c98"


def test_where_a_picture_came_from_is_not_its_content() -> None:
    assert sample_key("7", "Why?", (EncodedImage(b"cat", "elsewhere/cat.png"), DOG)) == sample_key(
        "7", "Why?", (CAT, DOG)
    )
