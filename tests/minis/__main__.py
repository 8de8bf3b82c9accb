"""`python -m tests.minis DIR`, in a checkout: miniatures of every benchmark in its real schema."""

import argparse
import sys
from pathlib import Path

from dynllava_plugin.errors import UserError
from tests.minis import make_minis


def main(arguments: list[str] | None = None) -> int:
    """Write the miniatures; returns 0, or 2 with one line where the user can mend the cause."""
    parser = argparse.ArgumentParser(prog="python -m tests.minis", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or an earlier run's (it is replaced)")
    folder = parser.parse_args(arguments).folder
    try:
        make_minis(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: run `dynllava eval smoke --pretrained tiny --data {folder}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
