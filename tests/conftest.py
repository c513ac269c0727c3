"""What every test gets: one thread, no network, and small models that are made once a session."""

from __future__ import annotations

import gc
import os

# Before transformers is imported: it reads them then.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from runs import save_pair
from switchkd.models.pair import ModelPair
from tiny import tiny_pair, tiny_tokenizer

torch.set_num_threads(1)
# A busy machine is no failure: the time of one example is not what is tested.
settings.register_profile("quick, no deadline", deadline=None, max_examples=50)
settings.load_profile("quick, no deadline")


# These take a minute or more with their fixtures. If one started last, the other worker would have nothing left to do.
_LONGEST = ("test_distributed.py", "test_study.py", "test_graphs.py")


@pytest.hookimpl(trylast=True)  # after the files were shuffled
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish() -> None:
    # accelerate collects garbage before every training, a quarter of a second over all that torch and transformers have
    # made: half of a short training. What is there by now stays anyway, and need not be looked at again.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    # PEFT still asks transformers by the old name.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure of a finished run takes as long as the few steps of a test. It is drawn where a test is marked `curves`."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr("switchkd.run.launch.save_curves", lambda *given, **named: None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama_pair(tokenizer: PreTrainedTokenizerFast) -> ModelPair:
    """For tests that only run it: a test that changes a model makes its own with `tiny_pair`."""
    return tiny_pair("llama", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student, a teacher and data.jsonl, for tests that run commands; they write elsewhere."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2", "opt"], scope="session")
def pair(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> ModelPair:
    """The same of three families whose caches, positions and heads differ."""
    return tiny_pair(request.param, tokenizer=tokenizer)
