"""The model card of a mixture: what it says, what it says nothing about, and whether a Hub would take it."""

import ast
import os
from html.parser import HTMLParser

import pytest
import torch
import yaml
from card_rules import problems_of
from helpers import fake_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from mpo_hf import MixturePolicyConfig
from mpo_hf.estimation import Certificate
from mpo_hf.mixture.model_card import create_model_card, escaped, pictures_of, update_model_card
from mpo_hf.trainer.fit_card import measured_rewards, save_plot


COMMIT, OTHER_COMMIT = "0123456789" * 4, "ab" * 20
REPOS = MixturePolicyConfig(
    components=[
        {"name_or_path": "org/helpful", "revision": COMMIT, "label": "helpful"},
        {
            "name_or_path": "gpt2",
            "adapter": "org/harmless-lora",
            "adapter_revision": "v1.0",
            "revision": OTHER_COMMIT,
            "label": "harm|less",
        },
    ],
    mixture_weights=[0.25, 0.75],
    reference={"name_or_path": "gpt2", "revision": OTHER_COMMIT},
)
UPLOADED = MixturePolicyConfig(components=[{"name_or_path": "org/sft", "adapter": "./adapters/terse"}])
WHOLE = MixturePolicyConfig(components=[{}, {}])
FOLDER = MixturePolicyConfig(components=[{"name_or_path": "/home/somebody/policies/kind"}])


def rows_of(card: ModelCard) -> list[list[str]]:
    """The cells of the table of components."""
    return [row.strip("| ").split(" | ") for row in card.text.splitlines() if row.startswith("|")]


def licensed(cache, **licenses):
    """Puts cards into a cache of the Hub, each with a license, or other metadata."""
    for name, metadata in licenses.items():
        folder = cache.parent / f"card-{name}"
        folder.mkdir()
        metadata = {"license": metadata} if isinstance(metadata, str) else metadata
        text = metadata["text"] if "text" in metadata else f"---\n{yaml.safe_dump(metadata)}---\n\n# {name}\n"
        (folder / "README.md").write_text(text)
        fake_hub(cache, f"org/{name}", folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mixture_of(*names, **adapters) -> MixturePolicyConfig:
    components = [{"name_or_path": f"org/{name}"} for name in names]
    components += [{"name_or_path": f"org/{base}", "adapter": f"org/{name}"} for name, base in adapters.items()]
    return MixturePolicyConfig(components=components)


# ---- metadata ----


@pytest.mark.parametrize("config", [REPOS, UPLOADED, WHOLE, FOLDER], ids=["repos", "uploaded", "whole", "folder"])
def test_metadata_is_valid(config):
    content = str(create_model_card(config, "org/mix", with_code=True))
    assert problems_of(content) == ([], [])
    metadata = yaml.safe_load(REGEX_YAML_BLOCK.search(content)[2])
    assert ModelCardData(**metadata).to_dict() == metadata  # nothing is lost on the way
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert {"mpo", "merge"} <= set(metadata["tags"])


@pytest.mark.parametrize(
    ("config", "base_models"),
    [(REPOS, ["gpt2", "org/harmless-lora", "org/helpful"]), (UPLOADED, ["org/sft"]), (WHOLE, None), (FOLDER, None)],
)
def test_base_models_are_the_repositories(config, base_models):
    data = create_model_card(config, "org/mix").data
    assert data.base_model == base_models
    assert data.get("base_model_relation") == ("merge" if base_models else None)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("base_model: [org/a, /home/me/b]", "not a repo id"),
        ("base_model_relation: blend\nbase_model: org/a", "must be one of"),
        ("base_model_relation: merge", 'needs a "base_model"'),
        ("license: [mit]", "must be a string"),
        ("license: my own", "must be one of"),
        ("license: other", "license_name"),
        ("tags: [a, a]", "duplicates"),
        ("tags: [1]", "list of strings"),
        ("language: english", "not a language"),
        ("tags: [a", "not YAML"),
        ("- a", "must be a mapping"),
    ],
)
def test_rules_of_the_hub_can_be_broken(metadata, problem):
    assert problem in problems_of(f"---\n{metadata}\n---\n# Mine\n")[0][0]
    assert problems_of("# Mine\n")[1]


# ---- licenses ----


def test_one_license_of_all_components_is_that_of_the_mixture(cache):
    licensed(cache, a="mit", b="mit", lora="mit", ref="gemma")
    config = mixture_of("a", "b", lora="b")
    card = create_model_card(config, "org/mix")
    assert card.data.license == "mit"
    assert [row[-1] for row in rows_of(card)[2:]] == ["mit", "mit", "mit over mit"]
    named = {"license": "other", "license_name": "house-rules", "license_link": "https://example.org/rules"}
    licensed(cache, own=named, too=named)
    data = create_model_card(mixture_of("own", "too"), "org/mix").data
    assert {key: data.get(key) for key in named} == named
    assert problems_of(f"---\n{data}\n---\n") == ([], [])


def test_different_or_unknown_licenses_are_listed_only(cache):
    unreadable = {"text": "---\nlicense: [mit\n---\n"}
    licensed(cache, a="mit", b="apache-2.0", lora={"tags": ["x"]}, broken=unreadable, open="unknown")
    card = create_model_card(mixture_of("a", "b", "broken", "missing", "open", lora="a"), "org/mix")
    assert card.data.license is None
    expected = ["mit", "apache-2.0", "unknown", "unknown", "unknown", "unknown over mit"]
    assert [row[-1] for row in rows_of(card)[2:]] == expected
    assert create_model_card(mixture_of("a", "missing"), "org/mix").data.license is None


def test_license_is_that_of_the_revision(cache):
    licensed(cache, a="mit")
    (cache.parent / "later").mkdir()
    (cache.parent / "later" / "README.md").write_text("---\nlicense: gemma\n---\n")
    fake_hub(cache, "org/a", cache.parent / "later", "later")
    component = {"name_or_path": "org/a", "revision": "later"}
    config = MixturePolicyConfig(components=[component], reference={"name_or_path": "org/a"})
    card = create_model_card(config, "org/mix")
    assert card.data.license == "gemma"  # the reference is not part of the mixture
    assert [row[-1] for row in rows_of(card)[2:]] == ["gemma", "mit"]


# ---- the text ----


def test_table_links_to_what_was_pinned():
    card = create_model_card(REPOS, "org/mix")
    table = card.text.split("<!-- mpo_hf: policies -->")[1].split("<!-- mpo_hf: end of policies -->")[0]
    helpful, harmless, reference = table.strip().splitlines()[-3:]
    pinned = f"[0123456](https://huggingface.co/org/helpful/tree/{COMMIT})"
    assert helpful == f"| helpful | 0.2500 | [org/helpful](https://huggingface.co/org/helpful) | {pinned} | unknown |"
    assert r"| harm\|less | 0.7500 |" in harmless
    assert "harmless-lora/tree/v1.0) over [abababa](https://huggingface.co/gpt2/tree/abab" in harmless
    assert reference.startswith("| *reference* |  | [gpt2](https://huggingface.co/gpt2) |")


def test_folders_of_the_author_stay_private():
    text = str(create_model_card(FOLDER, "mix"))
    assert "`kind`" in text and "somebody" not in text


def test_what_lies_in_the_repository_itself_is_told_apart():
    inside = {"name_or_path": "org/sft", "adapter": "org/mix", "adapter_subfolder": "adapters/terse"}
    for config in (UPLOADED, MixturePolicyConfig(components=[inside])):
        card = create_model_card(config, "org/mix")
        assert (
            "| in this repository over [org/sft](" in card.text and "holds a configuration and adapters" in card.text
        )
        assert card.data.base_model == ["org/sft"]
    elsewhere = create_model_card(MixturePolicyConfig(components=[inside]), "org/other")
    assert "[org/mix](https://huggingface.co/org/mix), `adapters/terse` over" in elsewhere.text
    assert elsewhere.data.base_model == ["org/mix", "org/sft"]


def test_card_says_how_to_load_the_mixture():
    plain, carrying = (str(create_model_card(REPOS, "org/mix", with_code=code)) for code in (False, True))
    assert 'from_pretrained("org/mix")' in plain and "trust_remote_code" not in plain
    assert 'from_pretrained("org/mix", trust_remote_code=True)' in carrying and "and `peft`" in carrying
    assert "`peft`" not in str(create_model_card(WHOLE, "org/mix", with_code=True))
    for text in (plain, carrying):
        assert "import mpo_hf" in text and "2502.18699" in text and "@inproceedings{wang2025mpo" in text


# ---- what a fit has measured ----


def history(*rewards, proposal_key="rewards/") -> list[dict]:
    steps = [
        {"step": i, "loss": 0.0, "weights/a": 0.5, "weights/b": 0.5, f"{proposal_key}a": a, f"{proposal_key}b": b}
        for i, (a, b) in enumerate(rewards, start=1)
    ]
    return [*steps, {"step": len(steps), "train_loss": 0.0}]


def test_the_reference_is_one_policy_at_all_steps():
    rewards, note = measured_rewards(history((1.0, 0.0), (2.0, 0.0), (3.0, 0.0)), "reference")
    assert list(rewards) == ["the reference, steps 1 to 3"]
    assert rewards["the reference, steps 1 to 3"] == {"a": (2.0, pytest.approx(1 / 3**0.5)), "b": (0.0, 0.0)}
    assert "was not measured" in note and "± is the standard error" in note


def test_the_mixture_is_another_at_the_end():
    values = [(float(i), -1.0) for i in range(20)]
    rewards, note = measured_rewards(history(*values), "mixture")
    assert list(rewards) == ["the mixture, steps 1 to 2", "the mixture, steps 19 to 20"]
    assert rewards["the mixture, steps 1 to 2"]["a"] == (0.5, 0.5)
    assert rewards["the mixture, steps 19 to 20"]["a"] == (18.5, 0.5)
    assert "standard error" in note
    few, note = measured_rewards(history((1.0, 2.0), (3.0, 4.0)), "mixture")
    assert few == {"the mixture, step 1": {"a": 1.0, "b": 2.0}, "the mixture, step 2": {"a": 3.0, "b": 4.0}}
    assert "standard error" not in note


def test_without_rewards_or_steps_nothing_is_claimed(tmp_path):
    assert (
        measured_rewards([], "mixture") == ({}, "") == measured_rewards(history((1, 1), proposal_key="x/"), "mixture")
    )
    assert save_plot([], tmp_path) is None and not os.listdir(tmp_path)
    assert "## Rewards" not in create_model_card(REPOS, "mix").text


def test_card_shows_the_fit(tmp_path):
    rewards, note = measured_rewards(history((1.0, 0.5), (2.0, 0.5)), "reference")
    plot = save_plot(history((1.0, 0.5), (2.0, 0.5)), tmp_path)
    text = create_model_card(REPOS, "mix", rewards, plot, note).text
    assert "The weights of the mixture at that time: helpful 0.2500, harm|less 0.7500." in text
    assert "| the reference, steps 1 to 2 | 1.5000 ± 0.5000 | 0.5000 ± 0.0000 |" in text and note in text
    assert "![Mixture weights during the fit](weights.png)" in text
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def certified() -> Certificate:
    return Certificate(
        weights=torch.tensor([0.25, 0.75]),
        standard_errors=torch.tensor([0.02, 0.02]),
        dual_objective=-0.1,
        duality_gap=0.0,
        duality_gap_bound=0.0125,
        confidence=0.95,
        active=torch.tensor([1.0, 1.0]),
        effective_sample_fraction=0.5,
        mixture_rewards=torch.tensor([1.25, 0.5]),
        mixture_reward_errors=torch.tensor([0.125, 0.25]),
    )


def test_card_says_how_good_the_weights_are():
    certificate = certified()
    names = ["a", "b"]
    rewards, note = measured_rewards(history((1.0, 0.5), (2.0, 0.5)), "reference", certificate, names)
    text = create_model_card(REPOS, "mix", rewards, note=note).text
    assert "| the mixture, estimated | 1.2500 ± 0.1250 | 0.5000 ± 0.2500 |" in text
    assert "With 95% confidence the weights are within 0.0125 nats" in text and "a 0.0200, b 0.0200" in text
    assert "was not measured" not in text
    certificate.duality_gap_bound, certificate.mixture_rewards = float("inf"), None
    rewards, note = measured_rewards(history((1.0, 0.5), (2.0, 0.5)), "reference", certificate, names)
    assert "nats" not in note and "was not measured" in note and len(rewards) == 1


# ---- names by others ----

HOSTILE = {
    "a tag": "<script>alert(1)</script>",
    "a link": "[x](https://evil.example)",
    "a picture": "![p](weights.png)",
    "an address": "https://evil.example www.evil.example a@evil.example",
    "a heading": "a\n\n# Heading",
    "a column": "a|b\\|c",
    "code": "`a` ``b",
    "emphasis": "*a* _b_ __c__ ~~d~~ e_f",
    "TeX": "$x$ \\frac{1}{2}",
    "entities": "&lt; &amp; \\*",
    "a comment": "<!-- mpo_hf: end of policies -->",
    "a template": "{{ name }} {% raw %}",
    "an escape": "\x1b[31mred\x9b0m\x07",
    "a direction": "\u202egnol a\u2066",
    "no width": "a\u200bb\u2060c\ufeff",
}


def shown(text: str) -> str:
    """A name on one line, with characters that cannot be seen as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


class _Cells(HTMLParser):
    """The tags of a page, and the texts of the cells of its tables."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.rows, self.is_inside = set(), [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add((tag, *(value for name, value in attrs if name in ("href", "src"))))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_inside = True

    def handle_endtag(self, tag):
        self.is_inside = self.is_inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.is_inside:
            self.rows[-1][-1] += data


def test_names_by_others_are_shown_as_they_are_written(cache):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    names = list(HOSTILE.values())
    for k, name in enumerate(names):
        licensed(cache, **{f"p{k}": {"license": "other", "license_name": name}})
    config = mixture_of(*(f"p{k}" for k in range(len(names))))
    rewards = {name: dict.fromkeys(names, 0.5) for name in names}
    card = create_model_card(config, "mix", rewards)
    page = _Cells(markdown.render(card.text))
    rows = [row for row in page.rows if row[0] != "objective"]
    expected = [shown(name) for name in names]
    assert [row[0] for row in rows[: len(names)]] == expected
    assert [row[4] for row in rows[: len(names)]] == expected
    assert rows[len(names)] == ["mean reward of", *expected]
    assert [row[0] for row in rows[len(names) + 1 :]] == expected
    targets = {target for _, *found in page.tags for target in found}
    assert all(target.startswith(("https://huggingface.co/org/p", "https://arxiv.org/")) for target in targets)
    assert {tag for tag, *_ in page.tags} <= set("h1 h2 p a pre code table thead tbody tr th td".split())
    assert card.text.count("<!-- mpo_hf: end of policies -->") == 1 and "\n# Heading" not in card.text
    # and it can be brought up to date
    update_model_card(card, create_model_card(config, "org/mix", rewards))
    assert _Cells(markdown.render(card.text)).rows == page.rows


@pytest.mark.parametrize("kind", HOSTILE)
def test_title_and_folders_are_names_by_others_too(kind):
    name = HOSTILE[kind]
    folder = name.replace("/", "-")
    text = create_model_card(MixturePolicyConfig(components=[{"name_or_path": f"/home/me/{folder}"}]), name).text
    assert f"# {escaped(name)}\n" in text and text.count("\n# ") == 1 and "<script" not in text.split("```")[0]
    code = text.split("```python")[1].split("```")[0]
    (call,) = [line for line in code.splitlines() if line.startswith("model")]
    assert ast.literal_eval(call.partition("from_pretrained")[2]) == name


def test_sentences_about_a_fit_have_names_of_others():
    certificate = certified()
    _, note = measured_rewards(history((1.0, 0.5), (2.0, 0.5)), "reference", certificate, ["<b>", "[c](d)"])
    assert "&#60;b&#62; 0.0200, &#91;c&#93;(d) 0.0200" in note


def test_components_are_called_by_the_names_of_the_fit():
    config = MixturePolicyConfig(components=[{"name_or_path": "org/a"}, {"name_or_path": "org/b", "label": "kind"}])
    card = create_model_card(config, "mix", {"fitted": {"short": 0.25, "kind": 0.5}})
    assert [row[0] for row in rows_of(card)[2:4]] == ["short", "kind"] and "policy_0" not in card.text
    assert "at that time: short 0.5000, kind 0.5000" in card.text
    # a push knows the config only
    update_model_card(card, create_model_card(config, "org/mix"))
    assert [row[0] for row in rows_of(card)[2:4]] == ["short", "kind"] and "policy_0" not in card.text
    other = MixturePolicyConfig(components=[{"name_or_path": "org/c"}])
    update_model_card(card, create_model_card(other, "org/mix"))
    assert rows_of(card)[2][0] == "policy_0"


def test_title_follows_the_repository_unless_an_author_has_changed_it():
    for title, expected in (("# mix", "# org/mix"), ("# Tea", "# Tea"), ("# mix of teas", "# mix of teas")):
        card = create_model_card(REPOS, "mix")
        card.text = card.text.replace("# mix", title)
        update_model_card(card, create_model_card(REPOS, "org/mix"))
        assert [line for line in card.text.splitlines() if line.startswith("# ")] == [expected]


# ---- a card that is there already ----


def test_what_an_author_has_written_stays():
    card = create_model_card(REPOS, "mix", {"fitted": {"a": 0.25}})
    card.text = card.text.replace("# mix", "# My mix\n\nMade for tea parties.") + "\nThanks to all.\n"
    card.data.license, card.data.tags, card.data["datasets"] = "mit", ["tea", "mpo"], ["org/tea"]
    changed = MixturePolicyConfig(components=REPOS.components[:1])
    update_model_card(card, create_model_card(changed, "org/mix", with_code=True))
    for kept in ("# My mix", "tea parties", "Thanks to all.", "## Rewards", "helpful 0.2500"):
        assert kept in card.text
    assert "| helpful | 1.0000 |" in card.text and "harmless-lora" not in card.text
    assert 'from_pretrained("org/mix", trust_remote_code=True)' in card.text and '"mix"' not in card.text
    assert card.data.license == "mit" and card.data["datasets"] == ["org/tea"]
    assert card.data.base_model == ["org/helpful"]
    assert card.data.tags == ["tea", "mpo", "mpo_hf", "merge", "text-generation"]
    assert problems_of(str(card)) == ([], [])


def test_a_card_from_elsewhere_gets_metadata_only():
    card = ModelCard("# Mine\n\nNothing but this.\n")
    update_model_card(card, create_model_card(REPOS, "org/mix"))
    assert card.text == "# Mine\n\nNothing but this.\n"
    assert card.data.pipeline_tag == "text-generation" and "gpt2" in card.data.base_model
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_pictures_are_those_of_the_folder():
    shown = ["weights.png", "./images/fit.png", "../secret.png", "/etc/secret.png", "https://example.org/fit.png"]
    card = ModelCard("\n".join(f"![A picture]({path})" for path in shown))
    assert pictures_of(card) == ["weights.png", os.path.join("images", "fit.png")]
