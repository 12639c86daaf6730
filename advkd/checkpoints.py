"""Checkpoints of a training: weights, moments and where it stood, in one safetensors file without pickle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from advkd.files import differences, fingerprint, first_line, write_atomic
from advkd.presets import UserError

CHECKPOINT_EVERY = 500  # steps of a training
AT_LEAST, PARTS = 50, 10  # of a short one, a tenth of its steps, but no fewer than 50
ABOUT = "advkd"  # what a checkpoint says beside its tensors


def save_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], state: dict
) -> None:
    """Write weights, optimizer moments and the JSON-able `state` to one safetensors file with its checksum, atomically."""
    tensors, groups = {}, {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": _packed(value) for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        saved = optimizer.state_dict()
        groups[name] = saved["param_groups"]
        for index, moments in saved["state"].items():
            tensors |= {f"{name}/{index}/{key}": _packed(torch.as_tensor(value)) for key, value in moments.items()}
    about = {"state": state, "groups": groups, "checksum": fingerprint(tensors, json.dumps([state, groups]))}
    # Under one name, since safetensors writes several in another order every time.
    write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, {ABOUT: json.dumps(about)}))


def checkpoint_due(step: int, total: int) -> bool:
    """Whether a training of `total` steps writes a checkpoint after this one (from 1): ten times or every 500 steps, whichever
    is sooner, but at least 50 apart; and at the end."""
    return step == total or step % min(CHECKPOINT_EVERY, max(AT_LEAST, total // PARTS)) == 0


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own in row-major order, as safetensors wants it (channels_last and shared tensors are refused)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def read_checkpoint_state(path: Path) -> dict:
    """The JSON part of a checkpoint. Raises UserError when the file is not one."""
    with _reading(path) as file:
        return json.loads(file.metadata()[ABOUT])["state"]


@contextmanager
def _reading(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # safetensors and JSON raise many kinds for what is no checkpoint
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}); remove it to start afresh"
        ) from error


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restore what `save_checkpoint` wrote into `modules` and `optimizers`; returns its `state`.

    Raises UserError, and changes nothing, when the file is none or is damaged.
    """
    with _reading(path) as file:
        about = json.loads(file.metadata()[ABOUT])
        state, groups = about["state"], about["groups"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is no dict
        if fingerprint(tensors, json.dumps([state, groups])) != about["checksum"]:
            raise ValueError("its checksum differs: it is damaged")
        for name, module in modules.items():
            there = {
                full.removeprefix(f"{name}/"): list(x.shape)
                for full, x in tensors.items()
                if full.startswith(f"{name}/")
            }
            if different := differences(there, {key: list(x.shape) for key, x in module.state_dict().items()}):
                raise ValueError(f"it holds another {name}: {different[0]}")
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    for name, optimizer in optimizers.items():
        moments: dict[int, dict] = {}
        for full, tensor in tensors.items():
            if full.startswith(f"{name}/"):
                _, index, key = full.split("/")
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": groups[name]})
        for parameter, restored in optimizer.state.items():
            for key, value in restored.items():
                if value.shape == parameter.shape:  # fused optimizers need the parameter's memory layout
                    restored[key] = torch.empty_like(parameter).copy_(value)
    return state
