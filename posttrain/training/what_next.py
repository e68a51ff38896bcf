"""Tells what can be done with a finished run, as commands to copy."""

from torch import distributed as dist

from posttrain.common.places import command
from posttrain.parallel.launched import read_launch
from posttrain.run.directory import Run


def tell_what_next(run: Run, template: str) -> None:
    """Print, after a run's end, how to talk to its model, to measure it, to see the run, and after SFT how to go on with DPO.

    `template` is the chat format of the run's data, which that of DPO must have as well.
    """
    ranks, ranks_here = dist.get_world_size(), read_launch().local_size
    commands = {
        "chat": command("serve", "--checkpoint", run.path),
        "measure": command("eval", "--checkpoint", run.path, "--benchmark", "arc_easy"),
        "report": command("report", run.path),
    }
    if run.recipe.kind == "sft":
        form = [] if template == "chatml" else ["--template", template]
        commands["pairs"] = command(
            "prepare-dpo", "--dataset", "PAIRS.jsonl", "--tokenizer", run.final, *form, "--output_dir", "data/pairs"
        )
        words = [f"--sft_checkpoint_path={run.final}", "--dpo_data_dir=data/pairs", f"--out_dir={run.path}_dpo"]
        commands["DPO"] = command("dpo", *words, ranks=ranks_here, several_hosts=ranks > ranks_here)
    run.say("what next\n" + "\n".join(f"  {what:9}{line}" for what, line in commands.items()))
