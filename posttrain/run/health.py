"""Looks for signs of trouble in a run's metrics, and says in plain words what is wrong and what to do. Each finding is given once a run.

The thresholds are chosen so that a normal run causes no finding. docs/reading-a-run.md shows the curves.
"""

import math
from collections import deque
from statistics import mean, median, pstdev
from typing import NamedTuple

from posttrain.recipes.keys import Recipe


class Facts(NamedTuple):
    """What is known about the model and the data before the first step."""

    parameters: int
    rows: int  # training examples
    copies: int  # training examples that are exact copies of others
    weight_scale: float  # root mean square of all matrices' weights
    answer_tokens: float  # mean number of trained tokens in an example
    vocabulary: int = 0  # tokens among which the model chooses; 0 = not known


class Finding(NamedTuple):
    """A sign of trouble: its name, what was seen, and what to do about it."""

    name: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.what}. {self.todo}"


WINDOW = 5, 20  # least and most steps over which metrics are averaged; a fortieth of the run in between
STEP_OF_WEIGHTS = {"sft": (2e-6, 0.05), "dpo": (1e-7, 0.02)}  # normal learning rate / weight_scale; Adam moves a weight by about the rate
COPIES = 0.2  # largest normal share of copies
CHANCE = 1.5  # largest normal loss of SFT at the start, in multiples of that of a model that finds all tokens equally likely
RISES = 1.1  # largest normal loss, in multiples of that at the start
FEWEST = 20  # gradient norms needed before their median counts as typical
SPIKE, SPIKES = 5.0, 5  # a spike is so many times the typical gradient norm; so many of the last 50 steps are too many
TOO_SMALL = 1e-4  # least normal share of bfloat16 weights a step changes; learning rate 5e-7 is above it, see tests/test_precision.py
SATURATED = 0.98, 0.1  # least accuracy, and greatest share of the loss at the start
CHOSEN_FALLS = 0.5  # largest normal fall of the chosen answers' log-prob, in nats a token
FAR = {"chosen": 1.5, "rejected": 6.0}  # largest normal distance from the reference, in nats a token; rejected answers are meant to go
SWAPPED = 0.25  # least normal share of pairs whose chosen answer the initial model finds likelier
LEARNT = 0.6  # accuracy on training pairs that counts as learnt; 1 - LEARNT on validation pairs counts as the opposite
OVERFITS = {"sft": 1.02, "dpo": 1.1}  # largest normal validation loss, in multiples of the lowest; above it twice in a row is overfitting
LONGER = 1.5  # largest normal length of answers, in multiples of that before training


class Health:
    """Checks the metrics of every step and every validation, which are those of all ranks together."""

    def __init__(self, recipe: Recipe, steps: int, facts: Facts):
        self.recipe, self.steps, self.facts = recipe, steps, facts
        self.told: set[str] = set()  # names of the findings already given
        self.kind = recipe.kind
        self.window = max(WINDOW[0], min(WINDOW[1], steps // 40))
        self.first: dict[str, list[float]] = {}
        self.last: dict[str, deque[float]] = {}
        self.norms: deque[float] = deque(maxlen=50)
        self.first_norms: list[float] = []
        self.looks: list[dict[str, float]] = []

    def before(self) -> list[Finding]:
        """Returns the findings about learning rate and data, before the first step."""
        facts, (least, most) = self.facts, STEP_OF_WEIGHTS[self.kind]
        share = self.recipe.learning_rate / facts.weight_scale
        found = []
        if not least <= share <= most:
            how = "large" if share > most else "small"
            found.append(
                Finding(
                    f"learning rate too {how}",
                    f"learning_rate {self.recipe.learning_rate:g} is far too {how} for this model: a step moves a typical weight by "
                    f"{share:.2g} of its size, where {least:g} to {most:g} is normal",
                    f"{'Lower' if share > most else 'Raise'} learning_rate",
                )
            )
        if facts.copies > COPIES * facts.rows:
            found.append(
                Finding(
                    "duplicated data",
                    f"{facts.copies:,} of {facts.rows:,} training rows ({facts.copies / facts.rows:.0%}) are exact copies of others, which "
                    "the model will memorize",
                    "Prepare the data again with --duplicates drop",
                )
            )
        return self._new(found)

    def see(self, step: int, split: str, metrics: dict[str, float | None]) -> list[Finding]:
        """Returns the new findings after a record of metrics.jsonl, in which None stands for a value that was not finite."""
        known = {name: math.nan if value is None else value for name, value in metrics.items()}
        return self._new(self._see_validation(known) if split == "eval" else self._see_step(step, known))

    def _see_step(self, step: int, metrics: dict[str, float]) -> list[Finding | None]:
        """Take in a training step's metrics, and check them."""
        for name in ("loss", "nll_loss", "preference_loss", "rewards/accuracies", "rewards/rejected", "rewards/chosen", "logps/accuracies"):
            if name in metrics:
                self.first.setdefault(name, [])
                if len(self.first[name]) < self.window:
                    self.first[name].append(metrics[name])
                self.last.setdefault(name, deque(maxlen=self.window)).append(metrics[name])
        self.norms.append(metrics["grad_norm"])
        chance = self._chance(metrics["loss"]) if step == 1 else None
        self.first_norms = [*self.first_norms, metrics["grad_norm"]][:FEWEST]
        found = [chance, self._small_update(step, metrics), self._spikes()]
        if len(self.first["loss"]) == self.window:
            found += [self._loss(step)] if self.kind == "sft" else [*self._preference(step)]
        return found

    def _see_validation(self, metrics: dict[str, float]) -> list[Finding | None]:
        """Take in a validation's metrics, and check them."""
        self.looks.append(metrics)
        chance = self._chance(metrics["loss"]) if len(self.looks) == 1 and "loss" in metrics else None
        return [chance, self._overfitting(), self._opposite(metrics), self._longer_answers()]

    def _new(self, found: list[Finding | None]) -> list[Finding]:
        """Returns the findings that have not been given yet, and notes them as given."""
        new = [finding for finding in found if finding and finding.name not in self.told]
        self.told |= {finding.name for finding in new}
        return new

    def _now(self, name: str) -> float:
        """Returns a metric's mean over the last steps."""
        return mean(self.last[name])

    def _start(self, name: str) -> float:
        """Returns a metric's mean over the first steps."""
        return mean(self.first[name])

    def _chance(self, loss: float) -> Finding | None:
        """Checks that the model to train finds SFT's answers likelier than tokens at random."""
        if self.kind != "sft" or self.facts.vocabulary < 2 or not loss > CHANCE * math.log(self.facts.vocabulary):
            return None
        return Finding(
            "worse than chance",
            f"the model begins with a loss of {loss:.3g}; one that knew nothing would have {math.log(self.facts.vocabulary):.3g}, the "
            "logarithm of its vocabulary",
            "Look whether the data's token ids are those of this model (its own tokenizer), and at the rows, with data_prep/preview.py",
        )

    def _small_update(self, step: int, metrics: dict[str, float]) -> Finding | None:
        """Checks that a step changes enough bfloat16 weights, unless the learning rate is low, as in warmup."""
        if metrics.get("bf16_changed", 1.0) >= TOO_SMALL or metrics["learning_rate"] <= self.recipe.learning_rate / 2:
            return None
        return Finding(
            "update too small",
            f"step {step} changed {metrics['bf16_changed']:.1e} of the bfloat16 weights: at learning rate {metrics['learning_rate']:.1e} "
            "an update is too small to register. The float32 master weights keep it, but the model hardly moves",
            "Raise learning_rate",
        )

    def _spikes(self) -> Finding | None:
        """Checks for many unusually large gradient norms."""
        # once most examples are learnt, few still have a gradient: norms are then far above a tiny median, but not above those of the start
        typical = max(median(self.norms), median(self.first_norms))
        if len(self.norms) < FEWEST or not typical:
            return None
        high = [norm for norm in self.norms if not norm <= SPIKE * typical]
        if len(high) < SPIKES:
            return None
        return Finding(
            "gradient spikes",
            f"{len(high)} of the last {len(self.norms)} gradient norms are more than {SPIKE:g} times the usual norm, {typical:.3g}",
            "Lower learning_rate, lengthen warmup_iters, or look for broken examples: bad_batches.jsonl, --replay_step",
        )

    def _loss(self, step: int) -> Finding | None:
        """Checks that the loss of SFT falls, and does not rise."""
        start, now, spread = self._start("loss"), self._now("loss"), pstdev(self.first["loss"])
        noise = spread / self.window**0.5
        if step >= 2 * self.window and not now <= max(RISES * start, start + 3 * noise):
            return Finding(
                "loss rises",
                f"the loss rises: {start:.3g} at the start, {now:.3g} now",
                "Lower learning_rate tenfold, or lengthen warmup_iters",
            )
        late = step >= max(self.steps / 10, 3 * self.window, self.recipe.warmup_iters + 2 * self.window)
        if late and now >= start - noise / 2:
            return Finding(
                "loss does not fall",
                f"the loss has not fallen: {start:.3g} at the start, {now:.3g} now",
                "Raise learning_rate, or check with data_prep/preview.py that the data is what you intended",
            )
        return None

    def _preference(self, step: int):
        """Yields what is wrong with a step's metrics of DPO: accuracy, margins, likelihood of the answers."""
        recipe, start = self.recipe, self._start("preference_loss")
        if step <= self.window and self._start("logps/accuracies") < SWAPPED:
            yield Finding(
                "swapped",
                f"the initial model finds the chosen answer likelier, per token, in only {self._start('logps/accuracies'):.0%} of pairs: "
                "are chosen and rejected swapped?",
                "Look at some with data_prep/preview.py. If the rejected answers are the model's own, this is expected",
            )
        accuracy, loss = self._now("rewards/accuracies"), self._now("preference_loss")
        if step <= self.steps / 10 and accuracy >= SATURATED[0] and loss <= SATURATED[1] * start:
            yield Finding(
                "saturated",
                f"margins are saturated at once: accuracy {accuracy:.2f}, preference loss {loss:.2g} after {step} of {self.steps} steps",
                "The pairs differ by something that is too easy to see (length, form, an empty answer), or learning_rate is too high",
            )
        if "nll_loss" in self.last and (fallen := self._now("nll_loss") - self._start("nll_loss")) > CHOSEN_FALLS:
            yield Finding(
                "chosen log-prob falls",
                f"chosen answers have become less likely, by {fallen:.2g} nats a token since the start",
                "Add chosen_nll_weight (0.1 to 1), raise beta, or lower learning_rate",
            )
        if not recipe.needs_reference:  # without one, rewards are not distances from it
            return
        distances = {which: abs(self._now(f"rewards/{which}")) / recipe.beta / self.facts.answer_tokens for which in FAR}
        if far := next((which for which, distance in distances.items() if distance > FAR[which]), None):
            yield Finding(
                "far from the reference",
                f"the policy is far from the reference: {distances[far]:.2g} nats a token in {far} answers of the data",
                "Raise beta, lower learning_rate, or stop earlier; samples.jsonl shows whether it still writes sensible answers",
            )

    def _overfitting(self) -> Finding | None:
        """Checks that the validation loss does not stay above its lowest."""
        losses = [look["loss"] for look in self.looks if "loss" in look]
        if len(losses) < 3 or not min(losses[-2:]) > OVERFITS[self.kind] * min(losses):
            return None
        return Finding(
            "validation rises",
            f"the validation loss has risen since its lowest, {min(losses):.4g}, to {losses[-1]:.4g}",
            "The model begins to memorize the training data: take the checkpoint that checkpoints/best names, fewer epochs, or more data",
        )

    def _opposite(self, metrics: dict[str, float]) -> Finding | None:
        """Checks that what is learnt from training pairs is not wrong for validation pairs."""
        if "rewards/margins" not in metrics or not self.last or self._now("rewards/accuracies") < LEARNT:
            return None
        if metrics["rewards/accuracies"] >= 1 - LEARNT or metrics["rewards/margins"] >= 0:
            return None
        return Finding(
            "swapped",
            f"what the model learns from training pairs (accuracy {self._now('rewards/accuracies'):.2f}) is wrong for validation pairs "
            f"(accuracy {metrics['rewards/accuracies']:.2f}): are chosen and rejected swapped in one of them?",
            "Look at both with data_prep/preview.py",
        )

    def _longer_answers(self) -> Finding | None:
        """Checks that DPO does not make the answers to the fixed prompts much longer."""
        lengths = [look["sample_tokens"] for look in self.looks if "sample_tokens" in look]
        if len(lengths) < 2 or self.kind == "sft" or lengths[-1] < max(LONGER * lengths[0], lengths[0] + 10):
            return None
        return Finding(
            "answers grow longer",
            f"answers to the fixed prompts grow longer: {lengths[0]:.0f} tokens before, {lengths[-1]:.0f} now",
            "Preference data often prefers length: ld_alpha below 1, loss sigmoid_norm or simpo, or pairs of similar length",
        )
