"""Where the blocks of an open_clip model are, and which towers can be served."""

from dataclasses import dataclass

from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import nn

from rsfast.models.blocks import ADAPTED, ORIGINAL, PaddingAwareTransformer

TOWERS = ("visual", "text")


@dataclass(frozen=True)
class Tower:
    """One encoder of a CLIP model."""

    name: str  # "visual" or "text"
    path: str  # of the module that holds the transformer; "" for the model itself
    module: nn.Module

    @property
    def transformer(self) -> Transformer:
        return self.module.transformer

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by their path in the model, first to last."""
        prefix = f"{self.path}." if self.path else ""
        return {f"{prefix}transformer.resblocks.{j}": b for j, b in enumerate(self.transformer.resblocks)}

    def facts(self) -> dict[str, int | str]:
        """What an adapter depends on; two towers of equal facts can exchange adapters."""
        block = self.transformer.resblocks[0]
        return {
            "blocks": len(self.transformer.resblocks),
            "width": self.transformer.width,
            "heads": block.attn.num_heads,
            "block": ORIGINAL.get(type(block), type(block)).__name__,
            "activation": type(block.mlp.gelu).__name__,
        }


def find_towers(model: nn.Module, names: tuple[str, ...]) -> list[Tower]:
    """The towers of these names, each checked to be one whose blocks can be adapted; changes nothing.

    Raises:
        TypeError: ``model`` is no open_clip ``CLIP`` or ``CustomTextCLIP``.
        NotImplementedError: A tower, its transformer or one of its blocks cannot be served; the message names it.
    """
    if not isinstance(model, (CLIP, CustomTextCLIP)):
        raise TypeError(
            f"model must be an open_clip CLIP or CustomTextCLIP (unwrapped from DDP or torch.compile), "
            f"got {type(model).__name__}"
        )
    found = {"visual": Tower("visual", "visual", model.visual)}
    if isinstance(model, CLIP):
        found["text"] = Tower("text", "", model)
    else:
        found["text"] = Tower("text", "text", model.text)
    towers = [found[name] for name in TOWERS if name in names]
    for tower in towers:
        _check(tower)
    return towers


def _check(tower: Tower) -> None:
    wanted = VisionTransformer if tower.name == "visual" else (TextTransformer, CLIP)
    if not isinstance(tower.module, wanted):
        raise NotImplementedError(
            f"the {tower.name} tower, model.{tower.path}, is a {type(tower.module).__name__}; "
            f"adapters need open_clip's own {'VisionTransformer' if tower.name == 'visual' else 'TextTransformer'}"
        )
    if type(tower.transformer) not in (Transformer, PaddingAwareTransformer):
        raise NotImplementedError(
            f"the transformer of the {tower.name} tower is a {type(tower.transformer).__name__}, "
            f"not open_clip's Transformer"
        )
    if not len(tower.transformer.resblocks):
        raise NotImplementedError(f"the {tower.name} tower has no blocks")
    for path, block in tower.blocks.items():
        if type(block) not in (*ADAPTED, *ORIGINAL):
            raise NotImplementedError(f"{path} of the {tower.name} tower is a {type(block).__name__}; cannot adapt it")
        if hasattr(block, "ln_1_kv"):
            raise NotImplementedError(f"{path} of the {tower.name} tower attends to another sequence; cannot adapt it")
        if getattr(block.attn, "batch_first", True) != tower.transformer.batch_first:
            raise NotImplementedError(
                f"{path}.attn.batch_first is {block.attn.batch_first}, but its transformer's is "
                f"{tower.transformer.batch_first}: this model mixes samples by itself"
            )
