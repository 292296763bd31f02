"""The page of a run: complete, self-contained, safe, and possible at every moment of a run's life."""

import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from adderflax import report
from adderflax.analysis.run_curves import panels_for, thin
from adderflax.analysis.run_page import write_run_page
from adderflax.data import DatasetInfo
from adderflax.training import environment, workdir
from adderflax.training.config import default_config

INFO = DatasetInfo("digits", 10, tuple("0123456789"), 8, 1, (0.3,), (0.4,), None, 1294, 144, 359)


@pytest.fixture
def begun(tmp_path):
    """A workdir as it is once a process has read its data, without any figure yet."""
    config = default_config()
    config.total_steps = 300
    config.data.data_dir = "<b>&sets"
    (path := tmp_path / "run").mkdir()
    workdir.write_config(path, config.to_dict())
    workdir.write_info(path, INFO)
    return path


def log(path, *lines):
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def page(path):
    text = write_run_page(path).read_text()
    # Nothing is fetched: no scripts, and every reference stays inside the page.
    assert not re.findall(r"<(?:script|link|img|iframe)|@import|\bsrc=", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}", svg), "a color that does not follow the page"
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))
    Balance().feed(text)
    return text


class Balance(html.parser.HTMLParser):
    """Fails where an element is closed that is not the innermost open one."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_a_finished_run(begun):
    environment.record_start(begun, 0)
    environment.record_start(begun, 150)
    for step in range(10, 301, 10):
        log(begun, {"step": step, "train_loss": 2 / step, "learning_rate": 1e-3, "skipped_updates": 0.0})
    log(begun, {"step": 300, "validation_loss": 0.31, "validation_accuracy": 0.9, "validation_examples": 144})
    workdir.write_summary(
        begun, {"steps": 300, "test_accuracy": 0.97493, "test_loss": 0.2249, "best_step": 300}
    )
    text = page(begun)
    assert "Finished at step 300." in text and "97.49 %" in text and "0.2249" in text
    assert text.count("<svg") == 4  # loss, accuracy, learning rate, and the figure that no panel knows
    assert "skipped updates" in text and "a process went on from there (150)" in text
    # What differs from the defaults comes first, and nothing of a configuration is taken for markup.
    changed = text.index("<td>total_steps</td><td>300</td><td>unset</td>")
    assert changed < text.index("Fields at their defaults") < text.index("<td>batch_size</td>")
    assert "<td>data.data_dir</td><td>&lt;b&gt;&amp;sets</td>" in text and "<b>&" not in text
    entry = environment.read_starts(begun)[-1]
    assert f"<td>jax</td><td>{entry['packages']['jax']}</td>" in text and "<td>2 x cpu</td>" in text
    assert entry["step"] == 150 and "Starts (2)" in text


def test_a_run_that_goes_on(begun):
    assert "Not a single figure" in page(begun)
    log(begun, {"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": float("nan")})
    (begun / "metrics.jsonl").open("a").write('{"step": 30, "train_l')  # as a kill leaves it
    (begun / "dataset.json").rename(begun / "elsewhere.json")
    assert "At step 20;" in page(begun)
    (begun / "elsewhere.json").rename(begun / "dataset.json")
    # The summary of an earlier, shorter end is not this run's.
    workdir.write_summary(begun, {"steps": 100, "test_accuracy": 0.5})
    text = page(begun)
    assert "At step 20 of 300; its log is a file of" in text and "test accuracy" not in text


def test_mistakes_are_told_in_one_line(tmp_path, begun, capsys):
    with pytest.raises(SystemExit, match="error: .*is not a run's workdir: it has no config.json"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*is a directory; give the name of an HTML file"):
        report.main([str(begun), f"--output={tmp_path}"])
    report.main([str(begun), f"--output={tmp_path / 'page.html'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n" and (tmp_path / "page.html").exists()


def test_long_logs_are_thinned_and_keep_their_peaks():
    values = np.random.default_rng(0).normal(size=100_000)
    values[77_777], values[5] = 99.0, -99.0
    kept = thin(list(enumerate(values.tolist())))
    assert len(kept) <= 800 and kept == sorted(kept)
    assert (77_777, 99.0) in kept and (5, -99.0) in kept
    assert [panel.title for panel in panels_for(["step", "validation_examples"])] == []


@pytest.mark.slow
def test_in_a_real_browser(begun, tmp_path):
    """Headless Chromium lays it out, light and dark, and asks for nothing."""
    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium (Debian's package of that name)")
    log(begun, *({"step": step, "train_loss": 2 / step} for step in range(10, 301, 10)))
    file = write_run_page(begun)
    backgrounds = []
    for theme in (0, 1):
        shot = tmp_path / f"{theme}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += [
            f"--blink-settings=preferredColorScheme={theme}",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += ["--window-size=600,900", f"--screenshot={shot}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = np.asarray(Image.open(shot).convert("L"))
        backgrounds.append(pixels[2, 2])
        assert np.mean(pixels != pixels[2, 2]) > 0.03, "the page is blank"
    assert backgrounds[0] < 60 < 200 < backgrounds[1]
