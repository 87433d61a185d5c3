"""
The cost of fitting the weights to a store of completions: memory and seconds by the number of rows.

    python examples/benchmarks/rollout_store.py --output docs/images/rollout_store.png

For every size, a store is written, and a separate process fits the weights to it, `MPOTrainer(rollouts=folder)`, with the
certificate from its bootstrap replicates. Printed are the resident memory before the store is opened, which is that of the
libraries, its peak, and seconds.

The rows are synthetic but valid. Completions are sampled from three policies under which tokens are independent, each the exact
optimum of its reward, which is additive over the tokens. So
log-probabilities under the policies, the reference and both proposals are exact, and so are the densities of the first
half under the second half's proposal, and vice versa. The models given to the trainer have random weights, and never
run: everything that they would compute is in the store.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpo_hf import MixturePolicyModel, MPOConfig, MPOTrainer
from mpo_hf.rollouts.store import RolloutStore


LABELS = ["helpful", "harmless", "concise"]
VOCAB_SIZE, LENGTH, KINDS, BETA = 64, 32, 100, 0.5
# completions of a prompt, from each of two proposals
COMPLETIONS = 10
PROPOSALS = [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.5, 0.3]]


class World:
    """Prompts of several kinds; for each kind, rewards of the tokens and policies that are optimal for these."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        options = {"generator": generator, "dtype": torch.float64}
        self.rewards = 0.1 * torch.randn(KINDS, VOCAB_SIZE, len(LABELS), **options)
        self.reference = torch.randn(KINDS, VOCAB_SIZE, **options).log_softmax(-1)
        self.policies = (self.reference.unsqueeze(-1) + self.rewards / BETA).log_softmax(1)
        self.mixtures = (self.policies @ torch.tensor(PROPOSALS, dtype=torch.float64).T).log_softmax(1)

    def rows(self, prompts: torch.Tensor, proposal: int) -> dict[str, torch.Tensor]:
        """Completions of some prompts from a proposal, with all their values."""
        kinds = (prompts % KINDS).repeat_interleave(COMPLETIONS)
        ids = torch.multinomial(self.mixtures[kinds, :, proposal].exp(), LENGTH, replacement=True)
        at = (kinds.unsqueeze(-1), ids)
        return {
            "completion_ids": ids,
            "policy_logps": self.policies[at].sum(1),
            "reference_logps": self.reference[at].sum(1),
            "mixture_logps": self.mixtures[at].sum(1),
            "rewards": self.rewards[at].sum(1),
        }


def write_store(folder: Path, num_rows: int, batch_size: int) -> None:
    """A store like that of a fit that visits all prompts twice and updates its proposal in between."""
    torch.manual_seed(0)
    world, store = World(), RolloutStore(folder, {"objectives": LABELS})
    batches = torch.arange(num_rows // (2 * COMPLETIONS)).split(batch_size // COMPLETIONS)
    earlier = []
    for step in range(1, 2 * len(batches) + 1):
        again = step > len(batches)
        prompts = batches[(step - 1) % len(batches)]
        rows = world.rows(prompts, int(again))
        ids = (step << 40) + torch.arange(len(rows["rewards"]))
        other = (ids, rows["mixture_logps"][:, int(not again)])
        if again:
            write_densities(store, step, [(PROPOSALS[0], *other), (PROPOSALS[1], *earlier[step - len(batches) - 1])])
        else:
            earlier.append(other)
        write_rollouts(store, step, prompts, ids, int(again), rows)


def write_rollouts(
    store: RolloutStore, step: int, prompts: torch.Tensor, ids: torch.Tensor, proposal: int, rows: dict
) -> None:
    names = [f"t{prompt}" for prompt in prompts.tolist() for _ in range(COMPLETIONS)]
    columns = {
        "prompt": names,
        "completion": [" ".join(f"t{i}" for i in row) for row in rows["completion_ids"].tolist()],
        "prompt_ids": [[prompt % VOCAB_SIZE] for prompt in prompts.tolist() for _ in range(COMPLETIONS)],
        "completion_ids": rows["completion_ids"].tolist(),
        "id": ids.tolist(),
        "step": [step] * len(ids),
        "prompt_key": [f"{prompt:016x}" for prompt in prompts.tolist() for _ in range(COMPLETIONS)],
        "proposal": [PROPOSALS[proposal]] * len(ids),
        "proposal_logps": rows["mixture_logps"][:, proposal].tolist(),
        **{name: rows[name].tolist() for name in ("policy_logps", "reference_logps", "rewards")},
    }
    store.write("rollouts", step, 0, columns)


def write_densities(store: RolloutStore, step: int, found: list[tuple[list, torch.Tensor, torch.Tensor]]) -> None:
    columns = {
        "id": [i for _, ids, _ in found for i in ids.tolist()],
        "proposal": [proposal for proposal, ids, _ in found for _ in range(len(ids))],
        "logps": [value for _, _, logps in found for value in logps.tolist()],
    }
    store.write("densities", step, 0, columns)


# ---- the process that fits ----


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", unk_token="t0")


def tiny_policy() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def resident(field: str) -> int:
    """Memory of this process in MiB: `VmRSS` is the current value, `VmHWM` the peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) // 1024


def fit(folder: Path, batch_size: int, num_resamples: int) -> None:
    """Fits the weights to a store, and prints time and memory."""
    mixture = MixturePolicyModel.from_policies([tiny_policy() for _ in LABELS], reference=tiny_policy(), labels=LABELS)
    args = MPOConfig(
        output_dir=str(folder / "fit"),
        objective="reward",
        beta=BETA,
        num_resamples=num_resamples,
        num_generations=COMPLETIONS,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    before, start = resident("VmRSS"), time.perf_counter()
    trainer = MPOTrainer(mixture, args=args, processing_class=tokenizer(), rollouts=folder)
    opened = time.perf_counter() - start
    trainer.train()
    result = {
        "rows": len(trainer.rollout_fit.columns),
        "before": before,
        "peak": resident("VmHWM"),
        "opened": opened,
        "seconds": time.perf_counter() - start,
        "weights": trainer.weights.tolist(),
        "bound": trainer.certificate.duality_gap_bound,
    }
    print(json.dumps(result))


# ---- all sizes ----


def measure(num_rows: int, batch_size: int, num_resamples: int, threads: int = 1) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_store(Path(folder), num_rows, batch_size)
        written = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        options = {"fit": folder, "batch_size": batch_size, "num_resamples": num_resamples, "threads": threads}
        command = [sys.executable, __file__, *(str(part) for k, v in options.items() for part in (f"--{k}", v))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {"written": written, "size": size, **json.loads(done.stdout.splitlines()[-1])}


def draw(results: list[dict], path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds = figure.subplots(1, 2)
    rows = [result["rows"] for result in results]
    memory.plot(rows, [result["peak"] for result in results], marker="o", label="peak of the fit")
    memory.plot(rows, [result["before"] for result in results], "--", color="grey", label="before the store is opened")
    memory.set(xscale="log", xlabel="completions", ylabel="resident memory, MiB", ylim=(0, None))
    memory.legend()
    seconds.plot(rows, [result["seconds"] for result in results], marker="o")
    seconds.set(xscale="log", yscale="log", xlabel="completions", ylabel="seconds")
    for axis in (memory, seconds):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where the picture goes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="numbers of rows")
    parser.add_argument("--batch_size", type=int, default=5000, help="rows of a shard, and of a step of the fit")
    parser.add_argument("--num_resamples", type=int, default=200, help="bootstrap replicates of the certificate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.fit:
        return fit(args.fit, args.batch_size, args.num_resamples)
    print("| completions | store, MiB | written, s | before, MiB | peak, MiB | opened, s | fitted, s | bound, nats |")
    print("|" + "---|" * 8)
    results = []
    for num_rows in args.sizes:
        results.append(found := measure(num_rows, args.batch_size, args.num_resamples, args.threads))
        cells = [f"{found['rows']:,}", *(f"{found[name]:.0f}" for name in ("size", "written", "before", "peak"))]
        cells += [f"{found['opened']:.1f}", f"{found['seconds']:.1f}", f"{found['bound']:.1e}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    if args.output:
        draw(results, args.output)


if __name__ == "__main__":
    main()
