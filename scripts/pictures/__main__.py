"""Draw the pictures of the guides from what the package computes, into `.github/`.

    python scripts/pictures                     # all of them, in about a minute
    python scripts/pictures loop packed_row     # these

Each picture has a module here: its `figures()` asks the package (or, for `loop`, the guide that
documents a measurement), and its `draw(found)` draws them. The figures are in the PNG as well, and
`tests/test_pictures.py` compares them with those of today.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))  # modules are named `pictures.loop`, not `loop`

from pictures.canvas import FOLDER, save

NAMES = ("pair", "packed_row", "chunked_head", "loop", "sharding")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names).difference(NAMES)):
        parser.error(f"no picture is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name in names:
        picture = importlib.import_module(f"pictures.{name}")
        found = picture.figures()
        path = FOLDER / f"{name}.png"
        save(picture.draw(found), found, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
