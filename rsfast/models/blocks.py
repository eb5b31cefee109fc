"""The classes that an adapted model's modules are swapped to; static, so that pickling and class policies work."""

from typing import NamedTuple

from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, Transformer
from torch import Tensor


class MaskAndLengths(NamedTuple):
    """What a padding-aware transformer passes its blocks as ``attn_mask``.

    Lengths travel as an argument, not as state, so that checkpointing recomputes every block with its own batch's.
    """

    attn_mask: Tensor | None
    lengths: Tensor  # (B,)


def _unpack(attn_mask, k_x, v_x):
    if k_x is not None or v_x is not None:
        raise ValueError("k_x and v_x must be None: an adapted block attends to itself; pass attn_mask by its name")
    return attn_mask if isinstance(attn_mask, MaskAndLengths) else (attn_mask, None)


class AdaptedBlock(ResidualAttentionBlock):
    """open_clip's block with a gated adapter, its child ``adapter``, on the MLP's branch inside ``ls_2``."""

    def forward(self, q_x: Tensor, k_x=None, v_x=None, attn_mask=None) -> Tensor:
        attn_mask, lengths = _unpack(attn_mask, k_x, v_x)
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), attn_mask=attn_mask))
        u = self.mlp(self.ln_2(x))
        if self.attn.batch_first:
            return x + self.ls_2(self.adapter(u, lengths))
        # blocks run (L, N, D) here, and the adapter attends along axis 1
        return x + self.ls_2(self.adapter(u.transpose(0, 1), lengths).transpose(0, 1))


class AdaptedCustomBlock(CustomResidualAttentionBlock):
    """As :class:`AdaptedBlock`; takes the four positionals of checkpointing, which upstream's block does not."""

    def forward(self, q_x: Tensor, k_x=None, v_x=None, attn_mask=None) -> Tensor:
        attn_mask, lengths = _unpack(attn_mask, k_x, v_x)
        x = q_x + self.ls_1(self.ln_attn(self.attn(self.ln_1(q_x), attn_mask=attn_mask)))
        return x + self.ls_2(self.adapter(self.mlp(self.ln_2(x)), lengths))


class EndOfText:
    """Forward pre-hook of a token embedding: measures the texts and keeps their lengths until they are taken."""

    def __init__(self, eos_id: int | None):
        self.eos_id = eos_id  # None: end-of-text is the highest id of each text, as in CLIP
        self.lengths = None

    def __call__(self, embedding, args) -> None:
        ids = args[0] if self.eos_id is None else (args[0] == self.eos_id).int()
        self.lengths = ids.argmax(dim=-1) + 1  # the position that is pooled, plus one

    def take(self) -> Tensor:
        lengths, self.lengths = self.lengths, None
        if lengths is None:
            raise RuntimeError("skip_padding=True needs the token ids: call encode_text, not the transformer alone")
        return lengths


class PaddingAwareTransformer(Transformer):
    """open_clip's text transformer that hands each text's length to its blocks; ``end_of_text`` measures it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None):
        return super().forward(x, attn_mask=MaskAndLengths(attn_mask, self.end_of_text.take()))

    def forward_intermediates(self, x: Tensor, attn_mask: Tensor | None = None, **options):
        mask = MaskAndLengths(attn_mask, self.end_of_text.take())
        return super().forward_intermediates(x, attn_mask=mask, **options)


ADAPTED = {ResidualAttentionBlock: AdaptedBlock, CustomResidualAttentionBlock: AdaptedCustomBlock}
ORIGINAL = {adapted: original for original, adapted in ADAPTED.items()}
