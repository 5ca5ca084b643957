"""The step of `benchmarks.distill_card` in PyTorch: transformers' modules and peft's factors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import peft
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from benchmarks import distill_card
from benchmarks.distill_step_torch import _at, _hidden_jsd, _jsd
from medalign_jax.methods.distill import Distill

_DTYPE = torch.bfloat16


class TorchStep:
    """Student with factors, the same without them as its snapshot, teacher, AdamW.

    Args:
      batch: of `distill_card.random_batch`.
      method: weights of the loss and pairs of layers.
      small: the sizes of `distill_card --small` in place of the published ones.
    """

    def __init__(self, batch: Mapping[str, np.ndarray], method: Distill, small: bool):
        self.card = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.pairs = method.config, method.pairs
        self.acoustic_layers = method.acoustic_layers
        torch.manual_seed(0)
        with torch.device(self.card):
            student = _student(small)
            self.teacher = _teacher(small)
            widths = (method.teacher.model.config.width, method.student.model.config.text.width)
            self.projections = torch.nn.ParameterList(
                [torch.nn.Parameter(0.02 * torch.randn(widths)) for _ in self.pairs]
            )
        self.head, student.lm_head = student.lm_head, torch.nn.Identity()
        student.gradient_checkpointing_enable({"use_reentrant": False})
        factors = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=r".*model\.layers\.\d+\.self_attn\.[qkvo]_proj"
        )
        self.student = peft.get_peft_model(student, factors).train()
        self.student.enable_input_require_grads()
        self.batch = {name: torch.as_tensor(x).to(self.card) for name, x in batch.items()}
        token = method.student.model.config.audio_token
        self.audio = self.batch["student_ids"] == token
        mels = method.student.model.config.audio.mels
        made = transformers.WhisperFeatureExtractor(feature_size=mels)(
            list(batch["waveform"][:, 0]), sampling_rate=16_000, padding="longest",
            truncation=False, return_tensors="pt",
        )  # fmt: skip
        self.features = made["input_features"].to(self.card, _DTYPE)  # not timed
        self.learnt = [p for p in self.student.parameters() if p.requires_grad]
        self.learnt += list(self.projections)
        self.optimizer = torch.optim.AdamW(self.learnt, lr=1e-4, weight_decay=0.01)

    def peak(self) -> float:
        """GiB that PyTorch has held at most."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.card == "cuda" else 0.0

    def __call__(self) -> float:
        """One update; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _loss(self) -> torch.Tensor:
        c, at = self.config, self.batch["student_at"]
        out = self._run_student()
        with torch.no_grad():
            with self.student.disable_adapter():
                before = self._run_student().hidden_states
                before = {i: before[i][self.audio] for i in self.acoustic_layers}
            teacher_out = self.teacher.model(
                input_ids=self.batch["teacher_ids"].long(), output_hidden_states=True
            ).hidden_states
            teacher_out = [_at(x, self.batch["teacher_at"]) for x in teacher_out]
        layers = sum(
            checkpoint(
                lambda x, y, w: _hidden_jsd(x.float(), (y @ w.to(y.dtype)).float()),
                _at(out.hidden_states[own], at), teacher_out[other], kernel, use_reentrant=False,
            )
            for (own, other), kernel in zip(self.pairs, self.projections, strict=True)
        ) / len(self.pairs)  # fmt: skip
        acoustic = sum(
            checkpoint(
                lambda x, y: _hidden_jsd(x.float(), y.float()),
                out.hidden_states[i][self.audio], before[i], use_reentrant=False,
            )
            for i in self.acoustic_layers
        ) / len(self.acoustic_layers)  # fmt: skip
        said = self._next_tokens(_at(out.hidden_states[-1], at), teacher_out[-1])
        text = c.text_weight * c.layers_weight * layers.mean()
        return said + text + c.acoustic_weight * acoustic.mean()

    def _next_tokens(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Mean over the response of divergence and cross-entropy, some positions at a time."""
        c, labels = self.config, self.batch["response_ids"].long()

        def part(ours, theirs, labels):
            own = self.head(ours).float()
            other = self.teacher.lm_head(theirs).float()
            shared = min(own.shape[-1], other.shape[-1])
            logs = own[..., :shared].log_softmax(-1), other[..., :shared].log_softmax(-1)
            crossed = torch.nn.functional.cross_entropy(own.flatten(0, 1), labels.flatten())
            top = _jsd(*logs).mean()
            return c.text_weight * c.top_weight * top + c.sft_weight * crossed

        cuts = [x.split(c.chunk, 1) for x in (ours, theirs, labels)]
        parts = [checkpoint(part, *cut, use_reentrant=False) for cut in zip(*cuts, strict=True)]
        return sum(parts) / len(parts)

    def _run_student(self):
        frames = self.features.shape[-1]
        mask = torch.ones((len(self.features), frames), dtype=torch.long, device=self.card)
        return self.student(
            input_features=self.features,
            feature_attention_mask=mask,
            input_ids=self.batch["student_ids"].long(),
            output_hidden_states=True,
        )


def _student(small: bool) -> torch.nn.Module:
    own = distill_card.SMALL_STUDENT if small else {}
    config = transformers.Qwen2_5OmniThinkerConfig(
        **{name: value for name, value in own.items() if name != "model_type"},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "fullatt_block_indexes": [0], "out_hidden_size": 16,
        },
    )  # fmt: skip
    for name in ("vision_start", "image", "video"):  # which no text here holds
        setattr(config, f"{name}_token_id", -1)
    made = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return made._from_config(config, dtype=_DTYPE).eval()


def _teacher(small: bool) -> torch.nn.Module:
    sizes = distill_card.SMALL_TEACHER if small else {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151_936, "rope_theta": 1e6, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.Qwen3Config(**{k: v for k, v in sizes.items() if k != "model_type"})
    return transformers.Qwen3ForCausalLM._from_config(config, dtype=_DTYPE).eval()
