"""Does the kernel of gradients at the start foretell how many steps fine-tuning takes?

    python -m benchmarks.protection.ntk --mnist ../shared/data/mnist
    python -m benchmarks.protection.ntk --write docs/ntk.md   # the page's tables

Three networks, each a backbone that learnt a pair of digits (or photographs), an immunized linear
layer theta, and a new head; four attackers who retrain the head alone, adapters, the last block, or
everything, by gradient descent on the squared loss at 0.9 / lambda_max(K), halved until it does not
diverge. Steps until the training loss is 0.35 of the first: predicted from K and the residual at
the start, and run.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.probing.data import load_mnist
from immunize_ext.probing.data.mnist import PIXEL_MEAN, PIXEL_STD
from immunize_ext.probing.extractors import load_backbone
from immunize_ext.probing.immunizers import closed_form_theta
from immunize_ext.probing.metrics import empirical_ntk, kernel_descent_steps

from .._page import fills, result_parser
from ._outcomes import one_thread, write

OUT = Path(__file__).with_name("ntk.json")
PRIMARY = ((3, 8), (0, 1))
HARMS = tuple(itertools.combinations((2, 4, 5, 6, 7, 9), 2))[:8]
THETAS = ("none", "whitening", "closed form, c = 100", "graded, 1e3")
ATTACKERS = ("probe", "LoRA", "last block", "full")
SHARE, RANK = 0.35, 4
GOAL = 0.8
DRAWS = 2000
# By network and attacker.
Summaries = dict[tuple[str, str], dict[str, float]]


# --- networks -------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer that stays as it is, and an adapter beside it that starts at zero."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        with torch.no_grad():
            shape = self.down.weight.shape
            self.down.weight.copy_(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its adapter."""
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


class Block(nn.Module):
    """A block of a ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the perceptron."""
        z = self.before(x)
        q, k, v = (
            part(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in (self.q, self.k, self.v)
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(-3, -2).flatten(-2))
        found: Tensor = x + self.back(functional.gelu(self.wide(self.after(x))))
        return found


class Tokens(nn.Module):
    """Sixteen patches of 7 x 7 pixels, and the first block of a small ViT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(49, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.block = Block(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, 16, width) of images (n, 784)."""
        patches = x.unflatten(-1, (4, 7, 4, 7)).movedim(-3, -2).flatten(-2).flatten(-3, -2)
        found: Tensor = self.block(self.patches(patches) + self.place)
        return found


class Ending(nn.Module):
    """The second block, a norm, the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block, self.norm = Block(width, 4), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (n, width)."""
        found: Tensor = self.norm(self.block(tokens)).mean(-2)
        return found


class Network(nn.Module):
    """Backbone, theta, head: one number a sample."""

    def __init__(self, backbone: nn.Module, theta: Tensor, head: Tensor) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        p = len(theta)
        self.theta, self.head = nn.Linear(p, p, bias=False), nn.Linear(p, 1, bias=False)
        with torch.no_grad():
            self.theta.weight.copy_(theta.mT)
            self.head.weight.copy_(head[None])

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n,)."""
        found: Tensor = self.head(self.theta(self.backbone(x)))[:, 0]
        return found


class Family(NamedTuple):
    """One kind of network.

    Attributes:
        name: As on the page.
        side: Of the images that it is given.
        samples: Of an attack.
        cap: Steps after which an attack is given up.
        harms: Harmful pairs for each pair that the backbone learnt; those of full fine-tuning.
        backbone: Made for a pair of digits.
        adapted: Layers that adapters go beside.
        last: Modules of the last block beside theta.
        images: Standardised pixels to inputs.
        dtype: Of weights and runs; kernels are float64.
    """

    name: str
    side: int
    samples: int
    cap: int
    harms: tuple[int, int]
    backbone: Callable[[Tensor, Tensor], nn.Module]
    adapted: tuple[str, ...]
    last: tuple[str, ...]
    images: Callable[[Tensor], Tensor] = lambda x: x
    dtype: torch.dtype = torch.float64


def trained(
    backbone: nn.Module, width: int, x: Tensor, y: Tensor, steps: int, rate: float
) -> nn.Module:
    """The backbone after some steps of Adam on its pair of digits."""
    head = nn.Linear(width, 1).to(x.dtype)
    backbone.to(x.dtype)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        (head(backbone(x[chosen]))[:, 0] - y[chosen]).square().mean().backward()
        optimizer.step()
    return backbone.eval()


def tanh_net(x: Tensor, y: Tensor) -> nn.Module:
    """One hidden layer of 32."""
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Linear(49, 32), nn.Tanh()), 32, x, y, 1000, 3e-3)


def small_vit(x: Tensor, y: Tensor) -> nn.Module:
    """Two blocks of width 32."""
    torch.manual_seed(0)
    return trained(nn.Sequential(Tokens(32), Ending(32)), 32, x, y, 400, 1e-3)


class Blocks(nn.Module):
    """EfficientNet-Lite0 before its last block."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.stem, self.norm = network._conv_stem, network._bn0
        self.blocks = network._blocks[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 192, h, w) of images (n, 3, h, w)."""
        hidden: Tensor = functional.relu6(self.norm(self.stem(x)))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Maps(nn.Module):
    """Its last block, averaged over places, of unit mean square on the first images."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.block, self.scale = network._blocks[-1], 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (n, 320)."""
        found: Tensor = self.block(hidden).mean((2, 3)) * self.scale
        return found


def efficientnet(x: Tensor, y: Tensor) -> nn.Module:
    """With weights of photographs, whatever the pair of digits."""
    network = load_backbone("efficientnet-lite0").model.eval()
    ending = Maps(network)
    backbone = nn.Sequential(Blocks(network), ending)
    with torch.no_grad():
        ending.scale = float(backbone(x[:64]).square().mean()) ** -0.5
    return backbone


def photographs(x: Tensor) -> Tensor:
    """Grey digits as 32 x 32 pixels in three channels, as EfficientNet-Lite takes them."""
    grey = (x.reshape(-1, 1, 28, 28) * PIXEL_STD + PIXEL_MEAN).clamp(0.0, 1.0)
    large = functional.interpolate(grey, size=(32, 32), mode="bilinear")
    return ((large * 255.0 - 127.0) / 128.0).expand(-1, 3, -1, -1)


FAMILIES = (
    Family("tanh network", 7, 200, 6000, (8, 8), tanh_net, ("theta",), ()),
    Family(
        "small ViT",
        28,
        100,
        400,
        (4, 4),
        small_vit,
        tuple(f"backbone.{end}.block.{part}" for end in (0, 1) for part in ("q", "v")),
        ("backbone.1",),
    ),
    Family(
        "EfficientNet-Lite0",
        28,
        48,
        300,
        (4, 2),
        efficientnet,
        ("theta",),
        ("backbone.1",),
        photographs,
        torch.float32,
    ),
)


# --- attacks --------------------------------------------------------------------------------------


def attacked(family: Family, network: Network, attacker: str) -> tuple[nn.Module, list[str]]:
    """The network as this attacker holds it, and the names of what is trained."""
    if attacker == "probe":
        return network, ["head"]
    if attacker == "last block":
        return network, [*family.last, "theta", "head"]
    if attacker == "full":
        return network, ["backbone", "theta", "head"]
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    names = []
    for name in family.adapted:
        parent, _, last = name.rpartition(".")
        adapted = Adapted(network.get_submodule(name), generator).to(family.dtype)  # type: ignore[arg-type]
        setattr(network.get_submodule(parent), last, adapted)
        names += [f"{name}.down", f"{name}.up"]
    return network, [*names, "head"]


def shortened(network: Any, names: Sequence[str], x: Tensor) -> tuple[nn.Module, Tensor]:
    """The network after what this attacker leaves alone, and what goes in there."""
    network = copy.deepcopy(network)
    parts: list[tuple[Any, Any]] = [(network, "theta")]
    if isinstance(network.backbone, nn.Sequential):
        parts = [*((network.backbone, str(k)) for k in range(len(network.backbone))), *parts]
    for owner, name in parts:
        path = name if owner is network else f"backbone.{name}"
        if any(
            f"{given}.".startswith(f"{path}.") or path.startswith(f"{given}.") for given in names
        ):
            break
        with torch.no_grad():
            x = getattr(owner, name)(x)
        setattr(owner, name, nn.Identity())
    return network, x


def measured(
    network: nn.Module, names: Sequence[str], x: Tensor, y: Tensor, rate: float, cap: int
) -> tuple[float, nn.Module]:
    """Steps of gradient descent until the loss is a share of the first, and the network then.

    Infinity where the cap comes first, NaN where the loss runs away.
    """
    network = copy.deepcopy(network)
    chosen = tuple(f"{name}." for name in names)
    weights = [p for name, p in network.named_parameters() if name.startswith(chosen)]
    first = None
    for step in range(cap + 1):
        residual = network(x) - y
        loss = float(residual.detach().square().sum())
        first = loss if first is None else first
        if not loss < 1e3 * first:
            return math.nan, network
        if loss <= SHARE * first:
            return float(step), network
        grads = torch.autograd.grad(0.5 * residual.square().sum(), weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= rate * grad
    return math.inf, network


def thetas(primary: Tensor, harmful: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What is compared, all of Frobenius norm sqrt(p), with mixed features."""
    p = primary.shape[1]
    rotation = torch.linalg.qr(
        torch.randn(p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).Q
    graded = torch.linalg.eigh(harmful.mT @ harmful)[1]
    graded = graded * torch.logspace(0, 1.5, p, dtype=torch.float64)
    found = (
        torch.eye(p, dtype=torch.float64),
        closed_form_theta(primary, harmful, strength=1.0, ridge=1e-4),
        closed_form_theta(primary, harmful, strength=100.0, ridge=1e-4),
        graded,
    )
    for name, theta in zip(THETAS, found, strict=True):
        turned = theta @ rotation
        yield name, turned * (p**0.5 / turned.norm())


class Digits(NamedTuple):
    """Standardised pixels and digits."""

    pixels: Tensor
    labels: Tensor

    def pair(self, pair: tuple[int, int], count: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many images of a pair of digits, and +-1."""
        chosen = torch.nonzero((self.labels == pair[0]) | (self.labels == pair[1]))[:, 0]
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[order[:count]]
        return self.pixels[chosen], torch.where(self.labels[chosen] == pair[0], 1.0, -1.0)


def points(family: Family, digits: Digits, attackers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Predicted and measured steps of every attacker on every task and theta."""
    heads = torch.Generator().manual_seed(2)
    for primary in PRIMARY:
        pixels, labels = digits.pair(primary, 1000, 0)
        backbone = family.backbone(family.images(pixels).to(family.dtype), labels.to(family.dtype))
        for number, harm in enumerate(HARMS[: family.harms[0]]):
            x, y = digits.pair(harm, family.samples, number)
            x, y = family.images(x).to(family.dtype), y.to(family.dtype)
            more, _ = digits.pair(harm, 500, number)
            with torch.no_grad():
                inputs = [family.images(part).to(family.dtype) for part in (pixels, more)]
                features = [backbone(part).to(torch.float64) for part in inputs]
            p = features[0].shape[1]
            for name, theta in thetas(*features):
                head = 0.3 * torch.randn(p, dtype=torch.float64, generator=heads) / p**0.5
                network = Network(backbone, theta, head).to(family.dtype).eval()
                for attacker in attackers:
                    if attacker == "full" and number >= family.harms[1]:
                        continue
                    held, names = attacked(family, network, attacker)
                    held, given = shortened(held, names, x)
                    kernel = empirical_ntk(held, given, names)
                    with torch.no_grad():
                        residual = held(given) - y
                    rate = 0.9 / float(torch.linalg.eigvalsh(kernel)[-1])
                    halved = 0
                    while True:
                        steps, after = measured(held, names, given, y, rate, family.cap)
                        if not math.isnan(steps):
                            break
                        rate, halved = rate / 2.0, halved + 1
                    moved = empirical_ntk(after, given, names) - kernel
                    yield {
                        "network": family.name,
                        "primary": "{}:{}".format(*primary),
                        "harm": "{}:{}".format(*harm),
                        "theta": name,
                        "attacker": attacker,
                        "predicted": kernel_descent_steps(kernel, residual, rate=rate, share=SHARE),
                        "measured": steps,
                        "halved": halved,
                        "kernel_change": float(moved.norm() / kernel.norm()),
                    }


# --- the page -------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]], cap: int) -> dict[str, float]:
    """Rank correlation with an interval, and how far predictions are off.

    Beyond the cap all numbers of steps are one, on both sides. Tasks are drawn anew as a whole: the
    four thetas of one are not independent.
    """
    pairs = np.array(
        [[min(float(r[k]), cap + 1.0) for k in ("predicted", "measured")] for r in rows]
    )
    tasks = [f"{r['primary']} {r['harm']}" for r in rows]
    groups = [np.flatnonzero(np.array(tasks) == task) for task in dict.fromkeys(tasks)]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        chosen = np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])
        draws.append(_spearman(pairs[chosen]))
    seen = pairs[(pairs <= cap).all(1)]
    ended = [r for r in rows if float(r["measured"]) <= cap]
    ratio = np.quantile(seen[:, 0] / np.maximum(seen[:, 1], 1.0), [0.25, 0.5, 0.75])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    changes = [r["kernel_change"] for r in ended]
    return {
        "points": len(rows),
        "beyond": int((pairs[:, 1] > cap).sum()),
        "foretold_beyond": int((pairs[:, 0] > cap).sum()),
        "in_ratio": len(seen),
        "spearman": _spearman(pairs),
        "low": float(low),
        "high": float(high),
        "ratio": float(ratio[1]),
        "ratio_low": float(ratio[0]),
        "ratio_high": float(ratio[2]),
        "ratio_ended": float(
            np.median([float(r["predicted"]) / max(float(r["measured"]), 1.0) for r in ended])
        ),
        "kernel_change": float(np.median(changes)),
        "halved": sum(r["halved"] > 0 for r in rows),
    }


def _spearman(pairs: np.ndarray) -> float:
    if (np.ptp(pairs, axis=0) == 0.0).any():
        return math.nan
    return float(np.corrcoef(rankdata(pairs, axis=0).T)[0, 1])


def _numbers(text: Any) -> float:
    return math.inf if text in (None, "inf", "Infinity") else float(text)


def summaries(results: dict[str, Any]) -> Summaries:
    """By network and attacker."""
    found = {}
    for name, cap in results["caps"].items():
        for attacker in ATTACKERS:
            rows = [
                {**r, **{k: _numbers(r[k]) for k in ("predicted", "measured")}}
                for r in results["rows"]
                if (r["network"], r["attacker"]) == (name, attacker)
            ]
            if rows:
                found[name, attacker] = summary(rows, cap)
    return found


def answer(found: Summaries) -> str:
    """The first sentence of the page."""

    def over(attackers: Sequence[str], key: str) -> list[float]:
        return [s[key] for (_, who), s in found.items() if who in attackers]

    def span(attacker: str) -> str:
        ends = [f"{end(over([attacker], 'spearman')):.2f}" for end in (min, max)]
        return " to ".join(dict.fromkeys(ends))

    ratios = over(ATTACKERS, "ratio_ended")
    exact = all(abs(ratio - 1.0) < 0.01 for ratio in over(["probe"], "ratio_ended"))
    # Of all runs that ended: without predictions beyond the cap ratios are too small.
    order = "yes" if min(over(ATTACKERS, "spearman")) > 0.5 else "not always"
    number = "only for a head alone" if exact and max(ratios) > 1.5 else "see the ratios"
    worst = next(name for (name, _), s in found.items() if s["ratio_ended"] == max(ratios))
    off = [found[worst, who]["ratio_ended"] for who in ATTACKERS[1:]]
    return (
        f"In order, {order}; in number, {number}: rank correlation {span('probe')} for the head, "
        f"{span('last block')} for the last block, {span('LoRA')} for LoRA and {span('full')} for "
        f"everything, but where it is furthest off ({worst}) training beyond the head is "
        f"{min(off):.0f} to {max(off):.0f} times as fast as foretold."
    )


def goal(found: Summaries) -> str:
    """Whether the goal was met."""
    aimed = {key: s for key, s in found.items() if key[1] in ("probe", "last block")}
    met = all(s["spearman"] >= GOAL for s in aimed.values())
    words = f"The goal was {GOAL} for head and last block; point estimates "
    words += "meet it" if met else "do not all meet it"
    for (name, attacker), s in aimed.items():
        if s["low"] < GOAL:
            words += (
                f", but the interval of the {name} for the {attacker}, {s['low']:.2f} to "
                f"{s['high']:.2f}, includes less"
            )
    return f"{words}."


def table(found: Summaries) -> str:
    """A row for each network and attacker."""
    lines = [
        "| network | attacker | points (beyond the cap; rate halved) | predicted beyond the cap "
        "| Spearman | points in the ratio | predicted / measured | of all that ended "
        "| kernel moves by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, attacker), s in found.items():
        lines.append(
            f"| {name} | {attacker} | {s['points']} ({s['beyond']}; {s['halved']}) | "
            f"{s['foretold_beyond']} | {s['spearman']:.2f} [{s['low']:.2f}, {s['high']:.2f}] | "
            f"{s['in_ratio']} | {s['ratio']:.2f} ({s['ratio_low']:.2f} to {s['ratio_high']:.2f}) | "
            f"{s['ratio_ended']:.2f} | {s['kernel_change']:.2f} |"
        )
    return "\n".join(lines)


def theta_table(results: dict[str, Any]) -> str:
    """Median measured (predicted) steps by theta."""
    lines = [
        f"| network | theta | {' | '.join(ATTACKERS)} |",
        f"|---|---|{'---|' * len(ATTACKERS)}",
    ]
    for name, cap in results["caps"].items():
        for theta in THETAS:
            cells = []
            for attacker in ATTACKERS:
                rows = [
                    r
                    for r in results["rows"]
                    if (r["network"], r["theta"], r["attacker"]) == (name, theta, attacker)
                ]
                steps = [
                    np.median([_numbers(r[k]) for r in rows]) for k in ("measured", "predicted")
                ]
                cells.append(f"{_count(steps[0], cap)} ({_count(steps[1], cap)})")
            lines.append(f"| {name} | {theta} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(steps: Any, cap: int) -> str:
    return f"{steps:.0f}" if steps <= cap else f"> {cap}"


def parts(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    found = summaries(results)
    return {
        "answer": answer(found),
        "goal": goal(found),
        "table": table(found),
        "steps": theta_table(results),
    }


def main() -> None:
    """Run the command line."""
    parser = result_parser(__doc__, OUT)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; fetched where omitted")
    parser.add_argument("--networks", nargs="*", default=[family.name for family in FAMILIES])
    arguments = parser.parse_args()
    one_thread()
    if fills(arguments, parts):
        return
    rows, caps = [], {}
    for family in FAMILIES:
        if family.name not in arguments.networks:
            continue
        images, labels = load_mnist(arguments.mnist, size=family.side)
        digits = Digits(torch.from_numpy(images[:20000]), torch.from_numpy(labels[:20000]))
        for row in points(family, digits, ATTACKERS):
            rows.append(row)
            print(*row.values(), flush=True)
        caps[family.name] = family.cap
    command = "python -m benchmarks.protection.ntk --mnist DATA/mnist"
    write(arguments.out, command, {"share": SHARE, "rank": RANK, "caps": caps, "rows": rows})


if __name__ == "__main__":
    main()
