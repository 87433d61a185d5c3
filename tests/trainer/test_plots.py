import pytest

from mpo_hf.trainer.plots import make_figure, plot_fit


def entry(step, **more):
    return {"step": step, "loss": -0.1, "weights/a": 0.1 * step, "weights/b": 1 - 0.1 * step, **more}


def with_rewards(step):
    return entry(step, **{"rewards/a": 0.3 * step, "rewards/b": -0.2})


OTHER = [{"train_runtime": 1.0, "weights/a": 0.4}, {"step": 3, "eval_loss": 0.2, "eval_rewards/a": 9.0}]


def lines_of(axis):
    return {line.get_label(): list(zip(*line.get_data())) for line in axis.get_lines()}


def test_weights_and_rewards_are_drawn_over_the_steps():
    figure = make_figure([OTHER[0], *map(with_rewards, (1, 2, 5)), *OTHER], "A fit")
    weights, rewards = figure.axes
    assert lines_of(weights) == {
        "a": [(1, 0.1), (2, 0.2), (5, 0.5)],
        "b": [(1, 0.9), (2, 0.8), (5, 0.5)],
    }
    assert lines_of(rewards) == {"a": [(1, 0.3), (2, 0.6), (5, 1.5)], "b": [(1, -0.2), (2, -0.2), (5, -0.2)]}
    assert weights.get_title() == "A fit"
    assert (weights.get_ylabel(), rewards.get_ylabel()) == ("mixture weight λ", "mean reward of samples")
    assert (weights.get_xlabel(), rewards.get_xlabel()) == ("", "step")
    assert [text.get_text() for text in weights.get_legend().get_texts()] == ["a", "b"]
    # one legend is for both panels, so the colors of an objective agree
    assert [line.get_color() for line in weights.get_lines()] == [line.get_color() for line in rewards.get_lines()]


def test_without_rewards_there_is_one_panel():
    (axis,) = make_figure([entry(1), entry(2)], "A fit").axes
    assert set(lines_of(axis)) == {"a", "b"} and axis.get_xlabel() == "step"


@pytest.mark.parametrize("name, start", [("fit.png", b"\x89PNG"), ("fit.svg", b"<?xml"), ("fit.pdf", b"%PDF")])
def test_the_extension_determines_the_format(tmp_path, name, start):
    plot_fit([with_rewards(1), with_rewards(2)], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_history_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no step"):
        plot_fit(OTHER, tmp_path / "fit.png")
    assert not (tmp_path / "fit.png").exists()


def test_names_are_drawn_as_they_are_written(tmp_path):
    names = ["_a", "$x$", "$b", "\\frac{1", "a\nb"]
    history = [{"step": 1, "loss": 0.0, **{f"weights/{name}": 0.2 for name in names}}]
    plot_fit(history, tmp_path / "fit.svg", "$fit_{")
    figure = make_figure(history, "$fit_{")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.lstrip("\u200a").replace("\\$", "$") for text in texts] == ["_a", "$x$", "$b", "\\frac{1", "a\\nb"]
