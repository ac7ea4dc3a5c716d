"""Effects of choices of the released code that need no training to be seen.

    python -m benchmarks.protection.discrepancies --data DATA/house_price

writes ``discrepancies.json`` beside this file. Those that do need training are variants in
``house_prices.py``. Networks are randomly initialised ones of the published classes: what is
measured on them does not depend on trained weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.protection._outcomes import one_thread, write
from benchmarks.protection._published import FLOOR
from immunize_ext.ops import gram_extremes
from immunize_ext.probing.data import house_prices_task, load_digits
from immunize_ext.probing.metrics import grouped_rir, log_kappa


def same_model_twice() -> dict[str, float]:
    """RIR of two models that are the same object, as the released evaluation calls it."""
    generator = torch.Generator().manual_seed(0)
    primary, harmful = (torch.randn(400, 64, generator=generator) for _ in range(2))
    ratios = grouped_rir(primary, primary, harmful, harmful).rir
    return {"least": float(ratios.min()), "largest": float(ratios.max())}


def floor_of_sigma_min(folder: Path) -> dict[str, Any]:
    """What the released smallest eigenvalue is on rank-deficient Gram matrices."""
    found: dict[str, Any] = {}
    for p in (512, 768):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(100, p, dtype=torch.float64, generator=generator)
        eigenvalues = torch.linalg.eigvalsh(x.mT @ x + FLOOR * torch.eye(p, dtype=torch.float64))
        counted = eigenvalues[eigenvalues > FLOOR]
        found[f"100 samples, {p} features"] = {
            "rank": int(gram_extremes(x).rank),
            "eigenvalues_counted": len(counted),
            "smallest_counted": float(counted[0]),
        }
    for role in ("primary", "harmful"):
        x = house_prices_task(folder, role).x_train  # type: ignore[arg-type]
        official, _ = log_kappa(x, policy="official")
        aware, rank = log_kappa(x)
        found[f"House Prices, {role}"] = {
            "rank": int(rank),
            "features": x.shape[1],
            "kappa_official": math.exp(float(official)),
            "kappa_rank_aware": math.exp(float(aware)),
        }
    return found


def unused_gradient(folder: Path) -> dict[str, float]:
    """The unused closed-form gradient of R_ill, at theta = I on House Prices, over the right one.

    Both share the numerator; the denominators are (|S|_F / (2 n) + sigma_n^2 / 2)^2 in the released
    code and (|S|_F^2 / (2 k) - sigma_k^2 / 2)^2 in the paper.
    """
    x = house_prices_task(folder, "harmful").x_train
    extremes = gram_extremes(x)
    squares = float((x.mT @ x).square().sum())
    n, smallest = x.shape[1], float(extremes.lambda_min)
    right = (squares / (2 * int(extremes.rank)) - smallest**2 / 2) ** 2
    released = (math.sqrt(squares) / (2 * n) + smallest**2 / 2) ** 2
    log = float(log_kappa(x, policy="official")[0])
    return {
        "too_large_by": right / released,
        # d log(log kappa) = d log kappa / log kappa.
        "log_of_log_scales_gradient_by": 1.0 / log,
        "epochs_of_30_with_epoch_floor_half_zero": sum(epoch // 2 == 0 for epoch in range(30)),
    }


def _digit_images(digits: tuple[int, ...]) -> Tensor:
    images, labels = load_digits()
    chosen = torch.from_numpy(images[[label in digits for label in labels]])
    small = chosen.to(torch.float32).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(small, size=32)


def drifting_statistics() -> dict[str, Any]:
    """Features of a ResNet-18 whose weights never change, before and after training-mode passes."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    model = ResNetModel(
        ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
        )
    )
    first, second = _digit_images((0, 1, 2, 3, 4)), _digit_images((5, 6, 7, 8, 9))

    def passes(images: Tensor, count: int) -> None:
        model.train()
        for step in range(count):
            model(images[(16 * step) % 800 : (16 * step) % 800 + 16])

    def features() -> Tensor:
        model.eval()
        return model(first[-64:]).pooler_output.flatten(1).to(torch.float64)

    with torch.no_grad():
        passes(first, 50)  # statistics of the data it is for
        before = features()
        passes(second, 50)  # frozen weights, another data set, training mode
        after = features()
    kappas = [float(log_kappa(z)[0]) for z in (before, after)]
    return {
        "relative_change_of_features": float((after - before).norm() / before.norm()),
        "factor_of_kappa": math.exp(kappas[1] - kappas[0]),
    }


def trained_parameters() -> dict[str, Any]:
    """Parameters that the released filters train, and those that the paper names."""
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    with torch.device("meta"):
        resnet = ResNetModel(
            ResNetConfig(
                embedding_size=64,
                hidden_sizes=[64, 128, 256, 512],
                depths=[2, 2, 2, 2],
                layer_type="basic",
            )
        )
        vit = ViTModel(ViTConfig())
    stages = [sum(p.numel() for p in stage.parameters()) for stage in resnet.encoder.stages]
    block = norms = 0
    for name, parameter in vit.named_parameters():
        if ".11." in name:
            block += parameter.numel()
        elif "norm" in name:
            norms += parameter.numel()
    return {
        "resnet18_last_stage": stages[-1],
        "resnet18_last_two_stages": stages[-1] + stages[-2],
        "vit_last_block": block,
        "vit_norms_elsewhere": norms,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("discrepancies.json"))
    arguments = parser.parse_args()
    one_thread()
    content = {
        "same_model_twice": same_model_twice(),
        "floor": floor_of_sigma_min(arguments.data),
        "unused_code": unused_gradient(arguments.data),
        "batch_norm": drifting_statistics(),
        "parameters": trained_parameters(),
    }
    write(arguments.out, "python -m benchmarks.protection.discrepancies --data DATA", content)


if __name__ == "__main__":
    main()
