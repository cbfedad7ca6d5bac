"""A tiny HunyuanVideo-1.5 transformer, and latents with something to learn in them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SETTINGS: dict[str, Any] = {
    "in_channels": 7,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "text_embed_2_dim": 10,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "target_size": 16,
}


def build_video(dtype: torch.dtype = torch.float64) -> Any:
    """Two layers of width 32; 3 channels of latents, and 4 of conditions."""
    from diffusers import HunyuanVideo15Transformer3DModel  # slow to import

    torch.manual_seed(0)
    model = HunyuanVideo15Transformer3DModel(**SETTINGS).train()
    return model if dtype == torch.float32 else model.to(dtype)


def video_folder(folder: Path) -> Path:
    """A folder with it."""
    build_video(torch.float32).save_pretrained(folder)
    return folder


def write_latents(
    folder: Path, number: int, *, seed: int = 0, full: bool = False, suffix: str = ".safetensors"
) -> Path:
    """Latents of two shapes, each of one value, which the text says; texts of ragged length.

    ``full`` adds what an image and a second text say, and a condition.
    """
    folder.mkdir(exist_ok=True)
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    for at in range(number):
        value = draw.choice([-1.0, 1.0])
        shape = [(3, 2, 2, 2), (3, 1, 4, 2)][at % 3 > 0]
        tensors = {
            "latents": torch.full(shape, value) + 0.1 * torch.randn(shape, generator=torch_draw),
            "encoder_hidden_states": torch.full((draw.randint(1, 5), 12), value),
        }
        if full:
            tensors["encoder_hidden_states_2"] = torch.full((draw.randint(1, 3), 10), value)
            tensors["image_embeds"] = torch.full((2, 8), value)
            tensors["condition"] = torch.full((2, *shape[1:]), value)
        path = folder / f"{at:03d}{suffix}"
        if suffix == ".npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            save_file(tensors, path)
    return folder
