"""The benchmark of the input runs end to end, on small sets under the names of the real ones."""

import dataclasses
import json
import sys

from benchmarks import input as benchmark


def test_every_figure_is_measured(fixed_size_set, varying_size_set, tmp_path, monkeypatch, capsys):
    sets = {"cifar10": fixed_size_set, "imagenette/160px-v2": varying_size_set}

    def config(name, data_dir, workers=0):
        assert data_dir == "here"
        return dataclasses.replace(sets[name], workers=workers)

    monkeypatch.setattr(benchmark, "DataConfig", config)
    monkeypatch.setattr(benchmark, "_BATCH", 8)
    monkeypatch.setattr(benchmark, "_PHOTOS", 2)
    monkeypatch.setattr(benchmark, "_tensorflow_decoder", lambda *_: None)  # as where it is not installed
    monkeypatch.setattr(
        benchmark, "alternate", lambda functions, **_: {n: f() or 1.0 for n, f in functions.items()}
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["input", "--data_dir=here", "--seconds=0.01", f"--output={tmp_path / 'results' / 'input'}"],
    )
    benchmark.main()
    written = json.loads((tmp_path / "results" / "input.json").read_text())
    figures = written["images_per_second"]
    assert len(figures) == 6 and all(figure > 0 for figure in figures.values())
    page = (tmp_path / "results" / "input.md").read_text()
    assert page == capsys.readouterr().out[:-1] and written["machine"]["device"] in page
    assert all(f"| {name} | {figure:,.0f} |" in page for name, figure in figures.items())
