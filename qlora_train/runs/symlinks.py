"""Nothing is written or deleted outside a run folder: what leads out of it is refused before either is done.

A link in the place of something that a run writes would lead its bytes, or a deletion, somewhere else. Folders above the
run folder may be links (a large disk often is one), and links inside a checkpoint or an adapter are deleted as links.

What is linked in while a run is at work is not looked for.
"""

from qlora_train.runs.run_folder import RunFolder
from qlora_train.utils.errors import CheckpointError


def refuse_links(run: RunFolder) -> None:
    """Refuse a run folder that is a link, or that has one among its files, folders or checkpoints.

    Raises:
        CheckpointError: the first link, and where it leads.
    """
    if run.path.is_symlink():
        raise CheckpointError(
            f"{run.path}: run.output_dir is a link to {run.path.readlink()}; a run folder must be a folder: set "
            "run.output_dir to where it leads"
        )
    for folder in (run.path, run.checkpoints):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_symlink():
                raise CheckpointError(
                    f"{path}: is a link to {path.readlink()}; a run writes and deletes inside its own folder only: put "
                    "what it leads to in its place, or remove the link"
                )
