"""``immunize erase``: erase concepts from a text-to-image model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "erase",
        help="erase concepts from a text-to-image model (UCE)",
        description="Map the words of concepts to their anchors in closed form, and write the "
        "edited pipeline. The model given is not changed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="digits", metavar="PATH", help="folder of a pipeline")
    parser.add_argument("--concepts", metavar="FILE", help="concepts.yaml")
    parser.add_argument("--targets", nargs="+", default=[], metavar="NAME", help="what to erase")
    parser.add_argument("--out", default="runs/erased", metavar="DIR", help="folder to write")
    parser.add_argument("--ridge", type=float, default=0.1, help="lambda of UCE")
    parser.add_argument("--preserve-scale", type=float, default=0.1, help="weight of what is kept")
    parser.add_argument("--force", action="store_true", help="replace an existing pipeline")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Erase and write."""
    require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
    from immunize_ext.text_to_image.immunizers import erase
    from immunize_ext.text_to_image.projections import describe_projections, find_text_projections
    from immunize_ext.text_to_image.tmp_config import TextToImageConfig
    from immunize_ext.text_to_image.tmp_task import check_config, load_task

    config = TextToImageConfig(
        model=arguments.model, concepts=arguments.concepts, targets=tuple(arguments.targets)
    )
    check_config(config)
    target = Path(arguments.out)
    if target.exists() and not (arguments.force and (target / "model_index.json").is_file()):
        raise FileExistsError(
            f"--out: {arguments.out} exists; choose another folder, or replace a pipeline with "
            "--force"
        )
    with progress_bar(arguments.quiet) as progress:
        task = load_task(config)
        found = find_text_projections(task.model.unet)
        progress(describe_projections(found), 0.3)
        erase(
            task.model,
            task.fitted,
            ridge=arguments.ridge,
            preserve_scale=arguments.preserve_scale,
        )
        progress("writing", 0.9)
        task.model.save(target, overwrite=arguments.force)
    print(f"erased {', '.join(task.fitted.names)} in {describe_projections(found)}")
    print(f"pipeline: {target}")
    return 0
