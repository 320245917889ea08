"""YAML of others: no Python objects, no duplicate keys, and aliases only as far as the document stays small."""

from __future__ import annotations

from typing import Any

MAX_NODES = 100_000  # with every alias written out


def load_yaml(content: str) -> Any:
    """The content of a document; ValueError for whatever is wrong with it.

    PyYAML raises errors of many types: YAMLError for syntax, but AttributeError for `!!timestamp x`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _expanded_size(node, {})
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                        raise ValueError(f"duplicate key {key.value!r}; keep one of them")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(content, Loader)  # noqa: S506  (a subclass of SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"a value does not fit its type ({error})") from error


def _expanded_size(node: Any, sizes: dict[int, int | None]) -> int:
    """Number of nodes with aliases written out; ValueError beyond MAX_NODES or for a node that contains itself."""
    if isinstance(node.value, str):
        return 1
    if (known := sizes.get(id(node), 0)) is None:
        raise ValueError("an alias refers to what contains it; write the value out")
    if known:
        return known
    sizes[id(node)] = None
    size = 1
    for child in node.value:
        for one in child if isinstance(child, tuple) else (child,):
            size += _expanded_size(one, sizes)
            if size > MAX_NODES:
                raise ValueError(f"its aliases expand to more than {MAX_NODES:,} values; write them out")
    sizes[id(node)] = size
    return size
