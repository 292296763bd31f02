"""The CUDA kernels as a JAX primitive, without a GPU: lowered, and run on the CPU by the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.interpreters import mlir
from kernel_operands import cuda_lowered_for_cpu, exact_sums, operands

from adderflax.operators import _gpu, _reference, adder_matmul
from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators.rules import Rule


def fake_ptx(source):
    constants = dict(re.findall(r"(?m)^#define (\w+) (\S+)", source))
    return '.version 6.3\n\t"' + " ".join(constants[name] for name in ("ROWS", "COLUMNS", "TERMS")) + '"\\'


@pytest.fixture
def any_machine(monkeypatch):
    """NVRTC replaced, so that lowering needs nothing installed."""
    monkeypatch.setattr(kernels, "unavailable", lambda: None)
    monkeypatch.setattr(kernels, "compile_ptx", fake_ptx)


def specs(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lowered(function, *arguments, platforms=("cuda",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def test_lowering_for_cuda_holds_the_call(any_machine):
    def run(x, y, g):
        rule = Rule("hardtanh")
        return _gpu.forward(x, y), _gpu.gradient_x(x, y, g, rule), _gpu.gradient_y(x, y, g, rule)

    traced = jax.jit(run).trace(*specs((3, 65, 64), (3, 64, 60), (3, 65, 60)))
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    main = module.body.operations[0].regions[0].blocks[0]
    calls = [op for op in main if op.name == "stablehlo.custom_call"]
    expected = (((0, 1), "65 60 64"), ((2, 1, 0), "65 64 60"), ((0, 2, 1), "64 60 65"))
    assert len(calls) == len(expected)
    for call, (arguments, lengths) in zip(calls, expected):
        assert list(call.operands) == [main.arguments[i] for i in arguments]
        assert call.attributes["call_target_name"].value == "__gpu$xla.gpu.ptx"
        # As XLA reads it.
        config = mlir.ir.Attribute.parse(call.attributes["backend_config"].value, module.context)
        assert config["kernel_data"].value == f'.version 6.3\n\t"{lengths}"\\'
        assert config["block_x"].value >= 32 and config["grid_x"].value >= 3


def test_the_kernels_are_what_runs_on_cuda_by_default(any_machine):
    def run(x, y):
        out, pull = jax.vjp(adder_matmul, x, y)
        return out, *pull(out)

    # The result, and the gradient of x; that of the templates is a product.
    assert lowered(run, *specs((70, 64), (64, 60))).count("__gpu$xla.gpu.ptx") == 2
    assert "__gpu$xla.gpu.ptx" not in lowered(run, *specs((70, 64), (64, 60)), platforms=("cpu",))


def test_nothing_is_compiled_for_other_platforms(any_machine, monkeypatch):
    def explode(source):
        raise AssertionError("compiled")

    monkeypatch.setattr(kernels, "compile_ptx", explode)
    run = functools.partial(jax.lax.platform_dependent, cuda=_gpu.forward, default=_reference.forward)
    arguments = specs((5, 6), (6, 7))
    assert "xla.gpu.ptx" not in lowered(run, *arguments, platforms=("cpu",))
    with pytest.raises(AssertionError, match="compiled"):
        lowered(run, *arguments)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs.*lowered for tpu"):
        lowered(lambda x, y: _gpu.forward(x, y), *arguments, platforms=("tpu",))


def test_exports_hold_xla_operations_only(any_machine):
    run = functools.partial(jax.lax.platform_dependent, cuda=_gpu.forward, default=_reference.forward)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda"])(*specs((5, 6), (6, 7)))
    assert "xla.gpu.ptx" not in exported.mlir_module()
    x, y, _ = operands("forward", 1, 5, 7, 6, "float32", "normal")
    np.testing.assert_allclose(exported.call(x[0], y[0]), reference.forward(x, y)[0][0], rtol=1e-5)


def test_refusals(any_machine, monkeypatch):
    assert _gpu.refuses(*specs((5, 6), (6, 7))) is None
    rows, *_ = jax.export.symbolic_shape("rows")
    assert "shapes must be known" in _gpu.refuses(*specs((rows, 6), (6, 7)))
    assert "no axis may be longer" in _gpu.refuses(*specs((2**30 + 1, 6), (6, 7)))
    monkeypatch.setattr(kernels, "unavailable", lambda: "no compiler")
    assert _gpu.unavailable() == "no compiler"


@pytest.fixture
def on_cpu(monkeypatch):
    with cuda_lowered_for_cpu(monkeypatch):
        yield


# --- integers ---


def integer_operands(*lengths, dtype=np.int8):
    *batch, m, k, n = lengths
    random, ends = np.random.default_rng(k), np.iinfo(dtype)
    return [random.integers(ends.min, ends.max + 1, (*batch, *s), dtype) for s in ((m, k), (k, n))]


def named(x, y):
    return adder_matmul(x, y, implementation="gpu")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1), (5, 7, 6), (3, 9, 13, 4), (2, 3, 4, 8, 5), (3, 0, 4), (0, 3, 4)]
)
def test_integers_take_the_kernel_of_bytes_where_it_is_named(on_cpu, monkeypatch, lengths, dtype):
    launched = []
    launch = _gpu.launch
    monkeypatch.setattr(
        _gpu, "launch", lambda problem, *rest: launched.append(problem) or launch(problem, *rest)
    )
    x, y = integer_operands(*lengths, dtype=dtype)
    found = jax.jit(named)(x, y)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, exact_sums(x, y))
    if 0 not in lengths:
        (problem,) = launched
        assert problem.operation == "bytes" and problem.terms == -(-lengths[-2] // 4)
    # Not where it is left to us to choose, nor where int8 meets uint8.
    launched.clear()
    np.testing.assert_array_equal(jax.jit(adder_matmul)(x, y), exact_sums(x, y))
    assert not any(problem.operation == "bytes" for problem in launched)
    np.testing.assert_array_equal(named(x, y.view(np.uint8)), exact_sums(x, y.view(np.uint8)))
    assert dtype == np.uint8 or not any(problem.operation == "bytes" for problem in launched)


def test_exported_integers_hold_xla_operations_only(any_machine):
    x, y = integer_operands(5, 7, 6)
    exported = jax.export.export(jax.jit(named), platforms=["cuda"])(*specs(x.shape, y.shape, dtype=jnp.int8))
    assert "xla.gpu.ptx" not in exported.mlir_module()
    assert "xla.gpu.ptx" in lowered(named, x, y)
    assert exported.out_avals[0].dtype == jnp.int32
