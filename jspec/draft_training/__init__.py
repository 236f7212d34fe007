"""Offline draft training (`jspec draft train`): a head from the policy's own answers to given
prompts.

    prompts ─► samples (files, with the states and log-probabilities that the verifier computed)
            ─► least squares ─► steps on the next states ─► steps on the draft's loss
            ─► head/ and a report of acceptance

Every stage goes on from what is in output_dir. One process, any number of devices.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax

from jspec.base_model import BaseModel
from jspec.config import load_config
from jspec.draft_config import DraftTrainingConfig
from jspec.draft_training.prompts import gather
from jspec.draft_training.report import report
from jspec.draft_training.samples import sample
from jspec.draft_training.stages import fit
from jspec.drafts.base import check_finite
from jspec.errors import InputError
from jspec.heads import files
from jspec.output_dir import claimed, written
from jspec.prepare import check_draft, check_tokenizer, make_sampling, named_drafter
from jspec.progress import telling
from jspec.session import session
from jspec.settings import refuse_changes, to_yaml
from jspec.sharding import check_mesh, configured_mesh
from jspec.speculate.arguments import check_stops

log = logging.getLogger(__name__)


def train_draft(config: DraftTrainingConfig) -> int:
    """Run every stage. Returns the exit code, 0.

    Raises InputError for a drafter that is not trained, an output_dir of another configuration, and
    whatever models, prompts and drafts raise it for.
    """
    if named_drafter(config).loss is None:
        raise InputError(f"draft.name={config.draft.name}: this drafter has no weights to train")
    directory = Path(config.output_dir)
    with session(config.log_level) as opened, claimed(directory, names=WRITTEN, folders=()):
        if jax.process_count() > 1:
            raise InputError("jspec draft train runs in one process, over the devices that it "
                             "sees: start it once")
        begin(config, directory)
        base = BaseModel.of(config)
        mesh = opened.use(configured_mesh(config.mesh))
        check_mesh(base.config, mesh)
        check_stops(base.config, make_sampling(config))
        check_draft(config, base.shape.config)
        check_tokenizer(config, base.config, base.tokenizer)
        with telling(f"loading {config.model.name}"):
            policy = base.policy()
            check_finite(config.model.name, policy.weights, "take another model")
        prompts = gather(config, policy, base.tokenizer, directory)
        with telling("sampling answers (the first of each length compiles)"):
            sample(config, policy, prompts.training, directory / "samples")
        draft = fit(config, policy, directory)
        head = directory / files.HEAD
        with written(directory):
            head.mkdir(exist_ok=True)
            files.write(draft, head)
        report(config, policy, files.read(head, policy, draft.drafter), prompts.held_out, directory)
    log.info("the draft lies in %s; draft.path=%s trains with it", head, directory)
    return 0


FREE_TO_CHANGE = ("output_dir", "log_level", "report", "mesh", "training.checkpoint_every",
                  "draft.learning_rate", "draft.clip")
"""Keys and sections that change nothing of what is already in output_dir, and what training that is
not finite has to be rescued with."""
REMEDY = ("give that value to go on with it, or choose another output_dir; one with a copy of its "
          "samples and instructions.json trains on the same answers")

MADE = ("instructions.json", "samples", "checkpoints")
"""What a configuration leaves in output_dir; one that came to none of it may be corrected."""
WRITTEN = ("config.yaml", "checkpoints", files.HEAD, "report.json", "report.png")
"""What is made in output_dir without being asked whether it may be there: samples and instructions
may."""


def begin(config: DraftTrainingConfig, directory: Path) -> None:
    """Write the configuration. Raises InputError if the directory is of one that made something
    else."""
    path = directory / "config.yaml"
    if path.exists() and any((directory / name).exists() for name in MADE):
        refuse_changes(directory, load_config(path, kind=DraftTrainingConfig), config,
                       FREE_TO_CHANGE, REMEDY)
    with written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
