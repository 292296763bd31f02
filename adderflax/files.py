"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file that holds its old content or the new one, whatever happens meanwhile.

    Args:
      file: where to; what was there is replaced, behind a symbolic link too.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written; what was there is still there.
    """
    file = file.resolve()
    scratch = file.with_name(f"{file.name}.tmp")
    try:
        with scratch.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            # Else a power failure may leave the new name with nothing in it, on file systems other than ext4.
            os.fsync(stream.fileno())
        scratch.replace(file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
