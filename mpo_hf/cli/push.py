"""`mpo-hf push`: shares a mixture on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..mixture.modeling_mixture import MixturePolicyModel
from .opening import named_in_errors, open_tokenizer
from .parser import CommandParser


@dataclass
class PushArguments:
    """Where to, and in which form."""

    repo_id: str = field(metadata={"help": "Where to: user/name. Made if it does not exist.", "metavar": "REPO"})
    private: bool = field(default=False, metadata={"help": "Make the repo a private one."})
    pin: bool = field(
        default=True,
        metadata={"help": "Pin the policies to the commits that they are at now."},
    )
    upload_adapters: bool = field(
        default=False, metadata={"help": "Upload adapters that live in folders with the mixture."}
    )
    with_code: bool = field(
        default=False,
        metadata={"help": "Upload the code of the mixture too, so that it opens where mpo_hf is not installed."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of a commit."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})


EXAMPLES = """
mpo-hf push mix --repo_id user/mix --private
mpo-hf push mix --repo_id user/mix --upload_adapters --commit_message "Weights for 2026"
"""


def make_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(
        "push",
        [PushArguments],
        usage="MIXTURE --repo_id REPO [options]",
        description="Shares a mixture on the Hub: its config, with every policy pinned to a commit, a model card and the "
        "tokenizer. Policies stay where they are. Log in by `hf auth login`, or set HF_TOKEN.",
        sections={
            "mixture": ["mixture"],
            "repository": ["repo_id", "private", "revision", "create_pr", "commit_message"],
            "contents": ["pin", "upload_adapters", "with_code"],
        },
        examples=EXAMPLES,
    )
    parser.add_argument("mixture", help="Folder or repo id of the mixture.")
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs `mpo-hf push`."""
    args, namespace = make_parser().parse(argv)
    with named_in_errors(namespace.mixture):
        model = MixturePolicyModel.from_pretrained(namespace.mixture, dtype="auto")
    commit = model.push_to_hub(
        args.repo_id,
        private=args.private or None,
        pin_revisions=args.pin,
        upload_adapters=args.upload_adapters,
        with_code=args.with_code or None,  # a mixture that came with code keeps it
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    # into the pull request of the first commit, where there is one
    revision = getattr(commit, "pr_revision", None) or args.revision
    tokenizer = open_tokenizer(model, namespace.mixture)
    tokenizer.push_to_hub(args.repo_id, revision=revision, commit_message="Upload tokenizer")
    print(f"{args.repo_id} is shared: {commit}")
