"""Runs one step's batch again, to see which example spoiled it."""

from posttrain.run.directory import Run
from posttrain.training.state import Training
from posttrain.training.step import example_losses, train_step


def replay(training: Training, run: Run, done: int, steps: int) -> None:
    """Run the batch of step replay_step on the weights after step `done`, print each example's loss, and change nothing. All ranks.

    Raises ValueError for a step after the run's last one, `steps`.
    """
    step = training.recipe.replay_step
    if step > steps:
        raise ValueError(f"replay_step {step} is after the run's last step, {steps}")
    metrics, refused, *_ = train_step(training, step, apply=False)
    weights = f"the checkpoint of step {done}" if done else "the model that the run began with"
    run.say(f"replay of step {step} with the weights of {weights}: loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}")
    run.say(f"it would not be applied: {refused}" if refused else "it would be applied: both are finite, and no spike")
    for example in example_losses(training, step):
        note = "" if example["weight"] else "  (weight 0: not of this step, but of the run's largest micro-batch, which step 1 tries)"
        numbers = f"{example['tokens']:>6} tokens  loss {shown_loss(example['loss']):>10}"
        run.say(f"  example {example['index']:>8}  {numbers}  {example['source']}{note}")


def shown_loss(loss: float | None) -> str:
    """Return a loss as text; None is one that is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"
