"""How the kernels of _tpu_matrix cut a problem into blocks and tiles, and the cycles it takes.

The figures are fitted to the schedules of the TPU compiler for a v5e.
"""

import functools
import math
from typing import NamedTuple

from adderflax.operators._tpu_common import LANES, SUBLANES, ceil_div
from adderflax.operators.rules import Rule

CHUNK = LANES  # steps of the depth in one unrolled loop body
# Registers of a tile, out of 64; a gradient holds its own operand's tile besides. Larger tiles
# spill: of the vector unit's slots, 32 x 896 numbers use 95 % in a forward kernel on v5e and v6e,
# 32 x 1024 93 %, and 24 x 1152 88 % on a v6e.
_FORWARD_TILE, _WIDEST_FORWARD_TILE, _GRADIENT_TILE = 28, 18, 21
_MAX_LANE_TILES = 9
_TURN_CYCLES = 3.0  # for 8 x 128 numbers
_LATENCY = 65  # cycles before the first broadcast of a loop body arrives
_BLOCK_ROWS, _BLOCK_DEPTH = 256, 512
_TURNED_ROWS = 384  # the most rows of a turned block, which are also lanes
_STEP_CYCLES = 20_000  # work that hides what one step of the grid costs (about 500 cycles)
_VMEM_BYTES = 12 * 2**20  # a kernel gets 16 MiB by default on a v5e


class Problem(NamedTuple):
    """Sizes of out[b, r, c] = sum_s ..., how the arrays are stored, and the term.

    Attributes:
        batch: number of independent problems.
        rows: length of r, along sublanes.
        lanes: length of c.
        depth: length of s.
        columns_turned: whether `columns` is stored as [b, s, r] instead of [b, r, s].
        rows_turned: whether `rows` is stored as [b, c, s] instead of [b, s, c].
        out_turned: whether `out` and `own` are stored as [b, c, r] instead of [b, r, c].
        rule: None for |columns - rows|; a rule for rule(other - own) times the weight.
        other: of a gradient, which of "columns" and "rows" is subtracted from; the remaining
            one is the weight.
    """

    batch: int
    rows: int
    lanes: int
    depth: int
    columns_turned: bool = False
    rows_turned: bool = False
    out_turned: bool = False
    rule: Rule | None = None
    other: str = "columns"


class Blocks(NamedTuple):
    """How a problem is cut.

    Attributes:
        tile_rows: rows of the tile that is held in registers.
        lane_tiles: its width in tiles of 128 lanes, and the width of a block.
        rows: rows of a block.
        depth: steps of a block.
        batch: problems in a block.
    """

    tile_rows: int
    lane_tiles: int
    rows: int
    depth: int
    batch: int


def cycles(problem: Problem, tile_rows: int, lane_tiles: int) -> float:
    """Estimated cycles of one problem of the batch, fitted to the compiler's schedules."""
    operations = 3 if problem.rule is None else 4
    vector, cross_lane = lane_tiles * operations / 4, 2.2
    # Close to the slower of the two units, and above both where they are equally busy.
    step = tile_rows // SUBLANES * (vector**3 + cross_lane**3) ** (1 / 3)
    full, rest = divmod(problem.depth, CHUNK)
    tile = full * (_LATENCY + CHUNK * step) + (_LATENCY + rest * step if rest else 0)
    rows, lanes = ceil_div(problem.rows, tile_rows), ceil_div(problem.lanes, lane_tiles * LANES)
    padded_rows = ceil_div(rows * tile_rows, LANES) * LANES
    turned = problem.depth * LANES * lane_tiles if problem.rows_turned else 0
    turned += problem.depth * padded_rows if problem.columns_turned else 0
    if problem.out_turned:
        turned += padded_rows * LANES * lane_tiles * (1 if problem.rule is None else 2)
    return lanes * (rows * tile + _TURN_CYCLES * turned / (SUBLANES * LANES))


@functools.cache
def choose_tile(problem: Problem) -> tuple[float, int, int]:
    """(cycles, rows of a tile, width of a tile in units of 128 lanes), the fastest."""
    candidates = []
    for lane_tiles in range(1, min(_MAX_LANE_TILES, ceil_div(problem.lanes, LANES)) + 1):
        registers = _FORWARD_TILE if lane_tiles < _MAX_LANE_TILES else _WIDEST_FORWARD_TILE
        if problem.rule is not None:
            registers = _GRADIENT_TILE
        for height in range(1, min(registers // lane_tiles, 16) + 1):
            tile_rows = height * SUBLANES
            if _row_unit(problem, tile_rows) <= _TURNED_ROWS:
                candidates.append((cycles(problem, tile_rows, lane_tiles), tile_rows, lane_tiles))
    return min(candidates)


def cheapest(forms: tuple[Problem, Problem]) -> Problem:
    """The faster of two forms of the same product, the straight one if they are as fast."""
    straight, turned = forms
    return turned if choose_tile(turned)[0] < 0.98 * choose_tile(straight)[0] else straight


def choose_blocks(problem: Problem) -> Blocks:
    """Blocks that fit in VMEM twice, since the next ones load while these are computed."""
    cost, tile_rows, lane_tiles = choose_tile(problem)
    unit = _row_unit(problem, tile_rows)
    rows = _balanced(problem.rows, max(_BLOCK_ROWS // unit, 1) * unit, unit)
    depth = _balanced(problem.depth, _BLOCK_DEPTH, CHUNK)
    blocks = Blocks(tile_rows, lane_tiles, rows, depth, batch=1)
    if depth < problem.depth:
        return blocks
    # Small problems share a step of the grid.
    in_block = cost * min(1.0, rows * lane_tiles * LANES / (problem.rows * problem.lanes))
    batch = min(problem.batch, max(1, round(_STEP_CYCLES / in_block)))
    while batch > 1 and vmem_bytes(problem, blocks._replace(batch=batch)) > _VMEM_BYTES:
        batch -= 1
    return blocks._replace(batch=batch)


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
    """Blocks twice, scratch once, all in float32."""
    width, held = blocks.lane_tiles * LANES, 1 if problem.rule is None else 2
    block = blocks.rows * blocks.depth + blocks.depth * width + held * blocks.rows * width
    scratch = blocks.rows * LANES + CHUNK * width + held * blocks.rows * width
    return 4 * (2 * blocks.batch * block + scratch)


def _row_unit(problem: Problem, tile_rows: int) -> int:
    """What the rows of a block are a multiple of.

    Blocks are turned in squares of 128, and bfloat16 is stored in pairs of rows.
    """
    turned = problem.columns_turned or problem.out_turned
    return math.lcm(LANES if turned else 2 * SUBLANES, tile_rows)


def _balanced(length: int, largest: int, unit: int) -> int:
    """The length of equal blocks, multiples of the unit, none above the largest."""
    count = ceil_div(length, largest)
    return ceil_div(ceil_div(length, count), unit) * unit
