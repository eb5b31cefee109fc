"""What a training step minimises and reports: HarMA's two losses, and the rest of the paper's objective by weight."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import HarMALoss, affiliation_loss, alignment_loss, uniformity_loss
from rsfast.harma.config import TrainConfig


class Towers(nn.Module):
    """Both encoders as one module, so that the gradients of several processes can be averaged."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features in fp32, and 1 / temperature."""
        image_features = F.normalize(self.model.encode_image(images).float(), dim=-1)
        text_features = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        return image_features, text_features, self.model.logit_scale.float().exp()


class FrozenTowers:
    """The frozen model that training starts from: with adapters the model without them, else a copy made now.

    Neither training mode nor weights of the model that trains are touched, and nothing random is drawn.
    """

    def __init__(self, towers: Towers, config: TrainConfig):
        self.copied, self.towers = config.method == "full", towers
        if self.copied:
            self.towers = copy.deepcopy(towers).eval().requires_grad_(False)
            if not config.drift_weight:
                self.towers.cpu()  # needed now and then only, and a GPU has other use for its memory

    @torch.no_grad()
    def __call__(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm features in fp32."""
        from rsfast.models import adapters_off  # open_clip takes its time to import

        if self.copied:
            tensors = [*self.towers.named_parameters(), *self.towers.named_buffers()]
            there = {name: t.to(images.device) for name, t in tensors}
            return torch.func.functional_call(self.towers, there, (images, tokens))[:2]
        with adapters_off(self.towers.model):
            return self.towers(images, tokens)[:2]


class Objective:
    """The loss of a batch, and its parts by name.

    ``contrastive + triplet + w_u (u_image + u_text) / 2 + w_a affiliation + w_d (d_image + d_text) / 2`` with the
    weights of the config, where u is the uniformity of a modality and d its drift: the mean over the batch of the
    squared distance between a feature and the frozen model's of the same input. What has no weight is not computed,
    unless it is reported, and then without gradients.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.harma = config, HarMALoss(margin=config.margin, gamma=config.gamma)

    def __call__(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: Tensor,  # ()
        *,
        image_ids: Tensor,  # (N,)
        labels: Tensor | None,  # (N,)
        frozen: Sequence[Tensor] | None,  # (N, D), (N, D)
        report: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to log without gradients; drift and a report need ``frozen``, affiliation ``labels``."""
        c, pairs = self.config, {"image": image_features, "text": text_features}
        pair = self.harma(image_features, text_features, logit_scale, output_dict=True, image_ids=image_ids)
        parts, each = {"contrastive": pair["contrastive_loss"], "triplet": pair["adaptive_triplet_loss"]}, {}
        if c.uniformity_weight or report:
            with torch.set_grad_enabled(c.uniformity_weight > 0):
                each |= {f"uniformity_{name}": uniformity_loss(x) for name, x in pairs.items()}
        if report:
            with torch.no_grad():
                each["alignment"] = alignment_loss(image_features, text_features)
        if c.drift_weight or report:
            with torch.set_grad_enabled(c.drift_weight > 0):
                for (name, x), start in zip(pairs.items(), frozen, strict=True):
                    each[f"drift_{name}"] = (x - start).square().sum(-1).mean()
        loss = parts["contrastive"] + parts["triplet"]
        if c.uniformity_weight:
            parts["uniformity"] = (each["uniformity_image"] + each["uniformity_text"]) / 2
            loss = loss + c.uniformity_weight * parts["uniformity"]
        if c.affiliation_weight:
            parts["affiliation"] = affiliation_loss(image_features, text_features, labels, logit_scale)
            loss = loss + c.affiliation_weight * parts["affiliation"]
        if c.drift_weight:
            parts["drift"] = (each["drift_image"] + each["drift_text"]) / 2
            loss = loss + c.drift_weight * parts["drift"]
        return loss, {name: value.detach() for name, value in ({"loss": loss} | parts | each).items()}
