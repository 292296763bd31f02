"""How long an epoch of CIFAR-10 should take on an H200: counted operations over speeds.

The speeds of the adder operators and of the gradient of templates were measured on one
(results/operators.md), and so was the bandwidth; the others are assumed. `device_cifar.py probe` measures
whole updates there.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Counts(NamedTuple):
    """What the forward pass of one image takes: elements, multiply-accumulates, bytes.

    Attributes:
      linear: |x - w| terms of adder layers with templates.
      scores: |q - k| terms.
      products: multiply-accumulates.
      product_bytes: operands and results of those.
      elementwise_bytes: operands and results of everything else, nothing fused.
    """

    linear: int
    scores: int
    products: int
    product_bytes: int
    elementwise_bytes: int


class Rates(NamedTuple):
    """Speeds of an H200.

    Attributes:
      forward: adder elements/s, measured: 71 % of what 132 x 128 lanes at 1.98 GHz do at two instructions
        each.
      input_gradient: likewise, 66 %.
      scores: adder elements/s of the small problems of attention, forward and for each gradient; assumed.
      exact: FLOP/s of float32 products, measured: gradients of adder templates.
      products: FLOP/s of TF32 products, 40 % of the datasheet's 494 T, assumed: everything that multiplies.
      bandwidth: bytes/s, as a copy was measured on such a machine.
      fused: share of the unfused elementwise bytes that still move when XLA has fused; assumed.
      step: seconds of an update that launching, small kernels and gaps take; assumed.
    """

    forward: float = 11_900e9
    input_gradient: float = 11_000e9
    scores: float = 5_000e9
    exact: float = 35e12
    products: float = 200e12
    bandwidth: float = 4.3e12
    fused: float = 0.25
    step: float = 3e-3


RATES = Rates()
EXAMPLES = 49_000  # images of the training part
# Seconds of a process besides its updates: imports, data, workers, compilation, validations, saves. Measured
# on an H200: 263 s for 11,484 updates of the twin, which took 155 s (results/cifar10.md).
STARTS = 108.0
CALLS = 3  # processes that train, both models together: one of them is stopped and goes on
MARGIN = 0.9  # share of the remaining seconds that are planned for


def seconds_an_epoch(counts: Counts, batch_size: int, rates: Rates = RATES) -> dict[str, float]:
    """Seconds of an epoch of training by what takes them; their sum is the whole.

    The backward pass of a product is two more of its size, that of elementwise operations is taken to move
    twice the forward pass's bytes. A product takes as long as the slower of its arithmetic and its bytes.
    """
    products = 3 * max(2 * counts.products / rates.products, counts.product_bytes / rates.bandwidth)
    an_image = {
        "adder layers, forward": counts.linear / rates.forward,
        "adder layers, input gradient": counts.linear / rates.input_gradient,
        "adder layers, template gradient": 2 * counts.linear / rates.exact,
        "L1 scores and their gradients": 3 * counts.scores / rates.scores,
        "products": products,
        "elementwise": 3 * rates.fused * counts.elementwise_bytes / rates.bandwidth,
        "launches and gaps": rates.step / batch_size,
    }
    return {name: EXAMPLES * seconds for name, seconds in an_image.items()}


def epochs_within(seconds: float, speeds: Iterable[float], starts: int = CALLS) -> int:
    """Epochs of each of several runs, at these images/s, that fit together into so many seconds."""
    updating = (seconds - starts * STARTS) * MARGIN
    return max(int(updating / sum(EXAMPLES / speed for speed in speeds)), 1)


def configured_counts(file: str, overrides: Sequence[str]) -> tuple[Counts, int]:
    """Counts of a configuration's model, by the operation ledger, and its batch size."""
    from adderflax.analysis.configured import configured_model, inference_ledger
    from adderflax.analysis.ledger import Ledger
    from adderflax.training.command_line import load_config

    config = load_config(file, overrides)
    ledger = inference_ledger(configured_model(config))
    kinds = {"product": Ledger(()), "elementwise": Ledger(())} | ledger.group(lambda entry: entry.kind)
    moved = {kind: part.bytes_read + part.bytes_written for kind, part in kinds.items()}
    adders = [entry for entry in ledger.entries if entry.kind == "adder"]
    scores = sum(entry.elements for entry in adders if entry.path.endswith("attention"))
    counts = Counts(
        linear=ledger.adder_elements - scores,
        scores=scores,
        products=ledger.macs,
        product_bytes=moved["product"],
        elementwise_bytes=moved["elementwise"],
    )
    return counts, config.batch_size
