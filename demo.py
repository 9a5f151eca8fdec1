"""Trains a small convolutional net on handwritten digits, explains what it reads, and draws a picture of that.

`make demo` draws it to `out/demo.png`, in some seconds. The one in the README, `docs/demo.png`, is drawn by
`make picture`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import lrpfunc as lrp

PICTURE = Path("out/demo.png")  # where git does not look: every machine draws a slightly different one
SHOWN_DIGITS = (0, 3, 5)

# How each recipe weighs contributions, in the words of the picture.
RECIPES = {
    "epsilon_plus_flat": (lrp.epsilon_plus_flat(), "positive contributions\nonly"),
    "epsilon_gamma_box": (lrp.epsilon_gamma_box(low=0.0, high=1.0), "positive contributions\nfavoured"),
    "epsilon_alpha2_beta1": (lrp.epsilon_alpha2_beta1(), "positive twice,\nminus negative once"),
    "gradient": (lrp.gradient(), "no rule: how the logit\nreacts to more ink"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Explains what a small net reads in handwritten digits.")
    parser.add_argument("--save", type=Path, default=PICTURE, metavar="PNG", help="where to draw the picture")
    picture = parser.parse_args().save

    torch.manual_seed(0)
    digits, held_out = load()
    model = train(build(), digits)
    share = accuracy(model, held_out)
    print(f"The network reads {share:.1%} of {len(held_out)} held-out digits correctly.")
    assert share > 0.97

    indices = [*(clearest(model, held_out, digit) for digit in SHOWN_DIGITS), misread(model, held_out)]
    readings = [read(model, held_out.images[i : i + 1], int(held_out.labels[i])) for i in indices]
    for reading in readings:
        print(f"\nA {reading.label}, read as {reading.chosen}:", *reading.balances, sep="\n")
    print(f"\nLayer by layer, by {next(iter(RECIPES))}, for the {readings[0].label}:\n\n{readings[0].table}")

    *clear, doubtful = readings
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(clear, doubtful, explain_every_class(model, doubtful.image)).savefig(picture, dpi=110)
    print(f"\nWrote {picture}.")


# --------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Digits:
    """Images of shape `(N, 1, 8, 8)`, from 0 (paper) to 1 (ink), and labels of shape `(N,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> tuple[Digits, Digits]:
    """The digits to train on, and a quarter of all that is held out."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (torch.tensor(p, dtype=torch.float32).reshape(-1, 1, 8, 8) for p in parts[:2])
    train_labels, test_labels = map(torch.tensor, parts[2:])
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def build() -> nn.Module:
    """An ordinary net. Nothing in it knows that it will be explained."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(model: nn.Module, digits: Digits, epochs: int = 15) -> nn.Module:
    """Trains the model, and hands it back in evaluation mode with its parameters frozen."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the digits that the model reads correctly."""
    return (model(digits.images).argmax(1) == digits.labels).float().mean().item()


def margins(model: nn.Module, digits: Digits) -> Tensor:
    """How far the logit of the true class is ahead of all others: negative where the model is wrong."""
    logits, true = model(digits.images), digits.labels[:, None]
    return (logits.gather(1, true) - logits.scatter(1, true, -torch.inf).amax(1, keepdim=True))[:, 0]


def clearest(model: nn.Module, digits: Digits, label: int) -> int:
    """The index of the image of a digit that the model is surest of."""
    return int(margins(model, digits).where(digits.labels == label, -torch.inf).argmax())


def misread(model: nn.Module, digits: Digits) -> int:
    """The index of the first image that the model gets wrong or, should there be none, finds hardest."""
    ahead = margins(model, digits)
    return int((ahead <= ahead.min().clamp(min=0)).int().argmax())


# --------------------------------------------------------------------------------------------------------------
# The explanations


@dataclass(frozen=True)
class Reading:
    """What the network reads in an image, and why.

    Attributes:
        image: Of shape `(1, 1, 8, 8)`.
        label: The digit that was written.
        logits: Of shape `(10,)`.
        heatmaps: For each recipe, what speaks for the class that the network chose, shaped like the image.
        balances: For each recipe, a line that says what became of the logit.
        table: What became of it layer by layer, for the first recipe.
    """

    image: Tensor
    label: int
    logits: Tensor
    heatmaps: list[Tensor]
    balances: list[str]
    table: str

    @property
    def chosen(self) -> int:
        """The class with the highest logit."""
        return int(self.logits.argmax())


def read(model: nn.Module, image: Tensor, label: int) -> Reading:
    """Explains the class that the network chooses for an image, by every recipe."""
    model_fn, params = lrp.from_module(model)
    logits = model_fn(params, image)[0]
    explanations = [
        lrp.explain(model_fn, rules)(params, image, target=int(logits.argmax())) for rules, _ in RECIPES.values()
    ]
    return Reading(
        image,
        label,
        logits,
        heatmaps=[explanation.relevance for explanation in explanations],
        balances=[
            balance(name, e.start, e.relevance_in, e.absorbed, e.residual)
            for name, e in zip(RECIPES, explanations, strict=True)
        ],
        table=str(explanations[0]),
    )


def balance(recipe: str, logit: float, arrived: float, absorbed: dict[str, float], residual: float) -> str:
    """The logit as the sum of what arrived at the pixels and of what was absorbed on the way, by cause."""
    # For the gradient, which is no relevance, what arrives is pixels times gradient.
    terms = [f"{amount:+.2g} {cause}" for cause, amount in absorbed.items() if amount]
    sums = " ".join([f"{arrived:.3f} at the pixels", *terms])
    return f"  {recipe:20}  logit {logit:.3f} = {sums}  (rounding {residual:.0e})"


def explain_every_class(model: nn.Module, image: Tensor) -> Tensor:
    """What speaks for each of the ten classes, of shape `(10, 1, 1, 8, 8)`, from a single forward pass."""
    model_fn, params = lrp.from_module(model)
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())
    return torch.vmap(lambda target: relevance_fn(params, image, target=target))(torch.arange(10))


# --------------------------------------------------------------------------------------------------------------
# The picture. Everything lies on a grid in inches, counted from the upper left corner.

WIDTH, HEIGHT = 11.4, 12.8
MIDDLE = 7.75
LEFT, MAPS, BAR = 0.3, 3.15, 10.25
MAP = 1.6
STEP = 1.76
SMALL_MAP = 1.26
SMALL_STEP = 1.405
GREY = "0.35"


def draw(clear: list[Reading], doubtful: Reading, every_class: Tensor) -> Figure:
    """All recipes for the clear readings and, below, all classes for the doubtful one."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    draw_recipes(figure, clear)
    draw_classes(figure, doubtful, every_class)
    return figure


def draw_recipes(figure: Figure, readings: list[Reading]) -> None:
    headline(
        figure,
        0.5,
        "Which pixels make the network read this digit?",
        "Red pixels speak for the class that the network chose, blue ones against it. "
        "The line is the outline of the ink.\n"
        "Each heatmap has its own scale. Its sum is the logit less what biases and rules absorbed on the way.",
    )
    tops = [1.97 + row * (MAP + 0.36) for row in range(len(readings))]
    for column, (name, (_, words)) in enumerate(RECIPES.items()):
        middle = MAPS + column * STEP + MAP / 2
        write(figure, middle, 1.52, name, size=11, ha="center")
        write(figure, middle, 1.58, words, size=9.5, color=GREY, ha="center", va="top")
    for top, reading in zip(tops, readings, strict=True):
        draw_reading(figure, top, reading)
    bottom = tops[-1] + MAP
    draw_scale(figure, tops[0], bottom - tops[0], ["against\nthe class", "0", "for\nthe class"])


def draw_reading(figure: Figure, top: float, reading: Reading) -> None:
    write(figure, LEFT, top + 0.42, "read as", size=12, color=GREY)
    write(figure, LEFT, top + 0.95, str(reading.chosen), size=32, weight="bold")
    write(figure, LEFT, top + 1.25, f"logit {reading.logits.max():.1f}", size=12, color=GREY)
    show_image(panel(figure, 1.3, top, MAP), reading.image)
    for column, (name, heatmap) in enumerate(zip(RECIPES, reading.heatmaps, strict=True)):
        axes = panel(figure, MAPS + column * STEP, top, MAP)
        show_heatmap(axes, heatmap, reading.image, heatmap.abs().max().item())
        axes.set_xlabel("" if name == "gradient" else f"sum {heatmap.sum():.1f}", fontsize=10, color=GREY)


def draw_classes(figure: Figure, reading: Reading, relevance: Tensor) -> None:
    headline(
        figure,
        MIDDLE + 0.5,
        "What would speak for each other class?",
        f"A {reading.label} that the network reads as {reading.chosen}, explained for all ten classes "
        "from one forward pass (epsilon_plus_flat).\nAll ten heatmaps have the same scale.",
    )
    top = MIDDLE + 1.6
    show_image(panel(figure, LEFT, top + 0.33, 2.45), reading.image)
    largest = relevance.abs().max().item()
    for label, heatmap in enumerate(relevance):
        row, column = divmod(label, 5)
        axes = panel(figure, MAPS + column * SMALL_STEP, top + row * 1.85, SMALL_MAP)
        show_heatmap(axes, heatmap, reading.image, largest)
        axes.set_title(f"{label}:  logit {reading.logits[label]:.1f}", fontsize=11)
        if label in (reading.chosen, reading.label):
            emphasize(axes, "chosen" if label == reading.chosen else "written")
    draw_scale(figure, top, 1.85 + SMALL_MAP, [f"against\n{-largest:.1f}", "0", f"for\n{largest:+.1f}"])


def headline(figure: Figure, top: float, title: str, words: str) -> None:
    write(figure, LEFT, top, title, size=19, weight="bold")
    write(figure, LEFT, top + 0.18, words, size=12, color=GREY, va="top", linespacing=1.4)


def show_image(axes: Axes, image: Tensor) -> None:
    axes.imshow(image[0, 0], cmap="gray_r", vmin=0, vmax=1)


def show_heatmap(axes: Axes, relevance: Tensor, image: Tensor, largest: float) -> None:
    axes.imshow(relevance[0, 0], cmap="RdBu_r", vmin=-largest, vmax=largest)
    # A border of paper, outside the frame, closes the outline where ink touches the frame.
    ink, places = pad(image[0, 0], (1, 1, 1, 1)), range(-1, 9)
    axes.contour(places, places, ink, levels=[0.4], colors="black", linewidths=1.0)
    axes.set(xlim=(-0.5, 7.5), ylim=(7.5, -0.5))


def emphasize(axes: Axes, reason: str) -> None:
    axes.title.set_fontweight("bold")
    axes.set_xlabel(reason, fontsize=11, fontweight="bold")
    axes.spines[:].set_linewidth(2.5)


def draw_scale(figure: Figure, top: float, height: float, labels: list[str]) -> None:
    axes = panel(figure, BAR, top, 0.17, height)
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), "RdBu_r"), cax=axes, ticks=[-1, 0, 1])
    bar.set_ticklabels(labels, fontsize=11)
    bar.outline.set_visible(False)


def panel(figure: Figure, left: float, top: float, width: float, height: float | None = None) -> Axes:
    """Axes without ticks, square unless a height is given."""
    height = width if height is None else height
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))
    axes.set(xticks=[], yticks=[])
    return axes


def write(figure: Figure, left: float, top: float, words: str, **style: Any) -> None:
    figure.text(left / WIDTH, 1 - top / HEIGHT, words, **style)


if __name__ == "__main__":
    main()
