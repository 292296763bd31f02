"""The layout: nothing imports upwards, and importing the library needs jax, flax and numpy only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "adderflax"

# Layer of each module or package, from the bottom; a module may import its own layer and those below.
LAYERS = {
    "operators": 1,
    "extras": 1,
    "files": 1,
    "pipes": 1,
    "fields": 2,
    "layers": 2,
    "attention": 2,
    "encoder": 2,
    "encoder_config": 2,
    "models": 2,
    "data": 3,
    "training.optimizer": 3,
    "training.sharding": 3,
    "training.checkpoints": 3,
    "training.distillation": 3,
    "training.distributed": 3,
    "training.environment": 3,
    "training.manifest": 3,
    "training.metrics": 3,
    "training.preemption": 3,
    "training.steplog": 3,
    "training.workdir": 3,
    "training.state": 4,
    "training.config": 4,
    "training.command_line": 4,
    "training.divergence": 4,
    "training.inheritance": 4,
    "training.recipes": 4,
    "training.profiling": 4,
    "training.restore": 4,
    "training.trainer": 4,
    "training.update": 4,
    "analysis": 5,
    "diversity": 5,
    "energy": 5,
    "export": 5,
    "pods": 5,
    "predict": 5,
    "report": 5,
    "study": 5,
}
ALLOWED_IN_LIBRARY = {"jax", "flax", "numpy", "adderflax"}
# Parts of layer 3 that another part may name: a plain description, the writer of lines, the list of a
# checkpoint's files, and the error that every command reports.
ACQUAINTED = {
    ("training.workdir", "data"),
    ("training.steplog", "training.metrics"),
    ("training.checkpoints", "training.manifest"),
    ("training.checkpoints", "training.workdir"),
}


def modules() -> list:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found.append(pytest.param(path, name, id=name))
    return found


def layer_key(name):
    return next((key for key in LAYERS if name == key or name.startswith(key + ".")), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("path", "name"), modules())
def test_imports_point_down(path, name):
    if name in ("__init__", "training"):
        return
    own = layer_key(name)
    assert own is not None, f"{name} has no place in the house: add it to LAYERS and to the README"
    for imported in imports(path):
        if not imported.startswith("adderflax."):
            continue
        target = layer_key(imported.removeprefix("adderflax."))
        assert target is not None, f"{name} imports {imported}, which has no layer"
        assert LAYERS[target] <= LAYERS[own], f"{name} imports upwards: {imported}"
        if LAYERS[own] == LAYERS[target] == 3 and own != target:
            assert (own, target) in ACQUAINTED, f"{name} knows {imported}, another part of layer 3"


@pytest.mark.parametrize(("path", "name"), modules())
def test_the_library_needs_little(path, name):
    if name != "__init__" and LAYERS.get(layer_key(name), 3) > 2:
        return
    allowed = ALLOWED_IN_LIBRARY - ({"flax"} if name.startswith("operators") else set())
    foreign = {module.split(".")[0] for module in imports(path)} - allowed - set(sys.stdlib_module_names)
    assert not foreign, f"{name} imports {foreign}"


def test_importing_the_library_brings_nothing_else():
    code = (
        "import sys, jax, flax.linen; before = {m.split('.')[0] for m in sys.modules}\n"
        "import adderflax\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "['adderflax']", done.stderr
