# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. The submodules
#
# **What you will learn:** how eleven denoising phases become eleven small submodules, where the paper's 2,429,937
# parameters sit, why 1,721,235 of them are enough once training is over, and what the improved student changes.
#
# **What you need:** the trajectories of notebook 1's teacher; this notebook makes them if they are missing.
# **How long:** three minutes on two CPU cores the first time, twenty seconds after that.

# %% tags=["parameters"]
preset: str = "digits"  # the experiment: digits, glyphs, celebahq, cifar10, ...; own: what fits the teacher
recipe: str = "improved"  # the student whose heads are drawn: improved or paper
teacher: str = ""  # another teacher: a folder in diffusers format, or a hub id
images: str = ""  # real images where the preset has none: a folder, or hf:OWNER/NAME
overrides: str = "{}"  # other values for fields of the preset, as JSON: {"trajectories": 64, "batch_sizes": [8]}
peek_steps: int = 200  # training steps before the heads are drawn

# %%
import json

import pandas as pd
import torch

from advkd.data import load_images, seeded_noise
from advkd.discriminator import Discriminator
from advkd.figures import save_figure, save_table, show_strip, start_notebook
from advkd.presets import load_preset
from advkd.run import finish, load_run, run_dir, train_run
from advkd.student import Student, count_parameters, gflop_per_image, gflop_per_submodule
from advkd.teacher import find_preset, load_teacher
from advkd.trajectories import generate_trajectories, trajectory_dir

start_notebook()
p = find_preset(preset, recipe, teacher, images=images, **json.loads(overrides))

# %% [markdown]
# ## The paper's student
#
# Submodule $k$ maps the features of submodule $k - 1$ to its own; a *terminal* turns its features into an image, so that a
# critic can compare it with the teacher's state $k + 1$. The resolution doubles with every second submodule,
#
# $$\text{resolution}(k) = 2^{\lfloor k / 2 \rfloor + 3} = 8, 8, 16, 16, \dots, 128, 128, 256.$$

# %%
paper = load_preset("celebahq", "paper")
student = Student.from_preset(paper).eval()
gflop = gflop_per_submodule(student)
rows = [
    {
        "submodule": k,
        "resolution_px": paper.resolution(k),
        "layers": count_parameters(stage.layers),
        "terminal": count_parameters(stage.terminal),
        "critic": count_parameters(Discriminator(paper.resolution(k))),
        "gflop_layers": round(gflop[k][0], 3),
        "gflop_terminal": round(gflop[k][1], 3),
    }
    for k, stage in enumerate(student.stages)
]
pd.DataFrame(rows).set_index("submodule")

# %%
counted = {"parameters": "float32, 4 bytes a parameter", "gflop": "one image, two for a multiplication and its sum"}
_ = save_table(rows, counted, f"figures/{preset}", "paper_submodules")

# %% [markdown]
# Most of the weight sits in the late submodules, and nearly a third of it in heads that only training needs: one-step
# sampling runs submodules 0 to 10 and the *last* terminal. Dropping the other ten changes no pixel.

# %%
generator = student.generator()
sizes = {
    "teacher (paper)": 113_673_219,
    "student with its heads": count_parameters(student),
    "deployable generator": count_parameters(generator),
}
pd.DataFrame({"parameters": sizes, "MiB (float32)": {k: round(n * 4 / 2**20, 2) for k, n in sizes.items()}})

# %%
assert count_parameters(student) == 2_429_937 and count_parameters(generator) == 1_721_235
latent = torch.randn(2, 3, 4, 4)
assert torch.equal(student.eval()(latent), generator.eval()(latent))

# %% [markdown]
# The paper gives 113.7M parameters and 455 MB (454.69 MB) for its teacher, 2.4M and 9 MB (9.27 MiB) for its student.
#
# ## The improved student
#
# The same idea, other proportions: residual submodules, so that a phase *corrects* an image instead of redrawing it; heads
# of a single convolution, so that the denoising happens in the submodules and not in the heads.

# %%
ours = Student.from_preset(p)
shapes, features = [], torch.randn(2, p.channels, 4, 4)
for k, stage in enumerate(ours.eval().stages):
    features = stage.layers(features)
    counts = {"layers": count_parameters(stage.layers), "terminal": count_parameters(stage.terminal)}
    shapes.append({"submodule": k, "features": "x".join(map(str, features.shape[1:])), **counts})
_ = save_table(shapes, {"recipe": recipe, "dtype": "float32"}, f"figures/{preset}", "submodules")
pd.DataFrame(shapes).set_index("submodule")

# %%
print(f"{count_parameters(ours):,} parameters, {count_parameters(ours.generator()):,} of them deployable")

# %% [markdown]
# ### At the paper's size
#
# Parameters are not time. At 256 px the paper's last submodule and its terminal alone take two thirds of the
# operations: 128 channels on the largest map. The improved student for `celebahq` moves its width to the small maps and
# has a head of one convolution; with its heads it is no larger than the paper's.

# %%
large = Student.from_preset(load_preset("celebahq")).eval()
costs = pd.DataFrame({"paper": map(sum, gflop), "improved": map(sum, gflop_per_submodule(large))}).round(2)
costs.index.name = "GFLOP of submodule and head"
costs.T

# %%
for name, big in (("paper", student), ("improved", large)):
    print(f"{name}: {count_parameters(big):,} parameters, {gflop_per_image(big):.1f} GFLOP an image (deployable)")

# %% [markdown]
# ## The latent
#
# The student's input is state 0 as a $4 \times 4$ map. The published code saves the noise as a clamped 8-bit PNG and shrinks
# it, which averages the noise away; sampling then feeds $\mathcal N(0, 1)$, which the student has never seen. The mean of a
# block of $b \times b$ pixels *times $b$* is an orthonormal projection: it is $\mathcal N(0, 1)$ exactly.

# %%
from advkd.data import make_latent

noise = seeded_noise(range(max(40, 2000 * 256 // p.image_size_px**2)), p.image_shape, seed=0)
spread = {how: round(make_latent(noise, how).std().item(), 2) for how in ("shrink8bit", "block-mean")}
spread

# %% [markdown]
# At 16 px the published latent has a standard deviation of 0.13; at the paper's 256 px it is sixteen times smaller.
#
# ## Eleven heads
#
# First the teacher's states, area-averaged to each submodule's resolution: these are the targets.

# %%
model = load_teacher(p, teacher or None)
store = generate_trajectories(model, p, trajectory_dir(model, p))
real = load_images(p, "train")[0] if p.real_share else None

# %% [markdown]
# Then the student's heads after a short training run of a few seconds. Notebook 3 trains in earnest.

# %%
peek = p.replace(steps=peek_steps, epochs=0.02, ema=0.0)  # so early, an average still shows the initial weights
folder = run_dir(peek, store).with_name(f"peek-{peek.config_hash}")
_ = finish(train_run(peek, store, folder, images=real))
pipeline = load_run(folder)

# %%
index = [2]
heads = [pipeline(noise=noise[index], stage=k, output_type="pt").images[0] for k in range(p.submodules)]
targets = [store.targets(k, p.target, torch.tensor(index))[0] for k in range(p.submodules)]
labels = [f"k = {k}\n{size} px" for k, size in enumerate(p.resolutions)]
figure = show_strip({"teacher": targets, "student": heads}, labels, p.image_size_px)
_ = save_figure(figure, f"figures/{preset}", "heads")

# %% [markdown]
# ## Exercises
#
# 1. `Student(widths=(48, 16), submodules=5, ...)`: how do the resolutions spread? (`resolution` in `advkd/presets.py` is
#    three lines.)
# 2. Swap the residual block for your own: add a function to `BLOCKS` in `advkd/student.py` and name it in the preset.
# 3. Which submodule costs most time at 256 px? Count multiplications: parameters times pixels.
