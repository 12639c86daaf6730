# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. On a small device
#
# **What you will learn:** how to hand the student to a device that has no torch; what 8 bits a number save and what they
# cost; what an image takes in time, memory and energy, of which submodule, and beside the teacher.
#
# **What you need:** the student of notebook 3 (trained here if it is missing). The rows at the paper's size are committed,
# since measuring them takes twenty minutes of an idle machine (last section).
# **How long:** a minute on two CPU cores, once the student is there.
#
# The paper promises a model for devices with few resources and reports its parameters. Parameters are not what such a
# device runs out of: it runs out of time, memory and battery. So these are measured.

# %% tags=["parameters"]
preset: str = "digits"  # the experiment: digits or glyphs
count: int = 5000  # images that the files are compared by

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

from advkd.data import load_images, make_latent, reference_images, seeded_noise
from advkd.deploy import SHOWN, SUBMODULES, SUMMARY, activations_mb, in_strips, submodule_costs, summary, targets
from advkd.evaluation import Metric, milliseconds, sample_student
from advkd.export import INPUT, export_onnx, open_session, quantize_onnx, sample_onnx

# %%
from advkd.figures import (
    IMPROVED_RECIPE,
    PAPER_RECIPE,
    markdown,
    plot_costs,
    plot_deploy,
    save_figure,
    save_table,
    show_images,
    start_notebook,
)
from advkd.presets import load_preset
from advkd.run import finish, load_run, run_dir, train_run
from advkd.student import Student, count_parameters
from advkd.teacher import load_teacher
from advkd.trajectories import generate_trajectories, trajectory_dir

start_notebook()
improved = load_preset(preset)

# %%
model = load_teacher(improved)
store = generate_trajectories(model, improved, trajectory_dir(model, improved))
folder = run_dir(improved, store)
_ = finish(train_run(improved, store, folder, images=load_images(improved, "train")[0]))
pipeline = load_run(folder)

# %% [markdown]
# ## A file without torch
#
# One-step sampling needs the submodules and the last head. `export_onnx` writes them as ONNX with every batch normalisation
# folded into the convolution before it: $\gamma (Wx + b - \mu) / \sigma + \beta$ is a convolution with other weights. Then it runs
# the file in ONNX Runtime and refuses to write one whose images differ from torch's by more than $10^{-4}$.

# %%
files = {"float32": folder / "student.onnx", "int8": folder / "student.int8.onnx"}
made = {"float32": export_onnx(pipeline.student, files["float32"])}
assert made["float32"]["max_difference"] < 1e-4

# %% [markdown]
# Eight bits: each output channel of a convolution has a scale for its weights, each activation one that is calibrated on
# latents that nothing is measured by. Weights are given 7 of the 8 bits: processors without VNNI (instructions made for sums of
# 8-bit products) add two products of 8 and 8 bits in 16, which overflow.

# %%
made["int8"] = quantize_onnx(files["float32"], files["int8"])

# %% [markdown]
# ### Does anybody see it?
#
# Above float32, below int8, from the same noise.

# %%
latents = make_latent(seeded_noise(range(count), improved.image_shape, seed=1), improved.latent)
samples = {"torch float32": sample_student(pipeline, count, seed=1)}
samples |= {f"onnx {bits}": sample_onnx(file, latents) for bits, file in files.items()}
figure, axes = plt.subplots(2, 1, figsize=(8, 1.5), layout="constrained")
for ax, name in zip(axes, ("onnx float32", "onnx int8"), strict=True):
    show_images(ax, samples[name][:20], 20)
_ = save_figure(figure, f"figures/{preset}", "int8")

# %% [markdown]
# ### What does the distance say?
#
# The distance `fd` of all images to the train split (notebook 4), the file's size, and one image's time on one thread, here and now.


# %%
def latency(call):
    with torch.inference_mode():
        return milliseconds(call, repeats=100)


metric, train = Metric(preset), reference_images(improved, "train")[0]
generator, threads = pipeline.student.generator().eval(), torch.get_num_threads()
generator.to(memory_format=torch.channels_last)
sessions = {bits: open_session(file, threads=1) for bits, file in files.items()}
torch.set_num_threads(1)
ms = {"torch float32": latency(lambda: generator(latents[:1]))}
for bits, session in sessions.items():
    ms[f"onnx {bits}"] = latency(lambda session=session: session.run(None, {INPUT: latents[:1].numpy()}))
torch.set_num_threads(threads)

# %%
sizes = {"torch float32": count_parameters(generator) * 4e-6}
sizes |= {f"onnx {bits}": file.stat().st_size / 1e6 for bits, file in files.items()}
rows = [
    {"variant": name, "file_mb": sizes[name], "ms_per_image": ms[name]} | metric.compare(images, train)
    for name, images in samples.items()
]
about = metric.protocol() | {"images": count, "sampling_seed": 1, "threads": 1, "training_seed": improved.seed}
_ = save_table(rows, about, f"figures/{preset}", "int8")

# %% tags=["nbval-ignore-output"]
Markdown(markdown(rows, {field: field for field in rows[0]}))

# %%
_, exact, small = rows
assert small["file_mb"] <= 0.35 * exact["file_mb"] and small["fd"] <= 1.15 * exact["fd"]

# %% [markdown]
# ## Ten lines for the device
#
# `pip install numpy onnxruntime` is all that this needs, and a test runs it in an environment that has nothing else. The
# README has it too.
#
# ```python
# import numpy as np
# import onnxruntime
#
# session = onnxruntime.InferenceSession("student.onnx")
# shape = session.get_inputs()[0].shape[1:]  # of one latent
# latents = np.random.default_rng(0).standard_normal((16, *shape), dtype=np.float32)
# (images,) = session.run(["image"], {"latent": latents})  # (16, channels, height, width) in [-1, 1]
# images = ((images + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
# ```
#
# The same file, with all heads (`python -m advkd export STUDENT --heads`), draws in a browser: `python -m advkd demo STUDENT`.
#
# ## At the paper's size
#
# 256 px, random weights (time and memory do not depend on them), the teacher beside them: one measured step, times 50 and
# 1000. Each row comes from a process of its own, all from one machine (`python -m advkd deploy`); the students' rows of one image at a time come from a second call, half an hour after the teacher's.

# %%
deployed = json.loads(Path("figures/deploy.json").read_text())
_ = save_table(summary(deployed["rows"]), deployed["protocol"], f"figures/{preset}", "deploy_summary", SUMMARY)
_ = save_figure(plot_deploy(deployed["rows"]), f"figures/{preset}", "deploy")

# %% tags=["nbval-ignore-output"]
Markdown(markdown([row for row in deployed["rows"] if row["batch"] == 1], SHOWN))

# %% [markdown]
# Many images at a time, on all threads. Nothing gains by it: one image of this size keeps all threads busy, and torch is slower
# an image than one by one.

# %% tags=["nbval-ignore-output"]
Markdown(markdown([row for row in deployed["rows"] if row["batch"] > 1], SHOWN))

# %% [markdown]
# What was asked before anything was measured:

# %% tags=["nbval-ignore-output"]
verdicts = targets(deployed["rows"])
_ = save_table(verdicts, deployed["protocol"], f"figures/{preset}", "deploy_targets")
Markdown(markdown(verdicts, {field: field for field in verdicts[0]}))

# %% [markdown]
# ## Which submodule takes it?
#
# At 256 px, one image, float32, measured here and now. Operations grow with the area, so the paper's eleven equal phases are
# not equal at all: its last one, at 256 px, takes two thirds of them. The improved student is narrow where the images are
# large: a quarter of its operations are the last submodule's.

# %%
costs = [row for recipe in ("paper", "improved") for row in submodule_costs(load_preset("celebahq", recipe))]
_ = save_figure(plot_costs(costs), f"figures/{preset}", "submodule_costs")

# %% tags=["nbval-ignore-output"]
_ = save_table(
    costs,
    {"preset": "celebahq", "threads": threads, "weights": "random"},
    f"figures/{preset}",
    "submodule_costs",
    SUBMODULES,
)
Markdown(markdown(costs, SUBMODULES))

# %% [markdown]
# ## Less memory: the last image in strips
#
# The peak is the last submodule's, whose maps have all of the 256 px. Nothing forces it to be computed at once: a convolution
# of 3 x 3 reaches one row, so `in_strips` computes the submodules of the full size strip by strip, with a few rows more on
# either side, and gets the same numbers. How much lies in activations at once:

# %%
strips, students = (1, 2, 4, 8, 16), {}
for recipe in ("paper", "improved"):
    students[recipe] = Student.from_preset(load_preset("celebahq", recipe)).generator().eval()
peaks = {recipe: [activations_mb(student, n) for n in strips] for recipe, student in students.items()}
noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    apart = max((in_strips(s, noise) - s(noise)).abs().max().item() for s in students.values())
assert apart < 1e-5

# %%
figure, ax = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for recipe, colour in (("paper", PAPER_RECIPE), ("improved", IMPROVED_RECIPE)):
    ax.plot(strips, peaks[recipe], "o-", color=colour, label=f"{recipe} recipe")
    ax.annotate(
        f"{peaks[recipe][0]:.0f} to {min(peaks[recipe]):.0f} MB",
        (strips[2], peaks[recipe][2]),
        (0, 8),
        textcoords="offset points",
        fontsize=8,
    )
ax.set(xscale="log", yscale="log", xticks=strips, xticklabels=strips, xlabel="strips", ylabel="activations at once, MB")
ax.legend(fontsize=8, frameon=False)
_ = save_figure(figure, f"figures/{preset}", "strips")

# %% [markdown]
# Beyond a few strips the submodule before, at 128 px, is the peak, and more strips only compute more rows twice.
#
# ## What was learned
#
# - **Parameters do not tell the time.** The improved student has a third more of them than the paper's and a tenth of the
#   operations. It is faster by about that in every library, since the paper's has 128 channels where the image is largest.
# - **The library and eight bits count once more.** On the processor above, at 256 px and on one thread, ONNX Runtime takes 13 to 21 % off
#   torch's time, and 8 bits a third off that. On one with VNNI or bfloat16 the order may be another: measure on yours.
# - **Batch normalisation is free**, folded into the convolutions; the ten training-time heads too, left out.
# - **Memory is the last submodule's.** Strips halve the activations and more, for 4 to 12 % of the time on one thread; what is
#   left of the resident memory is weights and the library's own.
# - **What did not help**: batches.
#
# ## Measure it again
#
# ```sh
# python -m advkd deploy                  # all rows, twenty minutes of an idle machine
# python -m advkd deploy --only trained   # the digits' student alone
# ```
#
# ## Exercises
#
# 1. Export a student with `latent="full"` (notebook 3 with `overrides='{"latent": "full"}'` trains it, `advkd export` writes it).
#    How much does its larger input cost?
# 2. `quantize_onnx` calibrates on latents N(0, 1), or on those that it is given (`latents`). What happens to the distance with
#    eight of them, and with latents twice as large?
# 3. The improved widths at 256 px are 160, 128, 96, 48, 24, 16. Find widths with the same parameters and half the time. What does
#    `submodule_costs` say about the price of the first submodules?
