"""OPERA-GT in PyTorch, written for speed: the yardstick of `benchmarks.opera_gt`.

Parameters keep their published names in one flat dict. Attention is PyTorch's fused kernel.
"""

import numpy as np
import torch
import torch.nn.functional as F

TABLES = ("pos_embed", "decoder_pos_embed")


class TorchOperaGT:
    """Feature and reconstruction loss from a state dict (name -> tensor)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.p = {
            name: tensor.clone().requires_grad_(name not in TABLES)
            for name, tensor in tensors.items()
        }
        place = np.stack(np.divmod(np.arange(16), 4), axis=-1)
        offset = (place[:, None] - place[None, :]).reshape(-1, 2)
        offset = np.sign(offset) * np.log1p(np.abs(offset))
        self.offset = torch.tensor(offset, dtype=torch.float32)
        half = torch.arange(16) >= 8
        self.shift = torch.zeros(16, 1, 16, 16)
        self.shift[-2:] = torch.where(half[:, None] != half[None, :], -100.0, 0.0)

    def to(self, device: str) -> "TorchOperaGT":
        """The same model on another device."""
        self.p = {
            name: tensor.detach().to(device).requires_grad_(tensor.requires_grad)
            for name, tensor in self.p.items()
        }
        self.offset, self.shift = self.offset.to(device), self.shift.to(device)
        return self

    def parameters(self) -> list[torch.Tensor]:
        return [tensor for tensor in self.p.values() if tensor.requires_grad]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)

    def _mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._linear(F.gelu(self._linear(x, f"{name}.fc1")), f"{name}.fc2")

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        batch, width = x.shape[0], x.shape[2]
        first = self.p["cls_token"] + self.p["pos_embed"][:, :1]
        x = torch.cat([first.expand(batch, -1, -1), x], dim=1)
        for i in range(12):
            qkv = self._linear(self._norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
            q, k, v = qkv.view(batch, -1, 3, 6, 64).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, width)
            x = x + self._linear(y, f"blocks.{i}.attn.proj")
            x = x + self._mlp(self._norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
        return x

    @staticmethod
    def _patches(features: torch.Tensor) -> torch.Tensor:
        batch = features.shape[0]
        x = features.view(batch, 64, 4, 16, 4).transpose(2, 3)
        return x.reshape(batch, 1024, 16)

    def _embed_patches(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        kernel = self.p["patch_embed.proj.weight"].view(384, 16)
        return F.linear(patches, kernel, self.p["patch_embed.proj.bias"]) + positions

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 256, 64) to (B, 384)."""
        x = self._embed_patches(self._patches(features), self.p["pos_embed"][:, 1:])
        return self._norm(self._encode(x)[:, 1:].mean(dim=1), "norm")

    def reconstruct(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Mean loss over the removed patches of (B, 256, 64); noise (B, 1024)."""
        patches = self._patches(features)
        order = noise.argsort(dim=1)
        place = order.argsort(dim=1)
        kept = order[:, :307]
        x = self._embed_patches(
            patches.gather(1, kept[..., None].expand(-1, -1, 16)), self.p["pos_embed"][0, 1:][kept]
        )
        x = self._linear(self._norm(self._encode(x), "norm")[:, 1:], "decoder_embed")
        x = torch.cat([x, self.p["mask_token"].expand(len(x), 1024 - 307, -1)], dim=1)
        x = x.gather(1, place[..., None].expand(-1, -1, 256)) + self.p["decoder_pos_embed"][:, 1:]
        for i in range(16):
            name = f"decoder_blocks.{i}"
            x = x + self._norm(self._window_attention(x, f"{name}.attn", i % 2), f"{name}.norm1")
            x = x + self._norm(self._mlp(x, f"{name}.mlp"), f"{name}.norm2")
        predicted = self._linear(self._norm(x, "decoder_norm"), "decoder_pred")
        errors = (predicted - patches).square().mean(dim=-1)
        return errors[place >= 307].mean()

    def _window_attention(self, x: torch.Tensor, name: str, shifted: int) -> torch.Tensor:
        shape = x.shape
        x = x.reshape(shape[0], 32, 8, shape[1])
        x = x.roll(-2, 1) if shifted else x
        x = x.view(shape[0], 8, 4, 2, 4, shape[1]).transpose(2, 3).reshape(-1, 16, 256)
        q, k, v = self._linear(x, f"{name}.qkv").view(-1, 16, 3, 16, 16).permute(2, 0, 3, 1, 4)
        lengths = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
        scores = q @ k.transpose(-2, -1) / lengths.clamp(min=1e-6)
        scores = scores / self.p[f"{name}.tau"].clamp(min=0.01)[:, None, None]
        hidden = F.relu(self._linear(self.offset, f"{name}.meta_mlp.fc1"))
        scores = scores + self._linear(hidden, f"{name}.meta_mlp.fc2").T.reshape(16, 16, 16)
        if shifted:
            scores = (scores.view(-1, 16, 16, 16, 16) + self.shift).view(-1, 16, 16, 16)
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, 16, 256)
        x = self._linear(x, f"{name}.proj")
        x = x.view(-1, 8, 2, 4, 4, 256).transpose(2, 3).reshape(-1, 32, 8, 256)
        return (x.roll(2, 1) if shifted else x).reshape(shape)
