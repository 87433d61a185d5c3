"""The part of their vocabularies that the components of a mixture have in common."""

from collections.abc import Mapping, Sequence


def common_vocab_size(
    names: Sequence[str],
    sizes: Sequence[int],
    vocabs: Sequence[Mapping[str, int] | None],
    claimed: int | None = None,
) -> int:
    """
    Number of leading token ids that mean the same to every component.

    The token-to-id maps of the tokenizers are compared. Rows that only pad an embedding matrix, and tokens that one
    component has added after all others, are cut off. Components without a tokenizer must have the size that remains.

    Args:
        names (`Sequence[str]`): names of the components, for messages.
        sizes (`Sequence[int]`): number of rows of each component's output layer.
        vocabs (`Sequence[Mapping[str, int]]`): token-to-id map of each component's tokenizer, `None` where it has none.
        claimed (`int`, *optional*): the number according to the caller, checked against the tokenizers.

    Returns:
        `int`: the number n of common token ids; the ids are 0 to n - 1.

    Raises:
        `ValueError`: when an id below n means different tokens to two components, naming them and the first such token.
    """
    known = [k for k, vocab in enumerate(vocabs) if vocab is not None]
    size = min((sizes[k] for k in known), default=sizes[0])
    for k in known[1:]:
        size = min(size, _common_prefix(names[known[0]], vocabs[known[0]], names[k], vocabs[k], claimed))
    if claimed is not None:
        if not 0 < claimed <= min(size, *sizes):
            raise ValueError(
                f"`vocab_size={claimed}` token ids cannot be common to components whose vocabularies have "
                f"{dict(zip(names, sizes))}, of which {min(size, *sizes)} agree."
            )
        return claimed
    for k, vocab in enumerate(vocabs):
        if vocab is None and sizes[k] != size:
            raise ValueError(
                f"Component {names[k]!r} comes without a tokenizer and has {sizes[k]} token ids where the others have "
                f"{size}. If their first ids mean the same tokens, say how many with `vocab_size=`."
            )
    return size


def _common_prefix(
    name: str, vocab: Mapping[str, int], other_name: str, other: Mapping[str, int], claimed: int | None
) -> int | float:
    """The common length of two vocabularies, infinite when they are equal. An error when neither extends the other."""
    if vocab == other:
        return float("inf")
    by_id, other_by_id = ({i: token for token, i in v.items()} for v in (vocab, other))
    first = min(i for i in by_id.keys() | other_by_id.keys() if by_id.get(i) != other_by_id.get(i))
    if first > min(max(by_id), max(other_by_id)) or (claimed is not None and first >= claimed):
        return first  # one of them only adds tokens after the other's last, or after those that are asked for
    raise ValueError(
        f"Components {name!r} and {other_name!r} do not share a vocabulary: token id {first} is "
        f"{by_id.get(first)!r} to the first and {other_by_id.get(first)!r} to the second. Only policies with the "
        "same tokenizer can be mixed token by token."
    )
