"""Files that are there as a whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that at any moment the old one or the new one is there as a whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may not survive a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    replace(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def load_state(path: Path, keys: set[str], what: str) -> dict:
    """A training that ``torch.save`` wrote, a dictionary with ``keys`` at least; ValueError, with ``what``, if not."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, struct and zipfile each have their own for damaged bytes
        raise ValueError(f"{what}: {path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not state.keys() >= keys:
        raise ValueError(f"{what}: {path} is damaged: it must hold {', '.join(sorted(keys))}")
    return state
