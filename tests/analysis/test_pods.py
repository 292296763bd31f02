"""The table of pods: collectives read off a program, estimates, resumption, and one real compilation."""

import importlib.util
import json

import pytest

from adderflax import pods as command
from adderflax.analysis import pods

# Lines as the TPU compiler writes them: synchronous, asynchronous, fused with computation, and none.
PROGRAM = """
  %ar = (f32[192,192]{1,0:T(8,128)S(1)}, bf16[10]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1}}
  %ag = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%c), channel_id=2, dimensions={0}
  %agd = bf16[32,4]{1,0} all-gather-done(%ag)
  %cp = (f32[24,2]{1,0}, f32[24,2]{1,0}, u32[], u32[]) collective-permute-start(%d), channel_id=3
  %cp2 = (f32[24,2]{1,0}, f32[24,2]{1,0}, u32[], u32[]) collective-permute-start(%d), channel_id=3
  %sum = f32[4]{0} add(%e, %f), metadata={op_name="all-reduce(x)"}
"""
ROW = {
    "program": "0123",
    "jax": "0.10.2",
    "libtpu": "0.0.42",
    "pod": "v5e-16",
    "chips": 16,
    "batch_per_chip": 64.0,
    "parameters": 5_700_000,
    "memory": 16 * 2**30,
    "arguments": 2**30,
    "temporaries": 4 * 2**30,
    "collectives": {"all-reduce": [2, 23 * 2**20]},
    "seconds": 5,
}


def test_collectives_are_counted_once():
    assert pods.count_collectives(PROGRAM) == {
        "all-reduce": [1, 192 * 192 * 4 + 10 * 2],
        "all-gather": [1, 32 * 4 * 2],
        "collective-permute": [1, 24 * 2 * 4],
    }


def test_the_largest_batch_is_estimated_from_the_widest_row():
    small = ROW | {"config": "a", "pod": "v5e-256", "batch_per_chip": 4.0, "temporaries": 2**20}
    rows = [ROW | {"config": "a"}, small, ROW | {"config": "b", "batch_per_chip": 640.0}]
    assert pods.largest_batch(small, rows) == 15 * 16  # 15 GiB are left, 64 examples take 4


def test_finished_rows_are_kept_and_offered_again(tmp_path, monkeypatch, capsys):
    seen = []

    def row(file, overrides, pod, known):
        seen.append((pod, [other["pod"] for other in known]))
        return next((other for other in known if other["pod"] == pod), ROW | {"pod": pod})

    monkeypatch.setattr(command, "_row", row)
    monkeypatch.setattr(pods, "missing_compiler", lambda: None)
    arguments = ["--config=configs/imagenet_adder_deit_ti.py", f"--output={tmp_path / 'pods.md'}"]
    command.main([*arguments, "--pod=v5e-16"])
    command.main([*arguments, "--pod=v5e-16", "--pod=v6e-64"])
    assert seen == [("v5e-16", []), ("v5e-16", ["v5e-16"]), ("v6e-64", ["v5e-16"])]
    kept = [json.loads(line) for line in (tmp_path / "pods.jsonl").read_text().splitlines()]
    assert [line["pod"] for line in kept] == ["v5e-16", "v6e-64"]
    page = (tmp_path / "pods.md").read_text()
    assert "python -m adderflax.pods --config=configs" in page and "jax 0.10.2, libtpu 0.0.42" in page
    line = "| imagenet_adder_deit_ti | 5.7 M | v5e-16 | 64 | 1.00 GiB | 4.00 GiB | 31.2% |"
    assert f"{line} all-reduce 2 x, 23.0 MiB | 240 |" in page and line in capsys.readouterr().out


def test_a_row_cut_short_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pods, "missing_compiler", lambda: None)
    (tmp_path / "pods.jsonl").write_text(json.dumps(ROW) + '\n{"program": "01')
    with pytest.raises(SystemExit, match="error: Line 2 of .*pods.jsonl is no finished row.*Delete it"):
        command.main([f"--output={tmp_path / 'pods.md'}"])


def test_a_program_that_does_not_fit_says_so():
    refused = {name: ROW[name] for name in ("pod", "batch_per_chip", "parameters", "memory")}
    table = pods.as_table([refused | {"config": "a", "refused": "RESOURCE_EXHAUSTED: 20 GiB"}])
    assert "does not fit: RESOURCE_EXHAUSTED: 20 GiB" in table


def test_without_the_compiler_it_is_skipped_with_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command.main([f"--output={tmp_path / 'pods.md'}"])
    assert "skipped: libtpu" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/no_such.py"], "no_such.py"),
        (["--config.batch_size=100", "--pod=v5e-16"], "batch_size=100 does not divide over 16 devices"),
        (
            ["--config.distillation.teacher=runs/t", "--config.distillation.soft_labels=1.0", "--pod=v5e-16"],
            "distillation.teacher='runs/t' .* only runs without a teacher",
        ),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    if pods.missing_compiler():
        pytest.skip("libtpu is not installed")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command.main([f"--output={tmp_path / 'pods.md'}", *arguments])


@pytest.mark.tpu_compile
@pytest.mark.skipif(pods.missing_compiler() is not None, reason="libtpu is not installed")
def test_a_small_run_compiles_for_tpus(tmp_path):
    output = tmp_path / "pods.md"
    command.main(
        [
            *("--config=configs/digits_adder_vit.py", "--pod=v5e-4", f"--output={output}"),
            *("--config.model.depth=1", "--config.model.patch_size=4", "--config.augment.mixup_alpha=0"),
        ]
    )
    (row,) = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert (row["chips"], row["batch_per_chip"]) == (4, 32)
    # State: parameters, two moments and the average; what crosses chips is the gradient.
    assert row["arguments"] > 4 * 4 * row["parameters"]
    assert row["collectives"]["all-reduce"][1] >= 3.9 * row["parameters"]
