"""What a reward model reads: the text of a prompt and its completion, and the tokens of the text."""

import copy
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import apply_chat_template, is_conversational

from .loading import RewardModelSpec, Text, reads_both_ways, template_fields
from .values import shorten, user_code


logger = logging.get_logger(__name__)

# A text that is scored, or a pair of texts.
Input = str | tuple[str, str]


class RewardInputs:
    """
    The tokens of completions for a reward model.

    Args:
        spec ([`RewardModelSpec`]): the template, special tokens and truncation.
        name (`str`): name of the objective, for messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the model, with a pad token.
        config ([`~transformers.PreTrainedConfig`]): the config of the model.
        max_length (`int`, *optional*): how many tokens the model takes.

    Raises:
        `ValueError`: it is not known which special tokens the model was trained with; the tokenizer has ids that the model
            has not. When called, there is no text for a completion, or an input is longer than `max_length`.
    """

    def __init__(
        self, spec: RewardModelSpec, name: str, tokenizer: PreTrainedTokenizerBase, config: Any, max_length: int | None
    ):
        self.spec, self.name, self.tokenizer, self.max_length = spec, name, tokenizer, max_length
        self._told: set[str] = set()
        self._vocab_size = getattr(config.get_text_config(), "vocab_size", None) or math.inf
        if tokenizer.pad_token_id >= self._vocab_size:
            raise ValueError(
                f"The pad token of reward {name!r} has the id {tokenizer.pad_token_id}, but the model has {self._vocab_size} "
                "tokens. Give a `processing_class` that belongs to the model, or set its `pad_token` to one of these tokens."
            )
        self._before, self._behind = special_tokens(tokenizer)
        self._reads_both_ways = reads_both_ways(config, tokenizer, [*self._before, *self._behind])
        if spec.template is not None and self._is_undecided:
            raise ValueError(
                f"The tokenizer of reward {name!r} adds {self._added} to a text, and whether its model was trained with that "
                "is not known. Set `add_special_tokens=True` if it was, or False if it was not; what a text has already is "
                "not added again."
            )
        if spec.truncation_side is not None:
            if max_length is None:
                raise ValueError(
                    f"`truncation_side={spec.truncation_side!r}` of reward {name!r} needs a `max_length`, as neither the "
                    "model nor the tokenizer has one."
                )
            self._truncating = copy.deepcopy(tokenizer)
            self._truncating.truncation_side = spec.truncation_side

    @property
    def _added(self) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens([*self._before, *self._behind])

    @property
    def _is_undecided(self) -> bool:
        """Whether the tokenizer would add special tokens, and nothing says whether the model was trained with them."""
        added = self._before or self._behind
        return bool(added) and self.spec.add_special_tokens is None and not self._reads_both_ways

    def _adds_special_tokens(self, is_chat: bool) -> bool:
        if self.spec.add_special_tokens is not None:
            return self.spec.add_special_tokens
        if self._is_undecided and not is_chat:
            self._tell(
                f"Texts get their reward {self.name!r} without the {self._added} that its tokenizer would add, as in TRL's "
                "GRPOTrainer. Set `add_special_tokens` in a RewardModelSpec: True if the model was trained with it, else False."
            )
        return self._reads_both_ways and not is_chat

    def _tell(self, message: str) -> None:
        """Warns of something once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> dict[str, list[list[int]]]:
        """The columns that the model takes, such as `input_ids`: a list of each completion's numbers, without padding."""
        pairs = zip(prompts, completions, strict=True)
        texts = [self.text(f"completion {row}", *pair) for row, pair in enumerate(pairs)]
        is_chat = self.spec.template is None and not isinstance(completions[0], str)
        adds = self._adds_special_tokens(is_chat)
        columns = self._encode(self.tokenizer, texts, adds)
        limit = self.max_length or math.inf
        too_long = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) > limit]
        if too_long and self.spec.truncation_side is None:
            self._refuse_length(too_long[0], len(columns["input_ids"][too_long[0]]), completions)
        if too_long:
            self._tell(
                f"Inputs of the reward {self.name!r} have more than {limit} tokens. The {self.spec.truncation_side} end of "
                "their texts is cut off."
            )
            cut = self._encode(self._truncating, [texts[row] for row in too_long], adds, max_length=limit)
            for key, values in columns.items():
                for row, value in zip(too_long, cut[key]):
                    values[row] = value
        self._check_ids(columns["input_ids"], completions)
        return columns

    def check(self, prompts: Sequence[Text]) -> None:
        """Raises a `ValueError` if completions of some prompts have no text, as far as the prompts tell."""
        for prompt in () if callable(self.spec.template) else prompts:
            completion = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
            self.text(f"completions of the prompt {shorten(prompt)}", prompt, completion)

    # ---- texts ----

    def text(self, which: str, prompt: Text, completion: Text) -> Input:
        """The text of a completion, and `which` it is, for messages."""
        template, texts = self.spec.template, {"prompt": prompt, "completion": completion}
        found: Any = None
        if callable(template):
            with user_code(self.name):
                found = template(prompt, completion)
        elif template is not None:
            contents = {key: self._content(which, texts[key]) for key in template_fields(template)}
            parts = [part.format(**contents) for part in ([template] if isinstance(template, str) else template)]
            found = parts[0] if isinstance(template, str) else tuple(parts)
        elif isinstance(prompt, str) and isinstance(completion, str):
            found = prompt + completion
        elif is_conversational({"prompt": prompt}) and is_conversational({"completion": completion}):
            found = self._chat(which, [*prompt, *completion])
        is_pair = isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(part, str) for part in found)
        if not isinstance(found, str) and not is_pair:
            raise ValueError(
                f"The reward {self.name!r} has no text for {which}: prompt and completion must both be plain "
                "or both be conversations, and a callable `template` must return a str, or a pair of them. Prompt: "
                f"{shorten(prompt)}, completion: {shorten(completion)}"
            )
        return tuple(found) if is_pair else found

    def _chat(self, which: str, messages: list[dict[str, Any]]) -> str:
        way_out = "give the text as `template` in a RewardModelSpec"
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"The prompts are conversations, but the tokenizer of reward {self.name!r} has no chat template. Set the one "
                f"that the model was trained with, or {way_out}, such as '{{completion}}' for a classifier of completions."
            )
        try:
            return apply_chat_template({"messages": messages}, self.tokenizer, **self.spec.chat_template_kwargs)[
                "text"
            ]
        except Exception as error:  # templates raise errors of their own, and those of Jinja
            raise ValueError(
                f"The chat template of reward {self.name!r} fails for {which}: {type(error).__name__}: {error}. Change "
                f"the messages, or {way_out}. The messages: {shorten(messages)}"
            ) from error

    def _content(self, which: str, value: Text) -> str:
        single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
        content = value[0].get("content") if single else value
        if not isinstance(content, str):
            raise ValueError(
                f"The template of reward {self.name!r} takes a text or a single message of text, but for {which} "
                f"there is {shorten(value)}. Give `template` as a callable (prompt, completion) -> str."
            )
        return content

    # ---- tokens ----

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[Input], adds: bool, max_length: int | None = None
    ) -> dict[str, list[list[int]]]:
        kwargs = {"add_special_tokens": adds, "verbose": False}
        if max_length is not None:
            kwargs |= {"truncation": True, "max_length": max_length}
        if len({type(text) for text in texts}) > 1:
            raise ValueError(
                f"The template of reward {self.name!r} makes a text of some completions and a pair of others."
            )
        if isinstance(texts[0], tuple):
            texts, seconds = zip(*texts)
            kwargs |= {"text_pair": list(seconds)}
        columns = dict(tokenizer(text=list(texts), **kwargs))
        for row, ids in enumerate(columns["input_ids"]):
            # texts for an encoder are not from a template that writes special tokens, and may speak of them
            start, stop = self._bounds(ids) if adds and not self._reads_both_ways else (0, len(ids))
            for values in columns.values():
                values[row] = values[row][start:stop]
            if not columns["input_ids"][row]:
                for key, values in columns.items():
                    values[row] = self._empty(key)
        return columns

    def _bounds(self, ids: list[int]) -> tuple[int, int]:
        """The part of an input that is left without special tokens which the text had already."""
        before, behind = len(self._before), len(self._behind)
        start = before if before and ids[before : 2 * before] == self._before else 0
        stop = len(ids)
        if behind and stop - start > 2 * behind and ids[stop - 2 * behind : stop - behind] == self._behind:
            stop -= behind
        return start, stop

    def _empty(self, key: str) -> list[int]:
        """An input without any token: what the tokenizer adds to an empty text, or else its EOS token."""
        ids = [*self._before, *self._behind] or [self.tokenizer.eos_token_id]
        if None in ids:
            raise ValueError(
                f"The reward {self.name!r} got a text without any token, and its tokenizer has no special token to score "
                "instead. Give `template` as a callable that writes something for an empty completion."
            )
        self._tell(
            f"The reward {self.name!r} got a text without any token. Such texts get the reward of "
            f"{self.tokenizer.convert_ids_to_tokens(ids)}. For another one, give `template` as a callable."
        )
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}.get(key, [0] * len(ids))

    def _refuse_length(self, row: int, length: int, completions: Sequence[Text]) -> None:
        raise ValueError(
            f"The reward {self.name!r} takes 1 to {self.max_length} tokens, but the input of completion {row} has {length}, "
            "and a truncated text would get another reward. Use shorter prompts or a lower `max_completion_length`, set "
            "`max_length` in its RewardModelSpec if the model can take more, or `truncation_side` to cut off one end of such "
            f"texts. The completion: {shorten(completions[row])}"
        )

    def _check_ids(self, rows: list[list[int]], completions: Sequence[Text]) -> None:
        for row, ids in enumerate(rows):
            if max(ids) >= self._vocab_size:
                raise ValueError(
                    f"The tokenizer of reward {self.name!r} gives completion {row} the token id {max(ids)}, but the model has "
                    f"{self._vocab_size} tokens. Give the `processing_class` that belongs to the model. The completion: "
                    f"{shorten(completions[row])}"
                )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and behind a text."""
    bare, whole = (tokenizer(text="a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return whole[:start], whole[start + len(bare) :]
