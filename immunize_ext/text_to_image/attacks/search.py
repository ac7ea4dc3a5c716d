"""Settings of an attack searched for on the model that it attacks, by Optuna.

A protection is worth what it holds against whoever tunes the attack on it: a search on the
unprotected model finds what that model minds most. What a search finds is the best of many noisy
scores, and so too good; it has to be measured again with other seeds before it is quoted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from immunize_ext._extras import require_extra
from immunize_ext.seams import Progress
from immunize_ext.settings import plain
from immunize_ext.storage import digest
from immunize_ext.text_to_image.attacks.adaptation import Adaptation

# A learning rate is searched for on both sides of the attack's own, by so many times.
RATES = 10.0

# Of other settings, those that an attack has are chosen from these.
CHOICES: dict[str, tuple[Any, ...]] = {
    "batch_size": (4, 8, 20),
    "snr_gamma": (None, 5.0),
    "weight_decay": (0.0, 0.01),
    "rank": (1, 4, 16),
    "init": ("kaiming", "gaussian"),
}


class Outcome(NamedTuple):
    """What one attempt got.

    Attributes:
        score: Success, the larger the better for the attacker.
        lost: How much worse the model became at what it shall still draw.
    """

    score: float
    lost: float


@dataclass(frozen=True)
class SettingsSearch:
    """An attack with the settings that served it best.

    Attributes:
        attack: The attack with these settings.
        settings: Those that were searched over.
        score: The best score among attempts; the maximum of noisy ones, and so too high.
        lost: What that attempt cost the model's other uses.
        own_score: Score of the attack's own settings, the first attempt; NaN if it diverged.
        trials: Attempts, also those of an earlier call.
        diverged: How many of them failed because the loss or a gradient was not finite.
        seconds: Time of this call.
    """

    attack: Adaptation
    settings: dict[str, Any]
    score: float
    lost: float
    own_score: float
    trials: int
    diverged: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the attack itself, for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "attack"}
        return {"attack": self.attack.name, **found}


def search_settings(
    attack: Adaptation,
    attempt: Callable[[Adaptation], Outcome],
    *,
    trials: int,
    most_lost: float = math.inf,
    seconds: float | None = None,
    made_of: str = "",
    journal: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SettingsSearch:
    """Search for the settings with which an attack succeeds most.

    Args:
        attack: The attack; its own settings are tried first, so the result is no worse, unless
            they lose too much.
        attempt: Runs an attack and says what it got.
        trials: Number of attempts, with those that the journal holds already.
        most_lost: An attempt that loses more of the model's other uses counts for less than every
            one that does not. No bound when omitted: who wants one concept alone does not mind.
        seconds: Stop after that much time, whatever is left of the attempts; at least one is made.
        made_of: Digest of all that decides an outcome beside the attack's settings; attempts of
            another digest in the same journal are left alone.
        journal: File of all attempts; the same call goes on with one that was cut off.
        seed: Of the sampler (a tree-structured Parzen estimator). A search that was cut off and
            went on tries other settings than one that was not.
        progress: Called with what was tried and the share done so far.

    Returns:
        The attack with the best settings.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ValueError: If ``trials`` is below 1, or every attempt diverged.

    Source:
        Akiba et al., Optuna, KDD 2019.

    Example:
        >>> from immunize_ext.text_to_image.attacks import LoRAAttack
        >>> def attempt(attack):  # in place of a run: rank 16 is best, far beyond 0.02 all is lost
        ...     return Outcome(attack.rank / 16, attack.learning_rate)
        >>> found = search_settings(LoRAAttack(), attempt, trials=30, most_lost=0.02)
        >>> found.settings["rank"], found.score, found.lost <= 0.02, found.own_score
        (16, 1.0, True, 0.25)
    """
    name = "search_settings"
    if trials < 1:
        raise ValueError(f"{name}: trials must be at least 1, got {trials}")
    optuna = require_extra("optuna", extra="search", purpose="the search for attack settings")
    started = time.monotonic()
    space = _choices(attack)
    key = digest(made_of, type(attack).__qualname__, plain(attack), most_lost)
    study = _study(optuna, key, journal, seed)
    own = {setting: getattr(attack, setting) for setting in ("learning_rate", *space)}
    if not _ended(study):
        study.enqueue_trial(own)

    def objective(trial: Any) -> float:
        rate = attack.learning_rate
        chosen = {setting: trial.suggest_categorical(setting, of) for setting, of in space.items()}
        chosen["learning_rate"] = trial.suggest_float(
            "learning_rate", rate / RATES, rate * RATES, log=True
        )
        try:
            found = attempt(replace(attack, **chosen))
        except FloatingPointError:
            trial.set_user_attr(_OUTCOME, None)
            raise
        trial.set_user_attr(_OUTCOME, list(found))
        trial.set_constraint(_KEEPS, max(found.lost - most_lost, -1.0))
        return found.score

    def tell(study: Any, trial: Any) -> None:
        if progress is not None:
            progress(f"searching {attack.name}: attempt {trial.number + 1}", _ended(study) / trials)

    go_on = partial(study.optimize, objective, catch=(FloatingPointError,), callbacks=[tell])
    if not _ended(study):
        go_on(n_trials=1)  # its own settings, however little time there is
    time_left = None if seconds is None else seconds - (time.monotonic() - started)
    if (left := trials - _ended(study)) > 0 and (time_left is None or time_left > 0.0):
        go_on(n_trials=left, timeout=time_left)
    known = [trial for trial in study.trials if trial.user_attrs.get(_OUTCOME)]
    if not known:
        raise ValueError(
            f"{name}: attack must not diverge at every setting, got {_ended(study)} attempts that "
            "did; give it a smaller learning_rate"
        )
    best = max(known, key=lambda t: (t.constraints[_KEEPS] <= 0.0, t.value, -t.number))
    score, lost = best.user_attrs[_OUTCOME]
    return SettingsSearch(
        replace(attack, **best.params),
        dict(best.params),
        score,
        lost,
        next((trial.value for trial in known if trial.params == own), math.nan),
        _ended(study),
        _ended(study) - len(known),
        time.monotonic() - started,
    )


# What the journal keeps of an attempt beside its settings and its score.
_OUTCOME, _KEEPS = "outcome", "keeps other uses"


def _ended(study: Any) -> int:
    """Attempts that came to an end, diverged or not; one that was cut off is made again."""
    return sum(_OUTCOME in trial.user_attrs for trial in study.trials)


def _choices(attack: Adaptation) -> dict[str, tuple[Any, ...]]:
    """Of the settings that the attack has, the values to choose from, its own among them."""
    return {
        name: tuple(dict.fromkeys((getattr(attack, name), *choices)))
        for name, choices in CHOICES.items()
        if hasattr(attack, name)
    }


def _study(optuna: Any, key: str, journal: str | Path | None, seed: int) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = None
    if journal is not None:
        Path(journal).parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        storage = optuna.storages.JournalStorage(backend)
    sampler = optuna.samplers.TPESampler(seed=seed)
    return optuna.create_study(
        direction="maximize", study_name=key, storage=storage, sampler=sampler, load_if_exists=True
    )
