"""How long the next block should be, from the cost of drafting and verifying so far and the share of drafts kept."""

from __future__ import annotations

from switchkd.errors import UserError

_LARGEST = 16
# The weight of the old mean beside a new measurement: a mean of about five blocks, soon enough after a change.
_MEMORY = 0.8


def check_block_size(block_size: int | str) -> None:
    """Raise UserError unless it is a number of tokens, or "auto"."""
    if block_size != "auto" and (not isinstance(block_size, int) or block_size < 1):
        raise UserError(f"block_size is {block_size!r}; give 1 or more tokens, or auto")


class BlockChooser:
    """Chooses block sizes: a fixed one, or for "auto" the one that keeps the most tokens per second, as measured so far.

    With acceptance a (the share of proposals that stand, given that all before them did), a block of k keeps
    1 + a + ... + a^(k-1) tokens per row, and costs k drafts and one verification. A verification is modeled as a base cost
    plus a cost per token. Timing changes only the block size, never a token.

    With `few_sizes`, for each costs a graph, they are powers of two or the fixed one, and may exceed the room that is left.
    """

    def __init__(self, block_size: int | str, max_new_tokens: int, *, few_sizes: bool = False) -> None:
        self.fixed = block_size if isinstance(block_size, int) else None
        self.few_sizes = few_sizes
        self.largest = min(self.fixed or _LARGEST, max_new_tokens)
        self._draft_seconds: float | None = None
        self._verify_seconds: dict[int, float] = {}
        self._stood = 0.0
        self._fell = 0.0

    def choose(self, room: int) -> int:
        """The size of the next block, at most `room` but with `few_sizes`."""
        room = self.largest if self.few_sizes else room
        if self.fixed is not None:
            return min(self.fixed, room)
        # Base cost and cost per token can be told apart only after two sizes.
        for size in (4, 8):
            if size <= min(room, self.largest) and size not in self._verify_seconds:
                return size
        # A block of one does not measure acceptance, so "auto" would never leave it.
        largest = min(room, self.largest)
        sizes = [size for size in range(min(2, largest), largest + 1) if not self.few_sizes or size.bit_count() == 1]
        return max(sizes, key=self._kept_per_second)

    def learn(
        self, size: int, rows: int, written: int, stopped: int, draft_seconds: float, verify_seconds: float
    ) -> None:
        """Take in the seconds that a block of `size` for `rows` rows cost.

        `written` tokens were kept in all, and `stopped` rows did not reach the end of the block.
        """
        if self.fixed is not None:
            return
        self._draft_seconds = _blend(self._draft_seconds, draft_seconds / size)
        self._verify_seconds[size] = _blend(self._verify_seconds.get(size), verify_seconds)
        # Every token after a row's first means that the proposal before it stood; every stopped row, that one fell.
        self._stood = _MEMORY * self._stood + written - rows
        self._fell = _MEMORY * self._fell + stopped

    def _kept_per_second(self, size: int) -> float:
        tried = self._stood + self._fell
        acceptance = self._stood / tried if tried else 0.5
        kept = sum(acceptance**position for position in range(size))
        return kept / (size * (self._draft_seconds or 0.0) + self._verify_cost(size) + 1e-9)

    def _verify_cost(self, size: int) -> float:
        """Seconds, as measured, or else from the nearest size measured and the slope between the extremes."""
        seen = self._verify_seconds
        if size in seen or not seen:
            return seen.get(size, 0.0)
        low, high = min(seen), max(seen)
        slope = max(0.0, (seen[high] - seen[low]) / (high - low)) if high > low else 0.0
        nearest = min(seen, key=lambda known: abs(known - size))
        return max(seen[nearest] + slope * (size - nearest), 0.0)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
