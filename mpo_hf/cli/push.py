"""`mpo-hf push`: shares a mixture on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..mixture.modeling_mixture import MixturePolicyModel
from .loading import load_tokenizer_of, named_in_errors
from .parser import CommandParser


@dataclass
class PushArguments:
    """The repo, and what is uploaded."""

    repo_id: str = field(
        metadata={"help": "The repo, user/name. It is created if it does not exist.", "metavar": "REPO"}
    )
    private: bool = field(default=False, metadata={"help": "Create the repo as private."})
    pin: bool = field(
        default=True,
        metadata={"help": "Pin the policies to their current commits."},
    )
    upload_adapters: bool = field(default=False, metadata={"help": "Upload adapters in folders with the mixture."})
    with_code: bool = field(
        default=False,
        metadata={"help": "Upload the code of the mixture too, so that it loads where mpo_hf is not installed."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of a commit."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the repos of the mixture's components and tokenizer."}
    )


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
        "tokenizer. Policies are not uploaded. Log in by `hf auth login`, or set HF_TOKEN.",
        sections={
            "mixture": ["mixture", "trust_remote_code"],
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
        trusted = {"component_kwargs": {"trust_remote_code": True}} if args.trust_remote_code else {}
        model = MixturePolicyModel.from_pretrained(namespace.mixture, dtype="auto", **trusted)
    commit = model.push_to_hub(
        args.repo_id,
        private=args.private or None,
        pin_revisions=args.pin,
        upload_adapters=args.upload_adapters,
        with_code=args.with_code or None,  # a mixture that was loaded with code keeps it
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    # into the pull request of the first commit, if there is one
    revision = getattr(commit, "pr_revision", None) or args.revision
    tokenizer = load_tokenizer_of(model, namespace.mixture)
    tokenizer.push_to_hub(args.repo_id, revision=revision, commit_message="Upload tokenizer")
    print(f"{args.repo_id} is uploaded: {commit}")
