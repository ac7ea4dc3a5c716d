"""What an optimizer moves: float32 leaves, whatever the model's dtype is.

A parameter in half precision gets a float32 master: an Adam step of 1e-5 on a bfloat16 weight of
size 1 is rounded away. The model computes with the half-precision copy, the optimizer moves the
master, and the copy follows after each step. A float32 parameter is its own master.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from immunize_ext._extras import require_extra
from immunize_ext.text_to_image.model import TextToImage

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

    def take(self) -> None:
        """Read the masters anew from the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    self.masters[name].copy_(parameter)

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


# The end-of-text id of old CLIP configurations, which stands for "the largest id".
_HISTORIC_EOS = 2


class NewToken:
    """One new word in every tokenizer and text encoder of a model.

    Args:
        model: The model; its tokenizers and text encoders are changed in place, so give a clone.
        token: The word, e.g. ``"<new1>"``.
        initializer: Text whose tokens' mean embedding the new row starts from; the mean of all
            embeddings when empty.

    Attributes:
        token: The word.
        ids: Its id in each tokenizer.
        rows: Its embedding for each text encoder, float32 (float64 in a float64 model), ``(d,)``.

    Raises:
        ValueError: If the word is known already, or a tokenizer does not keep it whole.
    """

    def __init__(self, model: TextToImage, token: str, initializer: str = "") -> None:
        self.token = token
        self.ids: list[int] = []
        self.rows: list[nn.Parameter] = []
        self._encoders = list(model.text_encoders)
        self._handles: list[RemovableHandle] = []
        for tokenizer, encoder in zip(model.tokenizers, self._encoders, strict=True):
            # Before the word is added: ids of the initializer in the old vocabulary.
            wanted = _plain_ids(tokenizer, initializer) if initializer else []
            self.ids.append(_add(tokenizer, token))
            weight = encoder.get_input_embeddings().weight.detach()
            start = (weight[wanted] if wanted else weight).to(torch.float64).mean(0)
            _make_room(encoder, self.ids[-1], start)
            _end_of_text(encoder, tokenizer)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self.rows.append(nn.Parameter(start.to(dtype)))
        self._attach()

    def _attach(self) -> None:
        for encoder, index, row in zip(self._encoders, self.ids, self.rows, strict=True):

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                output: Tensor,
                index: int = index,
                row: Tensor = row,
            ) -> Tensor:
                here = (args[0] == index).unsqueeze(-1)
                return torch.where(here, row.to(output.dtype), output)

            self._handles.append(encoder.get_input_embeddings().register_forward_hook(hook))

    def named(self) -> dict[str, nn.Parameter]:
        """Rows by name, ``token.<text encoder>.<word>``."""
        return {f"token.{i}.{self.token}": row for i, row in enumerate(self.rows)}

    def settle(self) -> None:
        """Write the rows into the embedding matrices and take the hooks away."""
        with torch.no_grad():
            for encoder, index, row in zip(self._encoders, self.ids, self.rows, strict=True):
                encoder.get_input_embeddings().weight[index].copy_(row)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens, unknown words left out."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    # CLIP's unknown token is its end of text; a word-level tokenizer's says nothing of the word.
    return [index for index in ids if index != unknown]


def _add(tokenizer: Any, token: str) -> int:
    tokenizers = require_extra("tokenizers", extra="diffusion", purpose="new tokens")
    if token in tokenizer.get_vocab():
        raise ValueError(
            f"NewToken: token must be new to the tokenizer, got {token!r}; choose another word"
        )
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False)])
    index = int(tokenizer.convert_tokens_to_ids(token))
    for text in (token, f"a {token} a"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(index) != 1 or (text == token and len(ids) != 1):
            raise ValueError(
                f"NewToken: the tokenizer must keep token whole, got ids {ids} for {text!r}; "
                "choose another word"
            )
    return index


def _make_room(encoder: Any, index: int, row: Tensor) -> None:
    embedding = encoder.get_input_embeddings()
    if index >= embedding.num_embeddings:
        # Rows of its own choosing are overwritten below; its draw must not disturb anyone's.
        with torch.random.fork_rng(devices=[]):
            encoder.resize_token_embeddings(index + 1, mean_resizing=False)
        embedding = encoder.get_input_embeddings()
        embedding.requires_grad_(False)
    with torch.no_grad():
        embedding.weight[index].copy_(row)


def _end_of_text(encoder: nn.Module, tokenizer: Any) -> None:
    actual = tokenizer.eos_token_id
    if actual is None or actual == _HISTORIC_EOS:
        return
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == _HISTORIC_EOS:
            module.eos_token_id = actual
    config: Any = encoder.config
    if getattr(config, "eos_token_id", None) == _HISTORIC_EOS:
        config.eos_token_id = actual
