"""Three rule-based rewards that pull in different directions, as reward functions for TRL's trainers.

Each takes `prompts` and `completions` (strings, or conversations whose last message is the answer) and returns one
float per completion.
"""

import functools
import re

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


MAX_WORDS = 60
MIN_READABLE_WORDS = 10
MAX_READING_EASE = 120.0

Completion = str | list[dict[str, str]]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def _syllables(word: str) -> int:
    """Count groups of vowels, less a silent final e, ed or es; a rule of thumb that needs no dictionary download."""
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = re.search(r"([^aeiouyl]e|[aeiouy]le|[^aeiouytd]ed|[^aeiouycghsxz]es)$", word) is not None
    return max(groups - silent, 1)


def _reading_ease(text: str) -> float:
    """Flesch reading ease (higher is easier); a line break ends a sentence, as in lists and headings."""
    words = _words(text)
    sentences = [part for part in re.split(r"[.!?\n]+", text) if _words(part)]
    if not words:
        return 0.0
    return 206.835 - 1.015 * len(words) / len(sentences) - 84.6 * sum(map(_syllables, words)) / len(words)


@functools.cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def positive(prompts: list, completions: list[Completion], **kwargs) -> list[float]:
    """Positive sentiment: VADER's compound score, from -1 (negative) over 0 (neutral, or empty) to 1 (positive)."""
    return [_vader().polarity_scores(_text(completion))["compound"] for completion in completions]


def concise(prompts: list, completions: list[Completion], **kwargs) -> list[float]:
    """Few words: 1 - n_words / 60, so just below 1 for one word and 0 from 60 words on. No words is no answer: 0."""
    counts = [len(_words(_text(completion))) for completion in completions]
    return [1 - min(count, MAX_WORDS) / MAX_WORDS if count else 0.0 for count in counts]


def readable(prompts: list, completions: list[Completion], **kwargs) -> list[float]:
    """Easy to read: Flesch reading ease, clipped to 0..120 and scaled to 0..1.

    Flesch's formula gives a single easy word its top score, so under ten words the score is scaled by n_words / 10.
    """
    scores = []
    for completion in completions:
        text = _text(completion)
        ease = min(max(_reading_ease(text), 0.0), MAX_READING_EASE) / MAX_READING_EASE
        scores.append(ease * min(len(_words(text)), MIN_READABLE_WORDS) / MIN_READABLE_WORDS)
    return scores


REWARD_FUNCS = {"positive": positive, "concise": concise, "readable": readable}
