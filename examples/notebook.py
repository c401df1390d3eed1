# %% [markdown]
# # From images to masks
#
# Sample images, a training, its report, and masks for new images, in five cells.
# `pip install 'fastunet[train]' jupyterlab`; this script becomes a notebook by `jupytext --to notebook notebook.py`.
# With your own data, point `data` to a folder with `images/` and `masks/` and leave the second cell out.

# %% tags=["parameters"]
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import fastunet
from fastunet.data.synthetic import write_dataset
from fastunet.train.config import TrainConfig
from fastunet.train.loop import train

count, size = 24, 256  # images to draw, and their side in pixels
minutes, features = 2.0, (16, 32, 64, 128)  # limit of the training, and channels of each level
folder = Path(tempfile.mkdtemp(prefix="fastunet-"))
data, run = folder / "data", folder / "run"

# %%
write_dataset(data, count, size)
figure, axes = plt.subplots(2, 4, figsize=(10, 5), layout="constrained")
for axis, file in zip(axes.flat, sorted(data.glob("*/cell_00[0-3].png")), strict=True):
    axis.imshow(plt.imread(file), cmap="gray")
    axis.set_title(f"{file.parent.name}/{file.name}", fontsize=9)
    axis.axis("off")

# %%
metrics = train(data, run, TrainConfig(steps=600, max_minutes=minutes, crop=min(128, size), features=features))
print(f"Dice of the cells on {len(metrics['images'])} images kept out of training: {metrics['mean_dice']:.3f}")

# %%
report = plt.imread(run / "report.png")  # report.html has more
plt.figure(figsize=(10, 10 * report.shape[0] / report.shape[1]), layout="constrained")
plt.imshow(report)
plt.axis("off")

# %%
write_dataset(folder / "new", 2, size, seed=1)
segmenter = fastunet.load(run)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
for column, file in enumerate(sorted((folder / "new" / "images").iterdir())):
    mask = segmenter.predict(file)
    for axis, picture, title in zip(
        axes[2 * column :], (plt.imread(file), mask), ("new image", "its mask"), strict=False
    ):
        axis.imshow(picture, cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
