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
# **How long:** three minutes on two CPU cores the first time (two to three times as long without bfloat16, see the README),
# twenty seconds after that.

# %% tags=["parameters"]
preset: str = "digits"  # the experiment: digits, glyphs, celebahq, cifar10, ...; own: what fits the teacher
recipe: str = "improved"  # the student whose heads are drawn: improved or paper
teacher: str = ""  # another teacher: a folder in diffusers format, or a hub id
images: str = ""  # real images where the preset has none: a folder, or hf:OWNER/NAME
overrides: str = "{}"  # other values for fields of the preset, as JSON: {"trajectories": 64, "batch_sizes": [8]}
peek_steps: int = 200  # training steps before the heads are drawn
sample: int = 2  # index of the trajectory whose states are drawn

# %%
import json

import pandas as pd
import torch

from advkd.data import load_images, seeded_noise
from advkd.discriminator import Discriminator
from advkd.explore import browse_submodules
from advkd.figures import save_table, start_notebook
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
# Submodule $k$ maps the features of submodule $k - 1$ to its own; a *head* (the paper: terminal) turns its features into an
# image. In training this image is compared with the teacher's state $k + 1$ by a *critic* (the paper: discriminator), a
# network that learns to tell the two apart; the paper trains a fresh one for each submodule. The resolution doubles with
# every second submodule,
#
# $$\text{resolution}(k) = 2^{\lfloor k / 2 \rfloor + 3} = 8, 8, 16, 16, \dots, 128, 128, 256.$$
#
# Below, the parameters of each submodule's layers, of its head and of its critic, and what layers and head compute for one
# image, in billions of floating-point operations (GFLOP).

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
# Most of the parameters sit in the late submodules, and nearly a third of all in heads that only training needs: one-step
# sampling runs submodules 0 to 10 and the *last* head. Dropping the other ten changes no pixel, as the assertion below says.

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
# The paper gives 113.7M parameters and 455 MB for its teacher, 2.4M and 9 MB for its student: the same numbers, the first
# size in MB (454.69 MB are 433.63 MiB), the second in MiB.
#
# ## The improved student
#
# The same idea, other proportions: residual submodules, so that a phase *corrects* an image instead of redrawing it; heads
# of a single convolution, so that the denoising happens in the submodules and not in the heads. The digits have 16 px, two
# sizes instead of six, which are spread evenly over the eleven submodules.

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
# Parameters are not time. At 256 px the paper's last submodule and its head alone take 29.4 of the 44.6 GFLOP of an image:
# 128 channels on the largest map. The improved student for `celebahq` moves its width to the small maps and has heads of one
# convolution; with its heads it is no larger than the paper's, and an image takes a tenth of the operations. (The table has
# all heads, the lines below it only the last one.)

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
# block of $b \times b$ pixels *times $b$* is an orthonormal projection: it is $\mathcal N(0, 1)$ exactly. The standard deviation
# of both:

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
# First trajectories of the teacher, thousands of them, from one noise each. Their states, area-averaged to each submodule's
# resolution, are the targets; the improved student's are the images that the teacher expects, $\hat x_0$ (notebook 1).

# %%
model = load_teacher(p, teacher or None)
store = generate_trajectories(model, p, trajectory_dir(model, p))
real = load_images(p, "train")[0] if p.real_share else None

# %% [markdown]
# Then a short training run, so that the heads show something. Notebook 3 explains the losses and trains in earnest.

# %%
peek = p.replace(
    steps=peek_steps, epochs=0.02, ema=0.0
)  # so early, an average of the weights is still the initial ones
folder = run_dir(peek, store).with_name(f"peek-{peek.config_hash}")
_ = finish(train_run(peek, store, folder, images=real))
pipeline = load_run(folder)

# %% [markdown]
# Every head beside the state that it imitates, from the same noise, in one forward pass. In JupyterLab this is a slider through
# the submodules, with a field for the trajectory; in a stored notebook, as on GitHub, a strip with head $k$ under state $k + 1$.

# %%
browse_submodules(pipeline, store, p.target, f"figures/{preset}", "heads", sample)

# %% [markdown]
# The student already draws something like a digit, but another one than the teacher: its sixteen numbers of latent say little
# about which digit the teacher makes of the 256 numbers that they were averaged from. Notebook 3 comes back to this.

# %% [markdown]
# ## Exercises
#
# 1. `Student(image_size_px=16, channels=1, widths=(48, 16), submodules=5)`: how do the resolutions spread? (`resolution` in
#    `advkd/presets.py` is two lines.)
# 2. Swap the residual block for your own: add a function to `BLOCKS` in `advkd/student.py` and its name to the field `block` in
#    `advkd/presets.py`, then run this notebook with `overrides='{"block": "yours"}'`.
# 3. Count the multiplications of the paper's submodule 9 by hand: parameters times pixels. Why is the table's `gflop_layers`
#    about twice that? And does time rank submodules as operations do? (`advkd.deploy.submodule_costs` measures it.)
# 4. Move the slider for ten samples. From which submodule on could you name the teacher's digit, from which the student's?
