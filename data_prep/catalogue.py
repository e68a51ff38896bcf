"""The datasets of the hub that have a short name here: where they lie, how large they are, and what is taken of them."""

from typing import NamedTuple

CARD = "see its card"
WIDE = 170  # columns of a terminal in which a dataset has one line


class Hub(NamedTuple):
    """A dataset of the hub."""

    name: str
    train: str  # the split that is trained on, in the words of the datasets library; all for all of them
    validation: str | None = None  # a split that the upstream holds out
    config: str | None = None
    folder: str | None = None  # the part of it that is taken, where that is no config
    rows: str = "millions"  # for training, about
    licence: str = CARD
    takes: str = ""  # columns that are read


SFT_HUB = {
    "alpaca": Hub("tatsu-lab/alpaca", "train", rows="52k", licence="cc-by-nc-4.0", takes="instruction, input; output"),
    "alpaca_cleaned": Hub("yahma/alpaca-cleaned", "train", rows="52k", licence="cc-by-4.0", takes="instruction, input; output"),
    "dolly": Hub("databricks/databricks-dolly-15k", "train", rows="15k", licence="cc-by-sa-3.0", takes="instruction, context; response"),
    "ultrachat": Hub("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft", rows="208k", licence="mit", takes="messages"),
    "slimorca": Hub("Open-Orca/SlimOrca", "train", rows="518k", licence="mit", takes="conversations"),
    "oasst1": Hub("OpenAssistant/oasst1", "train", "validation", rows="84k", licence="apache-2.0", takes="of each tree the best path"),
    "openhermes": Hub("teknium/OpenHermes-2.5", "train", rows="1.0M", takes="conversations"),
    "openorca": Hub("Open-Orca/OpenOrca", "train", licence="mit", takes="system_prompt, question; response"),
    "orca_math": Hub("microsoft/orca-math-word-problems-200k", "train", rows="200k", licence="mit", takes="question; answer"),
    "metamath": Hub("meta-math/MetaMathQA", "train", rows="395k", licence="mit", takes="query; response"),
    "no_robots": Hub("HuggingFaceH4/no_robots", "train", "test", rows="9.5k", licence="cc-by-nc-4.0", takes="messages"),
    "wildchat": Hub("allenai/WildChat-1M", "train", rows="838k", licence="odc-by", takes="conversation"),
    "lmsys_chat": Hub("lmsys/lmsys-chat-1m", "train", rows="1.0M", licence="its own, to be agreed to", takes="conversation"),
    "tulu3": Hub("allenai/tulu-3-sft-mixture", "train", rows="939k", licence="odc-by; parts differ", takes="messages"),
    "smoltalk": Hub("HuggingFaceTB/smoltalk", "train", "test", "all", rows="1.0M", licence="apache-2.0; parts differ", takes="messages"),
    "smoltalk2": Hub("HuggingFaceTB/smoltalk2", "all", config="SFT", takes="messages, chat_template_kwargs"),
    "aya": Hub("CohereForAI/aya_dataset", "train", "test", "default", rows="202k", licence="apache-2.0", takes="inputs; targets"),
    "medical_o1": Hub(
        "FreedomIntelligence/medical-o1-reasoning-SFT",
        "train",
        config="en",
        rows="20k",
        licence="apache-2.0",
        takes="Question; Complex_CoT, Response",
    ),
    "openthoughts": Hub(
        "open-thoughts/OpenThoughts-114k", "train", config="default", rows="114k", licence="apache-2.0", takes="system, conversations"
    ),
    "glaive": Hub("glaiveai/glaive-function-calling-v2", "train", rows="113k", licence="apache-2.0", takes="system, chat"),
    "xlam": Hub(
        "Salesforce/xlam-function-calling-60k", "train", rows="60k", licence="cc-by-4.0, to be agreed to", takes="tools, query; answers"
    ),
}
DPO_HUB = {
    "ultrafeedback": Hub(
        "argilla/ultrafeedback-binarized-preferences-cleaned", "train", rows="61k", licence="mit", takes="prompt; chosen, rejected"
    ),
    "hh_rlhf": Hub("Anthropic/hh-rlhf", "train", "test", rows="161k", licence="mit", takes="chosen, rejected"),
    "orca_dpo": Hub("Intel/orca_dpo_pairs", "train", rows="13k", licence="apache-2.0", takes="system, question; chosen, rejected"),
    "distilabel_capybara": Hub(
        "argilla/distilabel-capybara-dpo-7k-binarized", "train", rows="7.6k", licence="apache-2.0", takes="chosen, rejected"
    ),
    "ultrafeedback_original": Hub(
        "openbmb/UltraFeedback", "train", rows="64k", licence="mit", takes="instruction; best and a worse answer"
    ),
    "h4_binarized": Hub(
        "HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs", rows="61k", licence="mit", takes="chosen, rejected"
    ),
    "helpsteer3": Hub(
        "nvidia/HelpSteer3", "train", "validation", "preference", rows="38k", licence="cc-by-4.0", takes="context; both responses, by votes"
    ),
    "shp": Hub("stanfordnlp/SHP", "train", "validation", rows="349k", takes="history; human_ref_A and _B, by labels"),
    "nectar": Hub("berkeley-nest/Nectar", "train", rows="183k", licence="apache-2.0", takes="prompt; best and a worse answer"),
    "orpo_mix": Hub("mlabonne/orpo-dpo-mix-40k", "train", rows="44k", licence="apache-2.0", takes="chosen, rejected"),
    "dpo_mix": Hub("argilla/dpo-mix-7k", "train", "test", rows="6.8k", licence="mit", takes="chosen, rejected"),
    "ultrainteract": Hub("openbmb/UltraInteract_pair", "train", rows="220k", licence="mit", takes="trajectory; chosen, rejected"),
    "tulu3_preferences": Hub(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture", "train", rows="273k", licence="odc-by; parts differ", takes="chosen, rejected"
    ),
    "stack_paired": Hub(
        "lvwerra/stack-exchange-paired", "train", folder="data/rl", licence="cc-by-sa-4.0", takes="question; response_j, response_k"
    ),
}
HUBS = {"sft": SFT_HUB, "dpo": DPO_HUB}


def show(kind: str) -> None:
    """Print the datasets of a kind, sft or dpo, as a table: a line for each where the terminal is wide, else two."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    wide = console.width >= WIDE
    names = ("on the hub", "rows", "licence", "what is taken") if wide else ("on the hub; rows, licence: what is taken",)
    table = Table("--dataset", *names, box=None, header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for short, hub in HUBS[kind].items():
        place = " ".join(filter(None, (hub.name, _parts(hub))))
        facts = (place, hub.rows, hub.licence, hub.takes)
        table.add_row(short, *(facts if wide else [f"{place}\n{hub.rows}, {hub.licence}: {hub.takes}"]))
    console.print(table)
    console.print(
        "Rows are those for training; the second of two splits is held out. Some must be agreed to on the hub, with HF_TOKEN set."
    )


def _parts(hub: Hub) -> str:
    """Return in brackets what of a dataset is taken, where that is not its split train alone."""
    splits = f"{hub.train} + {hub.validation}" if hub.validation else f"{hub.train} splits" if hub.train != "train" else ""
    parts = ", ".join(filter(None, (hub.config and f"config {hub.config}", hub.folder, splits)))
    return f"({parts})" if parts else ""
