"""Measures the model while it trains: validation loss, answers to fixed prompts, and benchmarks, each at its interval."""

import time

from posttrain.data.chat import ChatFormat
from posttrain.run.directory import Run
from posttrain.training.samples import Samples
from posttrain.training.state import Training
from posttrain.training.step import evaluate


class Validation:
    """Measures the model in training after those steps at which something is due. All ranks call every method."""

    def __init__(self, training: Training, chat: ChatFormat, run: Run, steps: int):
        """`steps` is the run's last step, after which everything is measured."""
        self.training, self.run, self.steps, recipe = training, run, steps, training.recipe
        self.samples, self.benchmarks = Samples(recipe, training.data, chat, training.context), None
        if recipe.benchmarks:  # lm_eval, which takes seconds to import, is needed only then
            from posttrain.training.benchmarks import TrainingBenchmarks

            self.benchmarks = TrainingBenchmarks(recipe, chat, training.data.system_prompt, training.context)

    def after(self, step: int) -> float | None:
        """Measure and log what is due after `step`; returns the validation loss, None if it was not due."""
        recipe, run, started, metrics = self.training.recipe, self.run, time.perf_counter(), {}
        validates = self._is_due(recipe.eval_interval, step)
        if validates and len(self.training.data.validation):
            metrics, examples = evaluate(self.training)
            run.log_histograms(step, examples)
            run.eval_line(step, metrics)
        if validates and self.samples.prompts:
            answers = self.samples.ask(self.training)
            run.log_samples(step, answers)
            metrics["sample_tokens"] = sum(answer["tokens"] for answer in answers) / len(answers)
        if self.benchmarks and self._is_due(recipe.benchmark_interval or recipe.eval_interval, step):
            metrics |= self.benchmarks.take(self.training)
        if metrics:
            run.log(step, "eval", metrics | {"runtime": time.perf_counter() - started})
        return metrics.get("loss")

    def _is_due(self, interval: int, step: int) -> bool:
        """Whether `step` is a multiple of `interval` (0 is one) or the last step; never if the interval is 0."""
        return interval > 0 and (step % interval == 0 or step == self.steps)


def validate_only(training: Training, run: Run) -> None:
    """Print the validation metrics of the model as it is, and change nothing. All ranks.

    Raises ValueError if there are no validation rows.
    """
    if not len(training.data.validation):
        raise ValueError(f"eval_only: {training.recipe.data_dir} has no validation rows; prepare it with --val_size")
    run.say("  ".join(f"{name} {value:.4f}" for name, value in evaluate(training)[0].items()))
