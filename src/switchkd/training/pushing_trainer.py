"""`transformers.Trainer` that pushes a model's own files to the hub, by name.

Transformers pushes the whole output folder. In a run's there are prompts too, rollouts, a teacher's weights, and settings with
what lets somebody in.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from switchkd.training.card import CARD_FILE
from switchkd.training.checkpoints import OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    *ADAPTER_FILES, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece.*.model", "chat_template.*", CARD_FILE,
)  # fmt: skip
# What a run goes on from, without the rollouts that it may repeat and the pickled settings.
_STATE_FILES = (OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE, "rng_state*.pth", "scaler.pt")


def files_among(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The names of the files in a folder, not deeper, that match one of the patterns."""
    found = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(name for name in found if any(fnmatch(name, pattern) for pattern in patterns))


class PushingTrainer(Trainer):
    """As in `transformers.Trainer`, but for what it pushes: nothing beside the model, its tokenizer and its card."""

    _hub: HfApi | None = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `transformers.Trainer`; all processes call it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        kwargs.setdefault("model_name", (self.args.hub_model_id or folder.absolute().name).split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        given = {"token": token, "revision": revision, "run_as_future": not blocking}
        return self._upload(folder, files_among(folder, _MODEL_FILES), commit_message, **given)

    def push_final(self, folder: Path, files: Sequence[str]) -> str | None:
        """Push these files of a trained model, by the main process alone. An adapter that was merged into it leaves the hub.

        Where the hub does not take them, returns why, with the command that pushes them.
        """
        self._finish_current_push()
        merged = [] if ADAPTER_FILES[0] in files else [*ADAPTER_FILES]
        try:
            self._upload(folder, files, "Trained model", delete_patterns=merged)
        # Whatever it was, the model is whole, and the person has to know.
        except Exception as error:
            said = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
            named = " ".join(f"--include {shlex.quote(name)}" for name in files)
            return (
                f"the trained model is whole in {folder}, but was not pushed to {self.hub_model_id} ({said}); push it with: "
                f"hf upload {self.hub_model_id} {shlex.quote(str(folder))} . {named}"
            )
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # An older checkpoint may be removed after this one is written: nothing of it may still be on its way.
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, message = Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}"
        jobs: Any = [self._upload(folder, files_among(folder, _MODEL_FILES), message, run_as_future=True)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            files = files_among(folder, (*_MODEL_FILES, *_STATE_FILES))
            jobs.append(self._upload(folder, files, f"{message}, checkpoint", path_in_repo=place, run_as_future=True))
        pushing: Any = PushInProgress(jobs)
        self.push_in_progress = pushing

    def _upload(self, folder: Path, files: Sequence[str], message: str | None, **given: Any) -> Any:
        given = {key: value for key, value in given.items() if value}
        own = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        # One for all pushes: it sends those of the background in their order.
        self._hub = self._hub or HfApi()
        return self._hub.upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=str(folder),
            allow_patterns=[*files],
            commit_message=message,
            **{**own, **given},
        )
