"""Examples by the million: token ids in one array, records only while somebody looks at them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

from switchkd.records import Example, Prompt


class PackedExamples(Sequence[Example]):
    """Examples whose token ids lie in one array, 4 bytes a token and 34 an example. Each access makes a new `Example`.

    `teachers` are the names of the examples' teachers, each once. `references` are what answers are compared with, by prompt id:
    of an evaluation set whose answers are scored.
    """

    def __init__(self) -> None:
        self.references: Mapping[int, tuple[str, ...]] = {}
        self._tokens = array("i")
        self._prompt_ids, self._starts, self._seams, self._ends = (array("q") for _ in range(4))
        self.teachers: list[str] = []
        self._teacher_of = array("H")

    def add(self, prompt_ids: Iterable[int], prompt: Sequence[int], response: Sequence[int], teacher: str = "") -> None:
        """Append an example for each of the ids; their token ids are stored once."""
        if teacher not in self.teachers:
            self.teachers.append(teacher)
        start = len(self._tokens)
        self._tokens.extend(prompt)
        self._tokens.extend(response)
        for prompt_id in prompt_ids:
            self._prompt_ids.append(prompt_id)
            self._starts.append(start)
            self._seams.append(start + len(prompt))
            self._ends.append(len(self._tokens))
            self._teacher_of.append(self.teachers.index(teacher))

    def lengths(self) -> Iterator[tuple[int, int]]:
        """The number of tokens in each prompt, and in its response."""
        for start, seam, end in zip(self._starts, self._seams, self._ends, strict=True):
            yield seam - start, end - seam

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        start, seam, end = self._starts[index], self._seams[index], self._ends[index]
        teacher = self.teachers[self._teacher_of[index]]
        prompt = Prompt(tuple(self._tokens[start:seam]), self._prompt_ids[index], teacher=teacher)
        return Example(prompt, tuple(self._tokens[seam:end]))


def teachers_of(examples: Sequence[Example]) -> set[str]:
    """The names of the teachers that examples ask for; "" stands for a run's only one."""
    if isinstance(examples, PackedExamples):
        return {*examples.teachers}
    return {each.prompt.teacher for each in examples}


def lengths_of(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """The number of tokens in each example's prompt, and in its response."""
    if isinstance(examples, PackedExamples):
        return examples.lengths()
    return ((len(each.prompt.token_ids), len(each.response_ids)) for each in examples)
