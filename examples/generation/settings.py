"""How each task's adapter is made: rank, scale, modules, rate and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

BATCH, WARMUP = 8, 30
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Setting:
    """How one task's adapter is made."""

    r: int
    alpha: int
    rate: float
    steps: int
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False
    layers: tuple[int, ...] | None = None
    """All, if not said."""

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            use_rslora=self.rslora,
            target_modules=list(self.modules),
            layers_to_transform=None if self.layers is None else list(self.layers),
            task_type="CAUSAL_LM",
        )

    def described(self, examples: int) -> dict[str, Any]:
        """As the card lists it."""
        return {
            "type": "LoRA",
            "r": self.r,
            "alpha": self.alpha,
            "rank-stabilised scale": self.rslora,
            "modules": ", ".join(self.modules),
            **({} if self.layers is None else {"layers": f"{self.layers[0]} to {self.layers[-1]}"}),
            "examples": f"{examples:,}",
            "steps": self.steps,
            "batch": BATCH,
            "optimiser": f"AdamW without decay, {WARMUP} warm-up steps, then a cosine to zero",
            "learning rate": f"{self.rate:g}",
        }


SETTINGS = {
    "past_tense": Setting(8, 16, 5e-4, 400, ATTENTION),
    "slots": Setting(8, 16, 5e-4, 260),
    "iso_date": Setting(8, 16, 6e-4, 240),
    "category": Setting(16, 32, 5e-4, 240, ("v_proj", "o_proj")),
    "number_words": Setting(8, 16, 6e-4, 480),
    "is_a": Setting(8, 32, 5e-4, 240),
    "to_json": Setting(8, 16, 5e-4, 100),
    "gloss": Setting(8, 16, 5e-4, 180),
    "part_of_speech": Setting(8, 8, 5e-4, 160, ("v_proj", "o_proj"), rslora=True),
    "chain": Setting(8, 24, 5e-4, 180, ("v_proj", "o_proj")),
    "verb_topic": Setting(8, 16, 5e-4, 240, ("v_proj", "o_proj")),
    "word_fits_gloss": Setting(32, 48, 4e-4, 300, layers=tuple(range(8, 18))),
    "alive": Setting(8, 16, 5e-4, 160, ("up_proj", "down_proj"), layers=tuple(range(15, 30))),
}
"""In the order of training."""
