"""Textual Inversion: a new word, of which the embedding alone is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from immunize_ext.text_to_image.attacks.adaptation import Adaptation, Prepared
from immunize_ext.text_to_image.attacks.prior import PriorPreservation
from immunize_ext.text_to_image.attacks.prompts import attack_prompt, replace_name
from immunize_ext.text_to_image.attacks.target import Target
from immunize_ext.text_to_image.attacks.trainables import NewToken, Trainables
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import linear_layers, parameters_of


@dataclass(frozen=True, kw_only=True)
class NewWordAttack(Adaptation):
    """What attacks with a new word for each concept share.

    Attributes:
        token: The words; ``{}`` is the number of the concept, from 1.
        initializer: Text that a word starts as: the concept's ``"anchor"`` or ``"name"``, or any
            other text; empty for the mean of all words.
    """

    token: str = "<new{}>"
    initializer: str = "anchor"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if self.prompt in ("rare_token", "name_left_out"):
            raise ValueError(
                f"{self.name}: prompt must leave room for the new word, got {self.prompt!r}; use "
                "'canonical', 'paraphrase' or a text with the concept's name"
            )

    def _word(self, index: int) -> str:
        return self.token.replace("{}", str(index + 1))

    def prompts(self, target: Target | Sequence[Concept]) -> dict[str, str]:
        """What this attack trains and generates each concept with, the new word in its place.

        Args:
            target: What it wants, in the order given to :meth:`run`: words are numbered. Another
                wording than the one in the settings has to hold the name.

        Returns:
            Concept name to prompt.
        """
        wanted = Target.of(target)
        wording = self.prompt if wanted.prompt is None else wanted.prompt
        return {
            c.name: replace_name(attack_prompt(c, wording), c.words, self._word(index))
            for index, c in enumerate(wanted.concepts)
        }

    def _new_tokens(
        self, model: TextToImage, concepts: Sequence[Concept]
    ) -> tuple[list[NewToken], dict[str, nn.Parameter]]:
        if len(concepts) > 1 and "{}" not in self.token:
            raise ValueError(
                f"{self.name}: token must hold {{}} for several concepts, got {self.token!r}"
            )
        tokens = []
        for index, concept in enumerate(concepts):
            known = {"anchor": concept.anchor or "", "name": concept.spoken}
            start = known.get(self.initializer, self.initializer)
            tokens.append(NewToken(model, self._word(index), start))
        return tokens, {name: row for token in tokens for name, row in token.named().items()}


@dataclass(frozen=True, kw_only=True)
class TextualInversionAttack(NewWordAttack):
    """Learn the embedding of a new word; nothing else of the model moves.

    Source:
        Gal et al., ICLR 2023.
    """

    labels: ClassVar[Mapping[str, str]] = {"textual_inversion": "Textual Inversion"}

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 5e-4}

    name: str = "textual_inversion"
    learning_rate: float = 2e-2
    weight_decay: float = 0.0

    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        tokens, rows = self._new_tokens(model, target)
        return Prepared(Trainables(rows), tokens=tokens, text_moves=True)


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionAttack(NewWordAttack):
    """Train K and V of cross-attention together with a new word.

    Weights stay in the layers they belong to, so attention processors are the model's own.

    Source:
        Kumari et al., CVPR 2023.
    """

    labels: ClassVar[Mapping[str, str]] = {"custom_diffusion": "Custom Diffusion"}

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 1e-5}

    name: str = "custom_diffusion"
    learning_rate: float = 3e-3
    prior: PriorPreservation | None = field(default_factory=PriorPreservation)

    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        tokens, rows = self._new_tokens(model, target)
        chosen = parameters_of(model.unet, linear_layers(self.name, model.unet, "kv"))
        named = {
            f"{model.backbone.component}.{name}": parameter for name, parameter in chosen.items()
        }
        return Prepared(Trainables(named | rows), tokens=tokens, text_moves=True)
