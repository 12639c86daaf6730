"""Where things run: the device, and the processes that a launcher started side by side."""

import os

import torch

from advkd.presets import UserError


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the first of cuda, mps, cpu that exists. Raises UserError if `name` does not."""
    there = {f"cuda:{i}": True for i in range(torch.cuda.device_count())}
    there = {"cuda": bool(there)} | there | {"mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there.get(name):
        raise UserError(
            f"device {name!r} is not available here; available: {', '.join(k for k, v in there.items() if v)}"
        )
    return torch.device(name)


def processes() -> tuple[int, int]:
    """This process' rank and how many there are, as `accelerate launch` and torchrun say; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
