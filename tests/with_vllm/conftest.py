"""Every test in this folder needs vLLM, and an environment of its own: `make test-vllm`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vllm")
            # vLLM and what it brings warn of much that is not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("default"))
