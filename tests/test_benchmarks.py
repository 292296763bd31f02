"""The benchmarks run end to end on small shapes, and their page says where each figure is from."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import VisionTransformer, VisionTransformerConfig, adder_matmul
from adderflax.training.command_line import load_config
from adderflax.training.config import ConfigError, RunConfig
from benchmarks import inference, operators, step, templates, timing


def test_operators_are_timed_and_tabulated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operators, "RESULTS", tmp_path / "operators")
    monkeypatch.setattr(operators, "LINEAR", [(24, 48)])
    monkeypatch.setattr(operators, "COMPARED", [])
    monkeypatch.setattr(operators, "TOKENS", (5,))
    monkeypatch.setattr(operators, "device_limits", lambda: (1e9, 5e8))
    # A loop that takes whole sixes of rows, beside the first of the two batches.
    loop = functools.partial(time.sleep, 1e-3)
    monkeypatch.setattr(operators, "limit_loop", lambda rows, *others: loop if rows == 192 else None)
    assert operators.main(["--batches=1,2", "--name=here"]) == 0

    written = json.loads((tmp_path / "operators" / "here.json").read_text())
    ours = [record for record in written["records"] if record["contender"] == "adderflax"]
    assert len([record for record in ours if record["method"] != "int8"]) == 2 * 2 * 3
    forward = ours[0]
    assert forward["lengths"] == [197, 24, 48] and forward["method"] == "forward"
    rate = 197 * 24 * 48 / forward["seconds"]
    assert forward["elements_per_second"] == pytest.approx(rate)
    (limit,) = (record for record in written["records"] if record["contender"] == "limit loop")
    assert limit["seconds"] >= 1e-3 * 197 / 192
    assert forward["share_of_limit"] == pytest.approx(rate / limit["elements_per_second"])
    assert ours[1]["share_of_limit"] == pytest.approx(ours[1]["elements_per_second"] / 5e8)
    contenders = {record["contender"] for record in written["records"]}
    assert contenders >= {"adderflax", "multiply"}

    page = (tmp_path / "operators.md").read_text()
    assert written["machine"]["device"] in page and "394 x 24 x 48" in page and "12 x 5 x 64 x 5" in page
    assert f"| {rate / 1e9:,.1f} |" in page
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")
    if "kernels" in contenders:  # where a compiler builds them
        kernels = [r for r in written["records"] if r["lengths"] == [197, 24, 48] and r["method"] == "int8"]
        rates = {record["contender"]: record["elements_per_second"] for record in kernels}
        assert rates.keys() >= {"adderflax", "kernels", "multiply"}
        against = [f"{rates['kernels'] / rates[name]:.3g}" for name in ("adderflax", "multiply")]
        assert f"| {rates['kernels'] / 1e9:,.1f} | {' | '.join(against)} |" in page


@pytest.mark.parametrize("implementation", ["cpu"])  # skipped where no compiler builds it
def test_models_are_timed_beside_their_twins(implementation, monkeypatch, capsys):
    def load(path):
        size, sizes = (
            (16 if path.name == "larger" else 8),
            dict(channels=1, embed_dim=16, num_heads=2, depth=1),
        )
        preset = "adder" if path.name == "adder" else "multiply"
        config = VisionTransformerConfig.from_variant("digits", preset, image_size=size, **sizes)
        model, info = VisionTransformer(config), SimpleNamespace(image_size=size, channels=1)
        return model, model.init(jax.random.key(0), jnp.zeros((1, size, size, 1))), info

    monkeypatch.setattr(inference, "load_model", load)
    assert inference.main(["adder", "twin", "--batches=1,2", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    names = ["twin, float32", "adder, float32", "adder, float32, kernels", "adder, int8, kernels"]
    found = [(record["batch"], record["contender"]) for record in records]
    assert found == [(batch, name) for batch in (1, 2) for name in names]
    assert min(record["images_per_second"] for record in records) > 0
    # Each is the program that it says.
    functions, info = inference.contenders(Path("adder"), Path("twin"))
    texts = [functions[name].lower(inference.random_images(info, 2)).as_text() for name in names]
    assert ["adderflax_forward" in text for text in texts] == [False, False, True, False]
    assert ["adderflax_bytes" in text for text in texts] == [False, False, False, True]
    wrong = (
        (["adder", "twin", "--batches=0"], "positive numbers such as 1,64"),
        (["adder", "larger"], "error: adder and larger take images of different sizes"),
    )
    for given, said in wrong:
        with pytest.raises(SystemExit) as raised:
            inference.main(given)
        assert said in capsys.readouterr().err + str(raised.value)


def test_operators_refuse_unknown_cases(capsys):
    for wrong, said in (
        ("--only=convolutions", "allowed are linear and scores"),
        ("--batches=1,b", "1,8,64"),
    ):
        with pytest.raises(SystemExit):
            operators.main([wrong])
        assert said in capsys.readouterr().err


def test_faster_functions_take_less_time():
    x = jnp.ones((64, 256))
    fast = jax.jit(jnp.sum).lower(x).compile()
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y + x), x)).lower(x).compile()
    seconds = timing.alternate({"fast": lambda: fast(x), "slow": lambda: slow(x)}, rounds=3)
    assert 0 < seconds["fast"] < seconds["slow"]


def test_calls_of_a_step_are_found_and_counted():
    def twice(x, w):
        def body(x, _):
            return adder_matmul(x, w), None

        return jax.lax.scan(body, x, length=3)[0].sum() + adder_matmul(x[:2], w).sum()

    operands = jnp.ones((4, 6)), jnp.ones((6, 6))
    forward = {key[:2]: count for key, (_, _, count) in _calls(twice, *operands).items()}
    assert forward == {("adder_matmul", "float32(4, 6)"): 3, ("adder_matmul", "float32(2, 6)"): 1}
    gradient = {key[0]: count for key, (_, _, count) in _calls(jax.grad(twice, (0, 1)), *operands).items()}
    assert set(gradient) == {"adder_matmul", "adder_matmul_gradient_x", "adder_matmul_gradient_y"}


def _calls(function, *operands):
    return step.adder_calls(jax.make_jaxpr(function)(*operands).jaxpr)


@jax.numpy_dtype_promotion("standard")  # optax itself promotes
def test_a_step_is_split():
    fields = ["--config.batch_size=4", "--config.model.depth=1", "--config.model.embed_dim=32"]
    figures = step.split_step(RunConfig.parse(load_config("configs/digits_adder_vit.py", fields)))
    parts = [figures[name] for name in ("forward", "input gradient", "weight gradient")]
    assert min(parts) > 0
    assert figures["rest"] == pytest.approx(figures["step"] - sum(parts))
    assert figures["first step"] > figures["step"]


def test_a_step_with_a_teacher_is_refused():
    fields = ["--config.distillation.teacher=weights/cifar10_twin", "--config.distillation.soft_labels=0.5"]
    with pytest.raises(ConfigError, match="distillation.teacher='weights/cifar10_twin' computes on every"):
        step.split_step(RunConfig.parse(load_config("configs/digits_adder_vit.py", fields)))


def test_templates_that_follow_the_moments_agree_better():
    random = np.random.default_rng(0)
    x = templates.inputs("unequal", 64, random)[:400]
    kernel = jnp.float32(random.normal(size=(64, 16)))
    relative = kernel / jnp.sqrt(jnp.mean(jnp.square(kernel), axis=0, keepdims=True))
    ours = templates.agreement(x, templates.dense_templates(kernel, x), kernel)
    assert ours > 0.8 and ours > templates.agreement(x, relative, kernel) + 0.05


def test_the_gpu_benchmark_says_that_there_is_none(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "device_gpu.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 1 and "JAX finds no NVIDIA GPU here" in child.stderr
    assert not list(tmp_path.iterdir())


def test_the_gpu_checks_of_convolutions_tell_right_from_wrong():
    # In a process of its own: they stand an empty package around the operators.
    program = """
import device_gpu_checks as checks
checks.CONVOLUTIONS = [checks.CONVOLUTIONS[2], checks.CONVOLUTIONS[4]]
checks.check_convolutions()
exact = checks.exact_convolution
checks.exact_convolution = lambda *given: [1.01 * array for array in exact(*given)]
checks.check_convolutions()
"""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(benchmarks)}
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    records = [json.loads(line[7:]) for line in child.stdout.splitlines() if line.startswith("RECORD ")]
    # Adding, multiplying where it is depthwise, and int8; then the same against wrong expectations.
    assert [found["good"] for found in records] == [True] * 5 + [False] * 5
