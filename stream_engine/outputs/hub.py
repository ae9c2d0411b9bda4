"""A dataset goes to the Hugging Face hub: its folder as it is, large ones in parts, resumably.

huggingface_hub comes with transformers; its token and endpoint are used.
"""

from __future__ import annotations

import re
from pathlib import Path

from stream_engine.errors import ConfigError
from stream_engine.outputs.published import RECORD, file_problems, is_ours, recorded
from stream_engine.run_dir.sealed import read_sealed
from stream_engine.text import one_line

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Make the repository where there is none, and bring it to what the folder holds; returns its
    URL.

    Whoever was interrupted calls it again: files that arrived are not sent again. Files of an
    earlier dataset that this one has not are removed from the repository, whose history keeps them.

    Raises:
        ConfigError: for a name that is none, a folder that is no whole dataset of ours, or what the
            hub refuses.
    """
    from huggingface_hub import HfApi

    if REPOSITORY.fullmatch(repo_id) is None:
        raise ConfigError(f"{repo_id!r} names no repository; write user/name")
    stats = read_sealed(folder / RECORD)
    if not is_ours(folder) or stats is None:
        raise ConfigError(f"{folder} holds no dataset of ours")
    if problem := next(file_problems(folder), None):
        raise ConfigError(f"not pushed, since the dataset is damaged: {problem}")
    hub = HfApi()
    try:
        url = hub.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Preference pairs by stream_engine",
            delete_patterns=["*"],
            allow_patterns=[RECORD, *(f"{n}*" if n.endswith("/") else n for n in recorded(stats))],
        )
    except (OSError, ValueError, RuntimeError) as error:  # without network, name or right
        raise ConfigError(
            f"cannot push to {repo_id!r}: {one_line(error)}; the same command goes on where it "
            "stopped"
        ) from error
    return str(url)
