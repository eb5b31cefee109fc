"""A tiny PEFT model of linear layers, and the gradients by which two models are compared."""

import peft
import torch
from torch import nn


class Net(nn.Module):
    """Three linear layers, one without bias, and one of a kind that is not served."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.fc = nn.Linear(12, 8), nn.Linear(12, 8, bias=False), nn.Linear(8, 20)
        self.conv = nn.Conv1d(20, 4, 1)

    def forward(self, x):
        return self.conv(self.fc(torch.tanh(self.q(x) + self.v(x))).mT)


LINEAR = ("q", "v", "fc")
NAMES = ("one", "two", "three")


def stir(model):
    """Give both factors of every adapter values of their own: B is zero by initialisation."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def make(*configs, module=None, dtype=torch.float64, **options):
    """A stirred PEFT model with an adapter named one, two, ... for each of ``configs``, all of them active."""
    torch.manual_seed(0)
    configs = [peft.LoraConfig(**{"r": 3, "target_modules": list(LINEAR), **c}) for c in configs or ({},)]
    model = peft.get_peft_model((module or Net()).to(dtype), configs[0], adapter_name="one", **options)
    for name, config in zip(NAMES[1:], configs[1:], strict=False):
        model.add_adapter(name, config, **options)
    model.base_model.set_adapter(list(NAMES[: len(configs)]))
    if dtype is torch.float64:
        model.double()
    return stir(model).eval()


def example(dtype=torch.float64, batch=3):
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model, *inputs, call=None):
    """Output and the gradient of every trainable parameter and floating input, by name."""
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = (call or model)(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves |= {f"input {j}": t for j, t in enumerate(inputs) if t.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype == torch.float64, name
        atol = 1e-12 * t.abs().max().item()  # fp64; sums in another order
        torch.testing.assert_close(ours[name], t, rtol=0, atol=atol, msg=name)
