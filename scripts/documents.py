"""Writes what documents and the weights' header take from data and code; --check only compares.

    python scripts/documents.py [--check]

The limits in the header of the embedded weights come from edge-limits.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
WEIGHTS = ROOT / "artifactnet_jax" / "assets" / "edge.safetensors"


def limits() -> list[str]:
    """Where the embedded weights fail, a sentence each."""
    return (SCRIPTS / "edge-limits.txt").read_text(encoding="utf-8").splitlines()


def with_limits(file: bytes, sentences: list[str]) -> bytes:
    """A weights file with other `limits` in its provenance. Tensors and digest stay byte for byte.

    A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON,
    filled up with spaces to a multiple of 8, and the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    metadata = header["__metadata__"]
    provenance = json.loads(metadata["provenance"]) | {"limits": sentences}
    metadata["provenance"] = json.dumps(provenance, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def made() -> dict[Path, bytes]:
    """Path -> content of every file that this script writes or writes in."""
    return {WEIGHTS: with_limits(WEIGHTS.read_bytes(), limits())}


def main() -> int:
    """Write the files; with --check name those that differ and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")
    check = parser.parse_args().check
    stale = [(path, new) for path, new in made().items() if path.read_bytes() != new]
    for path, new in stale:
        print(path.relative_to(ROOT), "is stale" if check else "written", file=sys.stderr)
        if not check:
            path.write_bytes(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
