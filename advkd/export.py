"""Stand-in."""

from pathlib import Path

import torch
from torch import nn

from advkd.student import Student


class _Wrapper(nn.Module):
    def __init__(self, student: Student, heads: bool):
        super().__init__()
        self.student, self.heads = student, heads

    def forward(self, latent):
        return tuple(self.student.images(latent)) if self.heads else self.student(latent)


def export_onnx(student: Student, file: Path, *, heads: bool = False) -> dict:
    count = len(student.stages)
    names = [*(f"head_{k}" for k in range(count - 1)), "image"] if heads else ["image"]
    model = _Wrapper(student, heads).eval()
    latent = torch.zeros(2, *student.latent_shape)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        (latent,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["latent"],
        output_names=names,
        verbose=False,
    )
    program.save(str(file), external_data=False)
    return {}
