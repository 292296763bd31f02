"""What files a checkpoint consists of: written just before it is committed, checked before it is read.

Orbax and TensorStore notice a missing or shortened file, with an error of their own for each, but not a
changed bit in the arrays, and a lost figure silently makes another checkpoint the best.
"""

import hashlib
import json
import os
from pathlib import Path

_NAME = "manifest.json"
# Orbax completes these as the last thing of a commit. Nothing is restored from them.
_NOT_LISTED = {_NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}


def write_manifest(checkpoint: Path) -> None:
    """Writes ``manifest.json``: the size and the SHA-256 of every file of a checkpoint, by relative name."""
    files = {
        str(file.relative_to(checkpoint)): [file.stat().st_size, _digest(file)]
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name not in _NOT_LISTED
    }
    with (checkpoint / _NAME).open("w") as manifest:
        json.dump(files, manifest, indent=0)
        manifest.flush()
        os.fsync(manifest.fileno())


def find_damage(checkpoint: Path) -> str | None:
    """Compares a checkpoint with its manifest; reads every file once.

    Returns:
      None where every file is as it was written, else which one is not and how.
    """
    try:
        files = json.loads((checkpoint / _NAME).read_text())
        for name, (size, digest) in files.items():
            file = checkpoint / name
            if not file.exists():
                return f"{name} is missing"
            if (found := file.stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            if _digest(file) != digest:
                return f"{name} has the right size but other contents"
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
