"""What runs of the text-to-image wing can be asked for; all of it is checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, get_args

from immunize_ext.runtime import named_device
from immunize_ext.settings import check_types, hint, settings_of
from immunize_ext.text_to_image.attacks import (
    ATTACKS,
    AttackName,
    TextToImageAttack,
    asked_by,
    registered_name,
)
from immunize_ext.text_to_image.attacks.prompts import PromptVariant
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
from immunize_ext.text_to_image.immunizers import (
    METHODS,
    LossAscent,
    MethodName,
    TextToImageImmunizer,
)

DIGITS = "digits"

Dtype = Literal["saved", "float32", "float16", "bfloat16"]

# Whatever is claimed for a method has to be more than this.
BASELINE = LossAscent.method


def _check_attacks(
    names: Sequence[str], attack_settings: Mapping[str, Any], prompts: Sequence[str]
) -> None:
    for name in (*(() if tuple(names) == ("all",) else names), *attack_settings):
        ATTACKS.find(name, "attacks")
    if len(set(prompts)) < len(prompts):
        raise ValueError(f"prompts must be different wordings, got {list(prompts)}")
    known = get_args(PromptVariant)
    for prompt in prompts:
        # A text without a space is a wording misspelt sooner than a prompt.
        if " " not in prompt and prompt not in known and (near := hint(prompt, known)):
            raise ValueError(f"prompts must be wordings or texts, got {prompt!r}{near}")


@dataclass(frozen=True)
class ModelSettings:
    """A model and its concepts.

    Attributes:
        model: Folder of a pipeline, its name on huggingface.co (``owner/model``, fetched once), or
            ``digits`` for the one that comes with the package.
        concepts: A concepts.yaml; for ``digits`` the targets say it.
        targets: Names of concepts, of the file or of digits; all of the file when empty.
        device: Where to compute: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: Data type of the weights; ``saved`` for the one they were saved in.
        variant: Which files of weights to read, such as ``fp16``; the only one when omitted.
        image_size: Side that images of the concepts are resized to; the model's own when omitted.
    """

    model: str = DIGITS
    concepts: str | None = None
    targets: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: Dtype = "saved"
    variant: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        named_device(self.device, here=False)  # a file may come from another machine
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must be different concepts, got {list(self.targets)}")


@dataclass(frozen=True)
class RunSettings(ModelSettings):
    """One immunization of a text-to-image model, and how it is judged.

    Attributes:
        method: How to immunize.
        settings: Settings of the method by name.
        control: A concept that is erased and not immunized: the specificity control.
        new_word: A concept taught under a new word: may benign users still adapt?
        erase: Whether targets and control are erased first.
        caption_count: Use only so many captions for C_reg; all when omitted.
        attacks: Attacks to judge by; the first is the one that headline numbers are about; ``all``
            for all.
        attack_settings: Settings of single attacks by name.
        prompts: Wordings that each attack is repeated with: ``canonical``, ``paraphrase``,
            ``rare_token``, ``name_left_out``, ``unrelated_word`` or a text, ``{}`` in it the name;
            the attack's own alone when empty.
        attack_steps: Steps of each attack.
        evaluate_at: Steps at which it is judged; four in equal ratios when empty.
        seeds: Seeds: an immunization and its attacks for each.
        images: Images for each score.
        sampling_steps: Denoising steps of an image.
        guidance: Guidance scale.
        threshold: Score at which a concept counts as taught again.
        clip: Folder or hub name of a CLIP model to judge with, for models without a judge.
        dino: Folder or hub name of a DINO model, likewise.
    """

    method: MethodName | str = "mima"
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: str | None = None
    new_word: str | None = None
    erase: bool = True
    caption_count: int | None = None
    attacks: tuple[AttackName | Literal["all"] | str, ...] = ("lora", "full_fine_tuning")
    attack_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: tuple[PromptVariant | str, ...] = ()
    attack_steps: int = 40
    evaluate_at: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    images: int = 32
    sampling_steps: int = 20
    guidance: float = 1.5
    threshold: float = 0.8
    clip: str | None = None
    dino: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        METHODS.find(self.method, "method")
        _check_attacks(self.attacks, self.attack_settings, self.prompts)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different seeds, got {list(self.seeds)}")
        for name in ("attack_steps", "images", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.caption_count is not None and self.caption_count < 1:
            raise ValueError(f"caption_count must be at least 1, got {self.caption_count}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0.0):
            raise ValueError(f"guidance must be finite and at least 0, got {self.guidance}")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")
        steps = list(self.evaluate_at)
        if steps and not (
            steps == sorted(set(steps)) and 0 <= steps[0] <= steps[-1] <= self.attack_steps
        ):
            raise ValueError(
                f"evaluate_at must ascend from 0 to at most attack_steps={self.attack_steps}, got "
                f"{steps}"
            )
        if not self.attacks:
            raise ValueError("attacks must name at least one attack, got none")

    def immunizer(self, seed: int) -> TextToImageImmunizer:
        """The method with its settings, for one seed.

        Raises:
            ValueError: If the method or a setting is unknown or out of range.
        """
        if "seed" in self.settings:
            raise ValueError("settings: seed must be left out; seeds are those of the run")
        values = self._usual(METHODS.find(self.method, "method")) | {**self.settings}
        return METHODS.build(self.method, values, "method", seed=seed)

    def _usual(self, entry: Any) -> dict[str, Any]:
        """Rates of a method or an attack where nothing else is said.

        Their defaults are those of the digits; on them another model's training diverges.
        """
        return {} if self.model == DIGITS else {**getattr(entry, "usual_rates", {})}

    def rates(self) -> str | None:
        """On a model of one's own: the rates of the method and of each attack, in a line."""
        if self.model == DIGITS:
            return None
        shown = []
        for name, entry in [
            (self.method, self.immunizer(self.seeds[0])),
            *((attack.name, attack) for attack in self.chosen_attacks()),
        ]:
            known = [*getattr(entry, "usual_rates", {})]
            if known:
                values = ", ".join(f"{key} {getattr(entry, key):g}" for key in known)
                shown.append(f"{name} {values}")
        return "rates: " + "; ".join(shown) if shown else None

    def chosen_attacks(self) -> list[TextToImageAttack]:
        """The attacks with their settings and wordings, in the order given.

        Raises:
            ValueError: If a name or a setting is unknown, an attack comes twice, or one has
                settings that is not run.
        """
        names = tuple(ATTACKS) if self.attacks == ("all",) else self.attacks
        if len(set(names)) < len(names):
            raise ValueError(f"attacks must be different attacks, got {list(names)}")
        idle = [name for name in self.attack_settings if name not in names]
        if idle:
            raise ValueError(
                f"attacks: {idle[0]} must be run to have settings; name it among attacks"
            )
        built = [
            ATTACKS.build(
                name,
                self._usual(ATTACKS.find(name, "attacks")) | {**self.attack_settings.get(name, {})},
                "attacks",
            )
            for name in names
        ]
        return asked_by(built, self.prompts)

    def steps_to_judge(self) -> tuple[int, ...]:
        """Steps at which attacks are judged."""
        last = self.attack_steps
        return self.evaluate_at or tuple(sorted({0, max(1, last // 4), max(1, last // 2), last}))

    def baseline(self) -> RunSettings:
        """Plain loss ascent under the primary attack, with the settings that it shares."""
        known = settings_of(LossAscent)
        shared = {name: value for name, value in self.settings.items() if name in known}
        first = registered_name(self.chosen_attacks()[0].name)
        own = {name: v for name, v in self.attack_settings.items() if name == first}
        return replace(
            self,
            method=BASELINE,
            settings=shared,
            attacks=(first,),
            attack_settings=own,
            prompts=self.prompts[:1],
        )


@dataclass(frozen=True)
class EraseSettings(ModelSettings):
    """Erasure of concepts from a text-to-image model (UCE).

    Attributes:
        ridge: lambda of UCE, in the units of a squared text feature.
        erase_scale: Weight of erased tokens.
        preserve_scale: Weight of what is kept.
    """

    ridge: float = 0.1
    erase_scale: float = 1.0
    preserve_scale: float = 0.1


@dataclass(frozen=True)
class AttackSettings:
    """Further attacks on a finished run.

    Attributes:
        attacks: Attacks to run; ``all`` for all.
        attack_settings: Settings of single attacks by name.
        prompts: Wordings that each attack is repeated with; the attack's own alone when empty.
        budgets: Steps at which they are judged, the last of which ends them; those of the run when
            empty.
        images: Images for each score; as many as the run had when omitted.
        search: Attempts at better settings of each attack on the immunized model, judged at the
            last step with a seed of their own; the best is then measured like any attack. None
            when 0.
        search_seconds: Time for the attempts of each attack; no bound when omitted.
        most_lost: What a searched attack may lose of what the model shall still draw; 1 for no
            bound. LoRA on a few images of one digit alone loses most of the others.
        device: Where to compute; where the run did when omitted.
    """

    attacks: tuple[AttackName | Literal["all"] | str, ...] = ("all",)
    attack_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    images: int | None = None
    search: int = 0
    search_seconds: float | None = None
    most_lost: float = 1.0
    device: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _check_attacks(self.attacks, self.attack_settings, self.prompts)
        if self.search < 0:
            raise ValueError(f"search must be at least 0 attempts, got {self.search}")
        if not (self.search_seconds is None or 0.0 < self.search_seconds < math.inf):
            raise ValueError(f"search_seconds must be positive, got {self.search_seconds}")
        if not 0.0 <= self.most_lost <= 1.0:
            raise ValueError(f"most_lost must lie in [0, 1], got {self.most_lost}")
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets must be at least 1 step, got {min(self.budgets)}")


@dataclass(frozen=True)
class SweepSettings(RunSettings):
    """Runs at every combination of the given values, and for every seed.

    Attributes:
        counts: Numbers of concepts.
        captions: Numbers of captions of C_reg.
        inner_steps: Inner steps of the method.
        ridges: Ridges of its merge.
    """

    counts: tuple[int, ...] = ()
    captions: tuple[int, ...] = ()
    inner_steps: tuple[int, ...] = ()
    ridges: tuple[float, ...] = ()

    def points(self) -> dict[str, RunSettings]:
        """The settings of every point, checked, by a name that is fit for a file.

        Raises:
            ValueError: If a value is out of range.
        """
        common = {name: getattr(self, name) for name in settings_of(RunSettings)}
        found = {}
        for count, captions, steps, ridge, seed in product(
            self.counts or (None,),
            self.captions or (None,),
            self.inner_steps or (None,),
            self.ridges or (None,),
            self.seeds,
        ):
            settings = {"inner_steps": steps, "ridge": ridge}
            settings = {name: value for name, value in settings.items() if value is not None}
            point = replace(
                RunSettings(**common),
                settings={**self.settings, **settings},
                seeds=(seed,),
                targets=self._targets(count),
                caption_count=self.caption_count if captions is None else captions,
            )
            point.immunizer(seed)
            axes = {"count": count, "captions": captions, **settings}
            words = [f"{name}{value:g}" for name, value in axes.items() if value is not None]
            found["-".join([*words, f"seed{seed}"])] = point
        return found

    def _targets(self, count: int | None) -> tuple[str, ...]:
        if count is None:
            return self.targets
        available = self.targets or (DIGIT_NAMES if self.model == DIGITS else ())
        if not 1 <= count <= len(available):
            raise ValueError(
                f"counts: must be 1 to {len(available)} concepts, got {count}; name the concepts "
                "with targets"
            )
        return tuple(available[:count])
