"""New tokens: a word that a tokenizer keeps whole and whose embedding alone is trained.

The trained row is a float32 leaf beside the embedding matrix, put in its place by a forward hook.
No other row has a gradient, an optimizer state or weight decay, so the text encoder stays bit for
bit what it was.

Three traps on the way: ``add_tokens`` lower-cases what it adds unless the token says
``normalized=False``, after which "<V1>" is split into pieces; resizing fills new rows from the
global random generator; and CLIP encoders with the historic ``eos_token_id`` 2 take the largest id
for the end of the text, which a new id would be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from immunize_ext._extras import require_extra
from immunize_ext.models.text_to_image import TextToImage

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
