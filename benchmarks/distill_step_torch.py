"""The step of `benchmarks.distill_step` in PyTorch, with transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional

from medalign_jax.losses.layerwise import pair_name
from medalign_jax.methods.distill import Distill


class TorchStep:
    """Student, snapshot, teacher, projections and AdamW.

    Args:
      saved: folders of student and teacher.
      batch: of `data.questions.batches`.
      features: (B, mels, frames) to be taken as they are; None has transformers' feature extractor
        make them of the waveforms in every step.
      method: the weights of the loss and the pairs of layers.
      projections: their start, ``{"pair_..": {"kernel": (Wt, Ws)}}``.
      rate: learning rate.
    """

    def __init__(
        self,
        saved: tuple[Path, Path],
        batch: Mapping[str, np.ndarray],
        features: np.ndarray | None,
        method: Distill,
        projections: Mapping[str, Mapping[str, np.ndarray]],
        rate: float,
    ):
        self.config, self.pairs = method.config, method.pairs
        self.acoustic_layers = method.acoustic_layers
        self.student = _thinker(saved[0]).train()
        self.snapshot = _thinker(saved[0]).eval()
        self.teacher = transformers.Qwen3ForCausalLM.from_pretrained(
            saved[1], dtype=torch.float32
        ).eval()
        kernels = [torch.tensor(projections[pair_name(pair)]["kernel"]) for pair in self.pairs]
        self.projections = [torch.nn.Parameter(kernel) for kernel in kernels]
        self.batch = {name: torch.as_tensor(array) for name, array in batch.items()}
        self.features = features if features is None else torch.tensor(features)
        mels = method.student.model.config.audio.mels
        self.extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
        self.frames = self.batch["samples"][:, 0] // self.extractor.hop_length
        token = method.student.model.config.audio_token
        self.audio = (self.batch["student_ids"] == token) & self.batch["student_mask"]
        learnt = [*self.student.parameters(), *self.projections]
        self.learnt = [p for p in learnt if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=rate, weight_decay=0.01)

    def __call__(self) -> float:
        """One update; the loss before it."""
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def loss(self) -> torch.Tensor:
        """The weighted sum of the four terms."""
        c, mask = self.config, self.batch["response_mask"]
        features = self._features()
        out = self._run_student(self.student, features)
        with torch.no_grad():
            before = self._run_student(self.snapshot, features).hidden_states
            teacher_out = self.teacher(
                input_ids=self.batch["teacher_ids"].long(),
                attention_mask=self.batch["teacher_mask"].long(),
                output_hidden_states=True,
            )
        ours = _at(out.logits, self.batch["student_at"]).log_softmax(-1)
        theirs = _at(teacher_out.logits, self.batch["teacher_at"]).log_softmax(-1)
        shared = min(ours.shape[-1], theirs.shape[-1])
        top = _jsd(ours[..., :shared], theirs[..., :shared])
        layers = torch.stack(
            [
                _hidden_jsd(
                    _at(out.hidden_states[own], self.batch["student_at"]),
                    _at(teacher_out.hidden_states[other], self.batch["teacher_at"]) @ kernel,
                )
                for (own, other), kernel in zip(self.pairs, self.projections, strict=True)
            ]
        ).mean(0)
        acoustic = torch.stack(
            [_hidden_jsd(out.hidden_states[i], before[i]) for i in self.acoustic_layers]
        ).mean(0)
        wanted = self.batch["response_ids"].long()
        crossed = functional.nll_loss(ours.transpose(1, 2), wanted, reduction="none")
        text = c.top_weight * top + c.layers_weight * layers
        response = c.text_weight * text + c.sft_weight * crossed
        return response[mask].mean() + c.acoustic_weight * acoustic[self.audio].mean()

    def _features(self) -> torch.Tensor:
        if self.features is not None:
            return self.features
        made = self.extractor(
            list(self.batch["waveform"][:, 0].numpy()), sampling_rate=16_000, padding="longest",
            truncation=False, return_tensors="pt",
        )  # fmt: skip
        return made["input_features"]

    def _run_student(self, model, features: torch.Tensor):
        frames = torch.arange(features.shape[-1])
        return model(
            input_features=features,
            feature_attention_mask=frames < self.frames[:, None],
            input_ids=self.batch["student_ids"].long(),
            attention_mask=self.batch["student_mask"].long(),
            output_hidden_states=True,
        )


def _thinker(folder: Path) -> transformers.PreTrainedModel:
    """The saved student; its vision tower, which nothing uses, is made as small as can be."""
    config = transformers.Qwen2_5OmniThinkerConfig.from_pretrained(folder)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    for name, value in (vision | {"fullatt_block_indexes": [0], "out_hidden_size": 16}).items():
        setattr(config.vision_config, name, value)
    for name in ("vision_start", "image", "video"):  # which no text here holds
        setattr(config, f"{name}_token_id", -1)
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32
    )


def _at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, W) at (B, R)."""
    places = positions.long()[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, places)


def _jsd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities, over the last axis."""
    middle = torch.logaddexp(a, b) - np.log(2.0)
    return 0.5 * ((a.exp() * (a - middle)).sum(-1) + (b.exp() * (b - middle)).sum(-1))


def _hidden_jsd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _jsd(*(functional.layer_norm(x, x.shape[-1:], eps=0.0).log_softmax(-1) for x in (a, b)))
