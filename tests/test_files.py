"""Files are written whole or not at all."""

import os
import subprocess
import sys

import pytest

from adderflax.files import write_whole


def test_text_is_written_as_utf8_in_any_locale(tmp_path, root):
    code = (
        "import pathlib, sys; from adderflax.files import write_whole;"
        "write_whole(pathlib.Path(sys.argv[1]), '1 \\xb1 2\\n')"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(root)}
    words = [sys.executable, "-c", code, str(tmp_path / "page.md")]
    subprocess.run(words, env=os.environ | plain, check=True)
    assert (tmp_path / "page.md").read_bytes() == b"1 \xc2\xb1 2\n"
    write_whole(tmp_path / "page.md", b"\xff")
    assert (tmp_path / "page.md").read_bytes() == b"\xff"
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


def test_what_was_there_outlives_a_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    write_whole(file, "{}")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "[]")
    assert file.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_whole(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "1"
