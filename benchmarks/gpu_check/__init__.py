"""What a GPU must show: checks in order of worth, each in its own process."""

from __future__ import annotations

import argparse
from pathlib import Path


def command_line(doc: str) -> argparse.ArgumentParser:
    """The options that every check has; `doc` is its module's."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    return parser
