"""Builds the CUDA library ahead of what needs it, and says how long each source took.

python -m benchmarks.build

"""

import os
import pathlib
import re
import subprocess
import sys
import time

from rsfast import _extension


def ninja_log(text: str) -> dict[str, float]:
    """Output -> seconds, of ninja's log: the newest of each, so long ones stand first."""
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    found = {line[3]: (int(line[1]) - int(line[0])) / 1e3 for line in lines if len(line) == 5}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def folder() -> pathlib.Path | None:
    """Where the newest build for a GPU lies."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    found = pathlib.Path(cache, "rsfast", "csrc").glob("cuda-*/build.ninja")
    return max((path.parent for path in found), key=lambda path: path.stat().st_mtime, default=None)


def main() -> int:
    begun = time.monotonic()
    try:
        _extension.library()
        failed = None
    except NotImplementedError as error:
        failed = str(error)
    took, place = time.monotonic() - begun, folder()
    if place is not None and (place / ".ninja_log").exists():
        for name, seconds in ninja_log((place / ".ninja_log").read_text()).items():
            print(f"compiled {name} in {seconds:.1f} s")
    if failed is None:
        print(f"built the library in {took:.1f} s")
        print(_extension.status())
        return 0
    print(failed)
    if place is not None and re.search("building", failed):  # what failed once more, for all of what it says
        ninja = subprocess.run(["ninja", "-k", "0"], cwd=place, env=os.environ | {"PATH": _extension._path()})
        print(f"ninja ended with {ninja.returncode}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
