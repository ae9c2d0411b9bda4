"""Token ids as the pieces of text that they add, for people who look at single tokens.

Reads the tokenizer's own file by the library that it was made for, since transformers takes
seconds to import: nothing is encoded here, and both decode alike. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stream_engine.errors import CheckpointError
from stream_engine.models.intact import read_json, refuse_broken_file

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes to when a character's last bytes are still to come."""
LOOK_BACK = 6
"""Tokens decoded before a piece, since some tokenizers drop the space of a first word."""


def load_pieces(checkpoint: Path) -> Callable[[Sequence[int]], list[str]]:
    """A function from token ids to as many pieces of text; special tokens by their names.

    Raises:
        CheckpointError: when there is no tokenizer, or it cannot be read.
    """
    for name, load in {
        "tokenizer.json": load_fast,
        "tokenizer.model": load_sentencepiece,
        "vocab.json": load_bytes,
    }.items():
        path = checkpoint / name
        if not path.is_file():
            continue
        refuse_broken_file(path)
        try:
            return partial(pieces, load(path))
        except Exception as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
    raise CheckpointError(f"{checkpoint} has no tokenizer")


def pieces(decode: Decode, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a token that ends no character adds "", the next one all.

    A piece that is never finished is shown as it decodes.
    """
    found: list[str] = []
    begin = 0  # of the tokens whose text is not shown yet
    for end in range(1, len(token_ids) + 1):
        before = token_ids[max(0, begin - LOOK_BACK) : begin]
        text = decode([*before, *token_ids[begin:end]])
        if text.endswith(UNFINISHED) and end < len(token_ids):
            found.append("")
            continue
        found.append(text[len(decode(before)) :])
        begin = end
    return found


def load_fast(path: Path) -> Decode:
    """tokenizer.json, as the library `tokenizers` writes it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def load_sentencepiece(path: Path) -> Decode:
    """tokenizer.model, and the tokens that were added to it."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    names = added_tokens(path.parent)
    for token_id in range(processor.get_piece_size()):
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            names.setdefault(token_id, processor.id_to_piece(token_id))
    return partial(with_names, names, processor.decode)


def load_bytes(path: Path) -> Decode:
    """vocab.json of a byte-level vocabulary (GPT-2, Qwen2), and the tokens that were added."""
    from tokenizers.decoders import ByteLevel

    decoder = ByteLevel()
    words = {token_id: word for word, token_id in json.loads(path.read_text("utf-8")).items()}
    names = added_tokens(path.parent)
    return partial(
        with_names, names, lambda ids: decoder.decode([words.get(i, f"<{i}>") for i in ids])
    )


def with_names(
    names: dict[int, str], decode: Callable[[list[int]], str], token_ids: Sequence[int]
) -> str:
    """The text of ids, those that have names by their names."""
    text, run = [], list[int]()
    for token_id in token_ids:
        if token_id in names:
            text += [decode(run) if run else "", names[token_id]]
            run = []
        else:
            run.append(token_id)
    return "".join([*text, decode(run) if run else ""])


def added_tokens(checkpoint: Path) -> dict[int, str]:
    """Id -> name of the tokens that a checkpoint adds to its vocabulary, from its JSON files."""
    names = {int(i): str(word) for word, i in read_json(checkpoint / "added_tokens.json").items()}
    stated: dict[str, Any] = read_json(checkpoint / "tokenizer_config.json")
    for token_id, token in stated.get("added_tokens_decoder", {}).items():
        names[int(token_id)] = str(token["content"])
    return names
