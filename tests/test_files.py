"""Files are written whole or not at all."""

import os

import pytest

from adderflax.files import write_whole


def test_text_is_written_as_utf8(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    write_whole(tmp_path / "page.md", "1 ± 2\n")
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
