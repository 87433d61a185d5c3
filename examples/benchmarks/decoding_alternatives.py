"""
The sections `sequence_level` and `weight_space` of `decoding.py`: particle filters for the product of whole policies, and
averages of the policies' parameters, which decode as fast as one model but have another distribution.
"""

import argparse
import asyncio
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from common import OURS, decode_one, full_models, load, merge, mix, prompts, quartiles, ratios, show, table, take_turns
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed

from mpo_hf import sequential_monte_carlo


# ---- sequence level ----


def measure_sequence_level(args: argparse.Namespace) -> list[dict]:
    particles, tokens, rounds = (4, 4, 2) if args.quick else (16, 16, 4)
    base, model = load(args, 2)
    weights = [0.6, 0.4]
    ids = prompts(args, 1)
    mixture = mix(model, 2)
    mixture.mixture_weights = weights

    def run_ours() -> float:
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "return_dict_in_generate": True}
        settings |= {"num_particles": particles, "ess_threshold": 0.5, "attention_mask": torch.ones_like(ids)}
        return mixture.generate(ids, custom_generate=sequential_monte_carlo, **settings).log_normalizer.item()

    ways = {OURS: run_ours}
    if args.tiny:
        print("  genlm-control is left out: it needs a tokenizer")
    elif importlib.util.find_spec("genlm") is None:
        print("  genlm-control is not installed, and left out")
    else:
        ways["genlm-control"] = genlm_runner(full_models(model, 2), weights, ids[0].tolist(), particles, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    log_z: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            set_seed(turn)
            start = time.perf_counter()
            log_z[name].append(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    to_ours = ratios(seconds, OURS)
    size = {"particles": particles, "tokens": tokens, "rounds": rounds}
    return [
        {
            "way": name,
            **size,
            "seconds": quartiles(seconds[name])[0],
            "to_ours": to_ours[name],
            "log_z": statistics.mean(log_z[name]),
            "error": statistics.stdev(log_z[name]) / len(log_z[name]) ** 0.5,
        }
        for name in ways
    ]


def genlm_runner(
    models: list[PreTrainedModel], weights: list[float], prompt: list[int], particles: int, tokens: int
) -> Callable[[], float]:
    """The geometric mean of two policies over whole completions, by genlm-control."""
    from genlm.backend.llm import AsyncTransformer
    from genlm.control import Ensemble, PromptedLLM, direct_token_sampler
    from smollm2 import load_tokenizer

    tokenizer = load_tokenizer()
    language_models = [AsyncTransformer(model, tokenizer, batch_size=particles) for model in models]
    first, second = (PromptedLLM(lm, prompt_ids=prompt) for lm in language_models)

    def run() -> float:
        for lm in language_models:
            lm.clear_cache()  # of the previous run
        ensemble = Ensemble(first, second, op="prod", a=weights[0])
        sampler = direct_token_sampler(ensemble)
        # truncated without requiring the end of the text there, as `max_new_tokens` does
        length = {"max_tokens": tokens + 1, "terminate_when": lambda context: len(context) >= tokens}
        return float(asyncio.run(sampler.smc(n_particles=particles, ess_threshold=0.5, **length)).log_ml)

    return run


def render_sequence_level(rows: list[dict]) -> str:
    cells = [
        [row["way"], f"{row['seconds']:.2f}", show(row["to_ours"]), f"{row['log_z']:.2f} ± {row['error']:.2f}"]
        for row in rows
    ]
    note = "{particles} particles of {tokens} tokens, K = 2, {rounds} rounds.".format(**rows[0])
    return table(["way", "seconds", "÷ this project", "estimate of log Z"], cells) + "\n\n" + note


# ---- weight space ----


@torch.no_grad()
def divergence(
    mixture_logps: torch.Tensor, model: PreTrainedModel, sequences: torch.Tensor, start: int
) -> list[float]:
    """KL(mixture ‖ model) at every token of completions, in nats."""
    logps = model(input_ids=sequences).logits[:, start - 1 : -1].log_softmax(-1)
    return (mixture_logps.exp() * (mixture_logps - logps)).sum(-1).flatten().tolist()


def measure_weight_space(args: argparse.Namespace) -> list[dict]:
    base, model = load(args, 3)
    weights, names = [0.5, 0.3, 0.2], ["0", "1", "2"]
    mixture = mix(model, 3)
    mixture.mixture_weights = weights
    ids = prompts(args, 2 if args.quick else 8)
    set_seed(0)
    length = 8 if args.quick else 48
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    sequences = mixture.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    start = ids.shape[1]
    mixture_logps = mixture(sequences).logits[:, start - 1 : -1].log_softmax(-1)

    candidates = {f"policy {k} alone": lambda k=k: merge(model, str(k)) for k in range(3)}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(names, weights, kind, combination_type=kind)
        candidates[f"PEFT, {kind}"] = lambda kind=kind: merge(model, kind)
    if importlib.util.find_spec("mergekit") is None:
        print("  mergekit is not installed, and left out")
    else:
        candidates["mergekit, linear"] = lambda: merge_by_mergekit(full_models(model, 3), weights)

    candidates[OURS] = lambda: mixture
    rows = []
    for name, make in candidates.items():
        candidate = make()
        gap = divergence(mixture_logps, candidate, sequences, start)
        row = {"way": name, "kl": statistics.mean(gap), "kl_95": sorted(gap)[int(0.95 * len(gap))], "tokens": len(gap)}
        decoders = {"base": decode_one(base, ids), name: decode_one(candidate, ids)}
        seconds, _ = take_turns(decoders, name, max(4, args.num_steps // 2), time.perf_counter)
        rows.append({**row, "to_base": ratios(seconds, "base")[name]})
        print(f"  {name}", flush=True)
    return rows


def merge_by_mergekit(models: list[PreTrainedModel], weights: list[float]) -> PreTrainedModel:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    with tempfile.TemporaryDirectory() as folder:
        entries = []
        for k, (model, weight) in enumerate(zip(models, weights)):
            model.save_pretrained(path := f"{folder}/policy_{k}")
            entries.append({"model": path, "parameters": {"weight": weight}})
        dtype = str(models[0].dtype).removeprefix("torch.")
        config = MergeConfiguration.model_validate({"merge_method": "linear", "dtype": dtype, "models": entries})
        run_merge(config, f"{folder}/merged", MergeOptions(copy_tokenizer=False, cuda=False))
        return LlamaForCausalLM.from_pretrained(f"{folder}/merged", dtype=models[0].dtype).eval()


def render_weight_space(rows: list[dict]) -> str:
    cells = [[row["way"], f"{row['kl']:.4f}", f"{row['kl_95']:.4f}", show(row["to_base"])] for row in rows]
    note = f"KL(mixture ‖ candidate), in nats a token, on {rows[0]['tokens']} tokens that the mixture wrote. K = 3."
    return table(["candidate", "mean KL", "95th percentile", "step ÷ base"], cells) + "\n\n" + note
