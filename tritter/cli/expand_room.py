"""Disk and memory of an expansion, as a dry run tells them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.errors import RequestError
from tritter.expand import Room, check_room, free_bytes, size_text


@dataclass(frozen=True, slots=True)
class RoomTold:
    """What is said of the room that a result takes.

    Args:
        lines: label and text.
        obstacle: why it could not be written; empty: it could.
    """

    lines: tuple[tuple[str, str], ...]
    obstacle: str

    @classmethod
    def of(cls, room: Room, destination: Path) -> "RoomTold":
        free = free_bytes(destination)
        left = "what is free there is not known" if free is None else f"{size_text(free)} free"
        parts = [f"weights {size_text(room.weights)}"]
        parts += [f"state {size_text(room.state)}"] * bool(room.state)
        disk = f"{size_text(room.disk)} ({', '.join(parts)}), written once; {left}"
        memory = (
            f"at most {size_text(room.memory)} to write it, of which {size_text(room.process)} are "
            "the program"
        )
        return cls((("disk", disk), ("memory", memory)), _obstacle(room, destination))


def room_json(room: Room | None, destination: Path) -> dict[str, Any]:
    """Return what a dry run says of the room, in bytes; nothing of a result that was written."""
    if room is None:
        return {}
    return {
        "disk": {
            "needed_bytes": room.disk,
            "weights_bytes": room.weights,
            "state_bytes": room.state,
            "free_bytes": free_bytes(destination),
        },
        "memory_bytes": room.memory,
    }


def _obstacle(room: Room, destination: Path) -> str:
    try:
        check_room(destination, room)
    except RequestError as error:
        return str(error)
    return ""
