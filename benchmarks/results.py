"""Files of measurements: one a GPU, written after every row, the newest of each row kept."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import torch

from rsfast.info import driver_version

FOLDER = pathlib.Path(__file__).parent / "results"
KEY = ("family", "op", "shape", "dtype", "impl", "pass")
PROVENANCE = ("driver", "torch", "triton", "cuda", "commit", "date")  # of a row; the newest stands at the top too


def commit() -> str:
    """Hash of the checkout, with ``-dirty`` where something other than a result differs from it."""
    root = pathlib.Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)README.md"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "-dirty" * bool(changed)


def provenance(known_commit: str | None = None) -> dict[str, str]:
    """What ran, on what; ``known_commit`` for a copy of the tree that has no git folder."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": str(torch.version.cuda),
        "commit": known_commit or commit(),
        "date": now(),
    }


def now() -> str:
    """UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def processor() -> str:
    """Its name and how many there are."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def write_rows(path: pathlib.Path, top: dict, rows: list[dict]) -> None:
    """A file of what a CPU measured, at once: a line a row."""
    top = provenance() | {"processor": processor()} | top
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(top, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')


def slug(gpu: str) -> str:
    """``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read(path: pathlib.Path) -> dict:
    """A file of results.

    Raises:
        ValueError: It is no JSON, or a field is missing; the message names the file and the field.
    """
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [name for name in ("gpu", *PROVENANCE, "rows") if name not in found]
    missing += [f"rows[{i}].{name}" for i, row in enumerate(found.get("rows", [])) for name in KEY if name not in row]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing[:5])}")
    return found


def write(path: pathlib.Path, content: dict) -> None:
    """Replace a file in one step: a reader, or a run cut off, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row) for row in sorted(content["rows"], key=_key))
    top = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    half = path.with_suffix(f".{os.getpid()}.tmp")
    half.write_text(top.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')
    os.replace(half, path)


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def fold(old: dict | None, new: dict) -> dict:
    """Both files' rows, the newer of each, under the newer top; facts and checks of the older stay unless repeated."""
    if old is None:
        return new
    older, newer = sorted((old, new), key=lambda content: content["date"])
    rows = {_key(row): row for row in sorted(older["rows"] + newer["rows"], key=lambda row: row["date"])}
    facts = older.get("facts", {}) | newer.get("facts", {})
    both = [*older.get("checks", {}).items(), *newer.get("checks", {}).items()]
    checks = dict(sorted(both, key=lambda item: item[1]["date"]))  # a run's top is older than what its parts write
    return newer | {"facts": facts, "checks": checks, "rows": list(rows.values())}


class Writer:
    """Adds rows to ``<folder>/<gpu>.json``, one at a time.

    Args:
        folder: Where the file is, or will be.
        top: From :func:`provenance`.
    """

    def __init__(self, folder: pathlib.Path, top: dict[str, str]):
        self.path, self.top = folder / f"{slug(top['gpu'])}.json", top

    def add(self, row: dict) -> None:
        """Write one measurement, in place of an older one of the same key."""
        self._fold([row | {name: self.top[name] for name in PROVENANCE}], {})

    def copy_rate(self) -> float:
        """Measured bytes a second of a large copy, read and written."""
        return read(self.path)["facts"]["copy_bytes_per_second"]

    def facts(self, facts: dict) -> None:
        """Write what was measured of the machine itself."""
        self._fold([], facts)

    def check(self, part: str, found: dict) -> None:
        """Write how a part of a GPU run ended: the build, tests, what a sanitizer said."""
        self._fold([], {}, {part: found | {"commit": self.top["commit"], "date": now()}})

    def _fold(self, rows: list[dict], facts: dict, checks: dict | None = None) -> None:
        old = read(self.path) if self.path.exists() else None
        write(self.path, fold(old, self.top | {"facts": facts, "checks": checks or {}, "rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fold result files of another machine into benchmarks/results.")
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    for path in parser.parse_args().files:
        new = read(path)
        target = FOLDER / f"{slug(new['gpu'])}.json"
        write(target, fold(read(target) if target.exists() else None, new))
        print(f"{len(new['rows'])} rows of {path} folded into {target.name}")


if __name__ == "__main__":
    main()
