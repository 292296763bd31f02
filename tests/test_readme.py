"""The README: its snippets run, its commands are the ones that CI and the configurations use."""

import re
import shlex
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("import ")[-1].split("\n")[0])
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
        "logits": {(4, 10), (2, 10), (64, 10)},
        "maps": {(2, 3, 65, 65)},
    }
    shown = [name for name in shapes if name in names]
    assert shown
    for name in shown:
        assert names[name].shape in shapes[name], name


def test_the_test_command_is_the_one_ci_runs():
    assert any("python -m pytest\n" in block for block in blocks("bash"))
    assert "\npython -m pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_to_files_that_exist():
    targets = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(targets) > 5 and all((ROOT / target).exists() for target in targets)


def test_commands_name_files_and_flags_that_exist():
    flags = {
        "config",
        "workdir",
        "eval_only",
        "extend",
        "distributed",
        "coordinator_address",
        "num_processes",
        "process_id",
        "profile_steps",
    }
    for line in "".join(blocks("bash")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        for config in (word for word in words if word.startswith("configs/")):
            assert (ROOT / config.partition(":")[0]).exists(), line
        for flag in (word for word in words if word.startswith("--") and not word.startswith("--config.")):
            assert flag[2:].partition("=")[0] in flags | {
                "data_dir",
                "table",
                "evaluate",
                "keep_checkpoints",
                "convention",
                "json",
                "output",
                "report",
            }, line


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
