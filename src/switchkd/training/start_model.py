"""The student as it was before the first step, for targets and divergences that look back at it."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from switchkd.models.heads import Head, backbone, evaluating
from switchkd.models.pair import ModelPair
from switchkd.training.teachers import self_teacher


class StartModel:
    """The student that a run was given, frozen: a copy of its weights, or the weights without an adapter where it has one.

    Make it before a checkpoint is loaded and before the first step. A run that is resumed gets its start model from the model
    that it is given again, so that has to be the same one.
    """

    def __init__(self, pair: ModelPair) -> None:
        student = cast(nn.Module, pair.student)
        if hasattr(student, "disable_adapter"):
            self.model: PreTrainedModel = self_teacher(student)
        else:
            self.model = cast(PreTrainedModel, copy.deepcopy(student).eval().requires_grad_(False))
        with pair.computing():
            self.head = Head.of(self.model, pair.vocabulary_size)

    @torch.no_grad()
    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Its last hidden states (B, T, H)."""
        with evaluating(self.model):
            output = backbone(self.model)(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        states_BTH: Tensor = output.last_hidden_state
        return states_BTH
