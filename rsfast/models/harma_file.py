"""Opening the files that HarMA's training script saves, without running anything that is in them."""

import io
import os
import pathlib
import pickle
import pickletools
import zipfile

import torch
from torch import Tensor


def read_harma_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a checkpoint, and the backbone that its configuration names (``geo`` or ``vit``).

    HarMA saves ``{"model": state_dict, "config": config}``, where the configuration is of ruamel.yaml's own classes.
    ``weights_only=True`` refuses those, so such a configuration is cut away unread before the rest is loaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint that ``weights_only=True`` can read, or holds no dict of tensors.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    trained_on = None
    try:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(path):
                raise
            without, trained_on = _cut_config(path)
            checkpoint = torch.load(without, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read with weights_only=True: {error}") from None
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("config"), dict):
        trained_on = checkpoint["config"].get("model")
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(t, Tensor) for t in state_dict.values()):
        raise ValueError(f"{path} must hold a dict of tensors, or one under 'model'")
    return state_dict, trained_on


def _cut_config(path) -> tuple[io.BytesIO, str | None]:
    """The same file without ``"config": <ruamel object>``, which must be the last entry of its dict."""
    shorter = io.BytesIO()
    trained_on = None
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(shorter, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                content, trained_on = _cut(content)
            new.writestr(name, content)
    shorter.seek(0)
    return shorter, trained_on


def _cut(program: bytes) -> tuple[bytes, str | None]:
    """The pickle up to its ``"config"``, closed there, and what that says of ``model``; runs no step of it."""
    start = trained_on = None
    previous, key_at, memo = None, 0, {}
    for op, value, at in pickletools.genops(program):
        if "PUT" in op.name:
            memo[value] = previous
            continue
        value = memo.get(value) if "GET" in op.name else value
        if previous == "config" and op.name == "GLOBAL" and value.startswith("ruamel.yaml"):
            start = key_at
        if start is not None and trained_on is None and previous == "model" and isinstance(value, str):
            trained_on = value
        previous, key_at = value, at
    if start is None:
        raise ValueError("it holds objects other than tensors, numbers and strings")
    return program[:start] + pickle.SETITEMS + pickle.STOP, trained_on
