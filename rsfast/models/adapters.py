"""Attaching gated adapters to an open_clip model, and taking them off again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rsfast import GatedAdapter, SharedAdapter
from rsfast._dispatch import Impl, use_fused
from rsfast.models.blocks import ADAPTED, ORIGINAL, EndOfText, PaddingAwareTransformer, Transformer
from rsfast.models.freezing import give_back
from rsfast.models.towers import TOWERS, Tower, find_towers

STATE = "_rsfast_adapters"
OPTIONS = ("bottleneck", "num_heads", "share", "towers", "freeze", "skip_padding")


@dataclass(frozen=True)
class AdapterReport:
    """What :func:`add_adapters` did.

    Attributes:
        placed: Paths of the blocks that have an adapter now.
        skipped: What has none, and why.
        shared: For every sub-adapter, the paths of the blocks that own it.
        beyond: Blocks that own a sub-adapter alone because the other tower has no block of their number.
        trainable_parameters: Of the whole model, each counted once.
    """

    placed: tuple[str, ...]
    skipped: dict[str, str]
    shared: tuple[tuple[str, ...], ...]
    beyond: tuple[str, ...]
    trainable_parameters: int

    def __str__(self) -> str:
        in_two = sum(len(owners) > 1 for owners in self.shared)
        lines = [
            f"adapters in {len(self.placed)} blocks: {_ranges(self.placed)}",
            f"sub-adapters: {len(self.shared)}, of which {in_two} are owned by a text and a vision block together",
        ]
        if self.beyond:
            lines.append(f"own sub-adapter, beyond the other tower: {_ranges(self.beyond)}")
        lines += [f"skipped {path}: {why}" for path, why in self.skipped.items()]
        return "\n".join([*lines, f"trainable parameters: {self.trainable_parameters:,}"])


def _ranges(paths: tuple[str, ...]) -> str:
    """Consecutive blocks as ``transformer.resblocks.0 to 11``."""
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stack, _, number = path.rpartition(".")
        stacks.setdefault(stack, []).append(number)
    return ", ".join(f"{s}.{n[0]}" + (f" to {n[-1]}" if len(n) > 1 else "") for s, n in stacks.items())


@dataclass
class State:
    """What the model remembers: how the adapters were added, and what to put back. Copies and pickles with it."""

    config: dict
    requires_grad: dict[str, bool]
    logit_scale: Tensor


def add_adapters(
    model: nn.Module,
    *,
    bottleneck: int = 128,
    num_heads: int = 8,
    share: Literal["both", "text"] | None = "both",
    towers: tuple[str, ...] = ("visual", "text"),
    freeze: bool = True,
    skip_padding: bool = False,
    impl: Impl = "auto",
) -> AdapterReport:
    """Put a gated adapter on the MLP branch of every block of an open_clip model, in place.

    Each adapter becomes the child ``adapter`` of its block, and the block's class is swapped for a subclass that calls
    it inside ``ls_2``; nothing is wrapped, so names, ``state_dict`` keys, ``lock`` and checkpointing stay as they are.
    Until the first training step an adapter returns its input bit for bit. (PyTorch's own products may round otherwise
    once their weights are frozen, so compare outputs with those of a frozen model.)

    Source: HarMA, arXiv 2404.18253; upstream ``open_clip/model.py`` and ``ResidualAttentionBlock``. Differs from
    upstream: the temperature is the model's own ``logit_scale``, and ``share="both"`` is what the paper describes.

    Args:
        model: open_clip ``CLIP`` or ``CustomTextCLIP`` with open_clip's own transformers, not wrapped.
        bottleneck: Inner width of the adapters; even with ``share``.
        num_heads: Heads of their attentions; divides ``bottleneck``, and half of it with ``share``.
        share: ``"both"``: text block j and vision block j own the same sub-adapter, as in the paper; a block beyond
            the shorter tower, or every block if one tower alone is adapted, owns one by itself. ``"text"``: each text
            block owns one and vision blocks have none, as in the released code. None: no sub-adapters.
        towers: Which encoders to adapt.
        freeze: Freeze everything but the adapters and ``logit_scale`` (a ``logit_bias`` is frozen too); False leaves
            ``requires_grad`` of the model's own parameters alone.
        skip_padding: Tokens after end-of-text neither attend nor are attended to in the text adapters; HarMA's attend.
            With a causal text tower, features do not depend on the padding then.
        impl: As in :func:`rsfast.gated_adapter`.

    Returns:
        Where adapters were placed, what was skipped and why, who owns the sub-adapters, trainable parameters.

    Raises:
        ValueError: An option does not fit, or the model has adapters already. The model is as it was.
        TypeError: ``model`` is no open_clip CLIP. The model is as it was.
        NotImplementedError: A tower cannot be served (ResNet, timm, Hugging Face), or ``skip_padding`` on a text
            tower that pools no end-of-text token. The message names it, and the model is as it was.

    Adapters are in fp32 on their block's device, whatever 16-bit dtype the model is in (fp64 in an fp64 model).

    Example:
        >>> import open_clip, rsfast.models
        >>> vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
        >>> text = dict(layers=2, width=16, heads=2, vocab_size=50, context_length=6)
        >>> model = open_clip.model.CLIP(8, vision, text)
        >>> report = rsfast.models.add_adapters(model, bottleneck=32, num_heads=4)
        >>> len(report.placed), report.shared[0]
        (4, ('visual.transformer.resblocks.0', 'transformer.resblocks.0'))
    """
    options = (bottleneck, num_heads, share, towers, freeze, skip_padding)
    config = dict(zip(OPTIONS, options, strict=True))
    plan = make_plan(model, config, impl)
    attach(model, plan)
    return make_report(model)


def remove_adapters(model: nn.Module) -> None:
    """Take the adapters off, and put back the model's classes, hooks and every ``requires_grad``, as they were.

    ``logit_scale`` gets its value back where ``add_adapters(freeze=True)`` made it the adapters' temperature.

    Raises:
        ValueError: The model has no adapters.
    """
    state = state_of(model)
    for tower in find_towers(model, state.config["towers"]):
        for block in tower.blocks.values():
            del block.adapter
            block.__class__ = ORIGINAL[type(block)]
        if isinstance(tower.transformer, PaddingAwareTransformer):
            _unwatch(tower)
    if state.config["freeze"]:
        model.logit_scale.data.copy_(state.logit_scale)
    give_back(model, STATE)
    delattr(model, STATE)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it computed before the adapters were added, bit for bit; nothing is copied.

    Blocks and text transformer are of their own classes again, so what runs is open_clip's code. Afterwards, also after
    an error, the adapters take part as before. ``logit_scale``, ``requires_grad`` and training mode are left alone.
    Inside there are no gradients: a checkpointed block that recomputes later would do so with its adapter.

    Args:
        model: With adapters, not wrapped; under DDP the module that was wrapped.

    Raises:
        ValueError: The model has no adapters.

    Example:
        >>> import open_clip, torch, rsfast.models
        >>> vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
        >>> text = dict(layers=2, width=16, heads=2, vocab_size=50, context_length=6)
        >>> model = open_clip.model.CLIP(8, vision, text).eval()
        >>> tokens = torch.tensor([[1, 5, 49, 0, 0, 0]])
        >>> with torch.no_grad():
        ...     before = model.encode_text(tokens)
        >>> report = rsfast.models.add_adapters(model, bottleneck=32, num_heads=4)
        >>> with rsfast.models.adapters_off(model):
        ...     torch.equal(model.encode_text(tokens), before)
        True
    """
    towers = find_towers(model, state_of(model).config["towers"])
    own = ORIGINAL | {PaddingAwareTransformer: Transformer}
    adapted = [(m, type(m)) for tower in towers for m in (tower.transformer, *tower.blocks.values()) if type(m) in own]
    checkpointing = [(tower.transformer, tower.transformer.grad_checkpointing) for tower in towers]
    try:
        for module, kind in adapted:
            module.__class__ = own[kind]
        for transformer, _ in checkpointing:
            transformer.grad_checkpointing = False  # of no use without gradients, and upstream's custom block lacks it
        with torch.no_grad():
            yield
    finally:
        for module, kind in adapted:
            module.__class__ = kind
            if kind is PaddingAwareTransformer:
                module.end_of_text.lengths = None  # measured inside, and taken by nobody
        for transformer, before in checkpointing:
            transformer.grad_checkpointing = before


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, STATE)


def state_of(model: nn.Module) -> State:
    """What was remembered when the adapters were added."""
    if not has_adapters(model):
        raise ValueError("model has no adapters; add_adapters or load_adapters puts them in")
    return getattr(model, STATE)


@dataclass
class Plan:
    """Adapters built and checked, attached to nothing yet."""

    config: dict
    towers: list[Tower]
    adapters: dict[tuple[str, int], GatedAdapter]  # by tower and number of the block


def plan_of(model: nn.Module) -> Plan:
    """The plan by which the model's adapters were attached."""
    config = state_of(model).config
    towers = find_towers(model, config["towers"])
    blocks = {(tower.name, j): block for tower in towers for j, block in enumerate(tower.blocks.values())}
    return Plan(config, towers, {key: block.adapter for key, block in blocks.items()})


def make_plan(model: nn.Module, config: dict, impl: Impl = "auto") -> Plan:
    """Check everything and build the adapters; changes nothing."""
    towers = _check_options(model, config, impl)
    config = {**config, "towers": tuple(tower.name for tower in towers)}
    share = config["share"]
    size = (config["bottleneck"], config["num_heads"])
    deepest = max(len(tower.blocks) for tower in towers)
    shared = [SharedAdapter(*size) if share else None for _ in range(deepest)]
    adapters = {}
    for tower in towers:
        owns = share == "both" or share == tower.name
        for j, block in enumerate(tower.blocks.values()):
            adapter = GatedAdapter(tower.transformer.width, *size, shared=shared[j] if owns else None, impl=impl)
            weight = block.mlp.c_fc.weight
            adapter.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            adapters[tower.name, j] = adapter.train(block.training)
    return Plan(config, towers, adapters)


def attach(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan; nothing in here can be refused any more."""
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    setattr(model, STATE, State(plan.config, requires_grad, model.logit_scale.detach().clone()))
    if plan.config["freeze"]:
        model.requires_grad_(False)
        model.logit_scale.requires_grad_(True)
    for tower in plan.towers:
        for j, block in enumerate(tower.blocks.values()):
            block.adapter = plan.adapters[tower.name, j]
            block.__class__ = ADAPTED[type(block)]
        if plan.config["skip_padding"] and tower.name == "text":
            _watch(tower)


def make_report(model: nn.Module) -> AdapterReport:
    """Say what is in the model now."""
    config = state_of(model).config
    towers = find_towers(model, config["towers"])
    placed = {path: block.adapter.shared for tower in towers for path, block in tower.blocks.items()}
    owners: dict[int, list[str]] = {}
    for path, shared in placed.items():
        if shared is not None:
            owners.setdefault(id(shared), []).append(path)
    shared = tuple(tuple(paths) for paths in owners.values())
    beyond = tuple(paths[0] for paths in shared if len(paths) == 1) if config["share"] == "both" else ()
    skipped = {name: "not among the towers asked for" for name in TOWERS if name not in config["towers"]}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdapterReport(tuple(placed), skipped, shared, beyond, trainable)


def _check_options(model: nn.Module, config: dict, impl: Impl) -> list[Tower]:
    names, share = config["towers"], config["share"]
    known = isinstance(names, (tuple, list)) and len(names) and len(set(names)) == len(names)
    if not known or not set(names) <= set(TOWERS):
        raise ValueError(f"towers must be one or both of {TOWERS}, each once, got {names!r}")
    if share not in ("both", "text", None):
        raise ValueError(f"share must be 'both', 'text' or None, got {share!r}")
    if share == "text" and "text" not in names:
        raise ValueError(f"share='text' needs the text tower, but towers is {tuple(names)!r}")
    for option in ("bottleneck", "num_heads"):
        if type(config[option]) is not int or config[option] < 1:
            raise ValueError(f"{option} must be a positive integer, got {config[option]!r}")
    for option in ("freeze", "skip_padding"):
        if type(config[option]) is not bool:
            raise ValueError(f"{option} must be True or False, got {config[option]!r}")
    bottleneck, divided = config["bottleneck"], config["num_heads"] * (2 if share else 1)
    if bottleneck % divided:
        raise ValueError(
            f"bottleneck must be a multiple of {divided} for num_heads={config['num_heads']} and share={share!r}, "
            f"got {bottleneck}"
        )
    use_fused(impl, [])  # refuses an unknown impl
    if has_adapters(model):
        raise ValueError("model has adapters already; remove_adapters takes them out")
    towers = find_towers(model, names)
    for tower in towers:
        for path, block in tower.blocks.items():
            if hasattr(block, "adapter"):
                raise ValueError(f"{path} has something named 'adapter' already, a {type(block.adapter).__name__}")
        if config["skip_padding"] and tower.name == "text":
            _eos_id(tower)
    if config["skip_padding"] and "text" not in names:
        raise ValueError(f"skip_padding=True needs the text tower, but towers is {tuple(names)!r}")
    devices = {block.mlp.c_fc.weight.device for tower in towers for block in tower.blocks.values()}
    if share == "both" and len(devices) > 1:
        raise ValueError(f"share='both' needs both towers on one device, got {sorted(map(str, devices))}")
    return towers


def _eos_id(tower: Tower) -> int | None:
    """The id of the token that the text tower pools; None where it pools the highest id."""
    text = tower.module
    pool = text.pool_type if tower.path else text.text_pool_type
    if getattr(text, "cls_emb", None) is not None:
        raise NotImplementedError(
            "skip_padding=True needs an end-of-text token, but the text tower appends a class token"
        )
    if pool not in ("argmax", "eos"):
        raise NotImplementedError(
            f"skip_padding=True needs a text tower that pools end-of-text ('argmax' or 'eos'), but it pools {pool!r}"
        )
    return None if pool == "argmax" else (text.eos_id if tower.path else text.text_eos_id)


def _watch(tower: Tower) -> None:
    """Measure each text where its ids are embedded, and let the transformer pass the lengths to its blocks."""
    end_of_text = EndOfText(_eos_id(tower))
    tower.module.token_embedding.register_forward_pre_hook(end_of_text)
    tower.transformer.end_of_text = end_of_text
    tower.transformer.__class__ = PaddingAwareTransformer


def _unwatch(tower: Tower) -> None:
    hooks = tower.module.token_embedding._forward_pre_hooks  # the copy of a model has no handle to remove by
    for key in [key for key, hook in hooks.items() if isinstance(hook, EndOfText)]:
        del hooks[key]
    del tower.transformer.end_of_text
    tower.transformer.__class__ = Transformer
