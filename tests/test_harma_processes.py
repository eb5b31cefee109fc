"""Several processes train as one: the same losses, the same weights."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch

from rsfast.harma import model as models
from tests.harma_world import MODEL
from tests.test_harma_train import lines, run


def test_two_processes_train_as_one(tmp_path):
    # a large eps makes Adam's step proportional to the gradient, so a wrong factor shows
    settings = dict(
        epochs=1, eps=1.0, lr=1.0, max_steps=2, uniformity_weight=2.0, affiliation_weight=1.0, drift_weight=3
    )
    one = run(tmp_path / "one", **settings)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from rsfast.harma import train; from tests.harma_world import config, in_memory\n"
        f"train(config(sys.argv[1], batch_size=4, **{settings}), train_data=in_memory(), val_data=in_memory(),"
        " progress=False)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    root = pathlib.Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two")],
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, cwd=root,
        )
        for rank in "01"
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    state = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    start = models.create(MODEL, seed=3407).model.state_dict()
    for name, p in one.model.named_parameters():
        if not p.requires_grad:
            continue
        moved = (p - start[name]).abs().max() if name in start else p.abs().max()
        # the same sums in another order, in fp32
        assert (state["weights"][name] - p).abs().max() <= 1e-4 * moved, name
    for ours, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
