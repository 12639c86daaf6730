"""Where things run: the device, its precision, and the processes that a launcher started side by side."""

import os
import platform
from collections.abc import Iterable

import psutil
import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn

from advkd.presets import UserError


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the first of cuda, mps, cpu that exists.

    Under a launcher, which the processes join here, "auto" and "cuda" are the GPU that it gave this process. Raises UserError
    for a device that does not exist, and for a numbered one under a launcher.
    """
    there = {f"cuda:{i}": True for i in range(torch.cuda.device_count())}
    there = {"cuda": bool(there)} | there | {"mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there.get(name):
        raise UserError(
            f"device {name!r} is not available here; available: {', '.join(k for k, v in there.items() if v)}"
        )
    if processes()[1] == 1:
        return torch.device(name)
    if name not in ("cuda", "cpu"):
        raise UserError(f"device is {name!r}, but under a launcher each process has its own: auto, cuda or cpu")
    return PartialState(cpu=name == "cpu").device


def label(device: torch.device) -> str:
    """A device's name in `run.json` and result rows: of a GPU its model too, and torch's version, which may differ from the
    CPU's."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, torch {torch.__version__.partition('+')[0]})"


def precision(asked: str, device: torch.device) -> str:
    """The dtype to compute in there, `asked` or, in place of "bfloat16" on a CPU without instructions for it, "float32".

    Emulated on a Zen 3 (AVX2, as many laptops have), a training step of the digits took ten times as long, the teacher thirty.
    """
    emulated = asked == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16()
    return "float32" if emulated else asked


def cpu_has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16: AVX-512 BF16 or AMX; elsewhere, what torch makes of it."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or this process' share of that of the machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the program does not wait for; `x` itself where it is there."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and x.device.type == "cpu"
        else x.to(device)
    )


def processes() -> tuple[int, int]:
    """This process' rank and how many there are, as `accelerate launch` and torchrun say; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class _Sum(torch.autograd.Function):
    """The sum over all processes. What each gives counts in every process' result, so its derivative is a sum too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def all_mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, differentiable as often as needed; `x` itself where there is one."""
    _, count = processes()
    return x if count == 1 else _Sum.apply(x) / count


def batch_variance(x: Tensor) -> Tensor:
    """Variance of `(b, n)` along the batch, of all processes together: `(n,)`."""
    if processes()[1] == 1:
        return x.var(dim=0, correction=0)
    return all_mean((x - all_mean(x.mean(0))).square().mean(0))


def batch_softmax(x: Tensor) -> Tensor:
    """Softmax of `(b,)` along the batch of all processes together, times their number: one for a mean over them."""
    rank, count = processes()
    if count == 1:
        return x.softmax(0)
    gathered = torch.empty(count * len(x), dtype=x.dtype, device=x.device)
    distributed.all_gather_into_tensor(gathered, x.detach().contiguous())
    return count * gathered.softmax(0).view(count, -1)[rank]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean gradient, in one message: a student of a few million parameters needs no more."""
    _, count = processes()
    if count == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients]) / count
    distributed.all_reduce(message)
    for gradient, mean in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by mean and variance over the batches of all processes.

    What torch.nn.SyncBatchNorm is, but differentiable twice, as gradient penalties want it, and on the CPU too.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` `(b, c, ...)`."""
        if not self.training:
            return super().forward(x)
        over, values = [0, *range(2, x.ndim)], x.float()
        mean = all_mean(values.mean(over, keepdim=True))
        variance = all_mean((values - mean).square().mean(over, keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * processes()[1]
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        weight, bias = (p.view(mean.shape) for p in (self.weight, self.bias))
        return ((values - mean) * (variance + self.eps).rsqrt() * weight + bias).to(x.dtype)


def with_global_batches(module: nn.Module) -> nn.Module:
    """The module, its batch normalisations for all processes together; as it is where there is one process."""
    if processes()[1] == 1:
        return module
    for name, child in list(module.named_modules()):
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            changed = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
            changed.load_state_dict(child.state_dict())
            module.set_submodule(name, changed.to(child.weight.device).train(child.training))
    return module
