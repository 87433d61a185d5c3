"""What `--dtype auto` stands for: the dtype of the checkpoints, unless the processor is slow in it."""

import sys
from typing import Any

import torch

from ..cpu_dtype import MARGIN, cpu_speed
from ..mixture.modeling_mixture import MixturePolicyModel


def settle_dtype(model: MixturePolicyModel, with_reference: bool = False) -> str | None:
    """
    Converts policies from half precision to float32 where they run on a CPU that is slow in it. Nothing is rounded: policies in
    float32 stay there. Policies whose description names a dtype, and quantized ones, stay as they are.

    Args:
        model ([`MixturePolicyModel`]): the mixture, on its device, in the dtypes of its checkpoints.
        with_reference (`bool`, *optional*, defaults to `False`): whether its reference will run too, which is loaded then.

    Returns:
        `str`: a sentence for the user, about what was done or which dtype would be faster; `None` if there is nothing to say.
    """
    policies = [model.policy(k) for k in range(len(model.policies))]
    if with_reference and model.reference_policy is not None:
        policies.append(model.reference_policy)
    free = [policy for policy in policies if _is_free(policy)]
    found = {policy.dtype for policy in free}
    slow = {dtype for dtype in found if cpu_speed(dtype) < 1 / MARGIN}
    for policy in free:
        if policy.dtype in slow:
            backbone = policy.backbones[0].float()
            backbone.config.dtype = torch.float32
    model.config.dtype = model.dtype
    return _sentence(found, slow) if found else None


def _is_free(policy: MixturePolicyModel) -> bool:
    """Whether a policy runs on the CPU, in a dtype that nobody chose."""
    backbone, chosen = policy.backbones[0], policy.config.components[0].dtype
    is_quantized = getattr(backbone, "is_quantized", False)
    on_cpu = all(parameter.is_cpu and parameter.is_floating_point() for parameter in backbone.parameters())
    return chosen in (None, "auto") and not is_quantized and on_cpu


def _sentence(found: set[torch.dtype], slow: set[torch.dtype]) -> str | None:
    """What there is to say about the dtypes of policies, those that the processor is slow in among them."""
    for dtype in slow:
        return (
            f"dtype: float32 in place of {_name(dtype)}, as this processor multiplies matrices {1 / cpu_speed(dtype):.1f} times as "
            f"fast in it. It holds the same numbers in twice the memory; --dtype {_name(dtype)} keeps them as they are."
        )
    if (speed := cpu_speed(torch.bfloat16)) < MARGIN:
        return None
    faster = f"this processor multiplies matrices {speed:.1f} times as fast in bfloat16 as in float32"
    if torch.bfloat16 in found:
        return f"dtype: bfloat16, as the policies are stored; {faster}. --dtype float32 is more precise."
    return f"dtype: {_name(*found)}, as the policies are stored; {faster}. --dtype bfloat16 rounds them."


def _name(*dtypes: torch.dtype) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


class OpenedMixture:
    """In place of [`MixturePolicyModel`] for programs that open a mixture by its `from_pretrained`, with a dtype of `"auto"`."""

    @staticmethod
    def from_pretrained(source: str, **kwargs: Any) -> MixturePolicyModel:
        """
        Opens a mixture, and prints what there is to say about its dtype.

        Args:
            source (`str`): folder or repo id of the mixture.
            kwargs: arguments of [`MixturePolicyModel.from_pretrained`].
        """
        model = MixturePolicyModel.from_pretrained(source, **kwargs)
        if kwargs.get("dtype") == "auto" and (sentence := settle_dtype(model)):
            print(sentence, file=sys.stderr)
        return model
