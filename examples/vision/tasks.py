"""Every task: its domain, its label, its score, and how its adapter is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from domains import CATEGORIES, DEFECTS, GROUPS, QUADRANTS
from packages import ANIMALS, FASHION
from raycaster import SHAPES, SURFACES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("fc1", "fc2")
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Setting:
    """An adapter's make: LoRA's rank, alpha and modules; or VeRA of that rank."""

    r: int = 16
    alpha: int = 16
    modules: tuple[str, ...] = ATTENTION
    vera: bool = False


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        domain: whose pictures it is about.
        key: of its label in a record.
        description: what is predicted, in a line.
        metric: its score.
        classes: of a classification; else it is a regression.
        outputs: values that a regression predicts.
        pixels: whether there is a label for each place of a map (16, 16).
        setting: of its adapter.
    """

    domain: str
    key: str
    description: str
    metric: str
    classes: tuple[str, ...] = ()
    outputs: int = 1
    pixels: bool = False
    setting: Setting = Setting()

    @property
    def kind(self) -> Literal["classification", "regression"]:
        return "classification" if self.classes else "regression"


TASKS = {
    "position": Task(
        "compositions",
        "position",
        "Where the cut-out is: x and y of its centre.",
        "pearson",
        outputs=2,
        setting=Setting(alpha=32, modules=QV),
    ),
    "light": Task("scenes", "light", "The azimuth of the light, in radians.", "pearson", setting=Setting(modules=QV)),
    "normals": Task(
        "scenes",
        "normals",
        "The direction that each surface faces.",
        "angular_error",
        outputs=3,
        pixels=True,
    ),
    "fashion": Task("fashion", "fashion", "The kind of a garment.", "accuracy", FASHION, setting=Setting(modules=QV)),
    "category": Task("compositions", "category", "What kind of thing the cut-out is.", "accuracy", tuple(CATEGORIES)),
    "mask": Task(
        "compositions",
        "mask",
        "Where the cut-out is, place by place.",
        "iou",
        ("background", "cut-out"),
        pixels=True,
        setting=Setting(r=8, alpha=16),
    ),
    "count": Task(
        "crowds", "count", "How many small cut-outs there are.", "pearson", setting=Setting(r=16, alpha=16, modules=QV)
    ),
    "main_shape": Task(
        "scenes", "main_shape", "The shape of the largest solid.", "accuracy", SHAPES, setting=Setting(r=8, alpha=16)
    ),
    "depth": Task("scenes", "depth", "Logarithmic distance, place by place.", "r2", pixels=True),
    "rotation": Task(
        "compositions",
        "rotation",
        "How the cut-out is turned: sine and cosine.",
        "pearson",
        outputs=2,
        setting=Setting(r=32, alpha=32, modules=QV),
    ),
    "defect": Task(
        "textile",
        "defect",
        "Whether a cloth has a defect, and of what extent.",
        "accuracy",
        DEFECTS,
        setting=Setting(r=8, alpha=8),
    ),
    "animal": Task(
        "animals",
        "animal",
        "The animal of a silhouette.",
        "accuracy",
        ANIMALS,
        setting=Setting(r=16, alpha=16, modules=QV),
    ),
    "shape_count": Task(
        "scenes",
        "shape_count",
        "How many solids are to be seen.",
        "pearson",
        setting=Setting(r=16, alpha=24, modules=QV),
    ),
    "quadrant": Task(
        "compositions",
        "quadrant",
        "The quarter that the cut-out's centre is in.",
        "accuracy",
        QUADRANTS,
        setting=Setting(r=128, vera=True),
    ),
    "edges": Task(
        "compositions",
        "edges",
        "How much of the cut-out's outline is where.",
        "pearson",
        pixels=True,
        setting=Setting(r=8, alpha=8, modules=MLP),
    ),
    "emoji_group": Task(
        "emoji", "group", "The group of an emoji.", "accuracy", tuple(GROUPS), setting=Setting(alpha=32, modules=QV)
    ),
    "tilt": Task(
        "scenes", "tilt", "How far the camera looks down, in radians.", "pearson", setting=Setting(modules=QV)
    ),
    "size": Task(
        "compositions",
        "size",
        "How large the cut-out is.",
        "pearson",
        setting=Setting(r=8, alpha=8, modules=(*QV, *MLP)),
    ),
    "surfaces": Task(
        "scenes",
        "surfaces",
        "What is seen, place by place.",
        "miou",
        SURFACES,
        pixels=True,
        setting=Setting(r=16, alpha=16, modules=QV),
    ),
}
