"""Draws parameter_map.png: how a weight and its gradient map through a growing space.

Run from the root of the repository: `python docs/figures/parameter_map.py`.
"""

from pathlib import Path

import numpy
import torch
from matplotlib import pyplot as plt

from tritter.core.parameter_map import AxisMap

torch.manual_seed(5)
ffn = AxisMap.copied(
    4, [0, 1, 2, 3, 1, 3], torch.tensor([1, 0.9, 1, 0.5, 0.1, 0.5], dtype=torch.float64)
)
E, C = ffn.producer_matrix(), ffn.consumer_matrix()  # [6, 4], [4, 6]
up, down = torch.randn(4, 3).double(), torch.randn(3, 4).double()
gradient = torch.randn(3, 4).double()
rows = [
    [("W of up\n4 neurons", up), ("E", E), ("E · W\n6 neurons", E @ up)],
    [("W of down", down), ("C", C), ("W · C", down @ C)],
    [("G of down", gradient), ("Eᵀ", E.T), ("G · Eᵀ", gradient @ E.T)],
]
words = ["writes the FFN's space", "reads it", "its gradient"]
figure, axes = plt.subplots(3, 3, figsize=(7.5, 6), layout="constrained")
for line, row, word in zip(axes, rows, words, strict=True):
    for axis, (title, values) in zip(line, row, strict=True):
        axis.imshow(values, cmap="RdBu", vmin=-2, vmax=2)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        for (i, j), value in numpy.ndenumerate(values.numpy()):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7)
    line[0].set_ylabel(word)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
