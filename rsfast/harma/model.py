"""open_clip models: by name or by config, with weights from a tag, a file or a run."""

import contextlib
import json
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")


class Model(NamedTuple):
    """A model with what is needed to make it again: its config, and the name and tag of its weights if it has them."""

    model: nn.Module
    tokenizer: object
    config: dict
    name: str | None
    tag: str | None


def read_config(model: str | dict) -> tuple[dict, str | None]:
    """open_clip's config of a model, and its name if open_clip knows it by one.

    Args:
        model: Name, path of a ``.json`` (open_clip's ``model_configs/*.json`` or ``open_clip_config.json``), or the
            config itself.
    """
    import open_clip

    if isinstance(model, dict):
        config, name, what = model, None, "the model's config"
    elif str(model).endswith(".json"):
        path = Path(model)
        if not path.is_file():
            raise FileNotFoundError(f"model: there is no config {path}")
        try:
            config, name, what = json.loads(path.read_text(encoding="utf-8")), None, str(path)
        except ValueError as error:
            raise ValueError(f"model: {path} is not JSON: {error}") from error
    else:
        config, name, what = open_clip.get_model_config(model) if ":" not in model else None, model, model
        if config is None:
            raise ValueError(f"model: open_clip has no {model!r}; give a name of open_clip.list_models() or a .json")
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise ValueError(f"model: {what} is no config of open_clip, it lacks {', '.join(missing)}")
    return config, name


def build(config: dict, *, seed: int = 0) -> nn.Module:
    """The model of a config, weights drawn from ``seed``; open_clip's list of models is left alone."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), _quiet():
        # the one public way from a config to a model that changes no global list
        Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        torch.default_generator.manual_seed(seed)  # the GPUs' generators are the caller's
        try:
            return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        except Exception as error:  # whatever open_clip stumbles over in the config
            raise ValueError(
                f"model: open_clip can make none of its config: {type(error).__name__}: {error}"
            ) from error


@contextlib.contextmanager
def _quiet():
    """open_clip warns of missing weights where they are loaded a line later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def create(model: str | dict, *, weights: str | Path | None = None, seed: int = 0, name: str | None = None) -> Model:
    """Model and tokenizer.

    Args:
        model: As in :func:`read_config`.
        weights: None draws them from ``seed``; else a tag of open_clip for this name, or a file ``.pt``, ``.pth``,
            ``.bin`` or ``.safetensors``.
        name: open_clip's name of a model given by its config; it decides the tokenizer.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The config, the weights or the tokenizer do not fit; the message names which.
    """
    import open_clip

    config, own_name = read_config(model)
    name, tag = name or own_name, None
    if weights is not None and Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        built = build(config)
        load_weights(built, weights)
    elif weights is not None:
        tag, tags = str(weights), open_clip.list_pretrained_tags_by_model(name) if name else []
        if tag not in tags:
            known = f"the tags of {name} are {', '.join(tags)}" if tags else "tags go with names of open_clip only"
            raise ValueError(f"pretrained: {tag!r} is no weights file, run folder or tag; {known}")
        of_tag = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        if of_tag != config.get("quick_gelu", False):
            other = f"{name}-quickgelu" if of_tag else name.removesuffix("-quickgelu")
            raise ValueError(f"pretrained: {tag} was trained as {other}; with {name} it gives wrong features silently")
        try:
            built = open_clip.create_model(name, pretrained=tag)
        except RuntimeError as error:
            raise ValueError(f"pretrained: {tag} of {name} could not be loaded: {error}") from error
    else:
        built = build(config, seed=seed)
    return Model(built, tokenizer(config, name), config, name, tag)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a whole model's weights; refuses what does not fit and what is not finite."""
    import open_clip

    if not Path(path).is_file():
        raise FileNotFoundError(f"pretrained: there is no weights file {path}")
    try:
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:  # unreadable, of another model, or holding more than tensors: torch says what
        raise ValueError(f"pretrained: {path} does not fit the model: {type(error).__name__}: {error}") from error
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise ValueError(f"pretrained: {path} holds NaN or infinity in {', '.join(broken[:5])}")


def tokenizer(config: dict, name: str | None):
    """The tokenizer that open_clip gives the model."""
    import open_clip

    text = config["text_cfg"]
    try:
        if name is not None:
            return open_clip.get_tokenizer(name)
        if text.get("hf_tokenizer_name"):
            return open_clip.tokenizer.HFTokenizer(
                text["hf_tokenizer_name"],
                context_length=text.get("context_length", 77),
                tokenizer_mode=text.get("tokenizer_mode"),
                **text.get("tokenizer_kwargs", {}),
            )
    except Exception as error:  # missing packages and failed downloads come as many types
        raise ValueError(
            f"model: its tokenizer, which is not part of open_clip, could not be loaded: {error}"
        ) from error
    made = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {}))
    if text.get("vocab_size", made.vocab_size) < made.vocab_size:
        raise ValueError(
            f"model: vocab_size must be {made.vocab_size} or more, the tokenizer's, got {text['vocab_size']}"
        )
    return made


def image_settings(model: nn.Module) -> dict:
    """``size`` (height, width), ``mean`` and ``std`` that the model's images want."""
    import open_clip

    visual = model.visual
    size = visual.image_size
    return {
        "size": list(size) if isinstance(size, (tuple, list)) else [size, size],
        "mean": list(getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN),
        "std": list(getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD),
    }
