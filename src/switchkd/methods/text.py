"""How a rollout starts, how long it grows, and whether the teacher rewrites it."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Literal

from switchkd.errors import UserError
from switchkd.settings.components import Registry, setting


@dataclass(frozen=True)
class ReplayedPrefix:
    """`replayed_prefix`: rollouts begin with a part of another response to their prompt, and the student goes on from there.

    The response is the data set's, or the teacher's, written once before the first step. Of its `parts` equal parts the first
    t are replayed, t from 0 to parts - 1, with a probability that falls as kappa^t; t is drawn by the rollout's address. Over
    the first `until` of the run's steps the length falls to 0 by a cosine. A prefix is context alone, or where `weight` is
    above 0, its tokens are trained on with that weight.

    Sources: ReOPD, arXiv 2607.04763, whose parts are the turns of an agent, with kappa 0.6; and the guidance of TrOPD, arXiv
    2606.01249, whose longest prefix falls to 0 by a cosine (kappa 1, until 1, weight 0.001). Raises UserError for values out
    of range.
    """

    source: Literal["data", "teacher"] = setting("data", "Whose responses are begun: data or teacher.")
    parts: int = setting(8, "A response is cut into this many parts; a prefix is some of the first.")
    kappa: float = setting(0.6, "A prefix of one more part is less likely by this factor, above 0 to 1.")
    until: float = setting(0.0, "The share of the run's steps over which prefixes shrink to nothing; 0: they stay.")
    weight: float = setting(0.0, "Multiplies the loss of the prefix's tokens; 0: they are context alone.")

    def __post_init__(self) -> None:
        if self.source not in ("data", "teacher"):
            raise UserError(f"replayed_prefix.source is {self.source!r}; choose data or teacher")
        if self.parts < 2:
            raise UserError(f"replayed_prefix.parts is {self.parts}; a response has at least 2 parts")
        if not 0 < self.kappa <= 1:
            raise UserError(f"replayed_prefix.kappa is {self.kappa}; it has to be above 0 and at most 1")
        if not 0 <= self.until <= 1:
            raise UserError(f"replayed_prefix.until is {self.until}; it is a share of the run's steps, from 0 to 1")
        if not 0 <= self.weight < math.inf:
            raise UserError(f"replayed_prefix.weight is {self.weight}; it has to be 0 or more")

    def tokens(self, coin: float, response_tokens: int, progress: float) -> int:
        """The length of the prefix of a response, from a coin in (0, 1) and the share of the run's steps that are done."""
        chances = [self.kappa**part for part in range(self.parts)]
        left, drawn = coin * math.fsum(chances), 0
        while drawn < self.parts - 1 and left >= chances[drawn]:
            left -= chances[drawn]
            drawn += 1
        shrunk = 1.0
        if self.until:
            shrunk = (1 + math.cos(math.pi * min(1.0, progress / self.until))) / 2
        return math.floor(response_tokens * drawn / self.parts * shrunk)


@dataclass(frozen=True)
class LengthGrowth:
    """`length_growth`: the longest rollout of a step is min(max_new_tokens, start + step // steps_per_token), steps from 0.

    A policy whose threshold or places depend on max_new_tokens sees the step's limit in its place. Source: TCOD, arXiv
    2604.24005 (k_start + n / eta, with 1 and 2), which counts the turns of an agent, where we count tokens. Raises UserError
    for values out of range.
    """

    start: int = setting(16, "The longest rollout of the first step, in tokens.")
    steps_per_token: float = setting(1.0, "The number of steps after which the limit is one token larger.")

    def __post_init__(self) -> None:
        if self.start < 1:
            raise UserError(f"length_growth.start is {self.start}; it has to be at least 1 token")
        if not 0 < self.steps_per_token < math.inf:
            raise UserError(f"length_growth.steps_per_token is {self.steps_per_token}; it has to be positive")

    def limit(self, step: int, max_new_tokens: int) -> int:
        """The longest rollout of a step, in tokens."""
        return min(max_new_tokens, self.start + math.floor(step / self.steps_per_token))


@dataclass(frozen=True)
class Rewrite:
    """`rewrite`: the teacher rewrites every rollout. The student learns the new text under the original prompt.

    The teacher is asked in the words of `template`, where {prompt} is the prompt's text and {attempt} the student's response,
    as one user message of its chat template where it has one. So it has to be a teacher that follows instructions. While the
    loss compares the two models the teacher sees the original prompt, as the student does. We depart there: the authors' code
    shows it the attempt too.

    Source: TRD, arXiv 2606.08432, and the authors' code; the wording is ours. Raises UserError for a template without the two
    fields.
    """

    template: str = setting(
        "Here is a request and a first answer to it. Write the answer again: keep its course and what is right in it, and correct "
        "what is wrong. Give the new answer alone.\n\nRequest:\n{prompt}\n\nFirst answer:\n{attempt}\n\nNew answer:\n",
        "What the teacher is asked, with the fields {prompt} and {attempt}.",
    )

    def __post_init__(self) -> None:
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise UserError(f"rewrite.template cannot be read ({error}); write a brace of the text twice") from error
        if fields != {"prompt", "attempt"}:
            found = ", ".join(sorted(fields)) or "none"
            raise UserError(
                f"rewrite.template has the fields {found}; it needs {{prompt}} and {{attempt}}, and no other"
            )

    def request(self, prompt: str, attempt: str) -> str:
        """The text of the request for one rollout."""
        return self.template.format(prompt=prompt, attempt=attempt)


REPLAYED_PREFIX = Registry("replayed_prefix", "switchkd.prefixes", ReplayedPrefix, {"prefix": ReplayedPrefix})
LENGTH_GROWTH = Registry("length_growth", "switchkd.growths", LengthGrowth, {"steps": LengthGrowth})
REWRITE = Registry("rewrite", "switchkd.rewrites", Rewrite, {"teacher": Rewrite})
