import pytest

from mpo_hf.trainer.plots import plot_fit


def entry(step):
    return {"step": step, "loss": -0.1, "weights/a": 0.4, "weights/b": 0.6, "rewards/a": 0.1 * step, "rewards/b": 0.2}


def test_a_fit_becomes_a_picture(tmp_path):
    plot_fit([entry(step) for step in range(1, 6)] + [{"train_runtime": 1.0, "weights/a": 0.4}], tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_a_history_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no step"):
        plot_fit([{"train_runtime": 1.0}], tmp_path / "fit.png")
