"""What a model is worth on images it may not have been trained on."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hinv.shapes import Float, Int

CHUNK = 1024  # images of one forward pass


def score(
    model: nn.Module, x: Float[Tensor, "n channels side side"], y: Int[Tensor, " n"], device: str
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy."""
    loss, hits = 0.0, torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            outputs, labels = model(part.flatten(1).to(device)), labels.to(device)
            loss += functional.cross_entropy(outputs, labels, reduction="sum").item()
            best = outputs.topk(min(5, outputs.shape[1]), 1).indices == labels[:, None]
            hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
    return {"loss": loss / len(x), "top1": hits[0].item() / len(x), "top5": hits[1].item() / len(x)}
