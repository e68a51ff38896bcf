"""The same numbers as code that nobody here wrote: transformers' `labels=`, TRL's trainers, torch's cross_entropy.

First step: loss and gradient to 1e-5. Five steps of AdamW with clipping, our real command on two ranks against TRL's trainer in this
process: losses, gradient norms and final weights to 1e-4. Where TRL differs from the literature, a test says so for its version.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trl
from conftest import launch, metrics
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM

from posttrain.data import batches
from posttrain.data.prepared import load_prepared
from posttrain.model.policy import Policy, fastest_policy
from posttrain.objectives.likelihood import SFT
from posttrain.objectives.losses import LOSSES, PairLogps
from posttrain.objectives.preference import DPO
from posttrain.operators.attention_segments import SEGMENTS
from posttrain.recipes.keys import DPORecipe
from posttrain.recipes.reading import build_recipe

BATCH, STEPS, SEED, RATE, CLIP = 8, 5, 1337, 1e-3, 0.5
TRL_NAMES = {name: name for name in LOSSES if name not in ("ipo_sum", "simpo", "orpo")} | {"ipo_mean": "ipo"}
SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3}


def load(folder: str, shaken: float = 0.0):
    """The model at `folder`, its weights shaken a little, so that policy and reference are not the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shaken * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def in_order(trainer: type) -> type:
    """The trainer without shuffling and, in DPO, without tokenization: the rows hold token ids."""

    class InOrder(trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *arguments, **others):
            return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *arguments, **others)

    return InOrder


def trl_arguments(config: type, folder, **others):
    clock = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED}
    optimizer = {"learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": CLIP}
    optimizer |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "optim": "adamw_torch"}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_length": None}
    size = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    return config(output_dir=str(folder), **clock, **optimizer, **plain, **size, **others)


def planned(split, *columns: str) -> Dataset:
    """The rows of the plan's first steps, in its order."""
    rows = [split[int(i)] for step in range(1, STEPS + 1) for i in batches.step_examples(len(split), BATCH, SEED, step)]
    return Dataset.from_list([{new: row[old] for old, new in (column.split("=") for column in columns)} for row in rows])


def sft_trainer(tiny, folder, model):
    rows = planned(load_prepared(tiny.sft, "sft", "").train, "input_ids=input_ids", "labels=labels")
    arguments = trl_arguments(trl.SFTConfig, folder)
    return in_order(trl.SFTTrainer)(model=model, args=arguments, train_dataset=rows, processing_class=tiny.tokenizer)


def dpo_trainer(tiny, folder, model, reference, **options):
    columns = ("prompt=prompt_ids", "chosen=chosen_ids", "rejected=rejected_ids")
    rows = planned(load_prepared(tiny.dpo, "dpo", "").train, *columns)
    arguments = trl_arguments(trl.DPOConfig, folder, **options)
    trainer = in_order(trl.DPOTrainer)
    return trainer(model=model, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tiny.tokenizer)


def first_batch(trainer) -> dict:
    """The first optimizer step's rows as one padded batch."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])


def ours(objective, split) -> tuple[float, torch.Tensor]:
    """Loss of the plan's first step in two micro-batches, and its gradient by name in `objective.policy`."""
    indices = batches.step_examples(len(split), BATCH, SEED, 1)
    totals, loss = objective.totals(split, indices), 0.0
    for part in (indices[:3], indices[3:]):
        share, _ = objective.loss(split.micro_batch(part), totals)
        share.backward()
        loss += share.item()
    return loss, gradients(objective.policy.model)


def policy_and_reference(tiny) -> list[Policy]:
    return [fastest_policy(load(tiny.base, shaken=shaken), SEGMENTS) for shaken in (0.01, 0.0)]


def dpo_recipe(**options) -> DPORecipe:
    values = {"sft_checkpoint_path": "m", "dpo_data_dir": "d", "out_dir": "r", "max_iters": 1, "global_batch_size": BATCH}
    return build_recipe(DPORecipe, values | options, {})


def assert_same(mine: tuple, theirs: tuple) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
    assert mine[1].keys() == theirs[1].keys()
    scale = max(gradient.abs().max().item() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, scale), msg=lambda text, n=name: f"{n}: {text}")


def test_sft_equals_transformers_and_cross_entropy_on_a_padded_batch(tiny, tmp_path):
    plain = load(tiny.base)
    batch = first_batch(sft_trainer(tiny, tmp_path, plain))
    outputs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    outputs.loss.backward()
    mine = ours(SFT(fastest_policy(load(tiny.base), SEGMENTS)), load_prepared(tiny.sft, "sft", "").train)
    assert_same(mine, (outputs.loss.item(), gradients(plain)))
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert mine[0] == pytest.approx(expected.item(), rel=1e-5)


def test_sft_equals_trl(tiny, tmp_path):
    model = load(tiny.base)
    trainer = sft_trainer(tiny, tmp_path, model)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    mine = ours(SFT(fastest_policy(load(tiny.base), SEGMENTS)), load_prepared(tiny.sft, "sft", "").train)
    assert_same(mine, (loss.item(), gradients(model)))


CASES = [*((name, {}) for name in TRL_NAMES), ("sigmoid", {"share_prompt": False}), ("sigmoid", {"ld_alpha": 0.3})]
CASES += [("apo_zero", {"ld_alpha": 0.0, "share_prompt": False}), ("hinge", {"chosen_nll_weight": 0.7})]


def named(position: int, loss: str, options: dict):
    """A case under a name that other cases do not move."""
    name = "-".join([loss, *(f"{option}={value}" for option, value in options.items())])
    return pytest.param(loss, options, id=name, marks=pytest.mark.slow if position else ())


@pytest.mark.parametrize(("loss", "options"), [named(i, *case) for i, case in enumerate(CASES)])
def test_a_dpo_loss_equals_trl(tiny, tmp_path, loss, options):
    model, beta = load(tiny.base, shaken=0.01), 0.3
    options = options | ({"label_smoothing": SMOOTHED[loss]} if loss in SMOOTHED else {})
    theirs = {name: value for name, value in options.items() if name in ("label_smoothing", "ld_alpha")} | {"loss_type": [TRL_NAMES[loss]]}
    if nll := options.get("chosen_nll_weight"):
        theirs = {"loss_type": [TRL_NAMES[loss], "sft"], "loss_weights": [1.0, nll]}
    trainer = dpo_trainer(tiny, tmp_path, model, load(tiny.base), beta=beta, **theirs)
    value = trainer.compute_loss(model, first_batch(trainer))
    value.backward()
    recipe = dpo_recipe(loss=loss, beta=beta, **options)
    split = load_prepared(tiny.dpo, "dpo", "", recipe.share_prompt).train
    objective = DPO(*policy_and_reference(tiny), **recipe.objective)
    mine = ours(objective, split)
    assert_same(mine, (value.item(), gradients(model)))

    indices = batches.step_examples(len(split), BATCH, SEED, 1)
    totals = objective.totals(split, indices)
    sums = objective.loss(split.micro_batch(indices), totals)[1]
    measured = objective.metrics({name: value.item() for name, value in sums.items()}, totals)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert measured[name] == pytest.approx(trainer._metrics["eval"][name][-1], rel=1e-4, abs=1e-5), name


def test_trl_1_16_ignores_label_smoothing_in_its_sigmoid_loss(tiny, tmp_path):
    """TRL takes the option and does nothing with it; the literature's conservative DPO (ericmitchell.ai/cdpo.pdf) and ours do not."""
    assert trl.__version__ == "1.16.0", "look whether TRL honours label_smoothing again"
    model = load(tiny.base, shaken=0.01)
    values = {}
    for smoothing in (0.0, 0.2):
        trainer = dpo_trainer(tiny, tmp_path, model, load(tiny.base), beta=0.3, label_smoothing=smoothing)
        objective = DPO(*policy_and_reference(tiny), **dpo_recipe(beta=0.3, label_smoothing=smoothing).objective)
        mine, _ = ours(objective, load_prepared(tiny.dpo, "dpo", "").train)
        values[smoothing] = trainer.compute_loss(model, first_batch(trainer)).item(), mine
    assert values[0.2][0] == values[0.0][0] == pytest.approx(values[0.0][1], rel=1e-5)
    assert values[0.2][1] != pytest.approx(values[0.0][1], rel=1e-3)


def test_trl_1_16_averages_ipo_over_tokens(tiny, tmp_path):
    """Eq. 17 of the paper has sequence log-probs, which are sums: ipo_sum. TRL's ipo is our ipo_mean; the name ipo alone is refused."""
    model = load(tiny.base, shaken=0.01)
    trainer = dpo_trainer(tiny, tmp_path, model, load(tiny.base), beta=0.3, loss_type=["ipo"])
    theirs = trainer.compute_loss(model, first_batch(trainer)).item()
    split = load_prepared(tiny.dpo, "dpo", "").train
    for name in ("ipo_sum", "ipo_mean"):
        mine, _ = ours(DPO(*policy_and_reference(tiny), **dpo_recipe(loss=name, beta=0.3).objective), split)
        assert (mine == pytest.approx(theirs, rel=1e-5)) == (name == "ipo_mean")
    with pytest.raises(ValueError, match=r"ipo_sum .* ipo_mean"):
        dpo_recipe(loss="ipo")


def test_simpo_and_orpo_equal_trls_functions():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    logps = PairLogps(torch.tensor([-4.0, -30.0]), torch.tensor([-8.0, -2.0]))
    lengths = PairLogps(torch.tensor([4.0, 10.0]), torch.tensor([8.0, 2.0]))
    means = [logp / n for logp, n in zip(logps, lengths, strict=True)]
    here = SimpleNamespace(device="cpu")
    settings = SimpleNamespace(alpha=0.0, accelerator=here, loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0)
    options = {"beta": 2.0, "simpo_gamma": 0.7}
    torch.testing.assert_close(LOSSES["simpo"](logps, None, lengths, options), CPOTrainer.cpo_loss(settings, *means)[0])
    ratio = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=here), *means)[0]
    torch.testing.assert_close(LOSSES["orpo"](logps, None, lengths, {"beta": 0.3}), -means[0] - ratio)


def same_five_steps(tiny, run, trainer, names: list[str]) -> None:
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    mine = metrics(run)
    assert len(history) == len(mine) == STEPS
    for theirs, here in zip(history, mine, strict=True):
        for name in ("loss", "grad_norm", *names):
            assert here[name] == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-4), (name, here["step"])
    weights = load(str(run / "final")).state_dict()
    for name, theirs in trainer.model.state_dict().items():
        torch.testing.assert_close(weights[name], theirs, rtol=0, atol=1e-4)
    start = load(tiny.base).state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in start) > 3e-3  # they have moved


def our_run(script: str, tiny, out, *paths: str) -> None:
    clock = [f"--max_iters={STEPS}", f"--global_batch_size={BATCH}", f"--learning_rate={RATE}", "--min_lr=0", "--warmup_iters=0"]
    plain = [
        "--decay_lr=False",
        f"--grad_clip={CLIP}",
        "--dtype=float32",
        "--eval_interval=0",
        "--max_tokens_per_gpu=80",
    ]  # several micro-batches
    done = launch(script, *paths, f"--out_dir={out}", *clock, *plain, "--ds_config=ds_configs/zero2.json")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_five_steps_of_sft_on_two_ranks_equal_trls_trainer(tiny, tmp_path):
    our_run("posttrain/sft.py", tiny, tmp_path / "run", f"--checkpoint_path={tiny.base}", f"--sft_data_dir={tiny.sft}")
    trainer = sft_trainer(tiny, tmp_path / "trl", load(tiny.base))
    same_five_steps(tiny, tmp_path / "run", trainer, [])


@pytest.mark.slow
def test_five_steps_of_dpo_on_two_ranks_equal_trls_trainer(tiny, tmp_path):
    our_run("posttrain/dpo.py", tiny, tmp_path / "run", f"--sft_checkpoint_path={tiny.base}", f"--dpo_data_dir={tiny.dpo}", "--beta=0.3")
    trainer = dpo_trainer(tiny, tmp_path / "trl", load(tiny.base), load(tiny.base), beta=0.3)
    same_five_steps(tiny, tmp_path / "run", trainer, ["rewards/chosen", "rewards/margins", "logps/rejected"])
