# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Quality and ablations
#
# **What you will learn:** whether one step really keeps up with the teacher, over seeds and in a feature space that nobody
# tuned by; what it costs; and which change to the paper's recipe did it.
#
# **What you need:** nothing that is not in the repository: the rows of the full study are committed, and one of them is
# trained again here.
# **How long:** two minutes on two CPU cores; the full study takes hours (last section).

# %% tags=["parameters"]
preset: str = "digits"  # the experiment: digits or glyphs
live_setting: str = "K = 3"  # the setting of the group "submodules" that is trained again, seed 0

# %%
import json
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

from advkd.ablations import ablate, jobs
from advkd.figures import markdown, plot_against, plot_settings, save_figure, start_notebook
from advkd.presets import load_preset
from advkd.quality import SHOWN, Judge

start_notebook()
committed = {name: json.loads(Path(f"figures/{preset}/{name}.json").read_text()) for name in ("quality", "ablations")}
models, rows = committed["quality"]["rows"], committed["ablations"]["rows"]

# %% [markdown]
# ## Quality, over seeds
#
# Everything is measured on weights that nothing was chosen by: recipes were chosen by runs with the training seeds 0 to 2;
# the rows below are students of the seeds 3 to 5, each the last weights of a fixed budget, sampled with three seeds that
# were never used before. All rows have the same number of images, since the Frechet distance falls as images are added.
#
# - **FD** to the train split and to held-out images, in the features of a classifier trained on the train split.
# - **Unseen space**: the same distance in a random network, which no recipe was ever chosen by.
# - **Recall, coverage**: how much of the real images the samples reach; **precision, density**: how real they look.
# - **Nearer to train**: the share of samples nearer to a training image than to any of equally many held-out images (0.5 is
#   neutral). **Near-copies**: the share nearer to a training image than 1 % of the held-out images are.

# %% tags=["nbval-ignore-output"]
order = {("student", "improved"): 0, ("student", "paper"): 1, ("teacher", None): 2, ("real", None): 3}
models.sort(key=lambda row: (order[row["model"], row["recipe"]], row.get("steps", 0)))
Markdown(markdown(models, SHOWN))

# %% [markdown]
# Does every class appear? The share of each, over its share among real images, by the same classifier:

# %% tags=["nbval-ignore-output"]
factors = [field.removeprefix("rarest_") for field in models[0] if field.startswith("rarest_") and field[-3:] != "_sd"]
rarest = {"model": "model", "recipe": "recipe", "sampler": "sampler", "steps": "steps"}
rarest |= {f"rarest_{factor}": f"rarest {factor}" for factor in factors}
Markdown(markdown([row for row in models if row["model"] != "real"], rarest))

# %% [markdown]
# ## Quality against cost
#
# Time is that of one image at a time in float32 on the machine of the protocol; the dotted line is the distance of held-out
# real images to the train split. Beside the student of the recipe, whose budget is the largest, are students of other sizes
# with the budget of the ablations.

# %%
(real,) = (row for row in models if row["model"] == "real")
points = [row for row in models if row["model"] != "real"]
for row in points:
    row["name"] = f"{row['sampler'].upper()}-{row['steps']}" if row["model"] == "teacher" else f"{row['recipe']} recipe"
sizes = pd.DataFrame([row for row in rows if row["group"] == "size"]).groupby("parameters")[["fd_train", "fd_heldout"]]
small = sizes.mean().join(sizes.std().add_suffix("_sd")).reset_index()
small = [row | {"recipe": "improved", "marker": "s"} for row in small.to_dict("records")]

# %%
for field, heading in (("parameters", "parameters"), ("ms_per_image", "ms per image")):
    shown = points + small if field == "parameters" else points
    ax = plot_against(shown, field, "fd_train", (heading, "Frechet distance to the train split"))
    ax.axhline(real["fd_train"], ls=":", color="0.3", lw=1)
    _ = save_figure(ax.figure, f"figures/{preset}", f"pareto_{field}")

# %% [markdown]
# ## The waterfall: from the paper's recipe to ours
#
# One change at a time, in the order in which a reader would make them; every row is trained on the same number of images.

# %%
level = {"held-out real images": real["fd_train"]}
figure = plot_settings(rows, ["waterfall"], "fd_train", "Frechet distance to the train split", level)
_ = save_figure(figure, f"figures/{preset}", "waterfall")

# %% [markdown]
# ## One change at a time
#
# Every panel changes one thing in our recipe, at the same budget. The dashed line is the recipe itself.

# %%
base = pd.DataFrame([row for row in rows if (row["group"], row["setting"]) == ("losses", "both")])
level = {"held-out real images": real["fd_train"], "our recipe at this budget": base.fd_train.mean()}
groups = list(dict.fromkeys(row["group"] for row in rows if row["group"] != "waterfall"))
figure = plot_settings(rows, groups, "fd_train", "Frechet distance to the train split", level)
_ = save_figure(figure, f"figures/{preset}", "ablations")

# %% [markdown]
# ## The price: recall
#
# All of these trainings in one plane. What lowers the distance tends to lower the recall too: the student makes better images
# of fewer kinds.

# %%
means = pd.DataFrame([row for row in rows if "error" not in row]).groupby(["group", "setting"])
cloud = means[["fd_train", "recall", "pull_to_train"]].mean().reset_index()
cloud = [row | {"recipe": "improved", "marker": "."} for row in cloud.to_dict("records")]
marks = [row for row in points if row["model"] == "student" or row["steps"] in (50, 100, 1000)]
for field, heading in (("recall", "recall"), ("pull_to_train", "share nearer to train than to held-out images")):
    near = [row for row in cloud + marks if row["fd_train"] < 20]
    ax = plot_against(near, "fd_train", field, ("Frechet distance to the train split", heading), log=False)
    ax.set_xscale("log")
    _ = save_figure(ax.figure, f"figures/{preset}", f"trade_off_{field}")

# %% [markdown]
# ## One row again, now
#
# The rows above were committed by whoever ran the study. This trains one of them from scratch (or reads its run, where it
# was trained before) and puts the committed row beside it. Adversarial training is chaotic: another processor rounds
# differently and ends at another, equally good student, so the numbers agree in size and not in digits.

# %% tags=["nbval-ignore-output"]
(job,) = (job for job in jobs(preset) if (job.group, job.setting, job.preset.seed) == ("submodules", live_setting, 0))
(again,) = ablate(Judge(load_preset(preset)), [job])
same = [row for row in rows if all(row[key] == again[key] for key in ("group", "setting", "seed"))]
compared = [{"row": "committed"} | same[0], {"row": "now"} | again]
fields = ["row", "group", "setting", "seed", "parameters", "train_seconds", "fd_train", "fd_heldout", "recall"]
Markdown(markdown(compared, {field: field for field in fields}))

# %%
assert again["parameters"] == same[0]["parameters"] and again["preset_hash"] == same[0]["preset_hash"]
assert same[0]["fd_train"] / 2 < again["fd_train"] < same[0]["fd_train"] * 2, "the committed row cannot be made again"
