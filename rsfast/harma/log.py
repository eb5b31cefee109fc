"""Where the numbers of a run go: metrics.jsonl always, TensorBoard where it is installed."""

import json

from rsfast._files import replace
from rsfast.harma import checkpoint
from rsfast.harma.setup import Setup


class Log:
    """``metrics.jsonl`` and TensorBoard scalars of one run, continued at ``step``; what was written later is dropped.

    Args:
        setup: The run.
        step: Steps done.
        on: False writes nothing.
    """

    def __init__(self, setup: Setup, step: int, *, on: bool):
        self.path, self.on, self.writer = setup.run / checkpoint.METRICS, on, None
        if not on:
            return
        kept = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # a line that a crash cut off
                    continue
                if record["step"] <= step and "broken" not in record:
                    kept.append(line + "\n")
        replace(self.path, lambda temporary: temporary.write_text("".join(kept)))
        if setup.summary_writer is not None:
            self.writer = setup.summary_writer(str(setup.run / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, record: dict) -> None:
        if not self.on:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if self.writer is not None and name != "step" and isinstance(value, (int, float)):
                folder = "val" if name.startswith("val_") else "train"
                self.writer.add_scalar(f"{folder}/{name.removeprefix('val_')}", value, record["step"])
