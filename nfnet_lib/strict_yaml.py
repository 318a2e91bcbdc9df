"""YAML as people mean it: plain values, each key once, nothing that runs code or grows beyond what stands there."""

from pathlib import Path
from typing import Any

import yaml

from nfnet_lib.config import ConfigError

MOST_BYTES = 2**24  # of a file
MOST_VALUES = 100_000  # in one text, its aliases written out


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what it would take silently: repeated keys, keys that are no text or number, bombs of aliases."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key in line {key.start_mark.line + 1} is no plain value")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, each alias counted as what it stands for."""
    if known.setdefault(id(node), 0):
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode):
        size = 1
    else:
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        if any(known.get(id(part)) == 0 for part in parts):
            raise yaml.YAMLError("an alias stands for what it is in")
        size = 1 + sum(_size(part, known) for part in parts)
    if size > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
    known[id(node)] = size
    return size


def parse(text: str, what: str) -> Any:
    """The value of a YAML text; ConfigError in one line, beginning with `what`, for anything but plain values."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits, a 13th month
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping, its keys text, that a YAML or JSON file holds; ConfigError as of `parse`, also where it can't be read."""
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_BYTES):  # a device or pipe may never end
            raise OSError(f"it is no file of at most {MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: {path} can't be read: {error}") from None
    content = parse(text, f"{what}: {path}")
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: {path} holds {type(content).__name__}, not a mapping of names to values")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"{what}: {path}: the key {wrong[0]!r} is no text")
    return content
