"""The subcommands of ``immunize``, one module each.

A module gives ``add_parser(commands)``, which adds its parser and sets ``run`` as that parser's
default, and ``run(arguments) -> int``, the exit status. Heavy imports stand inside ``run``:
``immunize --help`` and ``immunize doctor`` have to work where optional packages do not.
"""

from immunize_ext.commands import attack, demo, doctor, report, sweep
from immunize_ext.probing import tmp_command as kappa
from immunize_ext.text_to_image import tmp_erase as erase
from immunize_ext.text_to_image import tmp_imma as imma
from immunize_ext.text_to_image import tmp_mima as mima
from immunize_ext.text_to_image.digits import tmp_command as build_pipeline

# In the order in which ``immunize --help`` lists them.
COMMANDS = (demo, kappa, mima, imma, erase, sweep, attack, report, build_pipeline, doctor)

__all__ = ["COMMANDS"]
