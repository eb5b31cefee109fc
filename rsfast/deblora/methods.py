"""The methods that a run compares, by name."""

from collections.abc import Sequence
from typing import NamedTuple

ADAPTATIONS = {  # name: what is trained with labels, by which loss
    "zero-shot": (None, "ce"),
    "fine-tune": ("full", "ce"),
    "lora": ("lora", "ce"),
    "clora": ("class-wise", "ce"),
    "reweight": ("lora", "reweight"),
    "logit-adjust": ("lora", "logit-adjust"),
}
SUFFIX = "+deblora"
METHODS = tuple(name + suffix for suffix in ("", SUFFIX) for name in ADAPTATIONS)
DEFAULT = ("zero-shot", "fine-tune", "lora", "clora", "reweight", "logit-adjust", "deblora", "lora+deblora")


class Method(NamedTuple):
    """What is done to the features before they are probed.

    Attributes:
        name: In tables.
        trained: By labels: None, ``"full"``, ``"lora"`` or ``"class-wise"``.
        loss: Of that, and of the probe.
        deblora: Whether a LoRA is then learned towards calibrated features.
    """

    name: str
    trained: str | None
    loss: str
    deblora: bool


def parse_methods(names: str | Sequence[str]) -> list[Method]:
    """Methods by their names, each once: a list, or one text with commas; ``"all"`` is every one.

    ``deblora`` is short for ``zero-shot+deblora``.

    Raises:
        ValueError: No name, or one that is unknown.

    Example:
        >>> from rsfast.deblora.methods import parse_methods
        >>> [method.trained for method in parse_methods("lora,deblora")]
        ['lora', None]
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    chosen = []
    for name in (part.strip().lower() for part in given):
        if name == "all":
            chosen += METHODS
        elif name in METHODS or name == "deblora":
            chosen.append(name)
        elif name:
            raise ValueError(f"method must be of {', '.join((*METHODS, 'deblora', 'all'))}; got {name!r}")
    found = {}
    for name in chosen:
        base = "zero-shot" if name == "deblora" else name.removesuffix(SUFFIX)
        deblora = name == "deblora" or name.endswith(SUFFIX)
        method = Method("deblora" if deblora and base == "zero-shot" else name, *ADAPTATIONS[base], deblora)
        found.setdefault(method.name, method)
    if not found:
        raise ValueError(f"method must name at least one of {', '.join(METHODS)}")
    return list(found.values())
