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
STEPS = ("deblora", "calibrate")  # what may follow
METHODS = (*ADAPTATIONS, *STEPS, *(f"{name}+{step}" for step in STEPS for name in ADAPTATIONS if name != "zero-shot"))
DEFAULT = (*ADAPTATIONS, "deblora", "lora+deblora", "calibrate")


class Method(NamedTuple):
    """What is done to the features before they are probed.

    Attributes:
        name: In tables.
        trained: By labels: None, ``"full"``, ``"lora"`` or ``"class-wise"``.
        loss: Of that, and of the probe.
        step: What follows. ``"deblora"``: a LoRA is learned towards calibrated features, as in the paper.
            ``"calibrate"``: the authors' released evaluation, without that LoRA: the probe is trained on the features
            and the calibrated ones of tail classes, and meets features as they are on the test rows.
    """

    name: str
    trained: str | None
    loss: str
    step: str | None


def parse_methods(names: str | Sequence[str]) -> list[Method]:
    """Methods by their names, each once: a list, or one text with commas; ``"all"`` is every one.

    ``deblora`` is short for ``zero-shot+deblora``, ``calibrate`` for ``zero-shot+calibrate``.

    Raises:
        ValueError: No name, or one that is unknown.

    Example:
        >>> from rsfast.deblora.comparison.methods import parse_methods
        >>> [(method.trained, method.step) for method in parse_methods("lora,lora+deblora,deblora")]
        [('lora', None), ('lora', 'deblora'), (None, 'deblora')]
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    found = {}
    for name in (part.strip().lower().removeprefix("zero-shot+") for part in given):
        for one in METHODS if name == "all" else filter(None, [name]):
            if one not in METHODS:
                raise ValueError(f"method must be of {', '.join((*METHODS, 'all'))}; got {one!r}")
            base, _, step = one.partition("+")
            if base in STEPS:
                base, step = "zero-shot", base
            found.setdefault(one, Method(one, *ADAPTATIONS[base], step or None))
    if not found:
        raise ValueError(f"method must name at least one of {', '.join(METHODS)}")
    return list(found.values())
