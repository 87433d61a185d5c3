"""Resuming: which checkpoint a run goes on from, and what an interrupted run has left beside it."""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import logging

from ..mixture.product_layouts import current_layouts, get_product_layouts, set_product_layouts
from ..rollouts.identity import first_difference
from ..rollouts.shard_files import read_json
from .folder_lock import locked
from .mpo_config import MPOConfig
from .rollout_fit import RolloutFit


logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
# The state of the fit in a checkpoint; see `MPOTrainer`.
FIT_STATE = "_FitState"


class CheckpointResuming:
    """The part of [`MPOTrainer`] that resumes from checkpoints, in an output folder that no other run writes to."""

    args: MPOConfig
    accelerator: Accelerator
    rollout_fit: RolloutFit | None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Fits the weights.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to go on from. `True` for the last one in `args.output_dir` that is whole: those that a killed
                process has left half-written are passed over, and a fit that was killed before its first checkpoint begins
                anew.
            trial, ignore_keys_for_eval: see [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`].

        Raises:
            `ValueError`:
                for a checkpoint of another fit, a folder that another run is writing to, and with `True` where there is
                nothing to go on from.
            `OSError`: for a checkpoint, or completions that it rests on, that are damaged or missing.
        """
        with ExitStack() as owned:
            self._on_main(lambda: self._lock_folders(owned))
            if resume_from_checkpoint:
                resume_from_checkpoint = self._on_main(lambda: self._choose(resume_from_checkpoint))
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _lock_folders(self, owned: ExitStack) -> None:
        """Until a fit ends, no other run may write where it writes, nor where it reads given completions."""
        output = Path(self.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        owned.enter_context(locked(output))
        given = self.rollout_fit.given if self.rollout_fit is not None else None
        if given is not None and given.folder.resolve().parent != output.resolve():
            owned.enter_context(locked(given.folder.resolve().parent, shared=True))

    def _on_main(self, decide: Callable[[], Any]) -> Any:
        """What the main process finds, in every process; its errors too, as the others would wait for it."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = decide()
            except Exception as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _choose(self, wanted: str | bool) -> str | None:
        """The checkpoint to resume from, after what cannot be kept beside it has been removed; `None` to begin anew."""
        if self.rollout_fit is not None:
            self.rollout_fit.store.read_index()  # another run may have written since the trainer was made
        found = checkpoints_in(self.args.output_dir)
        damage = {folder: why_not_whole(folder, self.args) for folder in found}
        if wanted is True:
            chosen = self._last_usable(damage)
            if chosen is None:
                self._check_restart(damage)
        else:
            chosen = Path(wanted)
            reason = why_not_whole(chosen, self.args) or self._why_without_rows(chosen)
            if reason is not None:
                raise OSError(f"The checkpoint {str(wanted)!r} cannot be resumed from: {reason}")
        if chosen is not None:
            self._check_same_fit(chosen)
        step = 0 if chosen is None else read_json(chosen / STATE)["global_step"]
        for folder, reason in damage.items():
            # the run would write into a later one, and a kill would leave a mixture of two checkpoints there
            if reason is not None or (found[folder] > step and folder.resolve() != chosen.resolve()):
                why = reason or f"the run goes on from step {step}, and writes it anew."
                logger.warning(f"The checkpoint {str(folder)!r} is removed: {why}")
                shutil.rmtree(folder)
        return None if chosen is None else str(chosen)

    def _last_usable(self, damage: dict[Path, str | None]) -> Path | None:
        """The last checkpoint that is whole, and whose completions are; `None` if there is none."""
        for folder, reason in reversed(damage.items()):
            reason = reason or self._why_without_rows(folder)
            if reason is None:
                return folder
            logger.warning(f"The checkpoint {str(folder)!r} is passed over: {reason}")
        return None

    def _why_without_rows(self, folder: Path) -> str | None:
        """Why the completions that a checkpoint rests on cannot be read; `None` if they can."""
        state = read_json(folder / STATE)
        rollouts = fit_state(state).get("rollouts") or {}
        if self.rollout_fit is None or "shards" not in rollouts:  # of an earlier version
            return None
        store, step = self.rollout_fit.store, state["global_step"]
        try:
            store.check(step)
        except OSError as error:
            return str(error)
        if store.digest(step) == rollouts["shards"]:
            return None
        return f"the completions that it rests on are not those in {str(store.folder)!r}."

    def _check_same_fit(self, folder: Path) -> None:
        state = fit_state(read_json(folder / STATE))
        difference = first_difference(state.get("identity") or {}, self.identity())
        if difference is not None:
            raise ValueError(
                f"The checkpoint {str(folder)!r} belongs to another fit: {difference}. Resume with what it had, choose another "
                "`output_dir`, or fit to its completions with `rollouts=`."
            )
        if (before := state.get("processes")) not in (None, self.args.world_size):
            logger.warning(
                f"The checkpoint {str(folder)!r} was written by {before} processes, and is resumed by {self.args.world_size}: "
                "the fit goes on with other prompts and random numbers than it would have had."
            )

    def _check_restart(self, damage: dict[Path, str | None]) -> None:
        """Refuses to begin anew where more would be lost than what a run draws before its first checkpoint."""
        shards = self.rollout_fit.store.shards() if self.rollout_fit is not None else []
        steps = [step_of(path.name) for path in [*damage, *shards]]
        if None in damage.values() or max(steps, default=0) > _steps_to_first_checkpoint(self.args):
            raise ValueError(
                f"There is no checkpoint in {str(self.args.output_dir)!r} to resume from, and what lies there goes further than "
                "a run without checkpoints. Choose another `output_dir`; completions that are whole can be fitted with "
                "`rollouts=`."
            )
        logger.warning(f"There is no checkpoint in {str(self.args.output_dir)!r} to resume from: the fit begins anew.")
        if self.rollout_fit is not None:
            self.rollout_fit.store.discard_after(0)


def layouts_state() -> dict[str, Any]:
    """What a checkpoint keeps of how products are computed, which decides the last digits of what is drawn and scored."""
    return {"measures": current_layouts().measures, "choices": get_product_layouts()}


def adopt_layouts(state: dict[str, Any] | None) -> None:
    """
    Computes products as the run that is resumed did, and goes on measuring those that it had none of, unless this process has
    been told how.

    Args:
        state (`dict`, *optional*): [`layouts_state`] of that run; `None` for a checkpoint of an earlier version.
    """
    if state is not None and current_layouts().measures:
        set_product_layouts(state["choices"])
        current_layouts().measures = state["measures"]


def checkpoints_in(folder: str | os.PathLike) -> dict[Path, int]:
    """The checkpoints in a folder, and their steps, in the order of these."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if pattern.fullmatch(path.name)]
    return dict(sorted(((path, step_of(path.name)) for path in found if path.is_dir()), key=lambda pair: pair[1]))


def step_of(name: str) -> int:
    """The step in the name of a checkpoint or a shard."""
    return int(name.split("-")[1])


def fit_state(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of the fit, given its `trainer_state.json`."""
    return state.get("stateful_callbacks", {}).get(FIT_STATE, {}).get("attributes", {})


def why_not_whole(folder: Path, args: MPOConfig) -> str | None:
    """
    What is missing or damaged in a checkpoint; `None` if nothing is. Files are checked without opening what is in them, as that
    may depend on versions of other packages.

    Args:
        folder (`Path`): the checkpoint.
        args ([`MPOConfig`]): the options of the run that resumes.
    """
    try:
        processes = fit_state(read_json(folder / STATE)).get("processes") or args.world_size
        read_json(folder / "config.json")
        if args.save_only_model:
            return None
        ranks = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
        for name in ("optimizer.pt", "scheduler.pt", *ranks):
            with zipfile.ZipFile(folder / name) as archive:
                if archive.testzip() is not None:
                    return f"{name} is damaged."
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing."
    except zipfile.BadZipFile:
        return f"{name} is damaged."
    except OSError as error:
        return str(error)
    return None


def _steps_to_first_checkpoint(args: MPOConfig) -> int:
    if args.save_strategy != SaveStrategy.STEPS:
        return 1
    return math.ceil(args.save_steps if args.save_steps >= 1 else args.max_steps * args.save_steps)
