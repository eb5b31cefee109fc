"""Where LoRA can go in a model, and which of these places a choice of targets means."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import MLP

from rsfast import GatedAdapter, SharedAdapter
from rsfast.models.lora_attention import LoRAAttention, LoRACrossAttention, LoRAMultiheadAttention
from rsfast.models.lora_windows import SWAPS

ALIASES = ("q", "k", "v", "out", "fc", "proj")
Columns = tuple[int, int]
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "q": "q", "k": "k", "v": "v"}
FUSED = {"qkv": "qkv", "kv": "kv"}  # layers that compute several projections, one after the other
FIRST, SECOND = ("c_fc", "fc1", "fc1_g", "fc1_x"), ("c_proj", "fc2")  # of an MLP: open_clip's names, timm's and HF's
OWN_ATTENTION = ("num_heads", "ln_q", "ln_k", "logit_scale", "head_scale", "attn_drop", "ln_inner", "out_drop")
OWN_FORWARD = {  # arguments of open_clip's own attention: those of version 3, and of the main branch
    ("self", "x", "attn_mask"): LoRAAttention,
    ("self", "x", "k_x", "v_x", "attn_mask"): LoRACrossAttention,
}


@dataclass
class Site:
    """A linear map that can have LoRA."""

    path: str
    weight: nn.Parameter
    aliases: dict[str, Columns | None]  # what it is called, and which of its columns that means; None: all
    refusal: str = ""  # why it cannot have LoRA after all
    unsplit: str = ""  # why its aliases cannot be told apart
    attention: nn.Module | None = None  # that holds the weight, if no layer does
    name: str = ""  # of the weight in the attention
    rows: slice = field(default_factory=lambda: slice(None))  # of the attention's bias
    swap: type | None = None  # what the attention must become for the LoRA to take part
    flag: str = ""  # of the parent: to be set, so that it calls the layer

    @property
    def columns(self) -> int:
        return self.weight.shape[0]


def find_sites(model: nn.Module) -> list[Site]:
    """All linear maps of a model, first to last, but for those of gated adapters; changes nothing."""
    sites, fast = [], ()
    for path, module in model.named_modules():
        if isinstance(module, GatedAdapter | SharedAdapter):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            fast = (*fast, _inside(path))
        found = list(_of_attention(path, module) if _keeps_weights(module) else _of_layers(path, module))
        for site in found:
            if site.path.startswith(fast):
                site.refusal = "nn.TransformerEncoderLayer may read the weights inside it without calling their layers"
        sites += found
    return sites


def _inside(path: str) -> str:
    """What the paths of all inside a module begin with."""
    return f"{path}." if path else ""


def choose(sites: list[Site], targets: tuple[str, ...]) -> tuple[dict[int, tuple[Columns, ...] | None], dict[str, str]]:
    """Which sites the targets mean, with the columns of each (None: all), and what is skipped and why.

    Raises:
        ValueError: A target names no linear layer, or all that the targets mean is skipped.
    """
    chosen, skipped = {}, {}
    for target in targets:
        hits = {j: site.aliases[target] for j, site in enumerate(sites) if target in site.aliases}
        if not hits:  # a layer may be called fc and belong to no MLP
            hits = {j: None for j, site in enumerate(sites) if f".{site.path}".endswith(f".{target}")}
        if not hits and target not in ALIASES:
            raise ValueError(f"targets: {target!r} names no linear layer of the model; {_what_there_is(sites)}")
        if not hits:
            skipped[target] = "the model has no such layer"
        for j, columns in hits.items():
            chosen.setdefault(j, []).append(columns)
    chosen = dict(sorted(chosen.items()))
    for j, columns in chosen.items():
        if None in columns and len(set(columns)) > 1:
            raise ValueError(f"targets mean all of {sites[j].path} and parts of it; name the parts or the layer")
        chosen[j] = None if None in columns else tuple(sorted(columns))
    for j, site in [(j, sites[j]) for j in chosen]:
        refusal = site.refusal or (site.unsplit if chosen[j] else "")
        if refusal:
            skipped[site.path] = refusal
            del chosen[j]
    if not chosen:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:8])
        raise ValueError(f"targets {targets} match nothing that can have LoRA ({reasons}); {_what_there_is(sites)}")
    return chosen, skipped


def tied(model: nn.Module, site: Site) -> list[str]:
    """Names under which the model holds the weight of a site, if there are several."""
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is site.weight]
    return names if len(names) > 1 else []


def _what_there_is(sites: list[Site]) -> str:
    aliases = [alias for alias in ALIASES if any(alias in site.aliases for site in sites)]
    names = dict.fromkeys(site.path.rpartition(".")[2] for site in sites)
    return f"there are {', '.join(aliases) or 'no attentions or MLPs'}, and by name {', '.join(names) or 'none'}"


def _keeps_weights(module: nn.Module) -> bool:
    """Whether it is an attention whose projections are bare parameters."""
    return any(module._parameters.get(name) is not None for name in ("in_proj_weight", "q_proj_weight"))


def _of_attention(path: str, attention: nn.Module) -> Iterator[Site]:
    """The projections of ``nn.MultiheadAttention`` and of open_clip's own attention."""
    kind, refusal = type(attention), _overridden(attention)
    if isinstance(attention, nn.MultiheadAttention):
        swap = out_swap = LoRAMultiheadAttention
        if kind.forward is not nn.MultiheadAttention.forward:
            refusal = f"{kind.__name__} computes attention in a way of its own"
        elif attention.bias_k is not None or attention.add_zero_attn:
            refusal = "it adds keys and values of its own (add_bias_kv or add_zero_attn)"
    else:
        swap, out_swap = OWN_FORWARD.get(tuple(inspect.signature(kind.forward).parameters)), None
        if swap is None or not all(hasattr(attention, name) for name in OWN_ATTENTION):
            refusal = f"{kind.__name__} is an attention that is not known here"
    prefix, fused = _inside(path), attention._parameters.get("in_proj_weight")
    if fused is not None:
        width = len(fused) // 3
        aliases = {alias: (j * width, (j + 1) * width) for j, alias in enumerate("qkv")}
        held = dict(attention=attention, name="in_proj_weight", swap=swap)
        yield Site(f"{prefix}in_proj", fused, aliases, refusal or _unfit(fused), **held)
    for j, alias in enumerate("qkv"):
        weight = attention._parameters.get(f"{alias}_proj_weight")
        if fused is None and weight is not None:
            rows = slice(j * len(weight), (j + 1) * len(weight))
            held = dict(attention=attention, name=f"{alias}_proj_weight", rows=rows, swap=swap)
            yield Site(f"{prefix}{alias}_proj", weight, {alias: None}, refusal or _unfit(weight), **held)
    for name, child in attention.named_children():
        if isinstance(child, nn.Linear):
            aliases = {"out": None} if name == "out_proj" else {}
            yield Site(f"{prefix}{name}", child.weight, aliases, refusal or _cannot(child), swap=out_swap)


def _of_layers(path: str, parent: nn.Module) -> Iterator[Site]:
    """The linear layers that are children of a module."""
    prefix = _inside(path)
    layers = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
    attends = not layers.keys().isdisjoint((*FUSED, "q_proj", "q"))
    first, second = FIRST, SECOND
    if isinstance(parent, MLP) and len(layers) == 2:  # torchvision's, whose layers have numbers
        first, second = ((name,) for name in layers)
    is_mlp = not layers.keys().isdisjoint(first) and not layers.keys().isdisjoint(second)
    windowed = isinstance(parent, ShiftedWindowAttention)
    swap = SWAPS.get(type(parent)) if windowed else None
    for name, layer in layers.items():
        refusal, unsplit, flag = _cannot(layer), "", ""
        if isinstance(parent, AttentionPool2d) or windowed and swap is None:
            refusal = f"{type(parent).__name__} reads the weights of its layers and does not call them"
        elif windowed:
            refusal = refusal or _overridden(parent)
        aliases = {}
        if name in FUSED:
            parts = FUSED[name]
            width, odd = divmod(layer.out_features, len(parts))
            aliases = {alias: (j * width, (j + 1) * width) for j, alias in enumerate(parts)}
            if odd or getattr(parent, "head_first", False) or hasattr(parent, "key_dim"):
                unsplit = f"{type(parent).__name__} does not keep {', '.join(parts)} one after the other"
            if getattr(parent, "q_bias", None) is not None:
                flag = "qkv_bias_separate"  # timm's EVA, BEiT and Swin 2 call the layer only then
                if not hasattr(parent, flag):
                    refusal = refusal or f"{type(parent).__name__} adds a bias of its own to the layer's weight"
        elif attends and name in PROJECTIONS:
            aliases = {PROJECTIONS[name]: None}
        elif attends and name in ("out_proj", "proj"):
            aliases = {"out": None}
        elif is_mlp and name in first + second:
            aliases = {"fc" if name in first else "proj": None}
        yield Site(f"{prefix}{name}", layer.weight, aliases, refusal, unsplit, swap=swap, flag=flag)


def _unfit(weight: torch.Tensor | None) -> str:
    if weight is None:
        return "it has no weight"
    if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain matrix"
    return ""


def _overridden(module: nn.Module) -> str:
    return "its forward is replaced on the instance" if "forward" in vars(module) else ""


def _cannot(layer: nn.Linear) -> str:
    """Why a layer cannot be replaced by one with LoRA; empty if it can."""
    if type(layer).forward is not nn.Linear.forward:
        return f"{type(layer).__name__} computes its product in a way of its own"
    if nn.utils.parametrize.is_parametrized(layer):
        return "its weight is parametrised"
    if any(vars(layer)[hooks] for hooks in vars(layer) if hooks.endswith("_hooks")):
        return "it has hooks, which would be lost"
    return _overridden(layer) or _unfit(layer.weight)
