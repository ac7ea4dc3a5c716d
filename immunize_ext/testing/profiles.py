"""Hypothesis profiles: how many examples, and whether a red run can be repeated.

* ``dev``: 25 examples, for a quick run at the desk.
* ``ci``: 100 examples.
* ``nightly``: 2000 random examples.

The first two are derandomized: every run sees the same examples, so that a red run is red again and
nobody's first ``make test`` meets an input that no run has met before.  Looking for those is what
the nightly run is for; it prints the blob that replays a failure.

None has a deadline: the first call of an operator pays for loading and thread pools.
"""

from __future__ import annotations

import os

from immunize_ext.testing._hypothesis import require_hypothesis

PROFILE_VARIABLE = "IMMUNIZE_EXT_HYPOTHESIS_PROFILE"
PROFILES = ("dev", "ci", "nightly")
_MAX_EXAMPLES = {"dev": 25, "ci": 100, "nightly": 2000}


def register_profiles(profile: str | None = None) -> str:
    """Register the profiles with hypothesis and load one; call it in ``conftest.py``.

    Args:
        profile: "dev", "ci" or "nightly".  Default: the environment variable
            ``IMMUNIZE_EXT_HYPOTHESIS_PROFILE``, else "ci" where ``CI`` is set, else "dev".

    Returns:
        The name of the profile that was loaded.

    Raises:
        ValueError: an unknown name, from the argument or from the environment variable.
        ImportError: hypothesis is not installed.

    Example:
        >>> register_profiles("ci")
        'ci'
    """
    settings = require_hypothesis("register_profiles").settings
    for name in PROFILES:
        settings.register_profile(
            name,
            deadline=None,
            print_blob=True,
            derandomize=name != "nightly",
            max_examples=_MAX_EXAMPLES[name],
        )
    source = "profile"
    if profile is None:
        source = PROFILE_VARIABLE
        profile = os.environ.get(PROFILE_VARIABLE) or ("ci" if os.environ.get("CI") else "dev")
    if profile not in PROFILES:
        raise ValueError(
            f"register_profiles: {source} must be one of {', '.join(PROFILES)}, got {profile!r}; "
            "correct it or leave it out"
        )
    settings.load_profile(profile)
    return profile
