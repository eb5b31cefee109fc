"""Numbers of the precision that is promised, whatever the caller is in the middle of."""

import functools
from collections.abc import Callable

import torch


def plain(function: Callable) -> Callable:
    """Without gradients, which labels and sums do not have, and without autocast, whose products no bound covers."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad():
            if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):  # to switch it takes microseconds
                with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

    return run
