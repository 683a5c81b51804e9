"""A bounded buffer of batches that are used more than once."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ReplayBuffer(Generic[T]):
    """Keeps the newest ``capacity`` items and gives the least used of them, the newest where several are used alike.

    That is the order of asynchronous decoupled greedy learning (Belilovsky et al., arXiv 1901.08164): what is new comes
    first, and a reader that is faster than the writer goes through what it has evenly. Not safe to share between
    threads by itself.

    Raises:
        ValueError: ``capacity`` below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; allowed: 1 or more")
        self.capacity = capacity
        self._items: list[T] = []  # from old to new
        self._uses: list[int] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> T | None:
        """The oldest item, which makes room in a full buffer, or None."""
        oldest = None
        if len(self._items) == self.capacity:
            oldest = self._items.pop(0)
            del self._uses[0]
        self._items.append(item)
        self._uses.append(0)
        return oldest

    def sample(self) -> T:
        """The newest of the least used items; counts as a use.

        Raises:
            IndexError: the buffer is empty.
        """
        if not self._items:
            raise IndexError("the buffer is empty")
        index = min(range(len(self)), key=lambda i: (self._uses[i], -i))
        self._uses[index] += 1
        return self._items[index]
