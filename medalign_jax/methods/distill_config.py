"""Which terms the loss of a distillation has, and between which layers."""

from __future__ import annotations

from dataclasses import dataclass

from medalign_jax.core.errors import UserError
from medalign_jax.losses import HIDDEN_KINDS, LOGIT_LENS


@dataclass(frozen=True)
class DistillConfig:
    """The loss of `methods.distill.Distill`.

    Attributes:
      text_weight: of the textual teacher's term; 0 runs no teacher.
      top_weight, layers_weight: of the two parts of that term; the paper leaves them open. A part
        of weight 0 is not computed.
      acoustic_weight: α_ac, of the student's own frozen snapshot; 0 runs no snapshot in training.
      monitor_acoustic: whether the divergence from the snapshot is measured on held-out questions
        where `acoustic_weight` is 0 too; it costs the snapshot's memory and, there alone, its
        forward pass.
      sft_weight: α_SFT.
      every: k: of the student's layers every k-th, counted from the last, is paired.
      divergence, beta, temperature: of the next-token distributions, see `losses.Divergence`.
      hidden: between hidden states of paired layers: "jsd", "cosine", "mse" or "logit_lens".
      acoustic_hidden: the same between student and snapshot; no "logit_lens".
      chunk: response tokens whose scores over the vocabulary exist at a time.
      train_audio: whether the student's audio tower learns. With LoRA its modules decide.
    """

    text_weight: float = 1.0
    top_weight: float = 1.0
    layers_weight: float = 1.0
    acoustic_weight: float = 0.05
    monitor_acoustic: bool = False
    sft_weight: float = 0.5
    every: int = 7
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    hidden: str = "jsd"
    acoustic_hidden: str = "jsd"
    chunk: int = 256
    train_audio: bool = True

    def __post_init__(self) -> None:
        for name in ("text_weight", "top_weight", "layers_weight", "acoustic_weight", "sft_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} is {getattr(self, name)}; a weight is 0 or more")
        if not (self.text_weight or self.acoustic_weight or self.sft_weight):
            raise UserError("all weights of the loss are 0: there is nothing to learn")
        if self.text_weight and not (self.top_weight or self.layers_weight):
            raise UserError(
                "loss.top_weight and loss.layers_weight are both 0: the textual teacher would run "
                "for nothing; set loss.text_weight to 0"
            )
        known = {"hidden": (*HIDDEN_KINDS, LOGIT_LENS), "acoustic_hidden": HIDDEN_KINDS}
        for name, kinds in known.items():
            if getattr(self, name) not in kinds:
                raise UserError(
                    f"loss.{name} {getattr(self, name)!r} is not one of {', '.join(kinds)}"
                )

    @property
    def layered(self) -> bool:
        """Whether hidden states of the teacher are read."""
        return bool(self.text_weight and self.layers_weight)

    @property
    def lens(self) -> bool:
        """Whether they are read through the frozen heads."""
        return self.layered and self.hidden == LOGIT_LENS
