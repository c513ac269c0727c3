"""How long the next block should be, from what drafting and verifying have cost so far and how much was kept."""

from __future__ import annotations

_LARGEST = 16
_MEMORY = 0.8  # How much of the old mean a new measurement leaves.


class BlockChooser:
    """Chooses block sizes: a fixed one, or ("auto") the one with the most kept tokens a second by what was measured.

    With acceptance a (the share of proposals that stand, given that all before them did), a block of k keeps
    1 + a + ... + a^(k-1) tokens a row, and costs k drafts and one verification. A verification's cost is taken as a base
    and a part for each token, from the blocks seen. Timing only ever changes the block size, never a token.
    """

    def __init__(self, block_size: int | str, max_new_tokens: int) -> None:
        self.fixed = block_size if isinstance(block_size, int) else None
        self.largest = min(self.fixed or _LARGEST, max_new_tokens)
        self._draft_seconds: float | None = None
        self._verify_seconds: dict[int, float] = {}
        self._stood = 0.0
        self._fell = 0.0

    def choose(self, room: int) -> int:
        """The size of the next block, at most `room`."""
        if self.fixed is not None:
            return min(self.fixed, room)
        # Two sizes have to be seen before a base and a slope can be told apart.
        for size in (4, 8):
            if size <= min(room, self.largest) and size not in self._verify_seconds:
                return size
        # A block of one would say nothing of acceptance, and so never be left again.
        largest = min(room, self.largest)
        return max(range(min(2, largest), largest + 1), key=self._kept_per_second)

    def learn(
        self, size: int, rows: int, written: int, stopped: int, draft_seconds: float, verify_seconds: float
    ) -> None:
        """Take in what a block of `size` for `rows` rows cost.

        `written` tokens were kept in all, and `stopped` rows did not get to the end of the block.
        """
        if self.fixed is not None:
            return
        self._draft_seconds = _blend(self._draft_seconds, draft_seconds / size)
        self._verify_seconds[size] = _blend(self._verify_seconds.get(size), verify_seconds)
        # Each token after a row's first had its predecessor stand; a row that stopped is one that did not.
        self._stood = _MEMORY * self._stood + written - rows
        self._fell = _MEMORY * self._fell + stopped

    def _kept_per_second(self, size: int) -> float:
        tried = self._stood + self._fell
        acceptance = self._stood / tried if tried else 0.5
        kept = sum(acceptance**position for position in range(size))
        return kept / (size * (self._draft_seconds or 0.0) + self._verify_cost(size) + 1e-9)

    def _verify_cost(self, size: int) -> float:
        seen = self._verify_seconds
        if size in seen or not seen:
            return seen.get(size, 0.0)
        low, high = min(seen), max(seen)
        slope = max(0.0, (seen[high] - seen[low]) / (high - low)) if high > low else 0.0
        nearest = min(seen, key=lambda known: abs(known - size))
        return max(seen[nearest] + slope * (size - nearest), 0.0)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
