"""Helpers for models of transformers that stand as the reference."""

import torch


def shake(model, seed: int = 0):
    """Random biases and norms too, so that none can be forgotten unnoticed; positions stay."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim and "embed_positions" not in name:
                spread = 0.2 if weight.ndim == 1 else 0.8 / weight[0].numel() ** 0.5
                weight.add_(spread * torch.randn_like(weight))
    return model.eval()
