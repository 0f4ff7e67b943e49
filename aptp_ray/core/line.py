"""Images that wait for a place in the batch, in the order of their arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from aptp_ray.core.batch import Member
from aptp_ray.core.image_request import Handle


class Line:
    """First come, first served; meanwhile the images at its head are prepared."""

    def __init__(self) -> None:
        self._waiting: deque[Handle] = deque()
        self._asked: set[Handle] = set()  # those whose preparation has begun
        self._members: dict[Handle, Member] = {}  # those that are prepared

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether the first image could take its first step."""
        return bool(self._waiting) and self._waiting[0] in self._members

    def append(self, handle: Handle) -> None:
        """Adds an image at the end."""
        self._waiting.append(handle)

    def remove(self, handle: Handle) -> None:
        """Takes an image out that will not be drawn."""
        self._waiting.remove(handle)
        self._asked.discard(handle)
        self._members.pop(handle, None)

    def unprepared(self, ahead: int) -> list[Handle]:
        """Returns those of the first ``ahead`` images that this has not returned before."""
        new = [h for _, h in zip(range(ahead), self._waiting, strict=False) if h not in self._asked]
        self._asked.update(new)
        return new

    def prepared(self, handle: Handle, member: Member) -> None:
        """Takes note that an image has been prepared."""
        self._members[handle] = member

    def leaving(self, places: int, *, empty: bool) -> Iterator[Member]:
        """Takes prepared images out while there are places; one that needs several is not overtaken.

        Args:
            places: that are free.
            empty: whether nothing else is being drawn; then the first image leaves, however large it is.
        """
        while self.ready:
            handle = self._waiting[0]
            if handle.places > places and not empty:
                return
            places, empty = places - handle.places, False
            member = self._members[handle]
            self.remove(handle)
            yield member
