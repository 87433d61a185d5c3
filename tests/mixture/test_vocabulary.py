"""Only policies with one vocabulary can be mixed: how far it reaches is read from tokenizers, not from sizes."""

import pathlib

import pytest
import torch
from helpers import BOS, CLOSE, VOCAB, left_pad, tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mpo_hf import MixturePolicyConfig, MixturePolicyModel
from mpo_hf.mixture.vocabulary import common_vocab_size


TOKENS = [f"t{i}" for i in range(VOCAB)]
IDS = torch.tensor([[BOS, 7, 11, 3, 22], [BOS, 30, 5, 6, 9]])


def vocab(tokens):
    return {token: i for i, token in enumerate(tokens)}


# ---- the comparison itself ----


def test_equal_vocabularies_are_common_whatever_their_order():
    backwards = dict(reversed(vocab(TOKENS).items()))
    assert common_vocab_size(["a", "b"], [VOCAB, VOCAB], [vocab(TOKENS), backwards]) == VOCAB


def test_rows_that_only_pad_an_embedding_matrix_are_cut():
    assert common_vocab_size(["a", "b"], [VOCAB, 64], [vocab(TOKENS), vocab(TOKENS)]) == VOCAB
    assert common_vocab_size(["a", "b"], [64, VOCAB], [vocab(TOKENS), vocab(TOKENS)]) == VOCAB


def test_tokens_that_one_component_has_added_are_cut():
    added = vocab([*TOKENS, "<pad>", "<sep>"])
    for sizes in ([VOCAB, VOCAB + 2], [64, 64], [64, VOCAB + 2]):
        assert common_vocab_size(["a", "b"], sizes, [vocab(TOKENS), added]) == VOCAB
        assert common_vocab_size(["b", "a"], sizes[::-1], [added, vocab(TOKENS)]) == VOCAB


def test_components_may_each_add_tokens_of_their_own():
    vocabs = [vocab(TOKENS), vocab([*TOKENS, "<pad>"]), vocab([*TOKENS, "<sep>", "<end>"])]
    assert common_vocab_size(["a", "b", "c"], [VOCAB, VOCAB + 1, 64], vocabs) == VOCAB


def test_different_tokens_are_refused_by_the_first_of_them():
    other = [*TOKENS]
    other[9], other[20] = "different", "again"
    with pytest.raises(ValueError, match="'kind' and 'terse'.*token id 9 is 't9' to the first and 'different'"):
        common_vocab_size(["kind", "plain", "terse"], [VOCAB] * 3, [vocab(TOKENS), vocab(TOKENS), vocab(other)])


def test_same_tokens_with_other_ids_are_refused():
    # the sizes and the sets of tokens agree
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:]]
    with pytest.raises(ValueError, match="token id 0 is 't0' to the first and 't1'"):
        common_vocab_size(["a", "b"], [VOCAB, VOCAB], [vocab(TOKENS), vocab(swapped)])


def test_tokens_added_with_the_same_ids_but_other_names_are_refused():
    first, second = vocab([*TOKENS, "<pad>"]), vocab([*TOKENS, "<sep>"])
    with pytest.raises(ValueError, match=f"token id {VOCAB} is '<pad>' to the first and '<sep>'"):
        common_vocab_size(["a", "b"], [VOCAB + 1] * 2, [first, second])
    assert common_vocab_size(["a", "b"], [VOCAB + 1] * 2, [first, second], claimed=VOCAB) == VOCAB


def test_id_that_one_vocabulary_skips_is_refused():
    skipping = {token: i for token, i in vocab(TOKENS).items() if i != 4}
    with pytest.raises(ValueError, match="token id 4 is 't4' to the first and None"):
        common_vocab_size(["a", "b"], [VOCAB] * 2, [vocab(TOKENS), skipping])


def test_components_without_a_tokenizer_must_have_the_size_of_the_others():
    assert common_vocab_size(["a", "b"], [VOCAB, VOCAB], [None, None]) == VOCAB
    assert common_vocab_size(["a", "b"], [VOCAB, VOCAB], [vocab(TOKENS), None]) == VOCAB
    for vocabs in ([None, None], [vocab(TOKENS), None], [None, vocab(TOKENS)]):
        with pytest.raises(ValueError, match="without a tokenizer.*`vocab_size=`"):
            common_vocab_size(["a", "b"], [VOCAB, VOCAB + 3], vocabs)
    assert common_vocab_size(["a", "b"], [VOCAB, VOCAB + 3], [None, None], claimed=VOCAB) == VOCAB


@pytest.mark.parametrize("claimed", [0, -3, VOCAB + 1])
def test_claimed_size_is_checked(claimed):
    for vocabs in ([None, None], [vocab(TOKENS)] * 2, [vocab(TOKENS), None]):
        with pytest.raises(ValueError, match=f"`vocab_size={claimed}`.*'a': {VOCAB}"):
            common_vocab_size(["a", "b"], [VOCAB, VOCAB + 3], vocabs, claimed)


def test_claimed_size_may_not_reach_behind_a_difference():
    other = [*TOKENS]
    other[9] = "different"
    for claimed in (10, VOCAB):
        with pytest.raises(ValueError, match="token id 9"):
            common_vocab_size(["a", "b"], [VOCAB] * 2, [vocab(TOKENS), vocab(other)], claimed)
    assert common_vocab_size(["a", "b"], [VOCAB] * 2, [vocab(TOKENS), vocab(other)], claimed=9) == 9


# ---- mixing saved policies ----


def save_policy(folder: pathlib.Path, seed: int, tokens, rows: int | None = None, architecture="llama") -> str:
    tiny(architecture, seed, vocab_size=rows or len(tokens)).save_pretrained(folder)
    tiny_tokenizer(tokens).save_pretrained(folder)
    return str(folder)


def remove_weights(*folders: str) -> None:
    """So that loading any of them fails."""
    for folder in folders:
        (pathlib.Path(folder) / "model.safetensors").unlink()


@torch.no_grad()
def test_policies_of_different_size_are_mixed_over_what_they_share(tmp_path):
    plain = save_policy(tmp_path / "plain", 1, TOKENS)
    padded = save_policy(tmp_path / "padded", 2, TOKENS, rows=40, architecture="gpt2")
    extended = save_policy(tmp_path / "extended", 3, [*TOKENS, "<pad>"], rows=40)
    mixture = MixturePolicyModel.from_policies([extended, plain, padded], [0.2, 0.3, 0.5])
    assert mixture.config.vocab_size == VOCAB
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (extended, plain, padded)]
    logps = [model(IDS).logits[..., :VOCAB].log_softmax(-1) for model in models]
    expected = 0.2 * logps[0] + 0.3 * logps[1] + 0.5 * logps[2]
    torch.testing.assert_close(mixture(IDS).logits, expected, **CLOSE)
    mixture.save_pretrained(tmp_path / "mixture")
    opened = MixturePolicyModel.from_pretrained(tmp_path / "mixture")
    torch.testing.assert_close(opened(IDS).logits, expected, **CLOSE)
    # an id that only one of them knows may pad, and nothing else
    foreign = left_pad([IDS[0].tolist(), [BOS, 4]], pad=VOCAB)
    assert opened(**foreign).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"token id {VOCAB} is not among"):
        opened(foreign["input_ids"])


def test_policies_of_different_vocabularies_are_refused_before_weights_are_loaded(tmp_path):
    other = [*TOKENS]
    other[9] = "different"
    kind = save_policy(tmp_path / "kind", 1, TOKENS)
    terse = save_policy(tmp_path / "terse", 2, other)
    remove_weights(kind, terse)
    message = "kind' and .*terse' do not share a vocabulary: token id 9 is 't9' to the first and 'different'"
    with pytest.raises(ValueError, match=message):
        MixturePolicyModel.from_policies([kind, terse])
    with pytest.raises(ValueError, match=message):
        MixturePolicyModel.from_policies([kind], reference=terse)
    config = MixturePolicyConfig(components=[{"name_or_path": kind}, {"name_or_path": terse}])
    config.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match=message):
        MixturePolicyModel.from_pretrained(tmp_path / "mixture")
    with pytest.raises(OSError, match="model.safetensors"):  # with the claim it gets as far as the weights
        MixturePolicyModel.from_policies([kind, terse], vocab_size=9)


def test_labels_name_the_components_that_differ(tmp_path):
    kind, terse = save_policy(tmp_path / "a", 1, TOKENS), save_policy(tmp_path / "b", 2, TOKENS[::-1])
    with pytest.raises(ValueError, match="Components 'kind' and 'terse' do not share"):
        MixturePolicyModel.from_policies([kind, terse], labels=["kind", "terse"])


def test_saved_vocabulary_size_is_checked_against_the_components(tmp_path):
    plain, padded = save_policy(tmp_path / "plain", 1, TOKENS), save_policy(tmp_path / "padded", 2, TOKENS, rows=40)
    components = [{"name_or_path": plain}, {"name_or_path": padded}]
    MixturePolicyConfig(components=components, vocab_size=40).save_pretrained(tmp_path / "mixture")
    remove_weights(plain, padded)
    with pytest.raises(ValueError, match="`vocab_size=40`.*32 agree"):
        MixturePolicyModel.from_pretrained(tmp_path / "mixture")


def test_reference_that_knows_fewer_tokens_limits_the_mixture(tmp_path):
    large = save_policy(tmp_path / "large", 1, [*TOKENS, "<pad>"])
    small = save_policy(tmp_path / "small", 2, TOKENS)
    mixture = MixturePolicyModel.from_policies([large], reference=small)
    for model in (mixture, mixture.reference_policy, mixture.policy(0)):
        assert model(IDS).logits.shape[-1] == VOCAB


# ---- models in memory ----


def test_models_in_memory_must_have_one_size_unless_it_is_given():
    policies = [tiny("llama", 1), tiny("gpt2", 2, vocab_size=VOCAB + 3)]
    with pytest.raises(ValueError, match=f"{VOCAB + 3} token ids where the others have {VOCAB}"):
        MixturePolicyModel.from_policies(policies)
    with pytest.raises(ValueError, match=f"{VOCAB} token ids where the others have {VOCAB + 3}"):
        MixturePolicyModel.from_policies(policies[::-1])
    assert MixturePolicyModel.from_policies(policies, vocab_size=20)(IDS % 20).logits.shape[-1] == 20
    with pytest.raises(ValueError, match=f"`vocab_size={VOCAB + 1}`"):
        MixturePolicyModel.from_policies(policies, vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=f"{VOCAB + 3} token ids"):
        MixturePolicyModel.from_policies(policies[:1], reference=policies[1])


def test_model_in_memory_beside_a_saved_one_must_have_its_size(tmp_path):
    saved = save_policy(tmp_path / "saved", 1, TOKENS)
    assert MixturePolicyModel.from_policies([saved, tiny("gpt2", 2)]).config.vocab_size == VOCAB
    with pytest.raises(ValueError, match="without a tokenizer"):
        MixturePolicyModel.from_policies([saved, tiny("gpt2", 2, vocab_size=VOCAB + 3)])
