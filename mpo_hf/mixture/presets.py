"""Decoding rules of other papers that are mixtures with particular weights, most of them off the simplex."""

from typing import Any

from .component_loading import Policy


class PresetMixin:
    """Constructors of [`MixturePolicyModel`] for decoding rules that are special cases of mixtures."""

    @classmethod
    def from_realignment(cls, reference: Policy, aligned: Policy, strength: float = 1.0, **kwargs: Any):
        r"""
        [Decoding-time realignment](https://huggingface.co/papers/2402.02992) (Liu et al., 2024): the policy that training
        with the KL coefficient β / `strength` would have given, \\(\pi_{ref}^{1 - s} \pi_{aligned}^{s}\\).

        Args:
            reference: the policy that `aligned` was trained from; as in [`~MixturePolicyModel.from_policies`].
            aligned: the aligned policy.
            strength (`float`, *optional*, defaults to 1.0):
                0 is the reference, 1 the aligned policy; values between them give less alignment than was trained,
                above 1 more.
            kwargs: see [`~MixturePolicyModel.from_policies`].
        """
        kwargs = {"reference": reference, "labels": ["reference", "aligned"], **kwargs}
        weights = [1 - strength, strength]
        return cls.from_policies([reference, aligned], weights, allow_off_simplex=True, **kwargs)

    @classmethod
    def from_proxy_tuning(
        cls, base: Policy, expert: Policy, anti_expert: Policy, strength: float = 1.0, **kwargs: Any
    ):
        r"""
        [Proxy tuning](https://huggingface.co/papers/2401.08565) (Liu et al., 2024): a large `base` steered by the
        effect of tuning on a small model, \\(\pi_{base} (\pi_{expert} / \pi_{anti})^{s}\\).

        Args:
            base: the large, untuned policy; as in [`~MixturePolicyModel.from_policies`].
            expert: the small policy after tuning.
            anti_expert: the small policy before tuning.
            strength (`float`, *optional*, defaults to 1.0): how much of the difference to apply.
            kwargs: see [`~MixturePolicyModel.from_policies`].
        """
        kwargs = {"labels": ["base", "expert", "anti_expert"], **kwargs}
        weights = [1.0, strength, -strength]
        return cls.from_policies([base, expert, anti_expert], weights, allow_off_simplex=True, **kwargs)

    @classmethod
    def from_contrast(
        cls, expert: Policy, amateur: Policy, penalty: float = 0.5, plausibility: float = 0.1, **kwargs: Any
    ):
        r"""
        [Contrastive decoding](https://huggingface.co/papers/2309.09117) (Li et al., 2023; in the form of O'Brien and
        Lewis, 2023): \\(\pi_{expert}^{1 + p} \pi_{amateur}^{-p}\\) over the tokens that the expert finds plausible.

        Args:
            expert: the strong policy; as in [`~MixturePolicyModel.from_policies`].
            amateur: the weak policy, whose preferences are subtracted.
            penalty (`float`, *optional*, defaults to 0.5): strength of the subtraction.
            plausibility (`float`, *optional*, defaults to 0.1):
                Tokens below this fraction of the expert's highest probability are excluded. Otherwise tokens that are
                unlikely under both policies could win by their ratio.
            kwargs: see [`~MixturePolicyModel.from_policies`].
        """
        kwargs = {"labels": ["expert", "amateur"], "plausibility": plausibility, **kwargs}
        weights = [1 + penalty, -penalty]
        return cls.from_policies([expert, amateur], weights, allow_off_simplex=True, **kwargs)
