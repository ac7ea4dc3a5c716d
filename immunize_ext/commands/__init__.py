"""The subcommands of ``immunize``, one module each.

A module gives ``add_parser(commands)``, which adds its parser and sets ``run`` as that parser's
default, and ``run(arguments) -> int``, the exit status. Heavy imports stand inside ``run``:
``immunize --help`` and ``immunize doctor`` have to work where optional packages do not.
"""

from immunize_ext.commands import (
    attack,
    build_pipeline,
    demo,
    doctor,
    erase,
    imma,
    kappa,
    mima,
    report,
    sweep,
)

# In the order in which ``immunize --help`` lists them.
COMMANDS = (demo, kappa, mima, imma, erase, sweep, attack, report, build_pipeline, doctor)

__all__ = ["COMMANDS"]
