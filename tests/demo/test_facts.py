import random

import pytest

from stream_engine.demo.facts import (
    ColourFact,
    CountFact,
    PlaceFact,
    PresenceFact,
    count_wrong_facts,
    read_clause,
)
from stream_engine.demo.world import Item, Scene, make_picture
from tests.demo_training.answers import corrupt, true_facts, write_answer

SCENE = Scene((Item("red", "circle"), None, Item("blue", "square"), None))


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        pytest.param("Describe the image.", "The top left shows a red circle.", 0, id="true"),
        pytest.param("Describe the image.", "The top left shows a red cross.", 1, id="shape"),
        pytest.param("Describe the image.", "In the top left is a blue circle.", 1, id="colour"),
        pytest.param("Describe the image.", "The top left has a blue cross.", 1, id="both-count-1"),
        pytest.param("Describe the image.", "The top left is empty.", 1, id="not-empty"),
        pytest.param("Describe the image.", "In the top right is nothing.", 0, id="empty"),
        pytest.param(
            "Describe the image.", "In the top right there is a red cross.", 1, id="made-up"
        ),
        pytest.param("What is in the top left?", "It is a red circle.", 0, id="reply"),
        pytest.param("What is in the bottom left?", "It is a red circle.", 1, id="reply-elsewhere"),
        pytest.param("What is in the top right?", "It is empty.", 0, id="reply-empty"),
        pytest.param("How many shapes are there?", "Two.", 0, id="reply-count"),
        pytest.param("How many shapes are there?", "I count three shapes.", 1, id="count"),
        pytest.param("How many shapes are there?", "I can see one shape.", 1, id="singular"),
        pytest.param("Is there a red circle?", "Yes.", 0, id="reply-yes"),
        pytest.param("Is there a green circle?", "No, there is no green circle.", 0, id="no"),
        pytest.param("Is there a red circle?", "No.", 1, id="reply-no"),
        pytest.param("What colour is the circle?", "It is red.", 0, id="reply-colour"),
        pytest.param("What colour is the circle?", "The circle is blue.", 1, id="wrong-colour"),
        pytest.param("Describe the image.", "It is red.", 1, id="reply-without-its-question"),
        pytest.param("Describe the image.", "The top left shows a", 1, id="cut-short"),
        pytest.param("Describe the image.", "", 1, id="nothing-said"),
        pytest.param(
            "How many shapes are there?",
            "Two. The top left shows a red cross. Bananas are nice. The top right has nothing.",
            2,
            id="several",
        ),
    ],
)
def test_wrong_facts_are_counted(question: str, answer: str, wrong: int) -> None:
    assert count_wrong_facts(SCENE, question, answer) == wrong


@pytest.mark.parametrize(
    ("fact", "sentence", "question"),
    [
        (
            PlaceFact("top left", Item("red", "circle")),
            "The shape in the top left is a red circle.",
            "Is the shape in the top left a red circle?",
        ),
        (PlaceFact("top left", None), "The top left is empty.", "Is the top left empty?"),
        (CountFact(3), "There are three shapes.", "Are there three shapes?"),
        (CountFact(1), "There is one shape.", "Is there one shape?"),
        (
            PresenceFact(Item("red", "circle"), False),
            "There is no red circle.",
            "Is there no red circle?",
        ),
        (ColourFact("circle", "red"), "The circle is red.", "Is the circle red?"),
    ],
)
def test_facts_have_a_sentence_and_a_question(
    fact: CountFact, sentence: str, question: str
) -> None:
    assert (fact.sentence(), fact.question()) == (sentence, question)
    assert read_clause(sentence, "Describe the image.") == fact


def test_written_answers_are_as_true_as_they_should_be() -> None:
    rng = random.Random(1)
    for number in range(300):
        picture = make_picture(1, number)
        true = write_answer(picture.scene, picture.question, rng)
        false = write_answer(picture.scene, picture.question, rng, error_rate=2.0)
        assert count_wrong_facts(picture.scene, picture.question, true) == 0, true
        assert count_wrong_facts(picture.scene, picture.question, false) == 4, false


def test_corrupted_facts_are_false() -> None:
    rng = random.Random(2)
    for number in range(300):
        picture = make_picture(1, number)
        for fact in true_facts(picture.scene, picture.question, rng):
            assert fact.holds(picture.scene)
            assert not corrupt(fact, rng).holds(picture.scene)
