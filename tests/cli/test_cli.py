"""The command line, run as a person runs it: options, files, output, exit codes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import yaml
from helpers import PROGRAMS, close, save_lora
from hub_server import Hub
from huggingface_hub import ModelCard
from toy import LENGTH, PROMPTS, toy_policy, toy_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from mpo_hf import MixturePolicyConfig, MixturePolicyModel
from mpo_hf.cli.chat import Conversation
from mpo_hf.cli.main import COMMANDS, main


pytestmark = pytest.mark.integration
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
SMALL = ["--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length", str(LENGTH)]
SMALL += ["--beta", "0.5", "--disable_tqdm", "true", "--use_cpu", "true"]


def run(*argv) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as exit:
            status = exit.code
    return status or 0, out.getvalue(), err.getvalue()


def run_process(*argv, module=("-m", "mpo_hf.cli.main"), **kwargs) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    command = [sys.executable, *module, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def error_line(result: tuple[int, str, str], status: int = 1) -> str:
    """The one line that a mistake is told in."""
    assert result[0] == status
    lines = [line for line in result[2].splitlines() if line.startswith("mpo-hf")]
    assert len(lines) == 1 and "Traceback" not in result[2]
    return lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policies, an adapter, a reward model, rewards and prompts on disk, and a mixture of two of the policies."""
    root = tmp_path_factory.mktemp("cli")
    reference = toy_policy(100, 0.5)
    policies = {"ref": reference, "a": toy_policy(1, 0.1, reference), "b": toy_policy(2, 0.1, reference)}
    for name, policy in policies.items():
        policy.save_pretrained(root / name)
        toy_tokenizer().save_pretrained(root / name)
    (root / "a" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    save_lora(root / "lora", str(root / "ref"), seed=3)
    config = LlamaConfig(**{**reference.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    LlamaForSequenceClassification(config).save_pretrained(root / "rm")
    toy_tokenizer().save_pretrained(root / "rm")
    shutil.copy(PROGRAMS / "my_rewards.py", root)
    rows = [{"prompt": prompt, "suffix": "b"} for prompt in PROMPTS]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixture = MixturePolicyModel.from_policies(
        [root / "a", root / "b"], [0.3, 0.7], reference=root / "ref", labels=["a", "b"]
    )
    mixture.save_pretrained(root / "mix")
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(root / "mix")
    mixture.save_pretrained(root / "chatty")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "chatty")
    return root


def fit_options(world, output_dir, *rewards, steps=3) -> list:
    rewards = rewards or (f"{world}/my_rewards.py:count_c", f"{world}/my_rewards.py:count_b")
    options = ["--policies", world / "a", world / "b", "--reference", world / "ref", "--rewards", *rewards]
    options += ["--dataset", world / "prompts.jsonl", "--output_dir", output_dir, "--max_steps", steps]
    return ["fit", *options, *SMALL]


@pytest.fixture(scope="module")
def fitted(world):
    """A fit by options on the command line."""
    output_dir = world / "fitted"
    result = run(*fit_options(world, output_dir), "--labels", "sea", "bee")
    assert result[0] == 0, result[2]
    return SimpleNamespace(folder=output_dir, out=result[1])


# ---- help ----


def test_help_names_every_command():
    done = run_process("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
    assert run() == (0, done.stdout, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_on_a_page(command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert len(out.splitlines()) < 100
    assert max(map(len, out.splitlines())) <= 120
    assert out.split("examples:")[1].count(f"mpo-hf {command}") == 2
    assert out.startswith(f"usage: mpo-hf {command} ")


def test_all_options_of_the_trainer_are_listed_apart():
    assert "--gradient_accumulation_steps" not in run("fit", "--help")[1]
    status, out, _ = run("fit", "--help_all")
    assert status == 0 and "--gradient_accumulation_steps" in out and "--policies" in out


def test_version():
    status, out, _ = run("--version")
    assert status == 0 and out.startswith("mpo_hf ")


# ---- fit ----


def test_fit_saves_a_mixture(world, fitted):
    config = MixturePolicyConfig.from_pretrained(fitted.folder)
    assert config.labels == ["sea", "bee"]
    assert [c.name_or_path for c in config.components] == [str(world / "a"), str(world / "b")]
    assert config.reference.name_or_path == str(world / "ref")
    assert config.mixture_weights != [0.5, 0.5] and sum(config.mixture_weights) == pytest.approx(1)
    assert len(AutoTokenizer.from_pretrained(fitted.folder)) == 6
    assert (fitted.folder / "README.md").exists() and (fitted.folder / "trainer_state.json").exists()


def test_fit_reports_weights_and_rewards(fitted):
    weights = MixturePolicyConfig.from_pretrained(fitted.folder).mixture_weights
    rows = {line.split()[0]: line.split() for line in fitted.out.splitlines() if line.startswith(("sea", "bee"))}
    for name, weight in zip(["sea", "bee"], weights):
        assert rows[name][2] == f"{weight:.4f}"
        assert 0 <= float(rows[name][3]) <= LENGTH
        assert 0 <= float(rows[name][4]) < 1 and 0 <= float(rows[name][5]) <= LENGTH
    assert re.search(r"^(Certificate: .* 95% confidence|There is no bound|Stopped at step)", fitted.out, re.MULTILINE)
    assert re.search(r"^Worst off: (sea|bee), \S+ ± \S+ .*the reference", fitted.out, re.MULTILINE)
    assert re.search(r"^KL to the reference: \S+ ± \S+ nats a completion", fitted.out, re.MULTILINE)
    assert f"The mixture is in {fitted.folder}" in fitted.out


def test_fit_with_a_constraint_has_the_reference_in_the_mixture(world, tmp_path):
    options = ["--constraints", '{"count_b": 0.3}', "--normalize_rewards", "none", "--labels", "count_c", "count_b"]
    options += ["--objective", "reward"]
    status, out, err = run(*fit_options(world, tmp_path / "mix"), *options)
    assert status == 0, err
    saved = MixturePolicyConfig.from_pretrained(tmp_path / "mix")
    assert saved.labels == ["count_c", "count_b", "reference"] and sum(saved.mixture_weights) == pytest.approx(1)
    assert re.search(rf"^reference +\S*{re.escape(str(world / 'ref'))}", out, re.MULTILINE)


def test_fit_draws_a_picture(fitted):
    pytest.importorskip("matplotlib")
    assert (fitted.folder / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_fit_from_yaml_with_dictionaries(world, tmp_path):
    config = {
        "policies": [
            {"name_or_path": str(world / "a"), "label": "plain"},
            {"adapter": str(world / "lora"), "label": "adapted"},
        ],
        "reference": {"name_or_path": str(world / "ref")},
        "rewards": [{"model": str(world / "rm"), "sign": -1, "scale": 2.0}, f"{world}/my_rewards.py:count_c"],
        "dataset": str(world / "prompts.jsonl"),
        "weights": [0.4, 0.6],
        "max_steps": 5,
        "learning_rate": "1e-3",
        "model_init_kwargs": {"dtype": "float32"},
        "normalize_rewards": False,
        "estimator": "bsmd",
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    # the command line has the last word
    options = ["--config", tmp_path / "fit.yaml", "--output_dir", tmp_path / "mix", "--max_steps", 1]
    status, out, err = run("fit", *options, *SMALL)
    assert status == 0, err
    saved = MixturePolicyConfig.from_pretrained(tmp_path / "mix")
    assert saved.labels == ["plain", "adapted"]
    assert saved.components[1].adapter == str(world / "lora")
    assert saved.components[1].name_or_path == str(world / "ref")
    assert saved.mixture_weights == pytest.approx([0.4, 0.6], abs=0.05)
    assert json.loads((tmp_path / "mix" / "trainer_state.json").read_text())["global_step"] == 1


def test_fit_from_yaml_with_an_ensemble(world, tmp_path):
    ensemble = [{"model": str(world / "rm"), "scale": 2.0}, str(world / "rm"), f"{world}/my_rewards.py:count_c"]
    rewards = [
        {"ensemble": ensemble, "aggregation": "uncertainty", "coefficient": 0.5, "label": "liked"},
        f"{world}/my_rewards.py:count_b",
    ]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"rewards": rewards}))
    options = [option for option in fit_options(world, tmp_path / "mix", "REWARD", steps=1) if option != "REWARD"]
    options.remove("--rewards")
    status, out, err = run(*options, "--config", tmp_path / "fit.yaml")
    assert status == 0, err
    assert "\nliked " in out
    entry = json.loads((tmp_path / "mix" / "trainer_state.json").read_text())["log_history"][0]
    assert entry["ensembles/liked/rm"] == close(2 * entry["ensembles/liked/rm_2"])
    mean = (entry["ensembles/liked/rm"] + entry["ensembles/liked/rm_2"] + entry["ensembles/liked/count_c"]) / 3
    assert entry["rewards/liked"] < mean and entry["ensembles/liked/disagreement"] > 0


ROLLOUT_FIT = ["--objective", "reward", "--proposal", "mixture"]


@pytest.fixture(scope="module")
def sampled(world):
    """A fit that keeps its completions, in `_rollouts`."""
    output_dir = world / "sampled"
    result = run(*fit_options(world, output_dir), *ROLLOUT_FIT)
    assert result[0] == 0, result[2]
    return output_dir


def rollout_options(world, rollouts, output_dir, *more) -> list:
    """Options of a fit to completions, without rewards."""
    options = ["--policies", world / "a", world / "b", "--reference", world / "ref", "--output_dir", output_dir]
    return ["fit", *options, "--labels", "count_c", "count_b", "--rollouts", rollouts, *more, *SMALL]


def test_fit_to_the_completions_of_an_earlier_fit(world, sampled, tmp_path):
    status, _, err = run(*rollout_options(world, sampled / "_rollouts", tmp_path, *ROLLOUT_FIT))
    assert status == 0, err
    weights = [MixturePolicyConfig.from_pretrained(folder).mixture_weights for folder in (sampled, tmp_path)]
    assert weights[1] == pytest.approx(weights[0], abs=1e-6) and weights[0] != [0.5, 0.5]


def test_fit_to_a_file_of_completions(world, tmp_path):
    rows = [{"prompt": prompt, "suffix": "b", "completion": text} for prompt in PROMPTS for text in ("c c b", "b a c")]
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rewards = [f"{world}/my_rewards.py:{name}" for name in ("count_c", "count_b")]
    options = rollout_options(world, tmp_path / "completions.jsonl", tmp_path / "mix", *ROLLOUT_FIT[:2])
    status, _, err = run(*options, "--rewards", *rewards)
    assert status == 0, err
    history = json.loads((tmp_path / "mix" / "trainer_state.json").read_text())["log_history"]
    assert {entry["rewards/count_c"] for entry in history if "loss" in entry} == {1.5}


def test_rollouts_that_do_not_go_with_other_options(world, sampled, tmp_path):
    options = rollout_options(world, sampled / "_rollouts", tmp_path)
    assert "--estimator mis" in error_line(run(*options, "--estimator", "bsmd"), 2)
    options += ROLLOUT_FIT
    assert "Leave out --dataset" in error_line(run(*options, "--dataset", world / "prompts.jsonl"), 2)
    assert "Leave out --dataset_streaming" in error_line(run(*options, "--dataset_streaming", "true"), 2)
    assert "--eval_dataset" in error_line(run(*options, "--eval_strategy", "steps"), 2)
    assert "no rollouts" in error_line(run(*rollout_options(world, sampled, tmp_path, *ROLLOUT_FIT)))


def test_fit_goes_on_from_a_checkpoint(world, fitted, tmp_path):
    straight = MixturePolicyConfig.from_pretrained(fitted.folder).mixture_weights
    labels = ["--labels", "sea", "bee"]
    options = [*fit_options(world, tmp_path / "mix"), *labels]
    assert run(*options)[0] == 0
    for name in ("config.json", "checkpoint-3"):
        path = tmp_path / "mix" / name
        path.rename(tmp_path / name)
    assert run(*options, "--resume_from_checkpoint", "true")[0] == 0
    assert MixturePolicyConfig.from_pretrained(tmp_path / "mix").mixture_weights == straight
    state = json.loads((tmp_path / "mix" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_fit_evaluates(world, tmp_path):
    options = ["--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", 8]
    assert "--eval_dataset" in error_line(run(*fit_options(world, tmp_path), *options), 2)
    prompts = world / "prompts.jsonl"
    status, out, err = run(*fit_options(world, tmp_path, steps=1), *options, "--eval_dataset", prompts)
    assert status == 0, err
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_welfare" in entry for entry in history)


def test_options_that_would_do_nothing_are_told(world, sampled, tmp_path, caplog):
    options = fit_options(world, tmp_path / "mix", steps=1)
    assert "without --eval_strategy" in error_line(run(*options, "--eval_dataset", world / "prompts.jsonl"), 2)
    assert "--step_scale 1.0 has no effect: --estimator mis goes" in error_line(run(*options, "--step_scale", 1), 2)
    assert run(*options, "--weights", 0.4, 0.6, "--objective", "reward", "--proposal", "mixture")[0] == 0
    assert "--weights has no effect" not in caplog.text
    weights = ["--weights", 0.4, 0.6, "--objective", "reward"]
    assert run(*rollout_options(world, sampled / "_rollouts", tmp_path / "again", *weights))[0] == 0
    assert "--weights has no effect" in caplog.text


def test_fit_by_the_implicit_objective_needs_no_rewards(world, tmp_path):
    options = [option for option in fit_options(world, tmp_path, "REWARD", steps=1) if option != "REWARD"]
    options.remove("--rewards")
    status, out, err = run(*options, "--objective", "implicit")
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.startswith("policy_")] == ["policy_0", "policy_1"]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_fit_reads_prompts_of_many_kinds(world, tmp_path, suffix):
    from datasets import load_dataset

    dataset = load_dataset("json", data_files=str(world / "prompts.jsonl"), split="train")
    path = str(tmp_path / f"prompts{suffix}")
    {".json": dataset.to_json, ".csv": dataset.to_csv, ".parquet": dataset.to_parquet}[suffix](path)
    status, _, err = run(*fit_options(world, tmp_path / "mix", steps=1), "--dataset", path)
    assert status == 0, err


# Options, what the message mentions, and the exit status: 2 for options that make no sense.
MISTAKES = {
    "no such policy": (["--policies", "nowhere/a", "nowhere/b"], "nowhere/a", 1),
    "no such file of prompts": (["--dataset", "missing.jsonl"], "missing.jsonl", 1),
    "too few rewards": (["--rewards", "my_rewards.py:count_c"], "2 policies", 2),
    "no such function": (["--rewards", "os:missing", "os:missing"], "'missing'", 2),
    "no function": (["--rewards", "my_rewards.py:number", "my_rewards.py:number"], "It has count_c, count_b", 2),
    "function forgotten": (["--rewards", "my_rewards.py", "my_rewards.py"], "count_c, count_b, broken", 2),
    "no such file of rewards": (["--rewards", "other.py:count_c", "other.py:count_c"], "other.py", 1),
    "no such module": (["--rewards", "no_such_module:f", "no_such_module:f"], "no_such_module", 1),
    "rewards in a table": (["--rewards", "prompts.jsonl", "prompts.jsonl"], "neither Python code", 2),
    "one completion a prompt": (["--num_generations", "1"], "--num_generations must be at least 2", 2),
    "reward that raises": (["--rewards", "my_rewards.py:broken", "my_rewards.py:broken"], "no such thing", 1),
    "weights off the simplex": (["--weights", "0.5", "0.6"], "sum", 1),
    "no such type": (["--dtype", "bf32"], "--dtype must name", 2),
    "no such reporter": (["--report_to", "paper"], "--report_to: paper", 2),
    "reporter that is not installed": (["--report_to", "dvclive"], "--report_to dvclive", 1),
    "no checkpoint yet": (["--resume_from_checkpoint", "true"], "no checkpoint", 1),
    "no such checkpoint": (["--resume_from_checkpoint", "missing"], "--resume_from_checkpoint missing", 1),
    "file for a folder": (["--output_dir", "my_rewards.py"], "--output_dir", 1),
    "file of an unknown kind": (["--dataset", "my_rewards.py"], ".jsonl", 1),
    "no such folder": (["--dataset", "./missing"], "./missing", 1),
    "one value behind each of two": (["--labels", "a", "--labels", "b"], "--labels is given 2 times", 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(world, tmp_path, mistake):
    options, mentioned, status = MISTAKES[mistake]
    files = ("my_rewards", "other", "prompts")
    options = [f"{world}/{option}" if option.startswith(files) else option for option in options]
    assert mentioned in error_line(run(*fit_options(world, tmp_path), *options), status)


def test_options_that_cannot_be_parsed(world, tmp_path):
    line = error_line(run(*fit_options(world, tmp_path), "--num_generation", "4"), 2)
    assert "--num_generations" in line
    assert "--max_steps" in error_line(run(*fit_options(world, tmp_path), "--max_steps", "many"), 2)
    assert "--config" in error_line(run("fit", "--config"), 2)
    assert "--policies" in error_line(run("fit"), 2)
    assert "--model" in error_line(run("generate"), 2)
    assert run("fitt")[0] == 2


def test_mistakes_in_yaml(world, tmp_path):
    path = tmp_path / "fit.yaml"

    def fit_with(text):
        path.write_text(text)
        return run(*fit_options(world, tmp_path), f"--config={path}")

    assert "--num_generations" in error_line(fit_with("num_generation: 4"), 2)
    error_line(fit_with("policies: ["))
    error_line(fit_with("- a list"))
    assert "nope.yaml" in error_line(run("fit", "--config", "nope.yaml"))
    options = ["--policies", world / "a", "--dataset", world / "prompts.jsonl", "--config", path]
    model = str(world / "rm")
    for reward, mentioned in [
        ({"model": model, "sing": -1}, "sing"),
        ({"modl": model}, "modl"),
        ({"scale": 2.0}, "needs a `model`"),
        ({"ensemble": model}, "must be a list"),
        ({"ensemble": [model]}, "two or more"),
        ({"ensemble": [model, model], "scale": 2.0}, "scale"),
        ({"ensemble": [model, "os:missing"]}, "'missing'"),
        ({"ensemble": [model, model], "aggregation": "median"}, "'median'"),
        ({"ensemble": [model, model], "aggregation": "uncertainty"}, "coefficient"),
    ]:
        path.write_text(yaml.safe_dump({"rewards": [reward]}))
        status = 2 if mentioned == "'missing'" else 1
        assert mentioned in error_line(run("fit", *options), status)


def test_debug_shows_where(world):
    done = run_process("generate", "--model", world / "a", "--prompt", "a")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "not a mixture" in done.stderr
    for options, env in ((["--debug"], {}), ([], {"MPO_HF_DEBUG": "1"})):
        done = run_process(*options, "generate", "--model", world / "a", "--prompt", "a", env={**os.environ, **env})
        assert done.returncode == 1 and "Traceback" in done.stderr


LAUNCHERS = {
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "mpo_hf.cli.main"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mpo_hf.cli.main"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_fit_under_a_launcher(world, tmp_path, launcher):
    done = run_process(*fit_options(world, tmp_path / "mix"), module=LAUNCHERS[launcher])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The mixture is in") == 1
    assert MixturePolicyConfig.from_pretrained(tmp_path / "mix").mixture_weights != [0.5, 0.5]


# ---- generate and chat ----


def completion_of(folder, prompt, length, weights=None) -> str:
    """What greedy decoding gives, by the library."""
    model = MixturePolicyModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        mixture_weights=weights,
        max_new_tokens=length,
        do_sample=False,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_writes_the_completion(world):
    options = ["generate", "--model", world / "mix", "--max_new_tokens", 6, "--temperature", 0, "--prompt", "b c"]
    assert run(*options)[:2] == (0, completion_of(world / "mix", "b c", 6) + "\n")
    status, out, _ = run(*options, "--weights", 1, 0)
    assert out == completion_of(world / "mix", "b c", 6, [1.0, 0.0]) + "\n"


def test_generate_takes_prompts_from_a_pipe(world):
    prompts = ["b c", "d e f b", "e"]
    options = ["--max_new_tokens", 6, "--temperature", 0, "--json", "--batch_size", 2]
    done = run_process("generate", "--model", world / "mix", *options, input="\n".join([*prompts, "", ""]))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == [{"prompt": p, "completion": completion_of(world / "mix", p, 6)} for p in prompts]


def test_generate_takes_prompts_from_a_file(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("b c\nd e\n")
    options = ["--max_new_tokens", 4, "--temperature", 0.7, "--seed", 1, "--prompts_file", tmp_path / "prompts.txt"]
    status, out, err = run("generate", "--model", world / "mix", *options)
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith(">")] == ["> b c", "> d e"]
    assert run("generate", "--model", world / "mix", *options)[1] == out


def test_generate_applies_the_chat_template(world):
    options = ["generate", "--model", world / "chatty", "--max_new_tokens", 6, "--temperature", 0, "--prompt", "b c"]
    with_system = run(*options, "--system", "d e")
    assert with_system[:2] == (0, completion_of(world / "mix", "d e b c", 6) + "\n")
    assert run(*options, "--raw")[1] == completion_of(world / "mix", "b c", 6) + "\n"
    options[2] = world / "mix"
    assert "--system" in error_line(run(*options, "--system", "d e"), 2)


def test_mistakes_in_generation(world):
    options = ["generate", "--model", world / "mix", "--prompt", "b c"]
    assert "sum" in error_line(run(*options, "--weights", 0.5, 0.9))
    assert run(*options, "--weights", 1.5, -0.5, "--allow_off_simplex", "--max_new_tokens", 2)[0] == 0
    assert "2 mixture weights" in error_line(run(*options, "--weights", 1))
    assert "--temperature" in error_line(run(*options, "--temperature", -1), 2)
    assert "nowhere" in error_line(run("generate", "--model", "nowhere", "--prompt", "b"))


def test_chat_over_standard_input(world):
    lines = ["b c", "/weights", "/weights 1 0", "/weights 3 4", "/nonsense", "/reset", "b c", "/quit", "never read"]
    options = ["--max_new_tokens", 4, "--temperature", 0]
    done = run_process("chat", "--model", world / "chatty", *options, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert completion_of(world / "mix", "b c", 4) in done.stdout
    assert completion_of(world / "mix", "b c", 4, [1.0, 0.0]) in done.stdout
    assert done.stdout.count("a 0.3, b 0.7") == 2 and "a 1, b 0" in done.stdout
    assert "error: " in done.stdout and "Forgotten." in done.stdout


def test_chat_remembers(world):
    model = MixturePolicyModel.from_pretrained(world / "chatty")
    conversation = Conversation(
        model, AutoTokenizer.from_pretrained(world / "chatty"), "d", {"max_new_tokens": 3, "do_sample": False}
    )
    with redirect_stdout(io.StringIO()):
        conversation.answer("b c")
        conversation.answer("e")
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    assert answers[0] == completion_of(world / "mix", "d b c", 3)
    assert answers[1] == completion_of(world / "mix", f"d b c {answers[0]} e", 3)


def test_chat_needs_a_template(world):
    assert "chat template" in error_line(run("chat", "--model", world / "mix"))


# ---- tokenizers ----


@pytest.fixture
def with_code(world, tmp_path):
    """A mixture without a tokenizer, of one component without and one with a tokenizer that comes with code."""
    for name in ("plain", "coded"):
        toy_policy(1, 0.1).save_pretrained(tmp_path / name)
    toy_tokenizer().save_pretrained(tmp_path / "coded")
    shutil.copy(PROGRAMS / "shouting.py", tmp_path / "coded")
    path = tmp_path / "coded" / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "shouting.Shouting"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Shouting", "auto_map": auto_map}))
    folders = [tmp_path / "plain", tmp_path / "coded"]
    MixturePolicyModel.from_policies(folders, vocab_size=6).save_pretrained(tmp_path / "mix")
    return tmp_path


GENERATE = ["--max_new_tokens", 6, "--temperature", 0, "--prompt", "b c"]


def test_code_of_a_tokenizer_is_run_if_trusted(world, with_code):
    options = ["generate", "--model", with_code / "mix", *GENERATE]
    line = error_line(run(*options))
    # why each place was of no use: two folders without a tokenizer, and one whose code is not trusted
    for name in ("mix", "plain", "coded"):
        assert f"'{with_code / name}': " in line
    assert "trust_remote_code" in line.partition(f"'{with_code / 'coded'}': ")[2] and "Save one there" in line
    status, out, err = run(*options, "--trust_remote_code")
    assert status == 0, err
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(with_code / "mix")
    assert out == completion_of(with_code / "mix", "b c", 6).upper() + "\n"
    # the tokenizer in the folder of the mixture comes first; Transformers asks whether to trust that of the component
    assert run(*options)[1].endswith(out.lower())


def test_fit_takes_a_tokenizer_with_code(world, with_code, tmp_path, monkeypatch):
    options = [*fit_options(world, tmp_path / "fit", steps=1), "--tokenizer", with_code / "coded"]
    line = error_line(run(*options))
    assert line.startswith(f"mpo-hf fit: error: --tokenizer {with_code / 'coded'} has no tokenizer")
    assert "trust_remote_code" in line
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    rewards = [f"{PROGRAMS}/seeing_reward.py:see", f"{world}/my_rewards.py:count_b"]
    options = [*fit_options(world, tmp_path / "fit", *rewards, steps=1), "--tokenizer", with_code / "coded"]
    status, _, err = run(*options, "--trust_remote_code", "true")
    assert status == 0, err
    completions = json.loads((tmp_path / "seen.json").read_text())
    assert completions and all(text == text.upper() for text in completions)


# ---- inspect ----


def test_inspect_shows_components(world):
    status, out, err = run("inspect", world / "mix")
    assert status == 0, err
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    count = toy_policy(1, 0.1).num_parameters()
    assert rows["a"][1:] == ["0.3000", str(world / "a"), "-", f"{count / 1000:.3g}K", "apache-2.0"]
    assert rows["b"][1:] == ["0.7000", str(world / "b"), "-", f"{count / 1000:.3g}K", "-"]
    assert str(world / "ref") in rows["(reference)"]
    assert "2 in memory for 2 components" in out and "6 tokens in common" in out


def test_inspect_reads_the_config_only(world, tmp_path):
    """Neither weights nor policies need to be there."""
    config = MixturePolicyConfig.from_pretrained(world / "mix").to_dict()
    for component, name in zip(config["components"], ("org/helpful", "/gone/harmless")):
        component["name_or_path"] = name
    config["components"][0]["revision"] = "0123456789" * 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = run("inspect", tmp_path)
    assert status == 0, err
    assert "org/helpful" in out and "01234567 " in out and "/gone/harmless" in out


def test_inspect_writes_json(world, tmp_path):
    model = MixturePolicyModel.from_policies(
        [world / "ref", world / "lora"], [0.25, 0.75], labels=["plain", "adapted"]
    )
    model.save_pretrained(tmp_path)
    status, out, err = run("inspect", tmp_path, "--json", "--offline")
    assert status == 0, err
    facts = json.loads(out)
    plain, adapted = facts["components"]
    assert facts["base_shared"] and facts["models_in_memory"] == 1
    assert (plain["label"], plain["weight"], plain["adapter"]) == ("plain", 0.25, None)
    assert adapted["adapter"] == str(world / "lora") and adapted["name_or_path"] == str(world / "ref")
    assert plain["parameters"] == adapted["parameters"] == toy_policy(1, 0.1).num_parameters()
    assert adapted["adapter_parameters"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert facts["parameters"] == plain["parameters"] + adapted["adapter_parameters"]
    assert facts["vocab_size"] == 6 and facts["reference"] is None
    assert run("inspect", tmp_path)[1].splitlines()[3].split()[2:5] == [
        str(world / "lora"),
        "over",
        str(world / "ref"),
    ]


def test_inspect_tells_licenses(world, tmp_path):
    save_lora(tmp_path / "lora", str(world / "a"), seed=3)
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\n")
    MixturePolicyModel.from_policies([world / "a", tmp_path / "lora"]).save_pretrained(tmp_path / "mix")
    status, out, _ = run("inspect", tmp_path / "mix", "--json", "--offline")
    assert status == 0
    components = json.loads(out)["components"]
    assert [c["license"] for c in components] == ["apache-2.0", "apache-2.0"]
    assert [c["adapter_license"] for c in components] == [None, "mit"]
    assert "mit over apache-2.0" in run("inspect", tmp_path / "mix")[1]


def test_inspect_refuses_what_is_no_mixture(world):
    assert "not a mixture" in error_line(run("inspect", world / "a"))
    error_line(run("inspect", world / "missing"))
    error_line(run("inspect"), 2)


# ---- push ----


@pytest.fixture(scope="module")
def shared(world):
    """A mixture of policies on a Hub, pushed there by the command line; and what it answers to that of folders."""
    with Hub({"token": "author"}, members={"author"}) as hub:
        for name in ("a", "b"):
            hub.upload(f"org/{name}", world / name)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(world / "home"), "HF_TOKEN": "token"}
        env |= {"HF_HUB_DISABLE_XET": "1"}
        config = MixturePolicyConfig.from_pretrained(world / "mix").to_dict()
        config["reference"] = None
        for component, name in zip(config["components"], ("org/a", "org/b")):
            component["name_or_path"] = name
        folder = world / "by_repo_id"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text("# Tea\n\nRewards: all of them.\n\n![The fit](weights.png)\n")
        (folder / "weights.png").write_bytes(b"a picture")
        done = run_process("push", folder, "--repo_id", "author/mix", "--private", "--with_code", env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        yield SimpleNamespace(hub=hub, env=env, done=done)


def test_push_shares_a_pinned_mixture(shared):
    repo = shared.hub.repos["author/mix"]
    files = shared.hub.files("author/mix")
    assert repo.private
    assert {"config.json", "README.md", "tokenizer.json"} <= set(files)
    components = json.loads(files["config.json"])["components"]
    assert [c["revision"] for c in components] == [shared.hub.repos[f"org/{n}"].refs["main"] for n in "ab"]
    assert "author/mix" in shared.done.stdout


def test_push_takes_the_card_of_the_folder_and_the_code_along(shared):
    files = shared.hub.files("author/mix")
    card = ModelCard(files["README.md"].decode())
    assert card.text.strip() == "# Tea\n\nRewards: all of them.\n\n![The fit](weights.png)"
    assert card.data.base_model == ["org/a", "org/b"] and "mpo" in card.data.tags
    assert files["weights.png"] == b"a picture"
    assert "modeling_mixture.py" in files and "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]


def test_inspect_asks_the_hub(shared):
    done = run_process("inspect", "author/mix", "--json", env=shared.env)
    assert done.returncode == 0, done.stderr
    assert [c["name_or_path"] for c in json.loads(done.stdout)["components"]] == ["org/a", "org/b"]


def test_push_refuses_folders(world, shared):
    done = run_process("push", world / "mix", "--repo_id", "author/other", env=shared.env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "folders of this machine" in done.stderr
    assert "author/other" not in shared.hub.repos


@pytest.mark.slow
def test_fit_pushes_to_a_branch_that_was_not_there(world, shared, tmp_path):
    options = [str(option) for option in fit_options(world, tmp_path / "mix", steps=1)]
    options[options.index("--policies") + 1 : options.index("--rewards")] = ["org/a", "org/b", "--reference", "org/a"]
    pushing = ["--push_to_hub", "true", "--hub_model_id", "author/branched", "--hub_revision", "v2"]
    done = run_process(*options, *pushing, env=shared.env)
    assert done.returncode == 0, done.stderr[-3000:]
    repo = shared.hub.repos["author/branched"]
    assert "config.json" in repo.commits[repo.refs["v2"]] and "config.json" not in repo.commits[repo.refs["main"]]
    card = repo.commits[repo.refs["v2"]]["README.md"].decode()
    assert "# author/branched\n" in card and "| count_c | " in card and "policy_0" not in card
