"""Data sets of Ray Data from tables of this process."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa
import ray.data


def dataset_from_table(table: pa.Table, num_blocks: int) -> ray.data.Dataset:
    """Return the rows as a data set of so many blocks of equal size, or fewer.

    The blocks are cut in this process. ``ray.data.from_arrow`` starts a task of one CPU
    for each block, and for these an autoscaler starts all nodes that it may start, also
    those with GPUs.
    """
    rows_per_block = max(1, -(-table.num_rows // num_blocks))
    edges = [*range(0, table.num_rows, rows_per_block), table.num_rows]
    slices = [table.slice(start, end - start) for start, end in pairwise(edges)]
    return ray.data.from_blocks(slices or [table])
