"""Saving the result of a fit: checkpoints, a folder that loads as a mixture, a repository on the Hub."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..mixture.configuration_mixture import MixturePolicyConfig
from ..mixture.hub import carries_code, check_pushable, code_alongside, shared_config
from ..mixture.model_card import add_tags, create_model_card
from ..mixture.modeling_mixture import MixturePolicyModel
from .fit_card import compared_rewards, measured_rewards, save_plot
from .mpo_config import MPOConfig


logger = logging.get_logger(__name__)
Result = TypeVar("Result")


def unless_it_fails(consequence: str, make: Callable[[], Result]) -> Result | None:
    """
    What a function makes that a fit can do without; `None`, and a warning with the reason, if it fails.

    Args:
        consequence (`str`): what it means that there is none.
        make (`Callable`): the function.
    """
    try:
        return make()
    except Exception as error:
        logger.warning(f"{consequence}: {type(error).__name__}: {error}")
        return None


class MixtureSaving:
    """The part of [`MPOTrainer`] that saves and pushes. It writes configs and a few numbers, and no weights of policies."""

    args: MPOConfig
    model: MixturePolicyModel

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the mixture: its config, the tokenizer and, last, a model card. The config refers to the policies. Only a mixture of
        models that were given in memory is saved with their weights, and its checkpoints are saved without.

        Args:
            output_dir (`str`, *optional*): folder to save to. Defaults to `args.output_dir`.
        """
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save and not _internal_call:
            # the result, before anything that may fail: the Hub, the tokenizer, the cards of others
            self.model.config.save_pretrained(output_dir)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            self.create_model_card(output_dir=output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # checkpoints of a mixture whose models were given in memory have its config only, as no weights in them change
        whole = all(component.name_or_path is None for component in self.model.config.components)
        if not whole or output_dir in (None, self.args.output_dir) or not self._is_checkpoint(output_dir):
            with ExitStack() as saved_as:
                shared = self._shared_config(output_dir or self.args.output_dir, wanted=self.args.push_to_hub)
                unless_it_fails(
                    "The config is saved as it is, which others may not be able to open",
                    lambda: saved_as.enter_context(shared),
                )
                saved_as.enter_context(code_alongside(self.model, self.args.hub_with_code or None))
                return super()._save(output_dir, state_dict)
        self.model.config.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)

    def _is_checkpoint(self, output_dir: str) -> bool:
        return os.path.basename(os.path.normpath(output_dir)).startswith(PREFIX_CHECKPOINT_DIR)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        output_dir: str | None = None,
        **kwargs,
    ) -> None:
        """
        Writes the model card, `README.md`, with components, weights and mean rewards of completions. With matplotlib, a plot of
        the fit is saved beside it. Whatever keeps either from being written is a warning: the mixture does without.

        Args:
            language (`str` or `list[str]`, *optional*): language of the mixture, for the metadata of the card.
            license (`str`, *optional*): its license. Defaults to that of the components, if they all have the same one.
            tags (`str` or `list[str]`, *optional*): further tags.
            dataset_tags (`str` or `list[str]`, *optional*): repo ids of the prompts.
            output_dir (`str`, *optional*): folder to write to. Defaults to `args.output_dir`.
        """
        if not self.is_world_process_zero():
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        metadata = {"language": language, "license": license, "datasets": dataset_tags}

        def write() -> None:
            card = self._make_card(output_dir)
            add_tags(card, [*(self.model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])])
            for key, value in metadata.items():
                if value is not None:
                    card.data[key] = value
            card.save(os.path.join(output_dir, "README.md"))

        unless_it_fails(f"There is no new model card in {output_dir!r}", write)

    def _make_card(self, output_dir: str) -> ModelCard:
        summary = self.summary()
        rewards, note = compared_rewards(summary) or measured_rewards(
            self.state.log_history, self.origin, self.certificate, self.objective_names, self._is_given
        )
        if note and summary.comparisons is None:
            note = f"{summary.about} {note}"
        if self.takes_best_step:
            note += (
                f"\nThe weights are those of step {self.state.best_global_step}, the best one by "
                f"`{self.args.metric_for_best_model}`."
            )
        plot = unless_it_fails(
            f"There is no new plot in {output_dir!r}", lambda: save_plot(self.state.log_history, output_dir)
        )
        return create_model_card(
            self.model.config,
            self.hub_model_id or os.path.basename(os.path.abspath(output_dir)),
            rewards=rewards,
            plot=plot,
            note=note,
            with_code=self.args.hub_with_code or carries_code(self.model),
            token=self.args.hub_token,
        )

    def init_hf_repo(self, token: str | None = None, **kwargs) -> None:
        """Creates the repo, and the branch `args.hub_revision` in it, before anything is sampled."""
        super().init_hf_repo(token, **kwargs)
        branch = self.args.hub_revision
        if branch is not None and not branch.startswith("refs/") and self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            HfApi().create_branch(self.hub_model_id, branch=branch, token=token, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        pin_revisions: bool | None = None,
        upload_adapters: bool | None = None,
        **kwargs,
    ) -> CommitInfo:
        """
        Uploads the mixture, its tokenizer and a model card to the repo `args.hub_model_id`; no checkpoints.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to return only when the upload has finished.
            token (`str`, *optional*): token to write with. Defaults to `args.hub_token`.
            revision (`str`, *optional*): branch to push to. Defaults to `args.hub_revision`.
            private (`bool`, *optional*): whether to make the repo private when it is created.
            pin_revisions (`bool`, *optional*):
                Whether to pin policies to the commits that they were loaded from. Defaults to `args.hub_pin_revisions`.
            upload_adapters (`bool`, *optional*):
                Whether to upload adapters that live in folders. Defaults to `args.hub_upload_adapters`.
            kwargs: see [`~transformers.Trainer.push_to_hub`].

        Returns:
            [`~huggingface_hub.CommitInfo`], or a future of one with `blocking=False`.

        Raises:
            `ValueError`: for policies that live in folders of this machine.
        """
        upload_adapters = self.args.hub_upload_adapters if upload_adapters is None else upload_adapters
        check_pushable(self.model.config, upload_adapters)
        if private is not None:
            self.args.hub_private_repo = (
                private  # Trainer's own method takes it as an argument from Transformers 5.23 on
            )
        with self._shared_config(
            self.args.output_dir, token=token, pin=pin_revisions, upload_adapters=upload_adapters
        ):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        unless_it_fails("The checkpoint is not on the Hub", lambda: self._push_checkpoint(checkpoint_folder))

    def _push_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            # Trainer copies only files of known names to the folder that is pushed, and neither folders nor code
            adapters = os.path.join(checkpoint_folder, "adapters")
            if os.path.isdir(adapters):
                shutil.copytree(adapters, os.path.join(self.args.output_dir, "adapters"), dirs_exist_ok=True)
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _shared_config(
        self,
        folder: str,
        wanted: bool = True,
        token: str | None = None,
        pin: bool | None = None,
        upload_adapters: bool | None = None,
    ) -> Iterator[None]:
        """A context in which the config is saved in the form that others can load; see [`~mpo_hf.mixture.hub.shared_config`]."""
        if not wanted or self._config_is_shared or not self.is_world_process_zero():
            yield
            return
        self._config_is_shared = True
        try:
            with shared_config(
                self.model,
                folder,
                token=token if token is not None else self.args.hub_token,
                pin=self.args.hub_pin_revisions if pin is None else pin,
                upload_adapters=self.args.hub_upload_adapters if upload_adapters is None else upload_adapters,
            ):
                yield
        finally:
            self._config_is_shared = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        config = MixturePolicyConfig.from_pretrained(resume_from_checkpoint)
        if config.labels != self.model.config.labels:
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint!r} belongs to a mixture of {config.labels}, this one is of "
                f"{self.model.config.labels}."
            )
        self.model.mixture_weights = config.mixture_weights

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.take_weights_of_model()
