"""What an optimizer moves: float32 leaves, whatever the model's dtype is.

A parameter in half precision gets a float32 master: an Adam step of 1e-5 on a bfloat16 weight of
size 1 is rounded away. The model computes with the half-precision copy, the optimizer moves the
master, and the copy follows after each step. A float32 parameter is its own master.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)

# Gradients in float16 vanish below 6e-8; they are computed of 2^10 times the loss.
_FLOAT16_SCALE = 1024.0

# How many names an error lists.
_LISTED = 5


class Trainables:
    """Named parameters under attack.

    Args:
        parameters: Name to parameter; ``requires_grad`` is set on each.
        silent_at_first: Names whose first gradient is zero by construction (LoRA's first factor,
            while the second is zero). Their second gradient must not be.
        may_be_unused: Names that the loss need not depend on.

    Attributes:
        loss_scale: Factor on the loss before the backward pass; taken out of the gradients again.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        silent_at_first: Collection[str] = (),
        may_be_unused: Collection[str] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self.silent_at_first = frozenset(silent_at_first)
        self.may_be_unused = frozenset(may_be_unused)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            master: Tensor = parameter
            if parameter.dtype in _HALF:
                master = parameter.detach().to(torch.float32).clone().requires_grad_(True)
            self.masters[name] = master
        self.loss_scale = 1.0
        self._dtypes = {name: p.dtype for name, p in self.parameters.items()}

    @property
    def leaves(self) -> list[Tensor]:
        """What goes into the optimizer."""
        return list(self.masters.values())

    def compute_in(self, dtype: torch.dtype) -> None:
        """Choose the loss scale for the dtype that the backward pass runs in."""
        self.loss_scale = _FLOAT16_SCALE if dtype == torch.float16 else 1.0

    def clear_gradients(self) -> None:
        """Forget gradients of masters and copies."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def collect_gradients(self) -> None:
        """Bring gradients to the masters, in their dtype and without the loss scale."""
        scale = self.loss_scale
        for name, parameter in self.parameters.items():
            gradient, master = parameter.grad, self.masters[name]
            if gradient is None:
                continue
            if master is not parameter:
                parameter.grad = None
                gradient = gradient.to(master.dtype)
            master.grad = gradient if scale == 1.0 else gradient / scale

    def publish(self) -> None:
        """Write the masters to the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def check_gradients(self, function: str, step: int) -> None:
        """Raise if something that shall move got no gradient.

        Raises:
            RuntimeError: Naming the first few of them.
        """
        missing, zero = [], []
        for name, master in self.masters.items():
            if name in self.may_be_unused:
                continue
            if master.grad is None:
                missing.append(name)
            elif (step > 1 or name not in self.silent_at_first) and not bool(master.grad.any()):
                zero.append(name)
        for names, what in ((missing, "no gradient"), (zero, "a gradient of zeros")):
            if names:
                raise RuntimeError(
                    f"{function}: every trainable must get a gradient at step {step}, got {what} "
                    f"for {_listed(names)}; the loss does not depend on it, or a checkpointed or "
                    "detached part cuts it off"
                )

    def check_finite(self, function: str, step: int) -> None:
        """Raise if a gradient is not finite.

        Raises:
            FloatingPointError: Naming the first few of them.
        """
        bad = [
            name
            for name, master in self.masters.items()
            if master.grad is not None and not bool(torch.isfinite(master.grad).all())
        ]
        if bad:
            raise FloatingPointError(
                f"{function}: gradients must be finite, got NaN or infinity for {_listed(bad)} at "
                f"step {step}; lower learning_rate"
            )

    def check_dtypes(self, function: str) -> None:
        """Raise if someone changed the dtype of what is being trained.

        Raises:
            RuntimeError: Naming the first few of them.
        """
        changed = [name for name, p in self.parameters.items() if p.dtype != self._dtypes[name]]
        if changed:
            raise RuntimeError(
                f"{function}: evaluate must leave the model under attack as it is, got another "
                f"dtype for {_listed(changed)}; evaluate a clone"
            )


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def freeze(modules: Iterable[nn.Module]) -> None:
    """Nothing of these modules is trained until someone says so."""
    for module in modules:
        module.requires_grad_(False)
