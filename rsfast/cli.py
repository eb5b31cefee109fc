"""The command ``rsfast``."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 where it did its work, 2 where the user has to change something."""
    from rsfast import info, tune
    from rsfast.deblora.comparison import command as deblora
    from rsfast.harma import command as harma
    from rsfast.harma import demo

    parser = argparse.ArgumentParser(prog="rsfast", description="Adapt vision-language models to remote sensing, fast.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in (info, demo, harma, deblora, tune):
        room.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a reader that has left can be noticed
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        if not _meant_for_the_user(error):
            raise
        print(f"rsfast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rsfast: interrupted", file=sys.stderr)
        return 130


def _meant_for_the_user(error: Exception) -> bool:
    """Whether the file system says no, or a ``raise`` of rsfast; anything else is a bug and keeps its traceback."""
    if isinstance(error, OSError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(Path(__file__).parent) and frame.line.startswith("raise ")
