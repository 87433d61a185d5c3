"""The branch that a fit is pushed to is there before the fit begins."""

from types import SimpleNamespace

import pytest
from hub_server import Hub
from huggingface_hub import HfApi

from mpo_hf.trainer import saving


class Base:
    """What Trainer does."""

    def init_hf_repo(self, token=None):
        self.hub_model_id = "author/mix"


class Fit(saving.MixtureSaving, Base):
    def __init__(self, revision):
        self.args = SimpleNamespace(hub_revision=revision, hub_token=None)

    def is_world_process_zero(self):
        return True


@pytest.mark.parametrize(
    "revision, branches", [("v2", {"main", "v2"}), ("main", {"main"}), (None, {"main"}), ("refs/pr/1", {"main"})]
)
def test_branch_is_made_early(monkeypatch, revision, branches):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub({"token": "author"}, members=set()) as hub:
        api = HfApi(endpoint=hub.endpoint, token="token")
        api.create_repo("author/mix")
        monkeypatch.setattr(saving, "HfApi", lambda: api)
        for _ in range(2):  # of a fit that is started again, too
            Fit(revision).init_hf_repo()
        assert set(hub.repos["author/mix"].refs) == branches
