"""Changes at any place of a JSON value, and any JSON value, for property tests."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import strategies as st

JsonPath = tuple[Any, ...]
"""Keys and indices from the root to one node."""

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=5)
    | st.sampled_from([10**400, 1e308, "NaN"]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=6,
)


def json_paths(root: Any, path: JsonPath = ()) -> Iterator[JsonPath]:
    """Yield the path of every node, the root's first."""
    yield path
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(root, dict):
        children = root.items()
    elif isinstance(root, list):
        children = enumerate(root)
    for key, child in children:
        yield from json_paths(child, (*path, key))


def node_at(root: Any, path: JsonPath) -> Any:
    """Return the node at a path."""
    node = root
    for key in path:
        node = node[key]
    return node


def replace_node(root: Any, path: JsonPath, replacement: Any) -> Any:
    """Return a copy with another node at one path."""
    if not path:
        return replacement
    copied = copy.deepcopy(root)
    node_at(copied, path[:-1])[path[-1]] = replacement
    return copied


def remove_node(root: Any, path: JsonPath) -> Any:
    """Return a copy without the node at one path."""
    copied = copy.deepcopy(root)
    del node_at(copied, path[:-1])[path[-1]]
    return copied
