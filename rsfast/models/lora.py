"""LoRA in a whole model: putting it in, choosing adapters of a batch, merging, taking it out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from rsfast import AdapterBatch, BatchedLoRALinear, LoRALinear
from rsfast._dispatch import Impl, use_fused
from rsfast.models.freezing import give_back
from rsfast.models.lora_attention import BatchedProjection, Projection
from rsfast.models.lora_sites import ALIASES, Columns, Site, choose, find_sites, tied
from rsfast.models.lora_sources import note_sources

STATE = "_rsfast_lora"


@dataclass(frozen=True)
class LoraReport:
    """What :func:`add_lora` did.

    Attributes:
        placed: Path of each layer with LoRA, and the columns of its output that have one each; None: all have one.
        skipped: What was meant and has none, and why.
        trainable_parameters: Of the whole model, each counted once.
    """

    placed: dict[str, tuple[Columns, ...] | None]
    skipped: dict[str, str]
    trainable_parameters: int

    def __str__(self) -> str:
        names: dict[str, int] = {}
        for path in self.placed:
            name = path.rpartition(".")[2]
            names[name] = names.get(name, 0) + 1
        lines = [f"LoRA in {len(self.placed)} layers: {', '.join(f'{n} {name}' for name, n in names.items())}"]
        lines += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join([*lines, f"trainable parameters: {self.trainable_parameters:,}"])


@dataclass
class State:
    """What the model remembers: how LoRA was put in, and what to put back. Copies and pickles with it."""

    config: dict
    requires_grad: dict[str, bool]
    layers: dict[str, nn.Linear]  # that were replaced, by path
    classes: dict[str, type]  # of attentions before they were swapped, by path
    flags: dict[str, str]  # set on parents, by path
    producers: dict[str, type]  # of norms and activations before they were swapped, by path


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 8,
    targets: Sequence[str] = ALIASES,
    dropout: float = 0.0,
    num_adapters: int = 1,
    *,
    freeze: bool = True,
    recompute: bool = True,
    impl: Impl = "auto",
) -> LoraReport:
    """Put LoRA into the linear maps of a model, in place.

    Knows open_clip (both its ``nn.MultiheadAttention`` and its own attention, in either layout), timm's towers,
    torchvision's ViT and Swin (TorchGeo's, too) and Hugging Face's CLIP and SigLIP, alone or inside another model;
    elsewhere any ``nn.Linear`` by name. A fused projection becomes one layer with a LoRA for each target; attentions
    that read weights are swapped for a subclass that calls their projections as layers, so that no weight is merged in
    a forward and the output's LoRA takes part.
    Names stay, so ``state_dict`` is a superset. Until the first step the model computes what it did, but for the
    rounding of other products.

    Source: LoRA, arXiv 2106.09685. Differs from PEFT: on ``nn.MultiheadAttention`` q, k, v and the output have LoRAs of
    their own, none dead, none counted twice, with dropout; values elsewhere are PEFT's.

    Args:
        model: Not wrapped in DDP or ``torch.compile``. Gated adapters in it are left alone.
        r: Rank; at most the smaller side of every layer meant.
        alpha: LoRA is scaled by ``alpha / r``.
        targets: ``"q"``, ``"k"``, ``"v"`` (an attention's projections), ``"out"`` (its output), ``"fc"``, ``"proj"``
            (first and second layer of an MLP), and names of linear layers: the last parts of a path, or all of it. A
            word of the six that the model has nothing for is a name like any other.
            :func:`rsfast.models.check_live` tells whether a model calls what you name.
        dropout: As in :class:`rsfast.LoRALinear`.
        num_adapters: Above 1 every layer is a :class:`rsfast.BatchedLoRALinear`; :func:`set_adapter_ids` says who uses
            which.
        freeze: Freeze everything but LoRA, as PEFT does, ``logit_scale`` and gated adapters too. False leaves
            ``requires_grad`` of all else alone; weight and bias of the layers with LoRA are frozen in any case.
        recompute: Where a layer's input comes straight from a LayerNorm or a GELU, keep for backward what that keeps
            anyway and compute the input again inside the sum that needs it, as :class:`rsfast.Source` says. Fused only.
        impl: As in :func:`rsfast.lora_linear`.

    Returns:
        Where LoRA is, what was skipped and why, trainable parameters. Skipped are layers that compute their product
        themselves (quantised ones, say), or whose parent would not call them.

    Raises:
        ValueError: An option does not fit, a target names nothing, a weight is tied to another, or the model has LoRA
            already. The model is as it was.
        TypeError: ``model`` is no ``nn.Module``.
        NotImplementedError: ``num_adapters`` above 1 in a model whose attention has samples on the second axis.

    Example:
        >>> import open_clip, rsfast.models
        >>> vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
        >>> text = dict(layers=2, width=16, heads=2, vocab_size=50, context_length=6)
        >>> model = open_clip.model.CLIP(8, vision, text)
        >>> report = rsfast.models.add_lora(model, r=4, targets=("q", "v", "out"))
        >>> report.placed["transformer.resblocks.0.attn.in_proj"]
        ((0, 16), (32, 48))
    """
    targets = _check_options(model, r, alpha, targets, dropout, num_adapters, freeze, impl)
    sites = find_sites(model)
    chosen, skipped = choose(sites, targets)
    for j, slices in chosen.items():
        _check_rank(sites[j], slices, r)
    places = {j: Place(slices, r, alpha) for j, slices in chosen.items()}
    config = dict(r=r, alpha=alpha, targets=targets, dropout=dropout, num_adapters=num_adapters)
    return place(model, sites, places, config, skipped=skipped, freeze=freeze, recompute=recompute, impl=impl)


class Place(NamedTuple):
    """What a site is to get."""

    slices: tuple[Columns, ...] | None
    r: int
    alpha: float


def place(
    model: nn.Module, sites: list[Site], places: dict[int, Place], config: dict, *, skipped: dict[str, str],
    freeze: bool = True, recompute: bool = True, impl: Impl = "auto",
) -> LoraReport:  # fmt: skip
    """Put LoRA into some of the sites, each with slices, rank and alpha of its own; if refused, nothing has changed."""
    for path, names in ((sites[j].path, tied(model, sites[j])) for j in places):
        if names:
            raise ValueError(f"targets: {path} cannot have LoRA, its weight is tied: {' and '.join(names)} are one")
    num_adapters = config["num_adapters"]
    if num_adapters > 1:
        for path, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                raise NotImplementedError(
                    f"num_adapters must be 1: {path} takes (tokens, samples, width), where an id a sample finds no axis"
                )
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    options = dict(dropout=config["dropout"], impl=impl)
    try:
        layers = {sites[j].path: _build(model, sites[j], p, num_adapters, options) for j, p in places.items()}
    except BaseException:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
        raise
    state = State(config, requires_grad, {}, {}, {}, {})
    if freeze:
        model.requires_grad_(False)
    for j in places:
        _attach(model, sites[j], layers[sites[j].path], state)
    if recompute:
        state.producers.update(note_sources(model))
    setattr(model, STATE, state)
    placed = {path: layer.slices for path, layer in layers.items()}
    return LoraReport(placed, skipped, sum(p.numel() for p in model.parameters() if p.requires_grad))


def remove_lora(model: nn.Module) -> None:
    """Take LoRA out, and put back the model's modules, classes, weights and every ``requires_grad``, as they were.

    Merged LoRA is unmerged first.

    Raises:
        ValueError: :func:`add_lora` has put none into the model.
    """
    state = state_of(model)
    for layer in lora_layers(model).values():
        if getattr(layer, "merged", False):
            layer.unmerge()
    give_back(model, STATE)
    for path, base in state.layers.items():
        layer = model.get_submodule(path)
        base.weight, base.bias = layer.weight, layer.bias  # moving or loading may have put in others
        model.set_submodule(path, base.train(layer.training))
    for path, kind in state.classes.items():
        attention = model.get_submodule(path)
        for name in ("in_proj", "q_proj", "k_proj", "v_proj"):
            if isinstance(getattr(attention, name, None), Projection | BatchedProjection):
                delattr(attention, name)
        attention.__class__ = kind
    for path, kind in state.producers.items():
        model.get_submodule(path).__class__ = kind
    for path, flag in state.flags.items():
        setattr(model.get_submodule(path), flag, False)
    delattr(model, STATE)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | BatchedLoRALinear]:
    """The layers with LoRA by path; ``X.in_proj`` is the in-projection of an attention ``X`` with bare parameters.

    Example:
        >>> import torch, rsfast.models
        >>> model = torch.nn.MultiheadAttention(8, 2)
        >>> report = rsfast.models.add_lora(model, r=2)
        >>> list(rsfast.models.lora_layers(model))
        ['out_proj', 'in_proj']
    """
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear | BatchedLoRALinear)}


def set_adapter_ids(model: nn.Module, adapter_ids: Tensor | AdapterBatch | None) -> None:
    """Say which adapter each sample of the coming batches uses, to all layers of a model or of a part of it.

    They stay until set anew, so that gradient checkpointing recomputes with the same; None forgets them.

    Args:
        model: With LoRA of several adapters; ``model.visual``, say, where towers see batches of other sizes.
        adapter_ids: As in :func:`rsfast.batched_lora_linear`.

    Raises:
        ValueError: There are no layers of several adapters, or an id is out of range. Nothing is set.
    """
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer, BatchedLoRALinear)]
    if not layers:
        raise ValueError("model has no LoRA of several adapters; add_lora(model, num_adapters=...) puts it in")
    adapters = {layer.num_adapters for layer in layers}
    if len(adapters) > 1:
        raise ValueError(f"model has layers of {sorted(adapters)} adapters; set the ids of its parts")
    batch = adapter_ids
    if adapter_ids is not None and not isinstance(adapter_ids, AdapterBatch):
        batch = AdapterBatch(adapter_ids, *adapters)
    if batch is not None and batch.num_adapters not in adapters:
        raise ValueError(
            f"adapter_ids is a batch for {batch.num_adapters} adapters, but there are {layers[0].num_adapters}"
        )
    for layer in layers:
        layer.adapter_ids = batch


def merge_lora(model: nn.Module) -> None:
    """Add every LoRA to its weight, for inference without it; :func:`unmerge_lora` goes back bit for bit.

    Raises:
        ValueError: There is none, one is merged already, there are several adapters, or a merged weight is not finite.
            The model is as it was.
    """
    layers = _mergeable(model)
    if any(layer.merged for layer in layers):
        raise ValueError("the model's LoRA is merged already; unmerge_lora takes it out of the weights")
    done = []
    try:
        for layer in layers:
            layer.merge()
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_lora(model: nn.Module) -> None:
    """Put the weights back as they were before :func:`merge_lora`, bit for bit.

    Raises:
        ValueError: There is no LoRA, or it is not merged. The model is as it was.
    """
    layers = _mergeable(model)
    if not all(layer.merged for layer in layers):
        raise ValueError("the model's LoRA is not merged")
    for layer in layers:
        layer.unmerge()


def state_of(model: nn.Module) -> State:
    """What was remembered when LoRA was put in."""
    if not hasattr(model, STATE):
        raise ValueError("add_lora has put no LoRA into model")
    return getattr(model, STATE)


def _mergeable(model: nn.Module) -> list[LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model has no LoRA; add_lora puts it in")
    for path, layer in layers.items():
        if isinstance(layer, BatchedLoRALinear):
            raise ValueError(f"{path} has {layer.num_adapters} adapters for one weight, so none can be merged into it")
    return list(layers.values())


def _check_options(model, r, alpha, targets, dropout, num_adapters, freeze, impl) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError("model is itself a linear layer, which cannot be replaced in place; take rsfast.LoRALinear")
    for name, value in (("r", r), ("num_adapters", num_adapters)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    for name, value, fits, wanted in (
        ("alpha", alpha, lambda v: math.isfinite(v) and v > 0, "a positive number"),
        ("dropout", dropout, lambda v: 0 <= v < 1, "a number of at least 0 and below 1"),
    ):
        if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if type(freeze) is not bool:
        raise ValueError(f"freeze must be True or False, got {freeze!r}")
    names = tuple(targets) if isinstance(targets, Sequence | set | frozenset) and not isinstance(targets, str) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"targets must be names in a tuple or list, one or more, got {targets!r}")
    use_fused(impl, [])  # refuses an unknown impl
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"model has LoRA already, in {path or 'itself'}; remove_lora takes out what add_lora put in"
            )
    return tuple(dict.fromkeys(names))


def _check_rank(site: Site, slices: tuple[Columns, ...] | None, r: int) -> None:
    columns = min(end - start for start, end in slices or ((0, site.columns),))
    inputs = site.weight.shape[1]
    if r > min(columns, inputs):
        raise ValueError(
            f"r must be at most {min(columns, inputs)} for {site.path}, whose LoRA has {inputs} inputs and {columns} "
            f"outputs; got {r}"
        )


def _build(model: nn.Module, site: Site, place: Place, num_adapters: int, options: dict):
    several = dict(num_adapters=num_adapters) if num_adapters > 1 else {}
    options = {**place._asdict(), **several, **options}
    if site.name:
        kind = BatchedProjection if several else Projection
        return kind(site.attention, site.name, site.rows, **options)
    return (BatchedLoRALinear if several else LoRALinear)(model.get_submodule(site.path), **options)


def _attach(model: nn.Module, site: Site, layer: nn.Module, state: State) -> None:
    parent_path, _, name = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if site.swap is not None and type(parent) is not site.swap:
        state.classes[parent_path] = type(parent)
        parent.__class__ = site.swap
    if site.flag and not getattr(parent, site.flag):
        state.flags[parent_path] = site.flag
        setattr(parent, site.flag, True)
    if site.name:
        setattr(parent, name, layer.train(parent.training))
    else:
        state.layers[site.path] = model.get_submodule(site.path)
        model.set_submodule(site.path, layer)
