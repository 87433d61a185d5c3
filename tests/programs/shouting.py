"""The code that comes with a tokenizer."""

from transformers import PreTrainedTokenizerFast


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()
