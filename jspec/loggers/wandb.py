"""Weights & Biases. WANDB_MODE says whether it is online; where nothing does, it is if there is a
key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import wandb

from jspec.loggers.base import Entry, RunCard


class WeightsAndBiases:
    """A run of W&B. Its library writes in the background, and has no flush."""

    def __init__(self, card: RunCard, done: int) -> None:
        """Offline a run has a folder of its own for each start: this one gets all steps, and those
        before it, which have the beginning of them, are removed. Online, what the server has of
        later steps stays: W&B takes no step twice."""
        mode = os.environ.get("WANDB_MODE") or (
            "online" if wandb.login(prompt=False, verify=False) else "offline")
        folder = Path(os.environ.get("WANDB_DIR") or card.store("wandb"))
        self.run = wandb.init(project=card.project, name=card.name, id=card.id, dir=str(folder),
                              mode=mode, resume="allow" if done > 0 and mode == "online" else None,
                              settings=wandb.Settings(silent=True, console="off"))
        self.run.config.update(dict(card.config), allow_val_change=True)
        self.held = self.run.starting_step - 1
        for earlier in folder.glob(f"wandb/offline-run-*-{card.id}"):
            if mode == "offline" and earlier != Path(self.run.dir).parent:
                shutil.rmtree(earlier)

    def write(self, entry: Entry) -> None:
        table = ({"samples": wandb.Table(columns=entry.columns(), data=entry.rows())}
                 if entry.samples else {})
        self.run.log({**entry.scalars, **table, "_timestamp": entry.time}, step=entry.step,
                     commit=True)

    def close(self) -> None:
        self.run.finish()


open_logger = WeightsAndBiases
