"""Helpers for models of transformers that stand as the reference."""

import numpy as np
import pytest
import torch

from medalign_jax.weights.load import load


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


def hollow(model):
    """Every tensor of a model on the meta device, as zeros that take no memory."""
    return {
        name: np.broadcast_to(np.float32(0), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def check_shapes(official, table, abstract):
    """`load` of a big model up to the point where numbers would be read."""

    class Stop(Exception):
        pass

    def read(*_):
        raise Stop

    # Everything is checked before the first tensor is read.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("medalign_jax.weights.load._read", read)
        load(official, table, abstract)
