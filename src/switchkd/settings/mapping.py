"""A mapping of settings in a YAML file. A key that stands twice is refused: YAML readers take the last one and say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class KeyTwice(yaml.MarkedYAMLError):
    """A key that stands twice in one mapping; `problem` says it, `problem_mark` where the second is."""


# Safe: a run file from somebody else must not run code.
class StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that raises KeyTwice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As in yaml.Composer."""
        # Here and not where values are made: by then `<<` has put in keys that others are meant to replace.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (first := lines.get((key.tag, key.value))) is not None:
                said = f"the key {key.value!r} stands twice, first in line {first}"
                raise KeyTwice(problem=said, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError that names the file, and the line of a fault."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except FileNotFoundError:
        raise UserError(f"there is no run file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        if isinstance(error, KeyTwice):
            raise UserError(f"{path}{line}: {error.problem}; keep one of them") from None
        raise UserError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}; correct it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} has to hold settings, one `key: value` a line")
    return values
