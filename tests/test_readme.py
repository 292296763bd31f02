"""The README and the pages of docs/: snippets run, commands and links name what is there."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language, *pages):
    text = "\n".join(page.read_text() for page in pages or PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


# A file of the reader's own, and one that reads it: tests/training/test_own_models.py trains with them.
OWN_MODEL = ("register_model(", "import adder_mixer")
SNIPPETS = [code for code in blocks("python") if not any(mark in code for mark in OWN_MODEL)]


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.split("import ")[-1].split("\n")[0])
@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_snippet_runs(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    shapes = {
        "y": {(8, 65, 384), (4, 64)},
        "dx": {(8, 65, 192)},
        "out": {(8, 65, 3, 64)},
        "weights": {(8, 3, 65, 65)},
        "features": {(8, 16, 16, 32)},
        "logits": {(4, 10), (2, 10), (64, 10), (2, 5)},
        "maps": {(2, 3, 65, 65)},
        "attended": {(2, 5, 64)},
        "templates": {(64, 256)},
        "outputs": {(256, 64)},
    }
    shown = [name for name in shapes if name in names]
    assert shown
    for name in shown:
        assert names[name].shape in shapes[name], name
    if "outputs" in names:
        wanted = names["dense"].apply({"params": names["trained"]}, names["inputs"])
        assert f"by {np.corrcoef(wanted.ravel(), names['outputs'].ravel())[0, 1]:.2f}\n" in code


def test_the_test_command_is_the_one_ci_runs():
    assert any("python -m pytest\n" in block for block in blocks("bash", PAGES[0]))
    assert "\npython -m pytest\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "results").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_lead_to_files_that_exist(page):
    targets = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert targets or page.parent.name == "results"
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_names_every_page():
    pages = [page.name for page in PAGES[1:]] + [page.name for page in (ROOT / "results").glob("*.md")]
    pages = [name for name in pages if not re.match(r"(gap|rank)_", name)]  # a study's, named on its page
    assert [name for name in pages if f"/{name})" not in README and f"/{name}#" not in README] == []


def flags_of(words):
    """Those of the command: its module defines them, and what reads --config for it."""
    module = words[words.index("-m") + 1] if "-m" in words else "train"
    files = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "adderflax" / "training" / "command_line.py"]
    told = r'add_argument\(\s*"--(\w+)"|DEFINE_\w+\(\s*"(\w+)"'
    code = "".join(path.read_text() for path in files)
    return {name for found in re.findall(told, code) for name in found if name}


def test_commands_name_files_and_flags_that_exist():
    ours = (page for page in PAGES if page.name != "cloud.md")  # its commands are gcloud's
    for line in "".join(blocks("bash", *ours)).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        for config in (word for word in words if word.startswith("configs/")):
            assert (ROOT / config.partition(":")[0]).exists(), line
        flags = [word for word in words if word.startswith("--") and not word.startswith("--config.")]
        if flags:
            assert {flag[2:].partition("=")[0] for flag in flags} <= flags_of(words), line


def test_the_layout_is_told():
    told = README[README.index("## The house") :]
    for path in sorted((ROOT / "adderflax").iterdir()):
        if path.name.startswith("__"):
            continue
        if path.name == "training":
            for module in path.glob("[a-z]*.py"):
                assert re.search(rf"\b{module.stem}\b", told), module.name
        else:
            assert path.stem in told, path.name
